r"""Denoising score matching: the score of noised rows points back to the rows.

With x~ = x + s e, e ~ N(0, I), the score of x~ given x is -e / s, and

    E_{x, e} |s_theta(x~) + e / s|^2 / 2 = E_x~ |s_theta(x~) - grad log p_s(x~)|^2 / 2 + const,      (1)

so its minimum is the score of the data smoothed by noise of deviation s (Vincent 2011, equations 9 to 11). No second
derivatives are needed. Weighted by s^2 the loss of a row is

    |s s_theta(x~) + e|^2 / 2,                                                                       (2)

of the same size at all levels. For a model that is conditional on the level, levels are drawn log-uniformly over its
range (Song and Ermon 2019, section 4.2, with a continuum of levels and an energy in place of the score).

A noise e that is unlike on each column (the grain of columns on a grid) enters (2) column by column.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._levels import judged_draws
from anomalib_gen.objectives._scores import draw_levels, score_at
from anomalib_gen.objectives._smoothing import noise_width, smooth


class DenoisingScoreMatching(Component):
    """Denoising score matching (equation 2).

    Parameters
    ----------
    data_noise : float, default=0.1
        Standard deviation of the noise for a model that is not conditional on it, in standard deviations of the
        training data. A model with a `grain` has it added in quadrature.

    References
    ----------
    Vincent, P. (2011). A connection between score matching and denoising autoencoders. Neural Computation 23(7).
    doi:10.1162/NECO_a_00142.

    Song, Y., Ermon, S. (2019). Generative modeling by estimating gradients of the data distribution. NeurIPS.
    arXiv:1907.05600.
    """

    uses_noise_levels = True
    """It trains a model that is conditional on noise at all of its levels."""

    recordable = True

    def __init__(self, *, data_noise: float = 0.1) -> None:
        self.data_noise = data_noise

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, not_negative=["data_noise"])
        x, levels, width = self._noise(model, x, generator)
        return _loss(model, x, levels, width, normal_like(x, generator))

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: the same, over noise in pairs e and -e and over more draws.

        It is judged at the levels that are trained; `train` gives the same noise at every evaluation.
        """
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        draws = judged_draws(x)
        for _ in range(draws):
            clean, levels, width = self._noise(model, x, generator)
            e = normal_like(x, generator)
            total += _loss(model, clean, levels, width, e) + _loss(model, clean, levels, width, -e)
        return total / (2 * draws)

    def _noise(
        self, model: Any, x: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Rows to be noised, the level of each, and the noise's width."""
        levels = draw_levels(model, x, generator)
        if levels is None:
            return x, None, noise_width(model, x, self.data_noise)
        # What the model is conditional on is the level; the grain is part of the data.
        x = smooth(model, x, 0.0, generator)
        return x, levels, expand_as_rows(levels, x)


def _loss(
    model: Any, x: torch.Tensor, levels: torch.Tensor | None, width: torch.Tensor, e: torch.Tensor
) -> torch.Tensor:
    score = score_at(model, x + width * e, levels)
    return 0.5 * (width * score + e).square().flatten(1).sum(1)
