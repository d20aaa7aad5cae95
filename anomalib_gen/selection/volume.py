r"""Mass-volume and excess-mass curves: how little room a detector needs for the normal rows.

A detector calls rows normal down to some score u. Of two detectors whose sets {s >= u} hold the same share of normal
rows the one with the smaller set leaves more room in which anomalies are seen. With lambda the volume,

    MV_s(alpha) = min_u { lambda(s >= u) : P(s(X) >= u) >= alpha },                                             (1)
    EM_s(t)     = max_u { P(s(X) >= u) - t lambda(s >= u) }                                                     (2)

are at their least and greatest, for all alpha and t at once, if s ranks rows as their density does (Clémençon and
Jakubowicz 2013; Goix, Sabourin and Clémençon 2015). Goix (2016) takes the area under (1) for alpha near one, or under
(2) until it falls to 0.9, as a criterion that needs no labels.

P is estimated by held-out normal rows, and lambda by points X' drawn uniformly from the box around them, so that
volumes are shares of the box. Then

    MV_s(1 - epsilon) = P(p(X') > epsilon),        int_0^1 MV_s(alpha) d alpha = P(s(X') >= s(X)) = E p(X'),      (3)

where p is the split-conformal p-value (calibration.p_values) up to 1 / (n + 1): (1) at a level is the volume of the
conformal prediction set, its *efficiency*, and the whole area is the mean p-value of uniform points.

In many columns the box is empty: no point falls near the rows, and every detector that knows where they are has volume
zero. There Goix (2016, algorithm 1) fits and judges on random subsets of a few columns. That judges the algorithm,
not the fitted model, and sees anomalies of few columns alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid
from sklearn.utils import _safe_indexing, check_random_state

from anomalib_gen._runtime import check_count, check_share
from anomalib_gen._warnings import warn_user
from anomalib_gen.selection._scorer import Scorer, as_table, draw_uniform, refit, with_columns


def mass_volume_curve(
    scores: Any, reference_scores: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mass-volume curve of a detector, from scores (equation 1).

    Parameters
    ----------
    scores : array-like of shape (n_rows,)
        Of normal rows that the detector was not fitted to, lower = more abnormal.
    reference_scores : array-like of shape (n_points,)
        Of points drawn uniformly from a region that holds those rows.

    Returns
    -------
    mass : ndarray of shape (n_thresholds,)
        Shares of the rows at or above a threshold, ascending to 1; a threshold for each distinct score.
    volume : ndarray of shape (n_thresholds,)
        Shares of the region at or above it. Between two masses the volume is that of the larger one.

    Raises
    ------
    ValueError
        If there are no scores, or one is NaN.

    See Also
    --------
    MassVolume : The area under it, as a scorer.

    References
    ----------
    .. [1] Clémençon, S., Jakubowicz, J. (2013). Scoring anomalies: a M-estimation formulation. AISTATS.
    .. [2] Goix, N. (2016). How to evaluate the quality of unsupervised anomaly detection algorithms? ICML anomaly
       detection workshop. arXiv:1607.01152.

    Examples
    --------
    >>> from anomalib_gen.selection import mass_volume_curve
    >>> mass_volume_curve([3.0, 2.0, 1.0, 1.0], [2.5, 0.5, 0.4, 0.3, 0.2])
    (array([0.25, 0.5 , 1.  ]), array([0. , 0.2, 0.2]))
    """
    s, reference = _checked(scores, "scores"), np.sort(_checked(reference_scores, "reference_scores"))
    threshold, count = np.unique(s, return_counts=True)
    mass = np.cumsum(count[::-1]) / len(s)
    volume = 1 - np.searchsorted(reference, threshold[::-1], side="left") / len(reference)
    return mass, volume


