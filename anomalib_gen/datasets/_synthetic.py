r"""Synthetic anomalies with known densities, so that the best possible detector is known too.

Normal rows come from a Gaussian mixture with full covariances,

.. math:: p_{in}(x) = \sum_k w_k N(x; \mu_k, \Sigma_k),

and anomalies from a density made of it, one for each type in ADBench (Han et al. 2022, Section 3.3):

==========  =======================================================  =======================================
kind        p_out                                                    what sets an anomaly apart
==========  =======================================================  =======================================
local       :math:`\sum_k w_k N(x; \mu_k, \alpha \Sigma_k)`          farther from its own cluster
global      uniform on a box, alpha times that of the normals        anywhere
dependency  :math:`\prod_j p_{in, j}(x_j)`, of the marginals         each value is usual, their union is not
clustered   :math:`\sum_k w_k N(x; \mu_k + \alpha s u, \Sigma_k)`    a copy of the normals, elsewhere
==========  =======================================================  =======================================

with a random unit vector u and s the root mean square of the standard deviations inside the clusters. ADBench
fits the mixture (for dependency a vine copula) to real data and multiplies the means; here all densities are
drawn at random and known, so that by the lemma of Neyman and Pearson no detector has a higher expected AUROC
than :math:`\log p_{in}(x) - \log p_{out}(x)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.special import logsumexp
from sklearn.utils import check_array, check_random_state, check_scalar

from anomalib_gen.datasets._bunch import make_bunch
from anomalib_gen.datasets._manifest import read_card

# ADBench's factors, but for the shift of clustered anomalies: its 5 leaves no detector anything to miss.
_DEFAULT_ALPHA = {"local": 5.0, "global": 1.1, "dependency": None, "clustered": 2.0}


@dataclass(frozen=True, eq=False)
class GaussianMixtureDensity:
    """A mixture of Gaussians: ``weights`` (k,), ``means`` (k, d), ``covariances`` (k, d, d)."""

    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    covariances: NDArray[np.float64]

    def log_prob(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the log-density (n,) of the rows of X (n, d)."""
        rows = _check_rows(X, self.means.shape[1])
        per_component = [
            np.log(weight) + _log_normal(rows, mean, np.linalg.cholesky(covariance))
            for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return np.asarray(logsumexp(per_component, axis=0))

    def sample(self, n_samples: int, random_state: Any = None) -> NDArray[np.float64]:
        """Return rows (n_samples, d) in random order."""
        rng = check_random_state(random_state)
        component = rng.choice(len(self.weights), size=n_samples, p=self.weights)
        rows = rng.normal(size=(n_samples, self.means.shape[1]))
        for k, (mean, covariance) in enumerate(zip(self.means, self.covariances, strict=True)):
            rows[component == k] = mean + rows[component == k] @ np.linalg.cholesky(covariance).T
        return rows


@dataclass(frozen=True, eq=False)
class UniformDensity:
    """The uniform density on the box from ``low`` (d,) to ``high`` (d,)."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def log_prob(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the log-density (n,) of the rows of X (n, d): minus infinity outside of the box."""
        rows = _check_rows(X, len(self.low))
        inside = np.all((rows >= self.low) & (rows <= self.high), axis=1)
        return np.where(inside, -np.log(self.high - self.low).sum(), -np.inf)

    def sample(self, n_samples: int, random_state: Any = None) -> NDArray[np.float64]:
        """Return rows (n_samples, d)."""
        return check_random_state(random_state).uniform(self.low, self.high, size=(n_samples, len(self.low)))


@dataclass(frozen=True, eq=False)
class IndependentDensity:
    """The product of the marginals of ``joint``: each feature keeps its distribution, dependence is gone."""

    joint: GaussianMixtureDensity

    def log_prob(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the log-density (n,) of the rows of X (n, d)."""
        rows = _check_rows(X, self.joint.means.shape[1])
        # The marginals of a mixture are mixtures of its components' marginals: (n, k, d), summed over k.
        variance = np.diagonal(self.joint.covariances, axis1=1, axis2=2)
        squares = (rows[:, None] - self.joint.means) ** 2
        log_normal = -0.5 * (squares / variance + np.log(2 * np.pi * variance))
        return np.asarray(logsumexp(log_normal + np.log(self.joint.weights)[:, None], axis=1).sum(axis=1))

    def sample(self, n_samples: int, random_state: Any = None) -> NDArray[np.float64]:
        """Return rows (n_samples, d): each feature comes from a joint sample of its own."""
        rng = check_random_state(random_state)
        n_features = self.joint.means.shape[1]
        return np.column_stack([self.joint.sample(n_samples, rng)[:, j] for j in range(n_features)])


@dataclass(frozen=True, eq=False)
class OptimalScore:
    """The score that no detector beats: the log-probability of being an inlier, at equal prior odds.

    It orders rows as the likelihood ratio does, and stays finite where a density vanishes.
    """

    inlier: GaussianMixtureDensity
    outlier: GaussianMixtureDensity | UniformDensity | IndependentDensity

    def __call__(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the score (n,) of the rows of X (n, d), lower = more abnormal."""
        return -np.logaddexp(0.0, self.outlier.log_prob(X) - self.inlier.log_prob(X))


def make_anomalies(
    kind: str = "local",
    *,
    n_samples: int = 1000,
    n_features: int = 2,
    contamination: float = 0.1,
    n_components: int = 3,
    alpha: float | None = None,
    random_state: Any = None,
    as_frame: bool = False,
    return_X_y: bool = False,
) -> Any:
    r"""Draw normal rows and anomalies of one type, with the exact density of both.

    Parameters
    ----------
    kind : {"local", "global", "dependency", "clustered"}, default="local"
        The type of anomaly. Local anomalies widen each normal cluster; global ones are uniform on a box
        around the normals; for dependency ones the features are independent, with the marginals of the
        normals; clustered ones are a shifted copy of the normals.
    n_samples : int, default=1000
        Rows in all.
    n_features : int, default=2
        Columns; at least 2 for ``kind="dependency"``.
    contamination : float in [0, 1), default=0.1
        Share of anomalies; their number is ``round(n_samples * contamination)``.
    n_components : int, default=3
        Gaussians in the density of the normals.
    alpha : float, optional
        How far anomalies go. local: factor on the covariances, above 1, default 5. global: factor on the box
        that reaches three standard deviations around every component, default 1.1. clustered: the length of
        the shift in units of the root mean square of the standard deviations inside the clusters, default 2.
        dependency has none. The more features, the smaller alpha must be for the two densities to overlap.
    random_state : int, RandomState instance or None, default=None
        Seeds the densities and the rows.
    as_frame : bool, default=False
        Return ``data`` as a DataFrame and ``target`` as a Series.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead of a `Bunch`.

    Returns
    -------
    sklearn.utils.Bunch
        - data : float64 array of shape (n_samples, n_features), in random order
        - target : int array of shape (n_samples,), +1 inlier, -1 anomaly
        - inlier, outlier : the two densities, each with ``log_prob(X)`` and ``sample(n_samples,
          random_state)``; use the latter for fresh rows of the same distribution
        - log_prob_inlier, log_prob_outlier : callables, X (n, d) to the exact log-density (n,)
        - optimal_score : callable, X (n, d) to a score (n,) with the highest AUROC there is, lower = more
          abnormal
        - feature_names, name, DESCR, path : as in `load_adbench`; path is None

    Raises
    ------
    ValueError
        An argument out of its range, or an ``alpha`` for ``kind="dependency"``.
    TypeError
        An argument of the wrong type.

    References
    ----------
    .. [1] Han, Hu, Huang, Jiang, Zhao. "ADBench: Anomaly Detection Benchmark", NeurIPS 2022, Section 3.3.
    .. [2] Steinbuss, Böhm. "Benchmarking Unsupervised Outlier Detection with Realistic Synthetic Data", ACM
       TKDD 2021.

    Examples
    --------
    >>> from sklearn.metrics import roc_auc_score
    >>> from anomalib_gen.datasets import make_anomalies
    >>> task = make_anomalies("dependency", n_features=5, random_state=0)
    >>> task.data.shape, int((task.target == -1).sum())
    ((1000, 5), 100)
    >>> bool(roc_auc_score(task.target, task.optimal_score(task.data)) > 0.9)
    True
    """
    _check_arguments(kind, n_samples, n_features, contamination, n_components)
    alpha = _check_alpha(kind, alpha)
    rng = check_random_state(random_state)
    inlier = _draw_mixture(n_components, n_features, rng)
    outlier = _anomaly_density(kind, inlier, alpha, rng)
    n_anomalies = round(n_samples * contamination)
    X = np.vstack([inlier.sample(n_samples - n_anomalies, rng), outlier.sample(n_anomalies, rng)])
    is_anomaly = np.arange(n_samples) >= n_samples - n_anomalies
    order = rng.permutation(n_samples)
    factor = "" if alpha is None else f", alpha {alpha:g}"
    return make_bunch(
        X[order],
        is_anomaly[order],
        name=f"synthetic_{kind}",
        description=f"Synthetic {kind} anomalies{factor}: {n_components} Gaussian components, "
        f"{n_features} features.\n\n{read_card('synthetic')}",
        as_frame=as_frame,
        return_X_y=return_X_y,
        inlier=inlier,
        outlier=outlier,
        log_prob_inlier=inlier.log_prob,
        log_prob_outlier=outlier.log_prob,
        optimal_score=OptimalScore(inlier, outlier),
    )


def _draw_mixture(n_components: int, n_features: int, rng: Any) -> GaussianMixtureDensity:
    """Draw clusters that may touch: eigenvalues 0.03 to 1 in a random basis, means of deviation 3."""
    weights = rng.dirichlet(np.full(n_components, 5.0))
    means = 3.0 * rng.normal(size=(n_components, n_features))
    covariances = np.empty((n_components, n_features, n_features))
    for k in range(n_components):
        basis, _ = np.linalg.qr(rng.normal(size=(n_features, n_features)))
        eigenvalues = 10.0 ** rng.uniform(-1.5, 0.0, size=n_features)
        covariances[k] = (basis * eigenvalues) @ basis.T
    return GaussianMixtureDensity(weights, means, covariances)


def _anomaly_density(
    kind: str, inlier: GaussianMixtureDensity, alpha: float | None, rng: Any
) -> GaussianMixtureDensity | UniformDensity | IndependentDensity:
    if alpha is None:
        return IndependentDensity(inlier)
    weights, means, covariances = inlier.weights, inlier.means, inlier.covariances
    variance = np.diagonal(covariances, axis1=1, axis2=2)  # (k, d)
    if kind == "local":
        return GaussianMixtureDensity(weights, means, alpha * covariances)
    if kind == "global":
        # The box of the density rather than that of a sample: it must not move with the number of rows.
        low, high = (means - 3 * np.sqrt(variance)).min(axis=0), (means + 3 * np.sqrt(variance)).max(axis=0)
        centre, half = (low + high) / 2, alpha * (high - low) / 2
        return UniformDensity(centre - half, centre + half)
    direction = rng.normal(size=means.shape[1])
    direction /= np.linalg.norm(direction)
    scale = np.sqrt((weights @ variance).mean())
    return GaussianMixtureDensity(weights, means + alpha * scale * direction, covariances)


def _check_arguments(
    kind: str, n_samples: int, n_features: int, contamination: float, n_components: int
) -> None:
    if kind not in _DEFAULT_ALPHA:
        raise ValueError(f"kind must be one of {sorted(_DEFAULT_ALPHA)}, got {kind!r}.")
    check_scalar(n_samples, "n_samples", Integral, min_val=1)
    check_scalar(n_features, "n_features", Integral, min_val=1)
    check_scalar(n_components, "n_components", Integral, min_val=1)
    check_scalar(contamination, "contamination", Real, min_val=0, max_val=1, include_boundaries="left")
    if math.isnan(contamination):  # which is neither below nor above a bound
        raise ValueError("contamination == nan, must be a number from 0 on and below 1.")
    if kind == "dependency" and n_features < 2:
        raise ValueError("n_features must be at least 2 for kind='dependency', got 1.")


def _check_alpha(kind: str, alpha: float | None) -> float | None:
    if alpha is None:
        return _DEFAULT_ALPHA[kind]
    if kind == "dependency":
        raise ValueError(f"alpha has no meaning for kind='dependency', got {alpha!r}; leave it out.")
    smallest = 1 if kind == "local" else 0
    check_scalar(alpha, "alpha", Real, min_val=smallest, include_boundaries="neither")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha == {alpha}, must be finite.")
    return float(alpha)


def _check_rows(X: ArrayLike, n_features: int) -> NDArray[np.float64]:
    rows = check_array(X, dtype=np.float64)
    if rows.shape[1] != n_features:
        raise ValueError(f"X has {rows.shape[1]} features, but this density has {n_features}.")
    return rows


def _log_normal(
    rows: NDArray[np.float64], mean: NDArray[np.float64], cholesky: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log-density (n,) of N(mean, L L^T): the solution z of L z = x - mean is standard normal."""
    z = solve_triangular(cholesky, (rows - mean).T, lower=True)
    log_normaliser = 0.5 * len(mean) * np.log(2 * np.pi) + np.log(np.diag(cholesky)).sum()
    return -0.5 * (z**2).sum(axis=0) - log_normaliser
