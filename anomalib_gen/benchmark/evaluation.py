"""The figures of one detector on one split: AUROC, average precision and wall time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from .detectors import score_rows
from .protocols import Split

__all__ = ["Evaluation", "anomaly_metrics", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What one fit and one pass over the test rows gave.

    Attributes
    ----------
    auroc, average_precision : float
        See `anomaly_metrics`.
    fit_seconds, score_seconds : float
        Wall time.
    scores : ndarray of shape (n_test,)
        Scores of the test rows, lower = more abnormal.
    """

    auroc: float
    average_precision: float
    fit_seconds: float
    score_seconds: float
    scores: NDArray[np.float64]


def anomaly_metrics(y: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Area under the ROC curve, and average precision with the anomalies as the positive class.

    Parameters
    ----------
    y : array-like of shape (n_rows,)
        +1 for a normal row, -1 for an anomaly.
    scores : array-like of shape (n_rows,)
        Finite scores, lower = more abnormal.

    Returns
    -------
    auroc : float
        Probability that a random anomaly scores lower than a random normal row; ties count half.
    average_precision : float
        Precision averaged over the recall of the anomalies; the share of anomalies is the level of chance.

    Raises
    ------
    ValueError
        If scores are not finite or ``y`` does not hold both labels.

    Examples
    --------
    >>> from anomalib_gen.benchmark import anomaly_metrics
    >>> anomaly_metrics([1, 1, -1], [0.3, 0.2, -7.0])
    (1.0, 1.0)
    """
    y, scores = np.asarray(y), np.asarray(scores, dtype=np.float64)
    if set(np.unique(y).tolist()) != {1, -1}:
        raise ValueError(f"y must hold both labels, +1 and -1, found {np.unique(y).tolist()}.")
    bad = int(np.sum(~np.isfinite(scores)))
    if bad:
        raise ValueError(
            f"The detector gave scores that are not finite for {bad} of {len(scores)} test rows."
        )
    return float(roc_auc_score(y, scores)), float(average_precision_score(y == -1, -scores))


def evaluate(estimator: Any, split: Split, *, fit_seconds: float | None = None) -> Evaluation:
    """Fit an estimator on the training rows of a split and judge it on the test rows.

    Parameters
    ----------
    estimator : object
        A detector; it is fitted in place, unless `fit_seconds` says that it is fitted already.
    split : Split
        Rows of a protocol.
    fit_seconds : float, optional
        What fitting took.

    Returns
    -------
    Evaluation
        Figures, times and scores.
    """
    start = time.perf_counter()
    if fit_seconds is None:
        estimator.fit(split.X_train)
        fit_seconds = time.perf_counter() - start
        start = time.perf_counter()
    scores = score_rows(estimator, split.X_test)
    score_seconds = time.perf_counter() - start
    auroc, average_precision = anomaly_metrics(split.y_test, scores)
    return Evaluation(auroc, average_precision, fit_seconds, score_seconds, scores)
