"""What the anomalies of diffusion models share: a ladder of noise levels, noise for all rows, deterministic steps."""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._runtime import check_count, normal_noise

DATA_LEVELS = (0.02, 5.0)
"""Noise levels that say something about standardised rows.

Noise of a fiftieth of a column's deviation blurs nothing but its rounding, and what a network removes there is its own
error. Under noise of five deviations a row is one part signal in 26, and all that is left of the data is their mean.
Which part in between tells anomalies apart differs from table to table, so all of it is used. The ends of a path are
chosen for sampling, not for this: EDM's range is 0.002 to 80.
"""


def level_ladder(model: Any, noise_levels: tuple[float, float], n_levels: int) -> list[float]:
    """Rising levels in geometric progression over what `noise_levels` has in common with ``model.noise_levels``.

    Where they have nothing in common, it is the model's level that is nearest. A single level is the smallest.
    """
    check_count(n_levels, "n_levels")
    if not (
        isinstance(noise_levels, tuple | list)
        and len(noise_levels) == 2
        and noise_levels[0] <= noise_levels[1]
    ):
        raise ValueError(f"noise_levels must be two numbers, the smaller one first, got {noise_levels!r}.")
    (first, last), (smallest, largest) = noise_levels, model.noise_levels
    low, high = min(max(first, smallest), largest), max(min(last, largest), smallest)
    return [low * (high / low) ** (k / max(1, n_levels - 1)) for k in range(n_levels)]


def balanced_noise(x: torch.Tensor, n_draws: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Draws of noise, each of the event's shape ``E`` and the same for all rows of `x`, in pairs e and -e."""
    check_count(n_draws, "n_draws")
    draws: list[torch.Tensor] = []
    while len(draws) < n_draws:
        e = normal_noise(tuple(x.shape[1:]), x, generator)
        draws += [e, -e]
    return draws[:n_draws]


def denoise_at(model: Any, x: torch.Tensor, level: float) -> torch.Tensor:
    """Clean rows behind rows `x` ``(B, *E)`` that all have noise of one level."""
    clean: torch.Tensor = model.denoise(x, x.new_full((len(x),), level))
    return clean


def deterministic_step(x: torch.Tensor, clean: torch.Tensor, level: float, next_level: float) -> torch.Tensor:
    """Rows `x` at a level, taken to the next along the noise that their `clean` rows leave.

    In rows that are not scaled this is the step of DDIM (Song et al. 2021, arXiv:2010.02502), on whichever path, and
    Euler's for the probability-flow equation ``dx / ds = (x - D(x, s)) / s``.
    """
    return clean + (next_level / level) * (x - clean)


def way_back(model: Any, x: torch.Tensor, level: float, lowest: float, n_steps: int) -> torch.Tensor:
    """Clean rows at the end of deterministic steps from rows `x` ``(B, *E)`` at a level.

    Levels fall geometrically, in `n_steps` evaluations of the denoiser, and would pass `lowest` were they to go on; the
    last step leads to level zero. From `lowest` itself there is that step alone.
    """
    n_steps = n_steps if lowest < level else 1
    steps = [level * (lowest / level) ** (j / n_steps) for j in range(n_steps)]
    for here, there in zip(steps, [*steps[1:], 0.0], strict=True):
        x = deterministic_step(x, denoise_at(model, x, here), here, there)
    return x
