r"""What is usual among a few numbers per row, learned from normal rows: for anomalies that see a row as a vector z.

Vectors are standardised by the mean and the deviation of each number over the normal rows. Then one of

    "mahalanobis":       sqrt((z - m)^T C^-1 (z - m)),                                                       (1)
    "gaussian-mixture":  -log sum_k w_k N(z; m_k, C_k),                                                      (2)
    "neighbors":         the mean distance to the nearest of the normal rows' vectors,                       (3)

is the anomaly. Covariances are shrunk towards a multiple of I (Chen et al. 2010, arXiv:0907.4698, equation 23; with
the effective number of rows where they are weighted), as there may be few rows, and numbers that say nearly the same.
(2) is fitted by expectation-maximisation (Dempster et al. 1977) from centres that are drawn one after the other with
odds of their squared distance to the nearest one (Arthur and Vassilvitskii 2007), so that it depends on the generator
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

DENSITIES = ("gaussian-mixture", "mahalanobis", "neighbors")
MAX_REFERENCE_ROWS = 16_384
"""Rows kept to be neighbours; of more, every second, fourth, ... row."""
ROWS_PER_CHUNK = 1024
"""Reference rows compared at once."""
MIN_DEVIATION = 1e-3
"""Floor under deviations, in those of the number in question: what is constant among normal rows must not divide."""
MAX_EM_STEPS, EM_TOLERANCE = 200, 1e-6
ROWS_PER_PARAMETER = 2
"""A component of (2) has at least this many rows for each number of a vector, or there are fewer components."""


@dataclass(frozen=True)
class Standard:
    """Centre and unit of each number, ``(K,)`` each."""

    shift: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor) -> Self:
        """Mean and deviation over rows ``(n, K)``; the unit of a number that is constant is one."""
        shift, scale = features.mean(0), features.std(0, correction=0)
        constant = scale <= 1e-12 * shift.abs()
        return cls(shift, torch.where(constant, 1.0, scale))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised vectors ``(B, K)``."""
        return (features - self.shift.to(features)) / self.scale.to(features)


@dataclass(frozen=True)
class Gaussians:
    """Mixture of normals: log-weights ``(M,)``, means ``(M, K)`` and lower factors of covariances ``(M, K, K)``."""

    log_weights: torch.Tensor
    means: torch.Tensor
    factors: torch.Tensor

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances ``(B, M)``."""
        difference = (z.unsqueeze(0) - self.means.to(z).unsqueeze(1)).mT
        u = torch.linalg.solve_triangular(self.factors.to(z), difference, upper=False)
        return u.square().sum(1).T

    def log_joint(self, z: torch.Tensor) -> torch.Tensor:
        """Log of weight times density, ``(B, M)``."""
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.log_weights - log_det - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return constant.to(z) - 0.5 * self.distances(z)


@dataclass(frozen=True)
class FeatureDensity:
    """Anomaly of vectors ``(B, K)`` by equation 1, 2 or 3, whichever of the two parts is there.

    Attributes
    ----------
    name : str
    standard : Standard
    gaussians : Gaussians or None
    rows : Tensor of shape (n, K) or None
        Standardised vectors of normal rows.
    n_neighbors : int
    """

    name: str
    standard: Standard
    gaussians: Gaussians | None = None
    rows: torch.Tensor | None = None
    n_neighbors: int = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Anomaly ``(B,)``."""
        z = self.standard(features)
        if self.gaussians is None:
            assert self.rows is not None
            return nearest_square_distances(z, self.rows, self.n_neighbors).sqrt().mean(1)
        if self.name == "mahalanobis":
            return self.gaussians.distances(z).squeeze(1).sqrt()
        return -self.gaussians.log_joint(z).logsumexp(1)


def check_density(name: str, argument: str, *, others: Sequence[str] = ()) -> None:
    """Refuse an unknown name, the value of `argument`, which may have `others` beside the densities."""
    if name not in DENSITIES:
        known = ", ".join(map(repr, [*others, *DENSITIES]))
        raise ValueError(f"{argument}={name!r} is unknown. Known: {known}.")


def fit_density(
    name: str, features: torch.Tensor, generator: torch.Generator, *, n_components: int, n_neighbors: int
) -> FeatureDensity:
    """Learn what is usual from vectors of normal rows.

    Parameters
    ----------
    name : {"gaussian-mixture", "mahalanobis", "neighbors"}
    features : Tensor of shape (n, K)
    generator : torch.Generator
        Draws the mixture's first centres.
    n_components : int
        Of the mixture, at most.
    n_neighbors : int

    Returns
    -------
    FeatureDensity
        On the CPU, so that what is pickled on a machine with a GPU opens on any.
    """
    if n_components < 1 or n_neighbors < 1:
        raise ValueError(
            f"n_components and n_neighbors must be at least 1, got {n_components!r} and {n_neighbors!r}."
        )
    features = features.cpu()
    standard = Standard.fit(features)
    z = standard(features)
    if name == "neighbors":
        return FeatureDensity(name, standard, rows=z, n_neighbors=n_neighbors)
    if name == "mahalanobis":
        n_components = 1
    return FeatureDensity(name, standard, gaussians=fit_gaussians(z, n_components, generator))


