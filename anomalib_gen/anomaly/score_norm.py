r"""Score norm: a row is as anomalous as the slope on which it lies,

    a(x) = |g(x)|,                     g = grad log p(x),   or                                       (1)
    a(x) = 1/K sum_k |g(x, s_k)|,      s_1 < ... < s_K geometric between the model's noise levels,   (2)

for a model that is conditional on noise. Normal rows lie near modes and ridges of the density, where the score is
small; the noised scores at larger s see further. Row and score are taken as they are, *without* noise on the row: what
noise adds to the norm is the same for every row and hides the rest.

s g(x, s) is the noise that a denoiser finds in the row. Taken in that unit, as with ``weighting="noise"``,

    a(x) = 1/K sum_k s_k |g(x, s_k)|,                                                                (3)

a row with noise of the level has the norm sqrt(D) at every level, and none counts for more than another. (2) weights
the noise found at level s by 1 / s: the smallest levels decide, at which a network has learned least.

Multiscale score matching (MSMA; Mahmood et al. 2021, arXiv:2010.13132) takes the norms as a vector,

    z(x) = (|g(x, s_1)|, ..., |g(x, s_K)|),                                                          (4)

learns what is usual among the vectors of normal rows, and scores by how unusual a row's is (_feature_density): by its
Mahalanobis distance, by a mixture of Gaussians, or by its nearest neighbours. A row is then odd on either side, also
where it has *less* slope than normal rows have, as at the mode of a density in many dimensions.

An energy is made for rows whose tails go on without end: beyond five standard deviations it has log-like tails, whose
slope falls again. There the slope is taken per unit of the compressed row t(x) (networks.tails),
dE/dt = (1 + |x| - 5) dE/dx, which rises along every ray where a model has no levels. With noise of level s tails begin
at 5 sqrt(1 + s^2), and the same factor makes a peak there: at s = 2 normal data have nearly twice the slope at 11.2
deviations that they have at 30. Rows that a denoiser sees have been compressed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.anomaly._feature_density import check_density, fit_density, keep_rows
from anomalib_gen.anomaly._levels import DATA_LEVELS, level_ladder
from anomalib_gen.networks import TAIL_START

WEIGHTINGS = ("score", "noise")


class ScoreNorm(Component):
    """Norm of the gradient of the log-density (equations 1 and 2), or how unusual its norms are (equation 4).

    It helps where anomalies lie on slopes, off the ridges of the density: on tables, where it was ahead of the energy
    itself after denoising score matching; and, with ``summary="mahalanobis"``, where images are darker, softer or
    noisier than normal ones (AUROC .73 to 1.00 on CIFAR-10, 1.00 on MNIST). It fails where they lie on ground as flat
    as normal ones do: images that show something else with strokes that the model knows have norms like normal images
    (AUROC of held-out digits .38 to .62, by energies and by diffusion networks), and simpler ones may have smaller
    norms (.08 and .50 on the digit 1).

    Parameters
    ----------
    n_levels : int, default=10
        Levels K of the ladder for a model that is conditional on noise.
    noise_levels : tuple of float, default=(0.02, 5.0)
        Range of the ladder, in standard deviations of the data; the part of it that the model knows is used. See
        `_levels.DATA_LEVELS` for the reason.
    weighting : {"score", "noise"}, default="score"
        Whether norms are those of the score (equation 2) or of the noise that it finds (equation 3). For a model
        without levels there is no difference.
    summary : {"sum", "mahalanobis", "gaussian-mixture", "neighbors"}, default="sum"
        What is made of the norms. "sum" is equation 2 and needs no other rows. The others compare (4) with the vectors
        of normal rows given to `prepare`; on tables they have been weaker than the sum.
    n_components : int, default=4
        Components of the "gaussian-mixture", at most; fewer where there are fewer than 2 K rows for each.
    n_neighbors : int, default=5
        Neighbours for "neighbors", whose mean distance counts.

    Attributes
    ----------
    density_ : FeatureDensity
        What `prepare` learned, unless `summary` is "sum".

    Raises
    ------
    ValueError
        When called, if `summary` or `weighting` is unknown.

    References
    ----------
    Mahmood, A., Oliva, J., Styner, M. (2021). Multiscale score matching for out-of-distribution detection. ICLR.
    arXiv:2010.13132.
    """

    in_nats = False

    def __init__(
        self,
        *,
        n_levels: int = 10,
        noise_levels: tuple[float, float] = DATA_LEVELS,
        weighting: str = "score",
        summary: str = "sum",
        n_components: int = 4,
        n_neighbors: int = 5,
    ) -> None:
        self.n_levels = n_levels
        self.noise_levels = noise_levels
        self.weighting = weighting
        self.summary = summary
        self.n_components = n_components
        self.n_neighbors = n_neighbors

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Learn what norms are usual from blocks of normal rows, each ``(B, *E)``."""
        if self.summary == "sum":
            return
        check_density(self.summary, "summary", others=["sum"])
        self.density_ = fit_density(
            self.summary,
            keep_rows(self.norms(model, x) for x in blocks),
            generator,
            n_components=self.n_components,
            n_neighbors=self.n_neighbors,
        )

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        if self.summary == "sum":
            return self.norms(model, x).mean(1)
        check_density(self.summary, "summary", others=["sum"])
        return self.density_(self.norms(model, x))

    def norms(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Norms of the score of rows ``(B, *E)`` along the ladder (equation 4), ``(B, K)``; K = 1 without levels."""
        if self.weighting not in WEIGHTINGS:
            known = ", ".join(map(repr, WEIGHTINGS))
            raise ValueError(f"weighting={self.weighting!r} is unknown. Known weightings: {known}.")
        # (A model with a denoiser is one for compressed rows.)
        stretch = 1.0 if hasattr(model, "denoise") else 1 + (x.abs() - TAIL_START).clamp(min=0)
        if getattr(model, "noise_levels", None) is None:
            return (stretch * model.score(x)).flatten(1).norm(dim=1, keepdim=True)
        norms = []
        for level in level_ladder(model, self.noise_levels, self.n_levels):
            score = model.score(x, x.new_full((len(x),), level))
            unit = level if self.weighting == "noise" else 1.0
            norms.append(unit * (stretch * score).flatten(1).norm(dim=1))
        return torch.stack(norms, 1)
