r"""Implicit score matching: fitting an unnormalised density without its constant.

The score s = grad log p does not contain log Z. Fitting it to the data's own,

    E_x |s(x) - grad log p_data(x)|^2 / 2 = E_x [ |s(x)|^2 / 2 + tr(ds/dx) ] + const,          (1)

needs no score of the data: the cross term is integrated by parts (Hyvarinen 2005, theorem 1). The trace takes one
backward pass a column. Hutchinson's estimate tr A = E[v^T A v], E[v v^T] = I, takes one a probe v (Hutchinson 1990,
doi:10.1080/03610919008812866); signs have the smallest variance, as the diagonal then enters without noise.

On a finite sample the minimum of (1) is a density of spikes on the rows, and data on a grid have no score at all. Rows
therefore get Gaussian noise: (1) then fits the smoothed density. A model that is conditional on noise levels s gets
each row at a level of its own, weighted by s^2.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._scores import noised_rows, random_directions, score_and_curvatures, weighted
from anomalib_gen.objectives.denoising_score_matching import DenoisingScoreMatching

EXACT_VALUES = 8
"""Values in a row up to which ``trace="auto"`` is exact."""


class ScoreMatching(Component):
    """Implicit score matching (equation 1).

    Parameters
    ----------
    data_noise : float, default=0.1
        Standard deviation of the noise for a model that is not conditional on it, in standard deviations of the
        training data. A model with a `grain` first gets noise of that width on each column.
    trace : {"auto", "exact", "hutchinson"}, default="auto"
        How the trace is taken. "auto" is exact for up to 8 columns.
    n_probes : int, default=1
        Probes of Hutchinson's estimate for each row.
    probe : {"rademacher", "gaussian"}, default="rademacher"
        Their distribution.

    References
    ----------
    Hyvarinen, A. (2005). Estimation of non-normalized statistical models by score matching. JMLR 6, 695-709.
    """

    uses_noise_levels = True
    """It trains a model that is conditional on noise at all of its levels."""

    def __init__(
        self, *, data_noise: float = 0.1, trace: str = "auto", n_probes: int = 1, probe: str = "rademacher"
    ) -> None:
        self.data_noise = data_noise
        self.trace = trace
        self.n_probes = n_probes
        self.probe = probe

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, counts=["n_probes"], not_negative=["data_noise"])
        x, levels = noised_rows(model, x, self.data_noise, generator)
        directions, factor = self._directions(x, generator)
        score, curvatures = score_and_curvatures(model, x, levels, directions)
        loss = 0.5 * score.square().flatten(1).sum(1) + factor * curvatures.sum(0)
        return weighted(loss, levels)

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: denoising score matching at the same noise.

        Its minimum is the same, the score of the smoothed density, and it varies far less. Without noise it says
        nothing, and the loss itself judges.
        """
        if self.data_noise == 0 and getattr(model, "noise_levels", None) is None:
            return self(model, x, generator)
        return DenoisingScoreMatching(data_noise=self.data_noise).validate(model, x, generator)

    def _directions(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        """Directions whose curvatures, summed and multiplied by the factor, are the trace or its estimate."""
        size = x[0].numel()
        if self.trace not in ("auto", "exact", "hutchinson"):
            raise ValueError(f"trace={self.trace!r} is unknown. Known: 'auto', 'exact', 'hutchinson'.")
        if self.trace == "exact" or (self.trace == "auto" and size <= EXACT_VALUES):
            unit = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
            return unit.expand(size, *x.shape), 1.0
        return random_directions(x, self.n_probes, self.probe, generator), 1 / self.n_probes
