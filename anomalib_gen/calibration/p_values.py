r"""Conformal p-values from scores: what a score is worth, without a word about its distribution.

Let s(x) be a detector's score, lower = more abnormal, and s_1 ... s_n the scores of n normal rows that the detector was
not fitted to. If x is one more such row, its rank among them is uniform, so

    p(x) = (1 + #{i : s_i <= s(x)}) / (n + 1)                                                            (split)

has P(p(x) <= t) = floor((n + 1) t) / (n + 1) <= t whatever the detector and the data, with equality unless scores tie
(Vovk, Gammerman and Shafer 2005; Laxhammar and Falkman 2010 for anomalies).

The guarantee is on average over the calibration rows. For the rows at hand it may be worse; with probability
1 - delta the p-values

    p'(x) = b_{ceil((n + 1) p(x))},    b_{n+1-j} = 1 - delta^{1/k} (prod_{l<k} (j - l) / (n - l))^{1/k},  k = floor(n/2)

are valid for *this* calibration set and all later rows together (Bates et al. 2023, the Simes bound).

The detectors that make such p-values are in calibration.conformal.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from sklearn.utils import check_random_state

from anomalib_gen._outlier import up_to_rounding
from anomalib_gen._runtime import check_share


def conformal_p_values(
    scores: Any,
    calibration_scores: Any,
    *,
    weights: Any = None,
    calibration_weights: Any = None,
    smoothed: bool = False,
    random_state: Any = None,
) -> npt.NDArray[np.float64]:
    """Split-conformal p-values from scores.

    Parameters
    ----------
    scores : array-like of shape (n_rows,)
        Scores of the rows in question, lower = more abnormal.
    calibration_scores : array-like of shape (n_calibration,)
        Scores of normal rows that the detector was not fitted to. Those equal to a row's up to rounding, a part in
        10^12, tie with it.
    weights, calibration_weights : array-like, default=None
        Likelihood ratios p_test(x) / p_calibration(x) of either set of rows, up to a constant, where normal rows of
        today are distributed otherwise than those of calibration (covariate shift, [3]_). Give both or neither.
    smoothed : bool, default=False
        Break ties at random, the row itself counted among them: p-values of normal rows are then exactly uniform, not
        only valid, and no two calls agree without a `random_state`.
    random_state : int, RandomState instance or None, default=None
        Used if `smoothed`.

    Returns
    -------
    ndarray of shape (n_rows,)
        In (0, 1]; without weights a multiple of ``1 / (n_calibration + 1)`` unless smoothed.

    Raises
    ------
    ValueError
        If there are no calibration scores, a score is NaN, or the weights do not fit.

    References
    ----------
    .. [1] Vovk, V., Gammerman, A., Shafer, G. (2005). Algorithmic learning in a random world. Springer.
    .. [2] Laxhammar, R., Falkman, G. (2010). Conformal prediction for distribution-independent anomaly detection in
       streaming vessel data. StreamKDD. doi:10.1145/1833280.1833287.
    .. [3] Tibshirani, R. J., Barber, R. F., Candès, E. J., Ramdas, A. (2019). Conformal prediction under covariate
       shift. NeurIPS. arXiv:1904.06019.

    Examples
    --------
    >>> from anomalib_gen.calibration import conformal_p_values
    >>> conformal_p_values([-9.0, 2.5], [1.0, 2.0, 3.0, 4.0])
    array([0.2, 0.6])
    """
    s, reference = _check_scores(scores, "scores"), _check_scores(calibration_scores, "calibration_scores")
    if not len(reference):
        raise ValueError("calibration_scores is empty; at least one normal row is needed.")
    if (weights is None) != (calibration_weights is None):
        raise ValueError("weights and calibration_weights belong together: give both or neither.")
    order = np.argsort(reference, kind="stable")
    reference = reference[order]
    w = np.ones(len(s)) if weights is None else _check_weights(weights, len(s), "weights")
    v = np.ones(len(reference))
    if calibration_weights is not None:
        v = _check_weights(calibration_weights, len(reference), "calibration_weights")[order]
    mass = np.concatenate([[0.0], np.cumsum(v)])
    low, high = up_to_rounding(s)
    up_to = mass[np.searchsorted(reference, high, side="right")]
    if not smoothed:
        return (up_to + w) / (mass[-1] + w)
    below = mass[np.searchsorted(reference, low, side="left")]
    uniform = check_random_state(random_state).uniform(size=len(s))
    return (below + uniform * (up_to - below + w)) / (mass[-1] + w)


def conditional_p_values(
    p_values: Any, n_calibration: int, *, delta: float = 0.1, method: str = "simes"
) -> npt.NDArray[np.float64]:
    """Make split-conformal p-values valid for the calibration rows at hand, not only on average over such rows.

    With probability at least ``1 - delta`` over the calibration rows, a normal row's adjusted p-value is at most t
    with probability at most t, for all t together. Given the calibration rows the p-values of later rows are then
    independent, which online control of false discoveries asks for.

    Parameters
    ----------
    p_values : array-like of shape (n_rows,)
        Split-conformal p-values, without weights and not smoothed.
    n_calibration : int
        Number of calibration rows that they come from.
    delta : float, default=0.1
        Probability that the promise fails.
    method : {"simes", "dkw"}, default="simes"
        ``"simes"`` is tight for small p-values, where decisions are made; ``"dkw"`` adds the same to all of them
        (Dvoretzky-Kiefer-Wolfowitz) and is tighter for large ones.

    Returns
    -------
    ndarray of shape (n_rows,)
        In (0, 1], in the order of those given.

    Raises
    ------
    ValueError
        If a p-value is no multiple of ``1 / (n_calibration + 1)``, or an argument is out of range.

    References
    ----------
    .. [1] Bates, S., Candès, E., Lei, L., Romano, Y., Sesia, M. (2023). Testing for outliers with conformal p-values.
       Annals of Statistics, 51(1). arXiv:2104.08279.

    Examples
    --------
    >>> from anomalib_gen.calibration import conditional_p_values
    >>> conditional_p_values([0.001, 0.05, 1.0], n_calibration=999).round(4)
    array([0.0046, 0.0723, 1.    ])
    """
    if not isinstance(n_calibration, Integral) or n_calibration < 2:
        found = f"an array of shape {np.shape(n_calibration)}" if np.ndim(n_calibration) else n_calibration
        raise ValueError(f"n_calibration must be an integer of at least 2, got {found}.")
    check_share(delta, "delta")
    n = int(n_calibration)
    p = np.asarray(p_values, dtype=np.float64)
    scaled = p * (n + 1)
    ranks = np.rint(np.clip(scaled, 0, n + 2))
    good = (ranks >= 1) & (ranks <= n + 1) & (np.abs(scaled - ranks) <= 1e-3)
    if not good.all():
        raise ValueError(
            f"p_values hold {p[~good].flat[0]:g}, which is no multiple of 1 / (n_calibration + 1) = {1 / (n + 1):.3g}. "
            "Give split-conformal p-values without weights and smoothing, and their number of calibration rows."
        )
    if method == "simes":
        bounds = _simes_bounds(n, delta)
    elif method == "dkw":
        # At the jth smallest of n uniforms the empirical distribution has just been (j - 1) / n (Massart 1990).
        slack = np.sqrt(np.log(1 / min(delta, 0.5)) / (2 * n))
        bounds = np.minimum(1, np.arange(n) / n + slack)
    else:
        raise ValueError(f"method must be 'simes' or 'dkw', got {method!r}.")
    adjusted: npt.NDArray[np.float64] = np.append(bounds, 1.0)[ranks.astype(np.int64) - 1]
    return adjusted


def _simes_bounds(n: int, delta: float) -> npt.NDArray[np.float64]:
    """Bounds b_1 <= ... <= b_n that n sorted uniforms stay below, all at once, with probability 1 - delta."""
    k = n // 2
    j = np.arange(n, k - 1, -1)  # b_{n+1-j}; beyond k factors of the product one is zero, and the bound is 1
    log_product = (
        special.gammaln(j + 1)
        - special.gammaln(j - k + 1)
        - special.gammaln(n + 1)
        + special.gammaln(n - k + 1)
    )
    bounds = np.ones(n)
    bounds[: len(j)] = -np.expm1((np.log(delta) + log_product) / k)
    return bounds


def _check_scores(scores: Any, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must be one number a row, got shape {values.shape}.")
    if np.isnan(values).any():
        raise ValueError(
            f"{name} must not be NaN, and {int(np.isnan(values).sum())} of {len(values)} are, the first at "
            f"{int(np.isnan(values).argmax())}."
        )
    return values


def _check_weights(weights: Any, n: int, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ValueError(f"{name} must be {n} finite, non-negative numbers, not all zero.")
    return values


def flagged_ranks(alpha: float, n: int) -> int:
    """Largest k with k / (n + 1) <= alpha, as floating-point numbers compare."""
    k = int(np.floor(alpha * (n + 1)))
    while (k + 1) / (n + 1) <= alpha:
        k += 1
    while k > 0 and k / (n + 1) > alpha:
        k -= 1
    return min(k, n)
