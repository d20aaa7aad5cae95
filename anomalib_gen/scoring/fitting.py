"""A model from files: read them, fit a detector, save it with the rows' schema."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from anomalib_gen import persistence
from anomalib_gen._base import GenerativeDetector
from anomalib_gen.benchmark.detectors import parse_detector
from anomalib_gen.monitoring import build_reference
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.scoring._columns import NUMBERS, kind_of
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.config import FitOptions
from anomalib_gen.scoring.rows import check_folder
from anomalib_gen.scoring.sources import (
    Input,
    add_partition,
    find_inputs,
    open_dataset,
    open_text,
    parse_text,
    unreadable,
)

MIN_KEYS = 50
"""Rows from which on a text that is another in every row is taken for a key."""


def make_detector(text: str, seed: int) -> Any:
    """Detector that a command line names, such as ``anomalib_gen.VAEDetector(n_components=3)``.

    Raises
    ------
    UsageError
        If it is none of this package.
    """
    try:
        chosen = parse_detector(text)
        cls = chosen.resolve()
        if not issubclass(cls, GenerativeDetector):
            raise TypeError(
                f"{chosen.path} is no detector that fits itself to rows. Use one of anomalib_gen."
            )
        detector = chosen.build(seed=seed, n_features=0)
        detector._validate_params()
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"--detector {text}: {error}") from None
    return detector


def fit_files(options: FitOptions, log: Log) -> str:
    """Fit a detector to files and save it; return the content hash.

    Text is one-hot encoded and missing numbers are filled with the median, in a pipeline before the detector, where
    there are any.

    Raises
    ------
    UsageError, DataError
        As the exit codes say.
    """
    folder = options.model
    if os.path.lexists(folder) and not options.overwrite:
        raise UsageError(f"{folder} exists already. Choose another folder, or replace it with --overwrite.")
    check_folder(folder, overwrite=options.overwrite)
    detector = make_detector(options.detector, options.seed)
    frame = read_frame(find_inputs(options.input), options.columns, options.exclude, log)
    log.info(f"read {len(frame)} rows of {frame.shape[1]} columns", rows=len(frame), columns=list(frame))
    model = with_encoding(detector, frame, log)
    asked = detector.verbose
    try:
        # (No part of the model, which is the same whoever looks on.)
        detector.set_params(verbose=asked or int(log.shows_progress))
        model.fit(frame)
    except (ValueError, TypeError, FloatingPointError) as error:
        raise DataError(f"The detector cannot be fitted: {error}") from None
    finally:
        detector.set_params(verbose=asked)
    try:
        reference = build_reference(model, frame).to_bytes()
        content = persistence.save_described(
            model, folder, X=frame, reference=reference, overwrite=options.overwrite
        )
    except FileExistsError as error:
        raise UsageError(str(error).replace("overwrite=True", "--overwrite")) from None
    except ModelFolderError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from None
    log.info(f"saved {folder}, hash {content}", model=folder, hash=content)
    return content


def read_frame(
    inputs: list[Input], columns: tuple[str, ...] | list[str], exclude: Any, log: Log
) -> pd.DataFrame:
    """All rows of files, which must have the same columns.

    Raises
    ------
    DataError
        If a file cannot be read or has other columns than the first.
    """
    tables: list[pa.Table] = []
    needed = set(columns).__contains__ if columns else lambda name: name not in exclude
    with log.progress("rows") as bar:
        for item in inputs:
            try:
                table = _read(item, needed)
            except Exception as error:
                raise unreadable(error, item.path) from None
            names = list(columns) or [name for name in table.column_names if name not in exclude]
            missing = [name for name in [*names, *exclude] if name not in table.column_names]
            if missing:
                raise DataError(
                    f"{item.path} has no column {missing[0]!r}. It has {', '.join(table.column_names)}."
                )
            if tables and names != tables[0].column_names and set(names) != set(tables[0].column_names):
                raise DataError(f"{item.path} has other columns than {inputs[0].path}.")
            tables.append(table.select(tables[0].column_names if tables else names))
            bar.update(len(table))
    for field in tables[0].schema:
        if kind_of(field.type) is None:
            raise DataError(
                f"Column {field.name!r} is of type {field.type}. Leave it out with --exclude {field.name}."
            )
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"The files have columns of different types: {str(error).splitlines()[0]}") from None
    if not whole.num_rows or not whole.num_columns:
        raise DataError("The files have no rows, or no columns are left.")
    plain = pa.table({name: _plain(whole.column(name)) for name in whole.column_names})
    # (An index that pandas wrote is none of the columns.)
    frame = plain.replace_schema_metadata(whole.schema.metadata).to_pandas()
    gappy = [name for name in frame if pa.types.is_boolean(whole.field(name).type) and frame[name].hasnans]
    return frame.astype(dict.fromkeys(gappy, "boolean"))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as `score` will read them, which pandas would have as objects: decimals, for one."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kind_of(column.type) == "float" and column.type not in (pa.float32(), pa.float64()):
        return column.cast(pa.float64(), safe=False)
    return column


def _read(item: Input, needed: Callable[[str], bool]) -> pa.Table:
    if not item.is_text:
        return add_partition(open_dataset(item).to_table(), item)
    # Types are guessed from the first block.
    convert = pacsv.ConvertOptions(strings_can_be_null=True)
    with open_text(item, needed, block_bytes=2**26) as text:
        try:
            tables = list(parse_text(text, item, convert))
        except pa.ArrowInvalid:
            if not text.bad:
                raise
    if text.bad:
        reason, _ = next(iter(text.bad.values()))
        raise DataError(f"{item.path} has a bad row: {reason}. Mend it and run again.")
    table = pa.concat_tables(tables) if tables else pa.table({name: pa.nulls(0) for name in text.names})
    return add_partition(table, item)


def with_encoding(detector: Any, frame: pd.DataFrame, log: Log) -> Any:
    """The detector, behind a column transformer where there are columns that it cannot take."""
    kinds = {str(name): kind_of(pa.Array.from_pandas(frame[name]).type) for name in frame}
    if times := [name for name, kind in kinds.items() if kind == "time"]:
        raise DataError(
            f"Column {times[0]!r} holds times. Turn it into numbers (hour, weekday, seconds), or leave it out "
            f"with --exclude {times[0]}."
        )
    text = [name for name, kind in kinds.items() if kind not in NUMBERS]
    counts = {name: frame[name].nunique() for name in text}
    for name, different in counts.items():
        if len(frame) >= MIN_KEYS and different == len(frame):
            raise DataError(
                f"Column {name!r} has another text in every row, like a key, and would become {different:,} columns. "
                f"Leave it out with --exclude {name}."
            )
    # (Of which a median would be made every time, with a warning that nothing is there.)
    empty = [name for name in kinds if name not in text and frame[name].isna().all()]
    gaps = [name for name in kinds if name not in {*text, *empty} and frame[name].isna().any()]
    rest = [name for name in kinds if name not in {*text, *empty, *gaps}]
    if empty:
        log.warning(f"no row has a value in {', '.join(empty)}: the detector does not see it", columns=empty)
    if len(empty) == len(kinds):
        raise DataError("No column has a value.")
    if not text and not gaps and not empty:
        return detector
    steps: list[Any] = [("passthrough", rest)] if rest else []
    if gaps:
        steps.append((SimpleImputer(strategy="median"), gaps))
        log.info(f"missing values are filled with the median in {', '.join(gaps)}", columns=gaps)
    if text:
        steps.append((OneHotEncoder(handle_unknown="ignore", sparse_output=False), text))
        named = ", ".join(f"{name} ({count(counts[name], 'category', 'categories')})" for name in text)
        log.info(f"text is one-hot encoded in {named}", columns=text)
    return make_pipeline(make_column_transformer(*steps), detector)
