"""What a model wants to know of a row, and how the columns of files become that.

Types are those of the model's schema: "float", "integer", "boolean", "text" and "time". Columns of CSV files come as
text and are turned into numbers here, value by value where need be, so that one bad value costs one row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from anomalib_gen.scoring._errors import DataError, UsageError

NUMBERS = ("float", "integer", "boolean")
_NUMBER = (
    r"^[+-]?([0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|inf|infinity|nan|Inf|Infinity|NaN)$"
)
SHOWN = 20
"""Columns named in a message."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Columns that a run takes from each file.

    Attributes
    ----------
    names : tuple of str or None
        Of the model's columns; None for a model that was fitted to columns without names, which takes all that are no
        keys, in the file's order.
    count : int
        The model's columns.
    types : tuple of str or None
        Of each.
    keys : tuple of str
        Columns that are carried over to the output.
    """

    names: tuple[str, ...] | None
    count: int
    types: tuple[str | None, ...]
    keys: tuple[str, ...] = ()


def wanted_by(schema: dict[str, Any], keys: tuple[str, ...], model: Any) -> Wanted:
    """Columns that a model with a schema wants."""
    columns = schema["columns"]
    if columns is None:
        count = int(model.n_features_in_)
        return Wanted(None, count, (None,) * count, keys)
    names = tuple(column["name"] for column in columns) if schema["named"] else None
    if len(set(keys)) != len(keys):
        raise UsageError("--key names a column twice.")
    return Wanted(names, len(columns), tuple(column["type"] for column in columns), keys)


def choose(wanted: Wanted, file_schema: pa.Schema, path: str) -> list[str]:
    """Names of the model's columns in a file.

    Raises
    ------
    DataError
        If columns are missing or are of another type than the model was fitted to.
    """
    present = file_schema.names
    odd = len(present) == 1 and any(mark in present[0] for mark in ";|\t,")
    hint = " Fields of .csv are separated by commas, and those of .tsv by tabs." if odd else ""
    missing_keys = [key for key in wanted.keys if key not in present]
    if missing_keys:
        raise DataError(f"{path} has no column {_listed(missing_keys)}. It has {_listed(present)}.{hint}")
    if wanted.names is None:
        names = [name for name in present if name not in wanted.keys]
        if len(names) != wanted.count:
            raise DataError(
                f"{path} has {len(names)} columns that are no keys, and the model takes {wanted.count}. It knows no "
                "names, so all of them are meant: name the others with --key, where the command has it, or fit it on "
                "named columns."
            )
    else:
        names = list(wanted.names)
        missing = [name for name in names if name not in present]
        if missing:
            raise DataError(
                f"{path} lacks the column{'s' if len(missing) > 1 else ''} {_listed(missing)}, which the model needs. "
                f"It has {_listed(present)}.{hint}"
            )
    doubled = sorted({name for name in [*names, *wanted.keys] if present.count(name) > 1})
    if doubled:
        raise DataError(f"{path} has the column {_listed(doubled)} more than once.")
    return names


def check_types(wanted: Wanted, names: list[str], file_schema: pa.Schema, path: str) -> None:
    """Compare the types of a file that has types with those the model was fitted to.

    Raises
    ------
    DataError
        If a column is of another kind.
    """
    for name, fitted in zip(names, wanted.types, strict=True):
        found = kind_of(file_schema.field(name).type)
        if pa.types.is_null(file_schema.field(name).type):
            # A column in which every value is missing, as pandas writes it: of whatever type.
            continue
        if fitted is None or found is None:
            if found is None:
                raise DataError(
                    f"Column {name!r} of {path} is of type {file_schema.field(name).type}, which no model takes."
                )
            continue
        if (fitted in NUMBERS) != (found in NUMBERS) or (fitted not in NUMBERS and found != fitted):
            raise DataError(
                f"Column {name!r} of {path} has the type {file_schema.field(name).type}, and the model was fitted to "
                f"{fitted}. Convert the column, or fit the model again."
            )


def kind_of(kind: pa.DataType) -> str | None:
    """Type of a schema that an Arrow type stands for, or None."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind):
        return "boolean"
    if types.is_integer(kind):
        return "integer"
    if types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind):
        return "float"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_timestamp(kind) or types.is_date(kind):
        return "time"
    return None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Type without the ways in which files store the same values: dictionaries, and text of several kinds."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if kind_of(kind) == "text" else kind


def to_frame(
    table: pa.Table, names: list[str], types: tuple[str | None, ...]
) -> tuple[pd.DataFrame, dict[int, str]]:
    """Columns of a table as a model takes them, and the reason for each row where one has no such value.

    Returns
    -------
    frame : DataFrame
        Bad values are missing.
    bad : dict of int to str
        By position.
    """
    columns: dict[str, Any] = {}
    bad: dict[int, str] = {}
    for name, kind in zip(names, types, strict=True):
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if kind in NUMBERS or (kind is None and kind_of(column.type) != "text"):
            columns[name] = _numbers(column, name, kind, bad)
        elif kind == "time":
            columns[name] = _times(column, name, bad)
        elif kind is None:
            # Text in a file, and a model that does not say what it was fitted to: numbers, where they can be.
            trial: dict[int, str] = {}
            numbers = _numbers(column, name, kind, trial)
            columns[name] = numbers if len(trial) < len(column) or not len(column) else column.to_pandas()
            bad |= trial if len(trial) < len(column) else {}
        else:
            columns[name] = column.cast(pa.string()).to_pandas()
    return pd.DataFrame(columns), bad


def _numbers(column: pa.Array, name: str, kind: str | None, bad: dict[int, str]) -> Any:
    if kind_of(column.type) == "text":
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        if kind == "boolean":
            text = pc.utf8_lower(text)
            text = pc.if_else(pc.equal(text, "true"), "1", pc.if_else(pc.equal(text, "false"), "0", text))
        fits = pc.fill_null(pc.match_substring_regex(text, _NUMBER), True)
        for row in np.flatnonzero(~fits.to_numpy(zero_copy_only=False)):
            bad.setdefault(int(row), f"column {name!r}: {str(column[int(row)])[:40]!r} is no number")
        # (Arrow does not take the sign of positive numbers.)
        text = pc.replace_substring_regex(text, r"^\+", "")
        column = pc.cast(pc.if_else(fits, text, pa.scalar(None, pa.string())), pa.float64())
    values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    # Whole numbers stay whole, and flags flags, for what compares them with values that it has seen.
    if kind in ("integer", "boolean") and np.isfinite(values).all() and (values == np.trunc(values)).all():
        if kind == "boolean" and np.isin(values, (0, 1)).all():
            return values.astype(bool)
        if (np.abs(values) < 2**53).all():
            return values.astype(np.int64)
    return values


def _times(column: pa.Array, name: str, bad: dict[int, str]) -> Any:
    times = pd.to_datetime(column.to_pandas(), errors="coerce")
    lost = pd.isna(times).to_numpy() & ~column.is_null().to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(lost):
        bad.setdefault(int(row), f"column {name!r}: {str(column[int(row)])[:40]!r} is no time")
    return times


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown or "none"
