r"""How the objectives of diffusion models draw times and noise levels.

Row i of a batch of B takes the place

    u_i = (u + i / B) mod 1,     u uniform on [0, 1),                                                (1)

in the distribution of times: each u_i is uniform, so that the loss of every row is unbiased, and together they cover
the interval evenly. The mean over the batch then has less noise than with independent draws, at no cost (Kingma et
al. 2021, "Variational diffusion models", arXiv:2107.00630, which calls it a low-discrepancy sampler). The order of
the rows is random in training, so level and row are independent.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from anomalib_gen.objectives._smoothing import smooth
from anomalib_gen.paths import Path

JUDGED_ROWS = 512
"""Held-out rows are repeated with fresh noise up to about this number: few rows leave a rough judge."""
TIMES = ("log-normal", "log-uniform", "uniform")


def places(n: int, like: torch.Tensor, generator: torch.Generator, *, draws: int = 1) -> torch.Tensor:
    """Draw the places of equation 1, ``(draws * n,)``.

    With several draws, row i has those at i, n + i, 2 n + i, ...: spread evenly too.
    """
    offset = torch.rand((), generator=generator, dtype=like.dtype, device=like.device)
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    j = torch.arange(draws, dtype=like.dtype, device=like.device).unsqueeze(1)
    return (offset + ((i / n + j) / draws).flatten()) % 1.0


def uniform_times(path: Path, u: torch.Tensor) -> torch.Tensor:
    """Times at places `u` of the clock: even between its ends, or even over the steps of a discrete path."""
    if path.n_steps is not None:
        steps = path.grid().to(u)
        return steps[(u * len(steps)).long().clamp(max=len(steps) - 1)]
    low, high = path.time_range
    return low + (high - low) * u


def levels_at(path: Path, u: torch.Tensor, times: str, log_mean: float, log_std: float) -> torch.Tensor:
    """Noise levels ``(B,)`` at places `u` of a distribution over the path's range of levels.

    Parameters
    ----------
    path : Path
    u : Tensor of shape (B,)
    times : {"log-normal", "log-uniform", "uniform"}
    log_mean, log_std : float
        Of "log-normal".
    """
    if times == "uniform":
        return path.noise_level(uniform_times(path, u))
    low, high = path.noise_levels
    if times == "log-uniform":
        log_level = math.log(low) + math.log(high / low) * u
    elif times == "log-normal":
        if not 0 < log_std < math.inf:
            raise ValueError(f"log_std must be positive and finite, got {log_std!r}.")
        first, last = (_normal_cdf((math.log(end) - log_mean) / log_std) for end in (low, high))
        # Less than that is lost in the rounding of single precision, and all levels would be those of one end.
        if not last - first > 1e-6:
            raise ValueError(
                f"log_mean={log_mean!r} and log_std={log_std!r} leave nothing of the noise levels "
                f"{low:.3g} to {high:.3g} of {path!r}."
            )
        log_level = log_mean + log_std * math.sqrt(2) * torch.erfinv(2 * (first + (last - first) * u) - 1)
    else:
        known = ", ".join(map(repr, TIMES))
        raise ValueError(f"times={times!r} is unknown. Known: {known}.")
    return log_level.exp().clamp(low, high)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def data_model(model: Any) -> Any:
    """The part of a denoiser that knows of the data's `grain` and `spread`: behind a `ScoreDenoiser`, its model."""
    return getattr(model, "model", model)


def clean_rows(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows as the model has them, ``(B, *E)``: with the noise of the grain, which is part of the data."""
    return smooth(data_model(model), x, 0.0, generator)


def unseen(model: Any, x: torch.Tensor) -> Any:
    """Return the model as it is for noisy rows made of clean rows `x`: one with stored rows must not see these."""
    without = getattr(model, "without", None)
    return model if without is None else without(x)


def judged_draws(x: torch.Tensor) -> int:
    """How often held-out rows are repeated, each time with noise in a pair e and -e."""
    return max(1, min(8, JUDGED_ROWS // (2 * len(x))))
