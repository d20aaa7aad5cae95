"""What scikit-learn expects of an outlier detector beyond `score_samples` and `offset_`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import OutlierMixin

from anomalib_gen import persistence

ROUNDING = 1e-12
"""Share of a score by which another is the same up to rounding.

The last digits of a score may depend on how many rows are scored at once. Where rows repeat, as in tables of flags and
counts, many have the score of a threshold, and are not to fall on either side of it by these digits.
"""


def subtract_scores(a: Any, b: Any) -> npt.NDArray[np.float64]:
    """Return ``a - b``; 0 for two that are the same up to rounding, or infinite alike.

    (Minus infinity is a log-density outside the support.)
    """
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    difference = np.subtract(a, b, out=np.zeros(a.shape), where=(a != b) | np.isfinite(a))
    alike = np.isfinite(difference) & (np.abs(difference) <= ROUNDING * np.minimum(np.abs(a), np.abs(b)))
    return np.where(alike, 0.0, difference)


def is_below(scores: Any, threshold: Any) -> npt.NDArray[np.bool_]:
    """Whether scores are below a threshold by more than rounding: the rows that `predict` labels as outliers."""
    below: npt.NDArray[np.bool_] = subtract_scores(scores, threshold) < 0
    return below


def up_to_rounding(
    scores: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The lowest and the highest numbers that `subtract_scores` tells not apart from each score."""
    width = np.where(np.isfinite(scores), ROUNDING * np.abs(scores), 0.0)
    return scores - width, scores + width


class OutlierScores(OutlierMixin):
    """Thresholded scores and labels of a detector that has `score_samples` and, once fitted, `offset_`."""

    offset_: float

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Score rows; lower is more abnormal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        raise NotImplementedError

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Return ``score_samples(X) - offset_``: negative for outliers.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return subtract_scores(self.score_samples(X), self.offset_)

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """Label rows: +1 for inliers, -1 for outliers.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of `score_samples`: how normal held-out rows look, for model selection without labels.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        y : ignored

        Returns
        -------
        float
        """
        return float(np.mean(self.score_samples(X)))

    def save(self, folder: Any, *, X: Any = None, overwrite: bool = False) -> str:
        """Save the fitted detector to a folder, without pickle; `anomalib_gen.load` brings it back.

        Parameters
        ----------
        folder : str or path
            The folder to make; it appears when it is complete.
        X : array-like or data frame of shape (n_samples, n_features), optional
            Rows as `fit` saw them: their types and ranges become the folder's schema. None leaves those open.
        overwrite : bool, default=False
            Whether to replace a model folder of that name.

        Returns
        -------
        str
            The content hash, in hexadecimal; equal models have equal hashes.

        Raises
        ------
        ModelFolderError
            If a part of the detector cannot be saved without pickle, such as a function of your own;
            `anomalib_gen.save` takes a list of those that you trust.
        FileExistsError
            If there is something under that name already.
        NotFittedError
            If the detector is not fitted.
        """
        return persistence.save(self, folder, X=X, overwrite=overwrite)

    @contextmanager
    def _restored_on_failure(self) -> Iterator[None]:
        """Leave the detector as it was, fitted or not, if fitting fails or is interrupted before its first step."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
