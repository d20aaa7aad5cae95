"""A saved model, and the scores of rows that may be bad."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomalib_gen import persistence
from anomalib_gen.calibration import _wrapped
from anomalib_gen.calibration._wrapped import innermost
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error


def load_model(folder: str, trusted: Collection[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Model of a folder, and what the folder says of itself.

    Parameters
    ----------
    folder : str
    trusted : list of str, default=()
        As for `persistence.load`.

    Raises
    ------
    DataError
        If there is none, or it is damaged or scores no rows.
    """
    try:
        model, facts = persistence.load_described(folder, trusted=trusted)
    except (ModelFolderError, OSError) as error:
        raise DataError(for_command_line(error)) from None
    if not hasattr(model, "score_samples"):
        raise DataError(f"{folder} holds a {type(model).__name__}, which scores no rows.")
    shape = tuple(getattr(detector_in(model), "event_shape_", ()))
    if len(shape) > 1:
        raise DataError(
            f"{folder} holds a detector of images of {' x '.join(map(str, shape))}, and files have rows of columns. "
            "Score images in Python: anomalib_gen.load(folder).score_samples(images)."
        )
    return model, facts


def for_command_line(error: Exception) -> str:
    """Message about a model folder, with what is to be done in the words of the command line."""

    def as_options(found: re.Match[str]) -> str:
        return "add " + " ".join(f"--trusted {path}" for path in re.findall(r"'([^']*)'", found[1]))

    return re.sub(r"(?:save and )?load with trusted=\[([^]]*)\]", as_options, str(error))


def check_folder(folder: str, *, overwrite: bool) -> None:
    """Refuse a place where no model folder can be written, before hours of work.

    Raises
    ------
    UsageError, DataError
    """
    try:
        persistence.check_place(folder, overwrite=overwrite)
    except (FileExistsError, ModelFolderError) as error:
        raise UsageError(str(error).replace("overwrite=True", "--overwrite")) from None
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from None


def detector_in(model: Any) -> Any:
    """The detector inside pipelines, frozen wrappers and those of `calibration`."""
    while True:
        inner = innermost(model)
        inner = getattr(inner, "estimator_", inner) if hasattr(inner, "score_direction") else inner
        if inner is model:
            return model
        model = inner


def threshold_of(model: Any) -> float:
    """Score below which a row is flagged; minus infinity flags none.

    Raises
    ------
    DataError
        If the model has none: some that score rows flag none.
    """
    threshold = _wrapped.threshold_of(model)
    if threshold is None:
        raise DataError(
            f"A {type(innermost(model)).__name__} has no threshold. Give it one: `anomalib-gen calibrate`."
        )
    return threshold


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity: a threshold that flags nothing is None."""
    return float(value) if np.isfinite(value) else None


def score_rows(
    model: Any, frame: pd.DataFrame, *, named: bool, limit: int
) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
    """Score rows that may be bad.

    Parameters
    ----------
    model : detector or pipeline
    frame : DataFrame
    named : bool
        Whether the model knows names of columns.
    limit : int
        Stop looking for bad rows after more than so many.

    Returns
    -------
    scores : ndarray of shape (n_rows,)
        NaN for bad rows.
    bad : dict of int to str
        Why the model refuses a row, by position.
    """
    scores = np.full(len(frame), np.nan)
    bad: dict[int, str] = {}
    if frame.empty:
        return scores, bad

    def attempt(rows: npt.NDArray[np.int64]) -> Exception | None:
        part = frame.iloc[rows] if len(rows) < len(frame) else frame
        try:
            scores[rows] = model.score_samples(part if named else part.to_numpy())
        except (ValueError, TypeError, ArithmeticError) as error:
            return error
        return None

    def divide(rows: npt.NDArray[np.int64], error: Exception) -> None:
        """Find the bad ones among rows that together were refused."""
        if len(bad) > limit:
            return
        if len(rows) == 1:
            bad[int(rows[0])] = str(error).strip().splitlines()[0][:300]
            return
        for half in np.array_split(rows, 2):
            if again := attempt(half):
                divide(half, again)

    everything = np.arange(len(frame))
    if (error := attempt(everything)) is None:
        return scores, bad
    # Rows with the same columns missing or infinite fare alike, as a rule.
    odd = np.column_stack([_is_odd(frame[name]) for name in frame])
    patterns, group = np.unique(odd, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.reshape(-1) == number)
        error = attempt(rows)
        if error is None:
            continue
        if pattern.any():
            names = ", ".join(repr(name) for name, is_odd in zip(frame, pattern, strict=True) if is_odd)
            reason = f"missing or infinite in {names}"
            bad.update((int(row), reason) for row in rows)
        else:
            divide(rows, error)
    scores[list(bad)] = np.nan
    return scores, bad


def _is_odd(column: pd.Series[Any]) -> npt.NDArray[np.bool_]:
    if column.dtype.kind == "f":
        return ~np.isfinite(column.to_numpy())
    return column.isna().to_numpy()
