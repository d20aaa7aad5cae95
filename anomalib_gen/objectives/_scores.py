"""What the score-matching objectives share: noised rows with their levels, and curvatures along directions."""

from __future__ import annotations

import math
from typing import Any

import torch

from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._smoothing import smooth


def draw_levels(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Noise level of each row ``(B,)``, log-uniform over the model's range; None if it is not conditional."""
    levels = getattr(model, "noise_levels", None)
    if levels is None:
        return None
    low, high = (math.log(level) for level in levels)
    return torch.exp(
        low + (high - low) * torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
    )


def noised_rows(
    model: Any, x: torch.Tensor, data_noise: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows with noise, and the level of each where the model is conditional on it (else the noise is `data_noise`)."""
    levels = draw_levels(model, x, generator)
    if levels is None:
        return smooth(model, x, data_noise, generator), None
    x = smooth(model, x, 0.0, generator)
    return x + expand_as_rows(levels, x) * normal_like(x, generator), levels


def score_at(model: Any, x: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    """Score ``(B, *E)`` at the levels ``(B,)``, or of an unconditional model."""
    score: torch.Tensor = model.score(x) if levels is None else model.score(x, levels)
    return score


def score_and_curvatures(
    model: Any, x: torch.Tensor, levels: torch.Tensor | None, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score s and its curvatures v^T (ds/dx) v along directions v, from one backward pass a direction.

    Parameters
    ----------
    model : Module
        With ``score(x[, levels]) -> (B, *E)``.
    x : Tensor of shape (B, *E)
    levels : Tensor of shape (B,), optional
    directions : Tensor of shape (K, B, *E)

    Returns
    -------
    score : Tensor of shape (B, *E)
    curvatures : Tensor of shape (K, B)
    """
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = score_at(model, x, levels)
        curvatures = []
        for v in directions:
            (product,) = torch.autograd.grad((score * v).sum(), x, create_graph=recording, retain_graph=True)
            curvatures.append((product * v).flatten(1).sum(1))
    stacked = torch.stack(curvatures)
    return (score, stacked) if recording else (score.detach(), stacked.detach())


def random_directions(x: torch.Tensor, n: int, probe: str, generator: torch.Generator) -> torch.Tensor:
    """Directions ``(n, B, *E)`` with E[v v^T] = I: signs ("rademacher") or normals ("gaussian")."""
    shape = (n, *x.shape)
    if probe == "gaussian":
        return torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
    if probe != "rademacher":
        raise ValueError(f"probe={probe!r} is unknown. Known probes: 'gaussian', 'rademacher'.")
    signs = torch.randint(0, 2, shape, generator=generator, device=x.device)
    return (2 * signs - 1).to(x)


def weighted(loss: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    """The loss ``(B,)`` times the squared level, which makes levels alike in size (Song and Ermon 2019)."""
    return loss if levels is None else levels.square() * loss