def shrunk_covariance(z: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``(K,)`` and shrunk covariance ``(K, K)`` of rows ``(n, K)`` with weights ``(n,)``."""
    features, mass = z.shape[1], weights.sum()
    mean = weights @ z / mass
    centred = z - mean
    covariance = (weights.unsqueeze(1) * centred).T @ centred / mass
    n = mass.square() / weights.square().sum()
    trace, square = covariance.trace(), covariance.square().sum()
    up = (1 - 2 / features) * square + trace.square()
    down = (n + 1 - 2 / features) * (square - trace.square() / features)
    share = torch.where(down > 0, (up / down).clamp(0, 1), 1.0)
    identity = torch.eye(features).to(z)
    target = trace / features * identity
    return mean, (1 - share) * covariance + share * target + MIN_DEVIATION**2 * identity


def fit_gaussians(z: torch.Tensor, n_components: int, generator: torch.Generator) -> Gaussians:
    """Mixture of at most `n_components` normals for standardised rows ``(n, K)``."""
    n, features = z.shape
    n_components = max(1, min(n_components, n // (ROWS_PER_PARAMETER * features)))
    centres = first_centres(z, n_components, generator)
    nearest = torch.cdist(z, centres).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, n_components).to(z)
    before = -math.inf
    for _ in range(MAX_EM_STEPS):
        gaussians = _maximize(z, shares)
        log_joint = gaussians.log_joint(z)
        shares = log_joint.softmax(1)
        now = float(log_joint.logsumexp(1).mean())
        # One component has nothing to share. (Shrinkage may cost a little likelihood, hence the size of the change.)
        if n_components == 1 or abs(now - before) < EM_TOLERANCE:
            break
        before = now
    return gaussians


def _maximize(z: torch.Tensor, shares: torch.Tensor) -> Gaussians:
    """Gaussians that fit rows ``(n, K)`` of which each component has a share ``(n, M)``."""
    # A component that lost its rows stays finite, with next to no weight.
    shares = shares + 1e-10
    parts = [shrunk_covariance(z, weights) for weights in shares.T]
    return Gaussians(
        shares.mean(0).log(),
        torch.stack([mean for mean, _ in parts]),
        torch.linalg.cholesky(torch.stack([covariance for _, covariance in parts])),
    )


def first_centres(z: torch.Tensor, n_centres: int, generator: torch.Generator) -> torch.Tensor:
    """Rows ``(n_centres, K)`` of z ``(n, K)``, far from one another."""
    odds = torch.ones(len(z), dtype=torch.float64, device=generator.device)
    chosen: list[int] = []
    for _ in range(n_centres):
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        distances = nearest_square_distances(z, z[chosen], 1).squeeze(1)
        # (Where all rows are a centre already, any will do.)
        odds = distances.to(odds) if bool((distances > 0).any()) else torch.ones_like(odds)
    return z[chosen]


def nearest_square_distances(x: torch.Tensor, rows: torch.Tensor, n_neighbors: int) -> torch.Tensor:
    """Squared distances ``(B, k)`` of each of x ``(B, D)`` to its nearest `rows` ``(n, D)``, rising; k at most n.

    Differences are taken number by number: rounding then depends on neither the other rows nor the distance from the
    origin. Memory is bounded by chunks of `rows`.
    """
    n_neighbors = min(n_neighbors, len(rows))
    best = x.new_empty((len(x), 0))
    for chunk in rows.split(ROWS_PER_CHUNK):
        distances = torch.cdist(x, chunk.to(x), compute_mode="donot_use_mm_for_euclid_dist")
        best = torch.cat([best, distances], 1)
        best = best.topk(min(n_neighbors, best.shape[1]), dim=1, largest=False).values
    return best.square()


def keep_rows(blocks: Iterable[torch.Tensor], limit: int = MAX_REFERENCE_ROWS) -> torch.Tensor:
    """Rows of all blocks ``(n, *E)``, evenly thinned to at most `limit`; no more than that and a block are held."""
    kept: list[torch.Tensor] = []
    stride, seen, held = 1, 0, 0
    for block in blocks:
        # Rows whose place in the whole is a multiple of the stride.
        part = block[(-seen) % stride :: stride].clone()
        seen += len(block)
        kept.append(part)
        held += len(part)
        while held > limit:
            stride *= 2
            kept = [torch.cat(kept)[::2]]
            held = len(kept[0])
    return torch.cat(kept)
