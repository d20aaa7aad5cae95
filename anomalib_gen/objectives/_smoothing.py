"""Gaussian noise on rows, shared by the objectives that fit the density of smoothed rows."""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._runtime import normal_like


def noise_width(model: Any, x: torch.Tensor, data_noise: float) -> torch.Tensor:
    """Deviation of the noise on each column, which broadcasts over ``(B, *E)``.

    A model with a `grain` (dequantisation, the width of each column's grid) has it added in quadrature.
    """
    grain = getattr(model, "grain", None)
    if grain is None:
        return x.new_tensor(data_noise)
    return (grain.to(x).square() + data_noise**2).sqrt()


def smooth(model: Any, x: torch.Tensor, data_noise: float, generator: torch.Generator) -> torch.Tensor:
    """Rows with noise of `noise_width`, ``(B, *E)``."""
    if data_noise == 0 and getattr(model, "grain", None) is None:
        return x
    return x + noise_width(model, x, data_noise) * normal_like(x, generator)


def some_rows(rows: Any, limit: int, generator: torch.Generator) -> torch.Tensor:
    """At most `limit` rows at random, ``(n, *E)``, of `rows` as training sees them."""
    index = torch.randperm(len(rows), generator=generator, device=generator.device)[:limit]
    return rows.take(index.cpu())
