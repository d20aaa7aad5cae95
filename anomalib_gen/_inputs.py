"""Rows as they come from users: checked, and refused with a message that names the column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import validate_data

from anomalib_gen._runtime import row_blocks
from anomalib_gen._scaling import rows_per_block
from anomalib_gen._warnings import warn_user

MIN_SIDE = 8
"""Smallest height and width of images: below this they are tables of a few columns."""
SHOWN = 10
"""Columns named in a message; the others are counted."""
TIMES = ("date", "time", "duration", "period")
"""What the names of types of dates, times and spans of time begin with, in numpy, pandas, polars and pyarrow."""


def validate_rows(detector: Any, X: Any, *, reset: bool, min_rows: int) -> npt.NDArray[Any]:
    """Check a table and return it as float32 or float64, without a copy where it is so already.

    Images of 8 bits stay uint8.

    Parameters
    ----------
    detector : estimator
        Whose number and names of columns are set (`reset`) or compared, and `event_shape_` and `_eight_bit` compared
        where it has them.
    X : array-like or data frame of shape (n, D), or array-like of shape (n, channels, height, width)
    reset : bool
    min_rows : int

    Raises
    ------
    ValueError, TypeError
        As scikit-learn's `validate_data`, but naming columns that are no numbers or not finite, and telling what is
        wrong with the shape or the values of images.
    """
    refuse_hidden(X)
    images = count_dimensions(X) == 4
    if images:
        X = stack_images(X)
        check_images(detector, X, reset=reset)
        if reset:
            warn_of_whole_numbers(X)
    elif not reset and len(getattr(detector, "event_shape_", ())) == 3:
        wanted = ", ".join(str(size) for size in detector.event_shape_)
        hint = " Of one image that is X[None]." if np.shape(X) == tuple(detector.event_shape_) else ""
        raise ValueError(
            f"{type(detector).__name__} was fitted on images of shape ({wanted}), (channels, height, width), and is "
            f"given an array of {count_dimensions(X)} dimensions. Give an array (n, {wanted}).{hint}"
        )
    try:
        checked = validate_data(
            detector,
            X,
            reset=reset,
            dtype=[np.float64, np.float32, *([np.uint8] if images else [])],
            ensure_all_finite=False,
            ensure_min_samples=min_rows,
            allow_nd=images,
        )
    except (TypeError, ValueError) as error:
        if count_dimensions(X) == 3:
            raise ValueError(
                f"{error} If these are grey images (n, height, width), put anomalib_gen.images.ChannelsFirst() before "
                "the detector."
            ) from error
        message = describe_non_numeric(X)
        if message is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{message} ({str(error).splitlines()[0]})") from error
    bad = np.zeros(checked.shape[1:], dtype=bool)
    missing = False
    for block in row_blocks(len(checked), rows_per_block(int(np.prod(checked.shape[1:])))):
        finite = np.isfinite(checked[block])
        if not finite.all():
            if images:
                first = block.start + int(np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))[0])
                raise ValueError(
                    f"Input X contains NaN or infinity in image {first}. Finite numbers are needed. "
                    "Drop such images, or fill the pixels."
                )
            bad |= ~finite.all(axis=0)
            missing |= bool(np.isnan(checked[block]).any())
    if bad.any():
        names = getattr(detector, "feature_names_in_", None)
        raise ValueError(describe_non_finite(bad, names, missing=missing))
    return checked


def refuse_hidden(X: Any) -> None:
    """Refuse rows that numpy would turn into numbers other than those that they stand for.

    It reads dates as nanoseconds (and a missing one as -9e18), and what a mask hides as if it were not masked.

    Raises
    ------
    TypeError
        If columns hold dates or times, or rows are not read yet.
    ValueError
        If values are masked.
    """
    if hasattr(X, "collect_schema") and hasattr(X, "collect"):
        raise TypeError(f"X is a {type(X).__name__}, whose rows are not read yet. Call X.collect() first.")
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        hidden = np.ma.getmaskarray(X)
        where = f"image {int(np.flatnonzero(hidden.reshape(len(X), -1).any(axis=1))[0])}"
        if X.ndim <= 2:
            where = name_columns([str(j) for j in np.flatnonzero(np.atleast_2d(hidden).any(axis=0))])
        raise ValueError(
            f"X is a masked array with masked values in {where}. Fill them first, e.g. X.filled(numpy.nan) and "
            "sklearn.impute.SimpleImputer in a pipeline."
        )
    if _holds_times(X):
        raise TypeError(describe_non_numeric(X))


def _holds_times(X: Any) -> bool:
    """Whether columns of a table hold dates or times, by their types alone."""
    if hasattr(X, "iloc") and hasattr(X, "columns"):
        types: Any = X.dtypes
    elif hasattr(X, "column_names"):
        types = X.schema.types
    elif hasattr(X, "schema"):  # polars, and narwhals around any of them
        types = X.schema.values()
    else:
        types = [X.dtype] if isinstance(X, np.ndarray) and X.ndim == 2 else []
    return any(str(kind).lower().startswith(TIMES) for kind in types)


def column_names(X: Any) -> list[Any] | None:
    """Names of the columns of a data frame of pandas, polars or pyarrow; None for anything else."""
    names = X.column_names if hasattr(X, "column_names") else getattr(X, "columns", None)
    return None if names is None else list(names)


def as_pandas(X: Any) -> Any:
    """Data frames of other libraries as those of pandas, column by column; anything else as it is."""
    names = column_names(X)
    if names is None or hasattr(X, "iloc"):
        return X
    import pandas as pd

    return pd.DataFrame({name: _values_of(X[name]) for name in names})


def _values_of(column: Any) -> Any:
    """Values of a column of polars or pyarrow for pandas, whole numbers as such where some are missing."""
    values = np.asarray(column)
    kind = str(getattr(column, "dtype", getattr(column, "type", ""))).lower()
    # As an array they are floats then, with NaN.
    if values.dtype.kind != "f" or not kind.startswith(("int", "uint")):
        return values
    import pandas as pd

    return pd.arrays.IntegerArray(np.array(column.fill_null(0)), np.array(column.is_null()))


def as_kind_of(rows: Any, X: Any) -> Any:
    """Rows ``(n, D)`` as a data frame of the library, the names and the index of X; an array if X is one."""
    names = column_names(X)
    if names is None:
        return np.asarray(rows)
    if hasattr(X, "iloc"):
        return rows if hasattr(rows, "iloc") else type(X)(rows, columns=X.columns, index=X.index)
    # Value by value: a library is to find the types of columns out by itself.
    values = np.asarray(rows).T.tolist()
    make: Any = getattr(type(X), "from_pydict", type(X))
    return make(dict(zip(names, values, strict=True)))


def count_dimensions(X: Any) -> int:
    """Dimensions of an array, or of a nested list, without a look at more than the first of each."""
    n = 0
    while not hasattr(X, "ndim"):
        if not isinstance(X, list | tuple) or len(X) == 0:
            return n
        X, n = X[0], n + 1
    return n + int(X.ndim)


def stack_images(X: Any) -> npt.NDArray[Any]:
    """Images as one array.

    Raises
    ------
    ValueError
        If they are a list of arrays of different shapes, naming the first that differs.
    """
    try:
        return np.asarray(X)
    except ValueError as error:
        shapes = [getattr(image, "shape", None) for image in X]
        k = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None)
        if k is None:
            raise
        raise ValueError(
            f"X holds images of different shapes: {shapes[0]}, and {shapes[k]} at position {k}. Resize or convert them "
            "alike; anomalib_gen.images.ImageReader(size=...) does so with files."
        ) from error


def check_images(detector: Any, X: npt.NDArray[Any], *, reset: bool) -> None:
    """Refuse images ``(n, channels, height, width)`` that are not laid out so, or unlike those of `fit`.

    Raises
    ------
    ValueError
        With what is wrong and how to put it right.
    """
    channels, height, width = X.shape[1:]
    if min(height, width) < MIN_SIDE or channels < 1:
        hint = ""
        if width < min(channels, height, MIN_SIDE):
            hint = (
                f" If these are channels-last images, {channels} x {height} with {width} channels, put "
                "anomalib_gen.images.ChannelsFirst() before the detector."
            )
        elif height in (1, 3) and min(channels, width) >= MIN_SIDE:
            hint = (
                f" If these were channels-first images, {width} x {channels} with {height} "
                f"channel{'s' if height > 1 else ''}, that went through anomalib_gen.images.ChannelsFirst(), leave it "
                "out: it takes channels-last images."
            )
        raise ValueError(
            f"X has shape {X.shape}, which is read as (images, channels, height, width); height and width must be at "
            f"least {MIN_SIDE}.{hint}"
        )
    if reset:
        return
    known = getattr(detector, "event_shape_", None)
    if known is not None and tuple(X.shape[1:]) != tuple(known):
        kind = "(channels, height, width)" if len(known) == 3 else "one row"
        raise ValueError(
            f"X has images of shape {X.shape[1:]}, but {type(detector).__name__} was fitted on {tuple(known)}, {kind}. "
            "Resize or convert them alike, e.g. with anomalib_gen.images.ImageReader."
        )
    eight_bit = getattr(detector, "_eight_bit", None)
    if eight_bit is not None and eight_bit != (X.dtype == np.uint8):
        fitted = "uint8 images, 0 to 255" if eight_bit else "images of real numbers"
        raise ValueError(
            f"{type(detector).__name__} was fitted on {fitted}, and X is {X.dtype}: its units may differ. "
            f"Give {'uint8' if eight_bit else 'floating-point'} images in the units of `fit`."
        )


def warn_of_whole_numbers(X: npt.NDArray[Any]) -> None:
    """Warn of images that hold grey levels of 8 bits in another type, in which they are taken for real numbers.

    Zeros and ones are no grey levels.
    """
    if X.size == 0 or X.dtype.kind not in "iu" or X.dtype == np.uint8:
        return
    low, high = int(X.min()), int(X.max())
    if low >= 0 and 1 < high <= 255:
        warn_user(
            f"X has images of whole numbers from {low} to {high} in {X.dtype}, which are taken for real numbers and "
            "not spread over their cells. Give X.astype(numpy.uint8) if these are grey levels of 8 bits, or "
            "X.astype(float) to silence this."
        )


def require_binary(detector: Any, X: npt.NDArray[Any]) -> None:
    """Refuse a checked table ``(n, D)``, or images, with values other than 0 and 1, naming the columns.

    Raises
    ------
    ValueError
        With a value of each such column.
    """
    if X.ndim > 2:
        for block in row_blocks(len(X), rows_per_block(int(np.prod(X.shape[1:])))):
            other = (X[block] != 0) & (X[block] != 1)
            if other.any():
                raise ValueError(
                    f"observation='bernoulli' needs zeros and ones, but there is {X[block][other][0]:g} in an image. "
                    "Choose another observation, or threshold the images."
                )
        return
    bad: dict[int, float] = {}
    for block in row_blocks(len(X), rows_per_block(X.shape[1])):
        other = (X[block] != 0) & (X[block] != 1)
        for j in np.flatnonzero(other.any(axis=0)):
            bad.setdefault(int(j), float(X[block][other[:, j], j][0]))
    if bad:
        names = getattr(detector, "feature_names_in_", None)
        shown = [f"{j if names is None else repr(str(names[j]))} (e.g. {bad[j]:g})" for j in sorted(bad)]
        raise ValueError(
            f"observation='bernoulli' needs zeros and ones, but there are other values in {name_columns(shown)}. "
            "Choose another observation, or turn those columns into flags."
        )


def name_columns(shown: Sequence[str]) -> str:
    """Return ``column 'a'`` or ``columns 'a', 'b' and 3 more`` from columns as they are to be shown."""
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"column{'s' if len(shown) > 1 else ''} {', '.join(shown[:SHOWN])}{more}"


def describe_non_finite(bad: npt.NDArray[np.bool_], names: Any, *, missing: bool) -> str:
    """Say which columns hold NaN or infinity, and what to do.

    Parameters
    ----------
    bad : ndarray of bool, of an event's shape
    names : sequence of str or None
        Names of the columns; None shows their positions.
    missing : bool
        Whether there is NaN among the values, not only infinity.
    """
    columns = [str(j) if names is None else repr(str(names[j])) for j in np.flatnonzero(bad)]
    what, advice = "infinity", "Replace infinite values, or drop those rows."
    if missing:
        what = "NaN"
        advice = "Fill missing values first, e.g. with sklearn.impute.SimpleImputer in a pipeline."
    return f"Input X contains {what} in {name_columns(columns)}. Finite numbers are needed. {advice}"


def describe_non_numeric(X: Any) -> str | None:
    """Say which columns are no numbers, with a value of each, and what to do; None if all seem to be numbers."""
    bad = []
    missing = times = False
    for name, values in _columns(X):
        if values.dtype.kind in "biuf":
            continue
        if values.dtype.kind == "c":
            bad.append(f"{name} (complex)")
            continue
        if values.dtype.kind in "mM":
            bad.append(f"{name} (dates or times)")
            times = True
            continue
        for value in values:
            try:
                float("nan" if value is None else value)
            except (TypeError, ValueError):
                if type(value).__name__.lower().startswith(TIMES):  # with a time zone they are objects
                    times = True
                    bad.append(f"{name} (dates or times)")
                elif type(value).__name__ == "NAType":
                    missing = True
                    bad.append(f"{name} (pandas.NA among objects)")
                else:
                    bad.append(f"{name} (e.g. {str(value)[:30]!r})")
                break
    if not bad:
        return None
    advice = (
        "Encode text, e.g. with sklearn.preprocessing.OneHotEncoder in a ColumnTransformer, split other things into "
        "numbers, or drop those columns."
    )
    if times:
        advice += " Of a date that may be the weekday, or the days since another one."
    if missing:
        advice += (
            " X.convert_dtypes() finds the types of columns of objects, and turns missing values into NaN."
        )
    return f"Input X has values that are not real numbers in {name_columns(bad)}. {advice}"


def _columns(X: Any) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Columns of a table of whatever kind, each with its name, or its position where there are none."""
    if hasattr(X, "iloc") and hasattr(X, "columns"):  # pandas, where names may repeat
        for j, name in enumerate(X.columns):
            yield repr(str(name)), np.asarray(X.iloc[:, j])
    elif hasattr(X, "column_names") or hasattr(X, "columns"):  # pyarrow, polars
        for name in X.column_names if hasattr(X, "column_names") else X.columns:
            yield repr(str(name)), np.asarray(X[name])
    else:
        try:
            array = X if isinstance(X, np.ndarray) else np.asarray(X, dtype=object)
        except ValueError:  # ragged: the error that led here says it better
            return
        if array.ndim == 2:
            for j in range(array.shape[1]):
                yield str(j), array[:, j]
