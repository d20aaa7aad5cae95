"""Noise on rows, shared by the objectives that fit the density of smoothed rows.

Discrete rows, images of 8 bits, are spread over their cells by uniform noise first (Uria et al. 2013,
arXiv:1306.0186, section 4; Theis et al. 2016, arXiv:1511.01844, section 3.1): the density of what comes out, averaged
over a cell on the log scale, is at most the log-probability of that cell.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._runtime import normal_like


def dequantise(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows ``(B, *E)`` with uniform noise over cells of width ``model.cell``; as they are where there are none."""
    cell = float(getattr(model, "cell", 0.0))
    if cell == 0:
        return x
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return x + cell * (u - 0.5)


def noise_width(model: Any, x: torch.Tensor, data_noise: float) -> torch.Tensor:
    """Deviation of the noise on each column, which broadcasts over ``(B, *E)``.

    A model with a `grain` (dequantisation, the width of each column's grid) has it added in quadrature.
    """
    grain = getattr(model, "grain", None)
    if grain is None:
        return x.new_tensor(data_noise)
    return (grain.to(x).square() + data_noise**2).sqrt()


def smooth(model: Any, x: torch.Tensor, data_noise: float, generator: torch.Generator) -> torch.Tensor:
    """Rows with noise of `noise_width`, ``(B, *E)``; discrete ones with uniform noise in place of the grain."""
    if getattr(model, "cell", 0.0):
        x = dequantise(model, x, generator)
        return x if data_noise == 0 else x + data_noise * normal_like(x, generator)
    if data_noise == 0 and getattr(model, "grain", None) is None:
        return x
    return x + noise_width(model, x, data_noise) * normal_like(x, generator)


def some_rows(rows: Any, limit: int, generator: torch.Generator) -> torch.Tensor:
    """At most `limit` rows at random, ``(n, *E)``, of `rows` as training sees them.

    Where they have weights that differ, rows are drawn in proportion to these, and some more than once.
    """
    weights = getattr(rows, "weights", None)
    if weights is None or bool((weights == weights[0]).all()):
        index = torch.randperm(len(rows), generator=generator, device=generator.device)[:limit]
        return rows.take(index.cpu())
    mass = weights.double().cpu().cumsum(0)
    size = min(limit, len(rows))
    u = torch.rand(size, generator=generator, dtype=torch.float32, device=generator.device).cpu().double()
    return rows.take(torch.searchsorted(mass, u * mass[-1], right=True).clamp(max=len(rows) - 1))
