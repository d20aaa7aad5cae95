"""What the scorers share: parameters, scores in one direction, and reference rows made from a table.

A scorer is called as ``scorer(estimator, X, y=None)`` with a fitted detector and rows that it was not fitted to,
returns a number, higher = better, and ignores labels: it goes where scikit-learn takes ``scoring=``. Its random numbers
come from `random_state` at each call, so that all candidates are judged on the same reference rows.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.frozen import FrozenEstimator

from anomalib_gen._component import Component
from anomalib_gen._inputs import as_pandas
from anomalib_gen.calibration._wrapped import score_rows, seeded_clone


class Scorer(Component):
    """Base of the scorers that compare scores of rows; subclasses have the parameters `score_direction`."""

    score_direction: str

    @abstractmethod
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
        """

    def _scores(self, estimator: Any, X: Any) -> npt.NDArray[np.float64]:
        return score_rows(estimator, X, self.score_direction)


def refit(estimator: Any, X: Any, random: np.random.RandomState) -> Any:
    """Fit a clone of a detector, seeded where its own random states are None, to other rows.

    Seeds are drawn from a copy of `random`: a candidate that needs some leaves as many numbers to what is drawn next as
    one that does not, so that all are judged on the same rows.

    Raises
    ------
    ValueError
        If it is frozen, so that it would not be fitted.
    """
    if isinstance(estimator, FrozenEstimator):
        raise ValueError(
            "estimator is frozen, but this scorer fits it to other rows. Give the detector inside."
        )
    return seeded_clone(estimator, copy.deepcopy(random)).fit(X)


def as_table(X: Any, needs: str) -> Any:
    """Rows as a data frame of pandas where columns have names, else as an array ``(n, D)``.

    Raises
    ------
    ValueError
        If X is no table; `needs` begins the message.
    """
    X = as_pandas(X)
    if hasattr(X, "iloc"):
        return X
    X = np.asarray(X)
    if X.ndim != 2:
        raise ValueError(f"{needs} needs a table of shape (n_samples, n_features), got shape {X.shape}.")
    return X


def column_of(X: Any, j: int) -> npt.NDArray[Any]:
    """Values of a column ``(n,)``; objects where they are categories, which may be numbers."""
    if not hasattr(X, "iloc"):
        return np.asarray(X[:, j])
    column = X.iloc[:, j]
    return np.asarray(column, dtype=object if hasattr(column, "cat") else None)


def varies(values: npt.NDArray[Any]) -> bool:
    """Whether a column has two different values."""
    return len(_distinct(values)) > 1


def draw_uniform(X: Any, j: int, n: int, random: np.random.RandomState) -> npt.NDArray[Any]:
    """Draws from the uniform distribution over a column's range, or over its categories.

    A column of whole numbers may hold counts or codes: draws are rounded to the nearest of its values. One of nothing
    but missing values keeps those.
    """
    values = column_of(X, j)
    known = _distinct(values)
    if not len(known):
        return np.resize(values, n)
    if values.dtype.kind not in "iuf":
        return random.choice(known, size=n)
    low, high = known.min().astype(np.float64), known.max().astype(np.float64)
    drawn = low + (high - low) * random.uniform(size=n)
    if not _holds_whole_numbers(X, j):
        return drawn
    known = np.sort(known)
    middles = (known[:-1].astype(np.float64) + known[1:]) / 2
    return known[np.searchsorted(middles, drawn)]


def _holds_whole_numbers(X: Any, j: int) -> bool:
    """Whether a column is of whole numbers by its type: where some are missing, its values are an array of floats."""
    from pandas.api.types import is_integer_dtype

    return is_integer_dtype(X.dtypes.iloc[j] if hasattr(X, "iloc") else X.dtype)


def _distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    import pandas as pd

    # In order of appearance: values of an object column need not be sortable.
    return pd.unique(values[~pd.isna(values)])


def with_columns(X: Any, columns: Sequence[npt.NDArray[Any]]) -> Any:
    """Rows with the names and kinds of X's columns and other values."""
    if not hasattr(X, "iloc"):
        return np.column_stack(columns)
    import pandas as pd

    made = pd.DataFrame(dict(enumerate(columns)))
    made = made.astype(dict(enumerate(X.dtypes)))
    made.columns = X.columns
    return made
