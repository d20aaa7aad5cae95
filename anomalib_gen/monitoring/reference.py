"""The training reference: what a model's normal rows looked like, to compare later rows with.

It is one JSON file in the model folder, under the folder's hash: the scores of normal rows, and of each column its
distribution or categories and the share of missing values. Scores are those of rows that the detector was not trained
on, where there are some: those that `fit` held out, or those that ``calibrate`` was given. Scores of training rows look
too normal, and later rows would seem to have drifted from them.

No rows are kept, but values are: those of up to 1024 order statistics of each column, among them its extremes where the
rows are few, and the names of categories. Who may read a model folder may see them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomalib_gen import persistence
from anomalib_gen._outlier import is_below
from anomalib_gen.calibration._wrapped import innermost
from anomalib_gen.monitoring.distribution import MAX_COUNT, Distribution
from anomalib_gen.monitoring.summaries import Column, Summariser

FORMAT = "anomalib_gen training reference"
VERSION = 1
MAX_SCORES = 4096
"""Scores that are kept: a random sample, all of them where there are no more, so that rows can be permuted."""
MIN_HELD_OUT = 5
"""Held-out rows that are a reference, if one that tells only large changes; with fewer, the training rows are."""


@dataclass(frozen=True)
class Reference:
    """What normal rows looked like.

    Attributes
    ----------
    n_rows : int
        Rows that the columns are described from.
    columns : tuple of Column
    scores : Distribution
        Of normal rows, lower = more abnormal.
    n_scored, n_flagged : int
        Normal rows that were scored, and those of them below the threshold.
    held_out : bool
        Whether the scored rows were kept from training.
    threshold : float or None
        None for a threshold that flags nothing.
    """

    n_rows: int
    columns: tuple[Column, ...]
    scores: Distribution
    n_scored: int
    n_flagged: int
    held_out: bool
    threshold: float | None

    def column(self, name: str) -> Column:
        """Column of a name.

        Parameters
        ----------
        name : str

        Returns
        -------
        Column

        Raises
        ------
        KeyError
            If there is none.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    @property
    def flagged_rate(self) -> float:
        """Share of normal rows below the threshold."""
        return self.n_flagged / self.n_scored if self.n_scored else 0.0

    def to_bytes(self) -> bytes:
        """Strict JSON, of which there is one form.

        Returns
        -------
        bytes
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "rows": self.n_rows,
            "columns": [column.to_dict() for column in self.columns],
            "scores": self.scores.to_dict(),
            "scored": self.n_scored,
            "flagged": self.n_flagged,
            "held_out": self.held_out,
            "threshold": self.threshold,
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Reference of `to_bytes`.

        Parameters
        ----------
        data : bytes

        Returns
        -------
        Reference

        Raises
        ------
        ValueError
            If it is none, or of a later format.
        """
        try:
            document = json.loads(data)
            if document["format"] != FORMAT:
                raise ValueError("it is of another format")
            if document["version"] != VERSION:
                raise ValueError(
                    f"it has version {document['version']!r} of the format, and this anomalib_gen knows version "
                    f"{VERSION}"
                )
            counts = [document["rows"], document["scored"], document["flagged"]]
            threshold, held_out = document["threshold"], document["held_out"]
            if (
                not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts)
                or counts[2] > counts[1]
                or type(held_out) is not bool
                or not (threshold is None or (type(threshold) in (int, float) and np.isfinite(threshold)))
            ):
                raise ValueError("its counts are malformed")
            columns = tuple(Column.from_dict(column) for column in document["columns"])
            if len({column.name for column in columns}) < len(columns):
                raise ValueError("a column is there twice")
            return cls(
                n_rows=counts[0],
                columns=columns,
                scores=Distribution.from_dict(document["scores"]),
                n_scored=counts[1],
                n_flagged=counts[2],
                held_out=held_out,
                threshold=threshold,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"The training reference cannot be read: {error}.") from error


def reference_of(
    columns: Sequence[Column],
    scores: Any,
    *,
    threshold: float,
    held_out: bool,
    random_state: int = 0,
) -> Reference:
    """Reference from summaries of columns, and scores of normal rows.

    Parameters
    ----------
    columns : sequence of Column
    scores : array-like of shape (n_scored,)
    threshold : float
    held_out : bool
        Whether the detector was not trained on the scored rows.
    random_state : int, default=0
        Draws from the scores, where they are many.

    Returns
    -------
    Reference
    """
    s = np.asarray(scores, dtype=np.float64)
    kept = s[np.isfinite(s)]
    if len(kept) > MAX_SCORES:
        kept = np.random.default_rng(random_state).choice(kept, MAX_SCORES, replace=False)
    return Reference(
        n_rows=max((column.n_rows for column in columns), default=0),
        columns=tuple(columns),
        scores=Distribution.of(kept, MAX_SCORES),
        n_scored=len(s),
        n_flagged=int(is_below(s, threshold).sum()),
        held_out=held_out,
        threshold=float(threshold) if np.isfinite(threshold) else None,
    )


def build_reference(model: Any, X: Any) -> Reference:
    """Reference of a model from the rows it was fitted to.

    Parameters
    ----------
    model : fitted detector or pipeline
    X : array-like or data frame of shape (n_rows, n_columns)
        The rows that `fit` saw, in the same order: it is known from it which were held out.

    Returns
    -------
    Reference

    Raises
    ------
    ValueError
        If the model takes images.
    """
    inner = innermost(model)
    if len(getattr(inner, "event_shape_", ())) > 1:
        raise ValueError("A training reference describes columns of tables, and this model takes images.")
    frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(np.asarray(X))
    summariser = Summariser(max_rows=len(frame))
    summariser.add(frame.rename(columns=str))
    chosen = held_out_rows(inner, len(frame))
    held_out = len(chosen) >= MIN_HELD_OUT
    if not held_out:
        count = min(len(frame), MAX_SCORES)
        chosen = np.sort(np.random.default_rng(0).choice(len(frame), count, replace=False))
    rows = X.iloc[chosen] if isinstance(X, pd.DataFrame) else np.asarray(X)[chosen]
    return reference_of(
        summariser.columns(), model.score_samples(rows), threshold=inner.offset_, held_out=held_out
    )


def held_out_rows(detector: Any, n_rows: int) -> npt.NDArray[np.int64]:
    """Positions of the rows that a detector was not trained on, of those given to `fit` without weights."""
    if not hasattr(detector, "_split") or not hasattr(detector, "_seeds"):
        return np.empty(0, dtype=np.int64)
    found: npt.NDArray[np.int64] = detector._split(n_rows, np.random.RandomState(detector._seeds[0]))[1]
    return found


def load_reference(folder: str | PathLike[str]) -> Reference | None:
    """Training reference of a model folder.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    Reference or None
        None for a folder without one. Folders that ``anomalib-gen fit`` or ``anomalib-gen calibrate`` wrote have one.

    Raises
    ------
    ModelFolderError
        If the folder or the reference is damaged.
    FileNotFoundError
        If there is no such folder.
    """
    data = persistence.read_reference(folder)
    if data is None:
        return None
    try:
        return Reference.from_bytes(data)
    except ValueError as error:
        raise persistence.ModelFolderError(str(error)) from error
