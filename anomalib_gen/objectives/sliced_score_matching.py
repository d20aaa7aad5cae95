r"""Sliced score matching: scores compared along random directions.

Projecting both scores on a random direction v with E[v v^T] = I and integrating by parts gives

    E_v E_x [ v^T (ds/dx) v + (v^T s)^2 / 2 ] + const,                                          (1)

one backward pass a direction, with the same minimum as score matching. As E_v (v^T s)^2 = |s|^2 is known, the form

    E_v E_x [ v^T (ds/dx) v + |s|^2 / 2 ] + const                                               (2)

has less variance (Song et al. 2019, equations 7 and 8). With (2) it is score matching with Hutchinson's trace.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._scores import noised_rows, random_directions, score_and_curvatures, weighted
from anomalib_gen.objectives.denoising_score_matching import DenoisingScoreMatching


class SlicedScoreMatching(Component):
    """Sliced score matching (equations 1 and 2).

    Parameters
    ----------
    data_noise : float, default=0.1
        Standard deviation of the noise for a model that is not conditional on it, in standard deviations of the
        training data. A model with a `grain` first gets noise of that width on each column.
    n_slices : int, default=1
        Directions for each row.
    probe : {"rademacher", "gaussian"}, default="rademacher"
        Their distribution.
    variance_reduced : bool, default=True
        Whether to take equation 2 instead of equation 1.

    References
    ----------
    Song, Y., Garg, S., Shi, J., Ermon, S. (2019). Sliced score matching: a scalable approach to density and score
    estimation. UAI. arXiv:1905.07088.
    """

    uses_noise_levels = True
    """It trains a model that is conditional on noise at all of its levels."""

    def __init__(
        self,
        *,
        data_noise: float = 0.1,
        n_slices: int = 1,
        probe: str = "rademacher",
        variance_reduced: bool = True,
    ) -> None:
        self.data_noise = data_noise
        self.n_slices = n_slices
        self.probe = probe
        self.variance_reduced = variance_reduced

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, counts=["n_slices"], not_negative=["data_noise"])
        x, levels = noised_rows(model, x, self.data_noise, generator)
        directions = random_directions(x, self.n_slices, self.probe, generator)
        score, curvatures = score_and_curvatures(model, x, levels, directions)
        if self.variance_reduced:
            square = score.square().flatten(1).sum(1)
        else:
            square = (directions * score).flatten(2).sum(2).square().mean(0)
        return weighted(curvatures.mean(0) + 0.5 * square, levels)

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: denoising score matching at the same noise.

        Its minimum is the same, the score of the smoothed density, and it varies far less. Without noise it says
        nothing, and the loss itself judges.
        """
        if self.data_noise == 0 and getattr(model, "noise_levels", None) is None:
            return self(model, x, generator)
        return DenoisingScoreMatching(data_noise=self.data_noise).validate(model, x, generator)
