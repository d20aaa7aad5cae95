"""What the meta-estimators share: any detector's scores in one direction, and seeded fits of clones.

Libraries disagree on what a high score means: to scikit-learn it is a normal row, to pyod an abnormal one. A wrong
guess turns every decision around without an error, so the direction is recognised only where it is certain, and has to
be said elsewhere.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_outlier_detector
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Tags, _safe_indexing, check_random_state, get_tags, indexable
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.validation import _num_samples, check_is_fitted

from anomalib_gen._outlier import OutlierScores

MAX_SEED = np.iinfo(np.int32).max


def innermost(estimator: Any) -> Any:
    """The detector inside pipelines, searches and frozen wrappers."""
    while True:
        if hasattr(estimator, "steps"):
            inner = estimator.steps[-1][1]
        elif hasattr(estimator, "best_estimator_"):
            inner = estimator.best_estimator_
        elif isinstance(estimator, FrozenEstimator):
            inner = estimator.estimator
        else:
            return estimator
        estimator = inner


def is_pyod(estimator: Any) -> bool:
    """Whether this is a detector of pyod, without importing pyod."""
    base = sys.modules.get("pyod.models.base")
    return base is not None and isinstance(estimator, base.BaseDetector)


def resolve_scores(estimator: Any, direction: str) -> tuple[str, float]:
    """Name of the method that scores rows, and the sign that makes lower more abnormal.

    Parameters
    ----------
    estimator : estimator
    direction : {"auto", "normal", "abnormal"}
        What a high score means.

    Raises
    ------
    TypeError
        If the estimator scores no rows, or the direction is ``"auto"`` and not certain.
    """
    inner = innermost(estimator)
    method = "score_samples"
    if is_pyod(inner) or not hasattr(estimator, method):
        method = "decision_function"
    if not hasattr(estimator, method):
        hint = ""
        if type(inner).__name__ == "LocalOutlierFactor":
            hint = " LocalOutlierFactor scores new rows with novelty=True only."
        raise TypeError(
            f"{type(inner).__name__} has neither score_samples nor decision_function, so it cannot score new "
            f"rows.{hint}"
        )
    if direction != "auto":
        return method, 1.0 if direction == "normal" else -1.0
    if is_pyod(inner):
        return method, -1.0
    if method == "score_samples" or is_outlier_detector(inner):
        return method, 1.0
    raise TypeError(
        f"What a high score of {type(inner).__name__} means is not known. "
        "Say it: score_direction='normal' or score_direction='abnormal'."
    )


def score_rows(estimator: Any, X: Any, direction: str) -> npt.NDArray[np.float64]:
    """Scores of rows by a fitted detector, ``(n,)``; lower is more abnormal.

    Raises
    ------
    TypeError
        As `resolve_scores`.
    ValueError
        If it does not return one number for each row.
    """
    method, sign = resolve_scores(estimator, direction)
    scores = sign * np.asarray(getattr(estimator, method)(X), dtype=np.float64)
    # (How many images a folder has, its reader knows.)
    n = scores.size if isinstance(X, str | os.PathLike) else _num_samples(X)
    if scores.shape != (n,):
        steps = [step for _, step in getattr(estimator, "steps", ())]
        hint = "".join(
            f" {type(step).__name__} leaves files out that it cannot read: leave those in its skipped_ out of X."
            for step in steps
            if getattr(step, "skipped_", None)
        )
        raise ValueError(
            f"{type(estimator).__name__}.{method} returned scores of shape {scores.shape} for {n} rows; one score a "
            f"row is needed.{hint}"
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"{type(estimator).__name__}.{method} returned NaN for row {int(np.isnan(scores).argmax())}."
        )
    return scores


def threshold_of(estimator: Any) -> float | None:
    """Score below which a fitted detector, or a pipeline that ends in one, flags rows; None if it has no threshold."""
    inner = innermost(estimator)
    if not hasattr(inner, "offset_") and is_pyod(inner) and hasattr(inner, "threshold_"):
        return -float(inner.threshold_)
    offset = getattr(inner, "offset_", None)
    return None if offset is None else float(offset)


def check_labels(y: Any, n: int) -> npt.NDArray[np.int64]:
    """Labels ``(n,)`` as they are used everywhere: +1 normal, -1 anomaly.

    Raises
    ------
    ValueError
        If there are other values, or another number of them.
    """
    labels = np.asarray(y)
    unknown = set(labels.ravel().tolist()) - {1, -1}
    if labels.shape != (n,) or unknown:
        message = f"y must hold {n} labels, +1 for normal rows and -1 for anomalies, got shape {labels.shape}"
        if unknown:
            message += f" and values {sorted(unknown, key=str)[:5]}"
        if unknown == {0}:
            raise ValueError(f"{message}. If 1 marks the anomalies, give numpy.where(y, -1, 1).")
        raise ValueError(f"{message}.")
    return labels.astype(np.int64)


def splittable(X: Any) -> Any:
    """Rows of which some can be taken.

    Raises
    ------
    TypeError
        If X is a folder.
    """
    if isinstance(X, str | os.PathLike):
        raise TypeError(
            f"X={os.fspath(X)!r} is a folder, of which no part can be held out. Give its files: "
            "anomalib_gen.images.list_images(folder)."
        )
    return indexable(X)[0]


def seeded_clone(estimator: Any, random: np.random.RandomState) -> Any:
    """A clone whose unset random states are set; those that the user set stay."""
    copy = clone(estimator)
    if isinstance(estimator, FrozenEstimator) or not hasattr(copy, "get_params"):
        return copy
    unset = {
        name: int(random.randint(MAX_SEED))
        for name, value in sorted(copy.get_params(deep=True).items())
        if value is None and (name == "random_state" or name.endswith("__random_state"))
    }
    return copy.set_params(**unset) if unset else copy


class WrappedDetector(OutlierScores, MetaEstimatorMixin, BaseEstimator):
    """Base of the meta-estimators: a detector inside, and what scikit-learn asks about it."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "estimator": [HasMethods(["fit"]), None],
        "score_direction": [StrOptions({"auto", "normal", "abnormal"})],
        "random_state": ["random_state"],
    }

    estimator: Any
    score_direction: str
    random_state: Any

    def _inner(self) -> Any:
        if self.estimator is not None:
            return self.estimator
        # Not at the top: importing it draws from Python's global random generator.
        from sklearn.ensemble import IsolationForest

        return IsolationForest()

    def _note_columns(self, fitted: Any) -> None:
        """Take over what the fitted detector knows of its columns."""
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))

    def _scores_of(self, estimator: Any, X: Any) -> npt.NDArray[np.float64]:
        return score_rows(estimator, X, self.score_direction)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "offset_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        inner = self._inner()
        if hasattr(inner, "__sklearn_tags__"):  # not so for every pyod detector
            own = get_tags(inner).input_tags
            tags.input_tags.sparse, tags.input_tags.allow_nan = own.sparse, own.allow_nan
        return tags


def fit_and_hold_out(detector: WrappedDetector, X: Any, fraction: float) -> tuple[Any, Any]:
    """Fit the detector's estimator to all but a share of the rows; return it and those rows.

    A frozen estimator is taken as it is, and all rows are held out.
    """
    X = splittable(X)
    inner = detector._inner()
    n = _num_samples(X)
    if isinstance(inner, FrozenEstimator):
        check_is_fitted(inner)
        return inner, X
    n_held_out = min(max(round(fraction * n), 1), n - 1)
    if n < 2:
        raise ValueError(
            f"n_samples={n}, but at least 2 rows are needed: some to fit {type(inner).__name__}, some to calibrate it."
        )
    random = check_random_state(detector.random_state)
    order = random.permutation(n)
    train, held_out = np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
    fitted = seeded_clone(inner, random).fit(_safe_indexing(X, train))
    return fitted, _safe_indexing(X, held_out)


def require_unfitted(detector: WrappedDetector) -> None:
    """Refuse a frozen estimator where models without each row are needed."""
    if isinstance(detector._inner(), FrozenEstimator):
        raise ValueError(
            f"estimator is frozen, but {type(detector).__name__} fits it to parts of the rows. "
            "Use SplitConformalDetector for a fitted detector."
        )