def excess_mass_curve(
    scores: Any, reference_scores: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Excess-mass curve of a detector, from scores (equation 2).

    Parameters
    ----------
    scores : array-like of shape (n_rows,)
        Of normal rows that the detector was not fitted to, lower = more abnormal.
    reference_scores : array-like of shape (n_points,)
        Of points drawn uniformly from a region that holds those rows.

    Returns
    -------
    t : ndarray of shape (n_corners,)
        Prices of volume, in masses by region, ascending from 0.
    excess_mass : ndarray of shape (n_corners,)
        The curve at those, descending from 1. It is linear in between and constant beyond.

    Raises
    ------
    ValueError
        If there are no scores, or one is NaN.

    See Also
    --------
    ExcessMass : The area under it, as a scorer.

    References
    ----------
    .. [1] Goix, N., Sabourin, A., Clémençon, S. (2015). On anomaly ranking and excess-mass curves. AISTATS.
       arXiv:1502.01684.

    Examples
    --------
    >>> from anomalib_gen.selection import excess_mass_curve
    >>> excess_mass_curve([3.0, 2.0, 1.0, 1.0], [2.5, 0.5, 0.4, 0.3, 0.2])
    (array([0.  , 3.75]), array([1.  , 0.25]))
    """
    mass, volume = mass_volume_curve(scores, reference_scores)
    # Only corners of the concave hull of (volume, mass) are ever best; nothing at all is the threshold above all rows.
    hull: list[tuple[float, float]] = []
    for v, m in zip([0.0, *volume, 1.0], [0.0, *mass, 1.0], strict=True):
        while hull and hull[-1][0] == v:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (v, m)):
            hull.pop()
        hull.append((v, m))
    # Dear volume first: from one corner to the next the price falls to the slope between them.
    t, excess = [0.0], [1.0]
    for left, right in zip(hull[-2::-1], hull[:0:-1], strict=True):
        price = _slope(left, right)
        if price > 0:
            t.append(price)
            excess.append(left[1] - price * left[0])
    return np.array(t), np.array(excess)


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _checked(scores: Any, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must be one number a row, for at least one row; got shape {values.shape}.")
    if np.isnan(values).any():
        raise ValueError(f"{name} must not be NaN, and the one at {int(np.isnan(values).argmax())} is.")
    return values


class _VolumeScorer(Scorer):
    """Judge scores of rows beside those of uniform points, on all columns or on random subsets of them."""

    n_points: int
    n_columns: int | None
    n_subsets: int
    random_state: Any

    @abstractmethod
    def _judge(self, scores: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
        """Criterion from scores, higher = better."""

    def __call__(self, estimator: Any, X: Any, y: Any = None) -> float:
        """Judge a fitted detector.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one.
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows that it was not fitted to.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        float
            Higher = better.

        Raises
        ------
        ValueError
            If X is no table, or has fewer columns than `n_columns`.

        Warns
        -----
        UserWarning
            If there are too many columns for any uniform point to come near the rows.
        """
        for name in ("n_points", "n_subsets", *(() if self.n_columns is None else ("n_columns",))):
            value = getattr(self, name)
            check_count(value, name)
        rows = as_table(X, type(self).__name__)
        random = check_random_state(self.random_state)
        if self.n_columns is None:
            return self._beside_points(estimator, rows, random)
        n, d = rows.shape
        if self.n_columns > d or n < 2:
            raise ValueError(
                f"n_columns={self.n_columns} columns and 2 rows are needed, and X has {d} columns and {n} rows."
            )
        found = []
        for _ in range(self.n_subsets):
            some = _safe_indexing(rows, np.sort(random.permutation(d)[: self.n_columns]), axis=1)
            train, judged = np.split(random.permutation(n), [n // 2])
            fitted = refit(estimator, _safe_indexing(some, np.sort(train)), random)
            found.append(self._beside_points(fitted, _safe_indexing(some, judged), random))
        return float(np.mean(found))

    def _beside_points(self, estimator: Any, X: Any, random: np.random.RandomState) -> float:
        """Criterion of a fitted detector on rows and on points drawn uniformly from the box around them."""
        columns = [draw_uniform(X, j, self.n_points, random) for j in range(X.shape[1])]
        scores = self._scores(estimator, X)
        reference = self._scores(estimator, with_columns(X, columns))
        if reference.max() < np.quantile(scores, 0.1, method="lower"):
            warn_user(
                f"None of {self.n_points} uniform points in {X.shape[1]} columns is as normal as nine rows in ten, so "
                "the volume cannot be told from zero, nor candidates from one another. Give a small n_columns, or take "
                "ColumnReplacement.",
            )
        return self._judge(scores, reference)


class MassVolume(_VolumeScorer):
    """Minus the mean volume that a detector needs for a large share of normal rows (equation 1).

    Parameters
    ----------
    levels : tuple of two float, default=(0.9, 0.999)
        Shares of the rows between which the volume is averaged, those of [1]_. ``(0, 1)`` makes the score minus the
        mean conformal p-value of uniform points, ``(0.95, 0.95)`` minus the volume of the conformal prediction set
        at 5 %.
    n_points : int, default=10_000
        Uniform points. Volumes below one by their number are zero.
    n_columns : int or None, default=None
        None judges the fitted detector on all columns, which is of use up to about five. A number makes the scorer
        draw subsets of so many columns, fit clones of the detector to half of the rows with those and judge them on
        the other half.
    n_subsets : int, default=10
        Subsets of columns, where there are any.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `anomalib_gen.calibration.SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=0
        Draws points, columns and halves. An int judges all candidates on the same ones.

    See Also
    --------
    ColumnReplacement : For many columns, without further fits.

    Notes
    -----
    The box is taken from the rows at hand: candidates compare on the same rows (folds of one search) only. A column of
    text, flags or categories counts each of its values as one unit of volume. Logarithms of columns change volumes,
    hence the choice, as they change a density's ranks.

    Ma et al. ([2]_) found this criterion, over 297 models of eight kinds, no better than a choice at random, and the
    figures of this project (``benchmarks/results/label-free-selection.md``) say no other.

    References
    ----------
    .. [1] Goix, N. (2016). How to evaluate the quality of unsupervised anomaly detection algorithms? ICML anomaly
       detection workshop. arXiv:1607.01152.
    .. [2] Ma, M. Q., Zhao, Y., Zhang, X., Akoglu, L. (2023). The need for unsupervised outlier model selection: a
       review and evaluation of internal evaluation strategies. SIGKDD Explorations, 25(1). arXiv:2104.01422.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.model_selection import cross_val_score
    >>> from anomalib_gen.selection import MassVolume
    >>> X = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], size=400)
    >>> for detector in (GaussianMixture(), IsolationForest(random_state=0)):
    ...     print(cross_val_score(detector, X, scoring=MassVolume(), cv=2).mean().round(2))
    -0.18
    -0.48
    """

    def __init__(
        self,
        *,
        levels: tuple[float, float] = (0.9, 0.999),
        n_points: int = 10_000,
        n_columns: int | None = None,
        n_subsets: int = 10,
        score_direction: str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.levels = levels
        self.n_points = n_points
        self.n_columns = n_columns
        self.n_subsets = n_subsets
        self.score_direction = score_direction
        self.random_state = random_state

    def _judge(self, scores: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
        low, high = self.levels if np.shape(self.levels) == (2,) else (np.nan, np.nan)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"levels must be two numbers with 0 <= low <= high <= 1, got {self.levels!r}.")
        mass, volume = mass_volume_curve(scores, reference)
        if low == high:
            return 0.0 - float(volume[np.searchsorted(mass, low - 1e-12)])
        # A step function: between two masses the volume of the larger.
        edges = np.clip(np.concatenate([[0.0], mass]), low, high)
        return 0.0 - float((np.diff(edges) * volume).sum() / (high - low))


class ExcessMass(_VolumeScorer):
    """Area under the excess-mass curve, from price zero to where the curve falls to a level (equation 2).

    Parameters
    ----------
    level : float, default=0.9
        Where the area ends, as in [1]_: the threshold then holds about that share of the rows, or more.
    n_points : int, default=10_000
        Uniform points. A volume below one by their number cannot be told from zero, so the area ends at that price.
    n_columns : int or None, default=None
        None judges the fitted detector on all columns; a number draws subsets of columns and fits clones, as in
        `MassVolume`.
    n_subsets : int, default=10
        Subsets of columns, where there are any.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `anomalib_gen.calibration.SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=0
        Draws points, columns and halves. An int judges all candidates on the same ones.

    See Also
    --------
    MassVolume : Its dual, ``EM(t) = max over alpha of alpha - t MV(alpha)``, with the same limits.

    References
    ----------
    .. [1] Goix, N. (2016). How to evaluate the quality of unsupervised anomaly detection algorithms? ICML anomaly
       detection workshop. arXiv:1607.01152.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.model_selection import cross_val_score
    >>> from anomalib_gen.selection import ExcessMass
    >>> X = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], size=400)
    >>> for detector in (GaussianMixture(), IsolationForest(random_state=0)):
    ...     print(cross_val_score(detector, X, scoring=ExcessMass(), cv=2).mean().round(2))
    0.4
    0.14
    """

    def __init__(
        self,
        *,
        level: float = 0.9,
        n_points: int = 10_000,
        n_columns: int | None = None,
        n_subsets: int = 10,
        score_direction: str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.level = level
        self.n_points = n_points
        self.n_columns = n_columns
        self.n_subsets = n_subsets
        self.score_direction = score_direction
        self.random_state = random_state

    def _judge(self, scores: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
        check_share(self.level, "level")
        t, excess = excess_mass_curve(scores, reference)
        end = float(len(reference))
        if excess[-1] <= self.level:
            # The curve falls from corner to corner, so it is at the level once.
            end = min(end, float(np.interp(-self.level, -excess, t)))
        corners = np.append(t[t < end], end)
        return float(trapezoid(np.interp(corners, t, excess), corners))
