r"""False discoveries in a batch of rows: how many of those flagged are normal after all.

At a p-value of 0.05 one normal row in twenty is flagged, so among 10,000 normal rows and 50 anomalies most flags are
false. The false-discovery rate is the expected share V / max(R, 1) of false flags V among all flags R. With sorted
p-values p_(1) <= ... <= p_(m), Benjamini and Hochberg (1995) flag the k smallest, k = max{i : p_(i) <= alpha i / m},
which keeps the rate at (m_0 / m) alpha where m_0 rows are normal, if the p-values are independent or positively
dependent; conformal ones that share a calibration set are (Bates et al. 2023). Storey's estimate

    m_0 <= (1 + #{p_i > lambda}) / (1 - lambda)

uses the slack m_0 / m, and keeps the rate with conformal p-values too (the same). Benjamini and Yekutieli (2001)
divide alpha by sum_i 1/i and hold under any dependence, so also for cross-conformal p-values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from anomalib_gen._runtime import check_share

METHODS = ("bh", "by", "storey")


def adjust_p_values(
    p_values: Any, *, method: str = "bh", lambda_: float = 0.5, weights: Any = None
) -> npt.NDArray[np.float64]:
    """Adjust p-values for a batch: ``adjust_p_values(p) <= alpha`` has a false-discovery rate of at most `alpha`.

    Parameters
    ----------
    p_values : array-like of shape (n_rows,)
        Of the rows of one batch, for instance from `SplitConformalDetector.p_values`.
    method : {"bh", "storey", "by"}, default="bh"
        ``"bh"``: Benjamini-Hochberg, for independent and for split-conformal p-values. ``"storey"``: the same with an
        estimate of the number of normal rows; finds more where many rows are anomalies. ``"by"``:
        Benjamini-Yekutieli, under any dependence, at the price of a factor of about log(n_rows).
    lambda_ : float, default=0.5
        Storey's threshold: p-values above it count as those of normal rows.
    weights : array-like of shape (n_rows,) or None, default=None
        Positive weights chosen without a look at the rows, divided here by their mean: a row with a larger one is
        flagged sooner ([4]_).

    Returns
    -------
    ndarray of shape (n_rows,)
        In [0, 1]: for each row the smallest rate at which it is flagged.

    Raises
    ------
    ValueError
        If a p-value lies outside [0, 1], or another argument is out of range.

    References
    ----------
    .. [1] Benjamini, Y., Hochberg, Y. (1995). Controlling the false discovery rate. JRSS B, 57(1).
    .. [2] Benjamini, Y., Yekutieli, D. (2001). The control of the false discovery rate in multiple testing under
       dependency. Annals of Statistics, 29(4).
    .. [3] Storey, J. D., Taylor, J. E., Siegmund, D. (2004). Strong control, conservative point estimation and
       simultaneous conservative consistency of false discovery rates. JRSS B, 66(1).
    .. [4] Genovese, C. R., Roeder, K., Wasserman, L. (2006). False discovery control with p-value weighting.
       Biometrika, 93(3).
    .. [5] Bates, S., Candès, E., Lei, L., Romano, Y., Sesia, M. (2023). Testing for outliers with conformal p-values.
       Annals of Statistics, 51(1). arXiv:2104.08279.

    Examples
    --------
    >>> from anomalib_gen.calibration import adjust_p_values
    >>> adjust_p_values([0.01, 0.02, 0.5, 0.9])
    array([0.04      , 0.04      , 0.66666667, 0.9       ])
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1:
        raise ValueError(f"p_values must be one-dimensional, got shape {p.shape}.")
    if (outside := ~((p >= 0) & (p <= 1))).any():
        raise ValueError(f"p_values must lie in [0, 1], got {p[outside][0]:g} at {int(outside.argmax())}.")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    check_share(lambda_, "lambda_")
    if not len(p):
        return p
    weighted = p
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != p.shape or not (np.isfinite(w) & (w > 0)).all():
            raise ValueError(f"weights must be {len(p)} positive, finite numbers, one for each p-value.")
        weighted = np.minimum(p * w.mean() / w, 1.0)
    if method != "storey":
        adjusted: npt.NDArray[np.float64] = stats.false_discovery_control(weighted, method=method)
        return adjusted
    normal_share = (1 + (weighted > lambda_).sum()) / (len(p) * (1 - lambda_))
    adjusted = np.minimum(normal_share * stats.false_discovery_control(weighted, method="bh"), 1.0)
    # The estimate says nothing about p-values beyond lambda, which are never discoveries.
    return np.where(weighted <= lambda_, adjusted, 1.0)
