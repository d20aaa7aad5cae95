r"""p-values that learn from the batch they judge.

A detector fitted to normal rows alone does not know in which direction anomalies lie. A batch that holds some shows it.
AdaDetect (Marandon et al. 2024) cuts the normal rows into Y_1 and Y_2 and fits a classifier to tell

    Y_1    from    Y_2 and the batch together.

Among the latter it cannot favour normal rows of the batch over those of Y_2, because nothing tells it which is which;
so their scores are exchangeable, and p-values against those of Y_2 (calibration.p_values) are valid. Anomalies stand
out the more, the more of them share a direction. Benjamini and Hochberg's procedure on these p-values keeps the
false-discovery rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import _num_samples

from anomalib_gen._inputs import as_pandas, column_names, name_columns
from anomalib_gen._runtime import check_share
from anomalib_gen.calibration._wrapped import seeded_clone
from anomalib_gen.calibration.p_values import conformal_p_values


def adaptive_p_values(
    X: Any,
    X_normal: Any,
    *,
    classifier: Any = None,
    calibration_fraction: float = 0.5,
    random_state: Any = None,
) -> npt.NDArray[np.float64]:
    """Conformal p-values of a batch by a classifier that sees the batch, for `adjust_p_values`.

    Parameters
    ----------
    X : array-like or data frame of shape (n_rows, n_features)
        The batch. Columns of data frames are matched by their names.
    X_normal : array-like or data frame of shape (n_normal, n_features)
        Normal rows, exchangeable with those of the batch.
    classifier : classifier with `predict_proba` or `decision_function`, or None, default=None
        Any of scikit-learn's, or a pipeline; it is cloned. None takes `sklearn.ensemble.RandomForestClassifier` with
        leaves of at least five rows.
    calibration_fraction : float, default=0.5
        Share of the normal rows that are set against the others together with the batch.
    random_state : int, RandomState instance or None, default=None
        Cuts the normal rows, shuffles, and seeds the classifier where its own random state is None.

    Returns
    -------
    ndarray of shape (n_rows,)
        Multiples of one by the number of calibration rows plus one.

    Raises
    ------
    ValueError
        If there are fewer than two normal rows, `calibration_fraction` is out of range, one of the two sets of rows is
        a data frame and the other is not, or they have different columns.

    Notes
    -----
    The p-values are valid together, for one batch: with another batch the classifier is another. Of single rows, or
    of batches with few anomalies, there is little to learn; then `SplitConformalDetector` is the better choice.

    References
    ----------
    .. [1] Marandon, A., Lei, L., Mary, D., Roquain, E. (2024). Adaptive novelty detection with false discovery rate
       guarantee. Annals of Statistics, 52(1). arXiv:2208.06685.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.calibration import adaptive_p_values, adjust_p_values
    >>> random = np.random.default_rng(0)
    >>> batch = np.vstack([random.normal(size=(80, 5)), random.normal([4, 0, 0, 0, 0], size=(20, 5))])
    >>> p = adaptive_p_values(batch, random.normal(size=(1000, 5)), random_state=0)
    >>> flagged = adjust_p_values(p) <= 0.1
    >>> flagged[:80].mean() < 0.05, flagged[80:].mean() > 0.3
    (np.True_, np.True_)
    """
    check_share(calibration_fraction, "calibration_fraction")
    n, m = _num_samples(X_normal), _num_samples(X)
    if n < 2:
        raise ValueError(f"X_normal has {n} rows; at least 2 are needed, and hundreds are better.")
    X, X_normal = _matched(X, X_normal)
    if classifier is None:
        # Not at the top: importing it draws from Python's global random generator.
        from sklearn.ensemble import RandomForestClassifier

        classifier = RandomForestClassifier(min_samples_leaf=5)
    random = check_random_state(random_state)
    order = random.permutation(n)
    n_calibration = min(max(round(calibration_fraction * n), 1), n - 1)
    calibration = _safe_indexing(X_normal, order[:n_calibration])
    known = _safe_indexing(X_normal, order[n_calibration:])
    # In random order, so that a classifier to which order matters cannot tell the batch from the calibration rows.
    mixed = random.permutation(n_calibration + m)
    rows = _stack(known, _safe_indexing(_stack(calibration, X), mixed))
    label = np.repeat([0, 1], [n - n_calibration, n_calibration + m])
    fitted = seeded_clone(classifier, random).fit(rows, label)
    scores = _normality(fitted, _stack(calibration, X))
    return conformal_p_values(scores[n_calibration:], scores[:n_calibration])


def _normality(classifier: Any, X: Any) -> npt.NDArray[np.float64]:
    """Score of rows, lower the more a row looks like one of the mixed set."""
    if hasattr(classifier, "predict_proba"):
        return np.asarray(classifier.predict_proba(X), dtype=np.float64)[:, 0]
    return -np.asarray(classifier.decision_function(X), dtype=np.float64)


def _matched(X: Any, X_normal: Any) -> tuple[Any, Any]:
    """Both sets of rows as frames of pandas with the same columns in the same order, or both as arrays."""
    names, known = column_names(X), column_names(X_normal)
    if names is None and known is None:
        X, X_normal = np.asarray(X), np.asarray(X_normal)
        if X.ndim == 0 or X.shape[1:] != X_normal.shape[1:]:
            raise ValueError(
                f"X and X_normal must be arrays of the same columns, got shapes {X.shape} and {X_normal.shape}."
            )
        return X, X_normal
    if names is None or known is None:
        frame, array = ("X", "X_normal") if known is None else ("X_normal", "X")
        raise ValueError(
            f"{frame} is a data frame and {array} is none, so their columns could be matched by position only. "
            "Give both as data frames, or both as arrays."
        )
    X, X_normal = as_pandas(X), as_pandas(X_normal)
    if names == known:
        return X, X_normal
    if sorted(map(str, names)) != sorted(map(str, known)):
        alone = {
            name: [repr(str(column)) for column in columns if column not in others]
            for name, columns, others in (("X", names, known), ("X_normal", known, names))
        }
        listed = " and ".join(f"{name} alone has {name_columns(c)}" for name, c in alone.items() if c)
        raise ValueError(
            f"X and X_normal have different columns: {listed or 'some repeat'}. Give the same ones."
        )
    return X[known], X_normal


def _stack(A: Any, B: Any) -> Any:
    if hasattr(A, "iloc"):
        import pandas as pd

        return pd.concat([A, B], ignore_index=True)
    return np.concatenate([A, B])
