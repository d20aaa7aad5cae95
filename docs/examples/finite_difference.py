r"""An objective in one file: score matching by finite differences of the energy.

Sliced score matching asks for v^T (grad^2 log p) v + (v^T grad log p)^2 / 2 along a direction v. With a short v both
are differences of energies (Pang et al. 2020, arXiv:2007.03317, equation 9), so that no derivative by x is taken:

    L(x) = [ 2 E(x) - E(x + v) - E(x - v) + (E(x + v) - E(x - v))^2 / 8 ] D / |v|^2,         (1)

v uniform on the sphere of radius h in D dimensions. For a quadratic energy (1) is exact for every h.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like


class FiniteDifferenceScoreMatching(Component):
    """Finite-difference sliced score matching (equation 1), for models with an energy.

    Parameters
    ----------
    data_noise : float, default=0.1
        Deviation of the noise on the data, in standard deviations of each column: rows on a sheet or on a grid would
        ask for an infinitely steep energy.
    step : float, default=0.1
        h.

    References
    ----------
    Pang, T., Xu, K., Li, C., Song, Y., Ermon, S., Zhu, J. (2020). Efficient learning of generative models via
    finite-difference score matching. NeurIPS. arXiv:2007.03317.
    """

    def __init__(self, *, data_noise: float = 0.1, step: float = 0.1) -> None:
        self.data_noise = data_noise
        self.step = step

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``; not reduced."""
        grain = getattr(
            model, "grain", None
        )  # the width of each column's grid, part of the noise where there is one
        width = self.data_noise if grain is None else (grain.square() + self.data_noise**2).sqrt()
        x = x + width * normal_like(x, generator)
        v = normal_like(x, generator)
        v = self.step * v / expand_as_rows(v.flatten(1).norm(dim=1), v)
        middle, ahead, behind = model.energy(torch.cat([x, x + v, x - v])).chunk(3)
        dimension = x[0].numel()
        return (2 * middle - ahead - behind + (ahead - behind).square() / 8) * dimension / self.step**2
