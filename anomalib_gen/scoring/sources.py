"""Files, folders and globs as parts of a fixed number of rows.

A part is the unit of work: what is read, scored, written and, after a kill, not done again. Where parts begin depends
on the file and on the number of columns alone, never on how fast something was, so that two runs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as papq

from anomalib_gen.scoring._columns import Wanted, check_types, choose, plain_type, to_frame
from anomalib_gen.scoring._errors import DataError, ScoringError, UsageError
from anomalib_gen.scoring.text import SHOWN_CHARACTERS, CheckedText

VALUES_PER_PART = 2**22
"""Values of a part: some tens of megabytes."""
MAX_ROWS_PER_PART = 2**17
FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".feather": "feather",
    ".arrow": "feather",
    ".ipc": "feather",
}
TEXTS = {".csv": ",", ".tsv": "\t"}
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
"""Of compressed text, by the ending."""
CSV_BLOCK_BYTES = 2**22
READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError, ValueError)
"""What reading a damaged file may raise."""
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
"""Value in the name of a folder that stands for a missing one."""
NO_VALUES = pa.array(pacsv.ConvertOptions().null_values)
"""What stands for a missing value in text."""


@dataclasses.dataclass(frozen=True)
class Input:
    """A file to read.

    Attributes
    ----------
    path : str
        As the user would name it.
    place : str
        Path within the file system.
    kind : {"parquet", "feather", ",", tab}
        Format; of text the separator.
    size, mtime : int
        Bytes, and time of the last change in nanoseconds (0 where unknown).
    filesystem : pyarrow.fs.FileSystem
    partition : dict of str to pyarrow.Scalar
        Values of the columns that the file's folders are named after, ``name=value``.
    """

    path: str
    place: str
    kind: str
    size: int
    mtime: int
    filesystem: Any = dataclasses.field(compare=False, repr=False, default=None)
    partition: dict[str, pa.Scalar] = dataclasses.field(compare=False, repr=False, default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether the file is CSV or the like, without types of its own."""
        return self.kind in TEXTS.values()


def kind_of_file(name: str) -> str | None:
    """Format of a file by its name, or None."""
    stem, ending = os.path.splitext(name.lower())
    if ending in CODECS:
        return TEXTS.get(os.path.splitext(stem)[1])
    return TEXTS.get(ending) or FORMATS.get(ending)


def find_inputs(patterns: Sequence[str]) -> list[Input]:
    """Files that paths, folders and globs name, in order of the patterns and then of their names, each once.

    A folder or a glob stands for all files of a known format; names that begin with a dot or an underscore are left
    out, as is customary. ``scheme://`` paths are opened by fsspec.

    Raises
    ------
    DataError
        If a pattern names nothing, or a file of an unknown format.
    UsageError
        If no file system is installed for a scheme.
    """
    found: dict[str, Input] = {}
    for pattern in patterns:
        try:
            here = _find(pattern)
        except UnicodeError:
            raise DataError(
                f"{shown_path(pattern)} names a file whose name is no UTF-8, and such files cannot be read. Rename it."
            ) from None
        except Exception as error:
            raise unreadable(error, pattern) from None
        if not here:
            raise DataError(
                f"{pattern} names no file. Files end in .parquet, .feather, .arrow, .csv or .csv.gz."
            )
        for item in here:
            # (However its path is written.)
            here_only = "://" not in item.path
            found.setdefault(os.path.abspath(item.place) if here_only else item.path, item)
    return _with_partitions(list(found.values()))


def unreadable(error: Exception, path: str) -> Exception:
    """What to raise for an error of reading: one that names the file, or for a defect of this program the error itself.

    Libraries of object stores have errors of their own, none of which is this program's.
    """
    is_known = isinstance(error, READ_ERRORS)
    if isinstance(error, ScoringError) or not (is_known or "://" in path):
        return error
    kind = "" if is_known else f"{type(error).__name__} "
    return DataError(f"{path} cannot be read: {kind}{first_line(error)}.")


def shown_path(path: str) -> str:
    """A path that can be printed, whatever bytes are in it."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def is_remote(path: str) -> bool:
    """Whether a path is one of an object store rather than of this machine."""
    return "://" in path and not path.startswith("file://")


def local_place(path: str) -> str:
    """Path of a file of this machine, which may be written as ``file://...``."""
    return path.removeprefix("file://")


def check_output(output: str | Path, flag: str, inputs: Sequence[Input]) -> None:
    """Refuse to write over what is read, and to what is no file of this machine.

    Raises
    ------
    UsageError
        If the output is in an object store, is one of the inputs, or is a folder that holds one, or is ``-``.
    """
    if str(output) == "-":
        raise UsageError(
            f"{flag} - would be a file of that name: nothing is written to standard output. Name a file."
        )
    if is_remote(str(output)):
        raise UsageError(f"{flag} {output} must be a file of this machine.")
    place = Path(local_place(str(output))).resolve()
    for item in inputs:
        read = Path(local_place(item.path)).resolve()
        # (An output that is a folder has the files that were written before.)
        if place in (read, *read.parents):
            raise UsageError(
                f"{flag} {output} would replace {item.path}, which is one of the inputs. Choose another, in a folder "
                "that is not read."
            )


def check_beside_model(output: str | Path, flag: str, model: str) -> None:
    """Refuse to write into the model's folder, which could not be loaded any more.

    Raises
    ------
    UsageError
    """
    place = Path(local_place(str(output))).resolve()
    if Path(model).resolve() in (place, *place.parents):
        raise UsageError(f"{flag} {output} is in the model folder, which holds nothing else. Choose another.")


def _find(pattern: str) -> list[Input]:
    if "://" in pattern:
        import fsspec

        try:
            remote, place = fsspec.core.url_to_fs(pattern)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{pattern}: {first_line(error)}.") from None
        filesystem: Any = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
        prefix = pattern.split("://", 1)[0] + "://"
        magic = any(mark in place for mark in "*?[")
        places = sorted(remote.glob(place)) if magic else [place]
    else:
        import glob

        filesystem, prefix = pafs.LocalFileSystem(), ""
        magic = glob.has_magic(pattern) and not os.path.lexists(pattern)
        places = sorted(glob.glob(pattern, recursive=True)) if magic else [pattern]
    found = []
    for place in places:
        try:
            info = filesystem.get_file_info(place)
        except OSError as error:
            raise DataError(f"{prefix}{place} cannot be read: {error}.") from None
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{prefix}{place} does not exist.")
        if info.type == pafs.FileType.Directory:
            below = filesystem.get_file_info(pafs.FileSelector(place, recursive=True))
            files = [
                entry
                for entry in sorted(below, key=lambda entry: entry.path)
                if entry.type == pafs.FileType.File
                and not any(part.startswith((".", "_")) for part in _below(entry.path, place).split("/"))
                and kind_of_file(entry.base_name) is not None
            ]
        else:
            unknown = kind_of_file(info.base_name) is None
            if magic and (unknown or info.base_name.startswith((".", "_"))):
                continue
            if unknown:
                raise DataError(
                    f"{prefix}{place} is of no known format. Files end in .parquet, .feather, .arrow, .csv or .tsv; "
                    f"those of text may be compressed ({', '.join(CODECS)})."
                )
            files = [info]
        for entry in files:
            found.append(
                Input(
                    path=prefix + entry.path,
                    place=entry.path,
                    kind=str(kind_of_file(entry.base_name)),
                    size=int(entry.size or 0),
                    mtime=int(entry.mtime_ns or 0),
                    filesystem=filesystem,
                )
            )
    return found


def open_dataset(item: Input) -> Any:
    """File of a format with types, as a data set.

    Raises
    ------
    DataError
        If columns have the same name, which Arrow's data sets do not know.
    """
    try:
        return pads.dataset(item.place, format=item.kind, filesystem=item.filesystem)
    except pa.ArrowInvalid as error:
        if "duplicate field names" not in str(error):
            raise
    with item.filesystem.open_input_file(item.place) as file:
        names = (papq.read_schema(file) if item.kind == "parquet" else pa.ipc.open_file(file).schema).names
    doubled = sorted({name for name in names if names.count(name) > 1})
    raise DataError(
        f"{item.path} has the column {', '.join(map(repr, doubled))} more than once. Rename one, or leave it out."
    )


def open_text(item: Input, needed: Callable[[str], bool], block_bytes: int | None = None) -> CheckedText:
    """Bytes of a text file, decompressed, of which what is no row is marked.

    Parameters
    ----------
    item : Input
    needed : callable
        Whether a column of a name is wanted.
    block_bytes : int, optional
        What is parsed at a time.
    """
    codec = CODECS.get(os.path.splitext(item.place.lower())[1])
    stream = item.filesystem.open_input_stream(item.place, compression=codec)
    return CheckedText(stream, item.path, item.kind, needed, block_bytes or CSV_BLOCK_BYTES)


def parse_text(
    text: CheckedText, item: Input, convert: pacsv.ConvertOptions, note: Any = None
) -> Iterator[pa.Table]:
    """Tables of checked text, a block at a time.

    Nothing goes on in the background: a thread that still has objects of Python when it ends takes the process with it.

    Parameters
    ----------
    text : CheckedText
    item : Input
    convert : pyarrow.csv.ConvertOptions
        Types that it leaves open are guessed from the first block.
    note : callable, optional
        Takes rows of another number of fields than the header has, of each the number of rows before it in the file,
        and returns "skip" or "error". Without one they are an error.
    """
    n_before, n_noted = 0, 0

    def numbered(row: Any) -> str:
        nonlocal n_noted
        n_noted += 1
        # Counted from 1, those that are noted included.
        answer: str = note(row, n_before + int(row.number) - 1)
        return answer

    for chunk in text:
        table = pacsv.read_csv(
            pa.BufferReader(chunk),
            read_options=pacsv.ReadOptions(
                column_names=text.names, use_threads=False, block_size=max(len(chunk), 1)
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=item.kind,
                newlines_in_values=True,
                invalid_row_handler=None if note is None else numbered,
            ),
            convert_options=convert,
        )
        n_before, n_noted = n_before + len(table) + n_noted, 0
        convert.column_types = {**convert.column_types, **{field.name: field.type for field in table.schema}}
        yield table


def _with_partitions(inputs: list[Input]) -> list[Input]:
    """Inputs with the values that their folders are named after.

    A column is one of whole numbers if the folders of all files say so, else of text; a single file, whose value may be
    missing, does not tell.
    """
    texts = [named_values(item.place) for item in inputs]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for values in texts for name in values):
        column = pa.array([values.get(name) for values in texts], pa.string())
        try:
            columns[name] = column.cast(pa.int32())
        except pa.ArrowInvalid:
            columns[name] = column
    return [
        dataclasses.replace(item, partition={name: columns[name][number] for name in values})
        for number, (item, values) in enumerate(zip(inputs, texts, strict=True))
    ]


def named_values(place: str) -> dict[str, str | None]:
    """Columns that the folders of a file are named after, ``name=value``, and their values as text."""
    pairs = [folder.split("=", 1) for folder in place.split("/")[:-1] if "=" in folder]
    return {unquote(name): None if value == NULL_FOLDER else unquote(value) for name, value in pairs}


def add_partition(table: pa.Table, item: Input) -> pa.Table:
    """A table of a file with the columns that its folders are named after, which stand for those of the same name."""
    for name, value in item.partition.items():
        table = table.drop_columns(name) if name in table.column_names else table
        table = table.append_column(name, pa.repeat(value, len(table)))
    return table


def _below(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


def rows_per_part(n_columns: int) -> int:
    """Rows of a part of a table with so many columns."""
    return max(1024, min(MAX_ROWS_PER_PART, VALUES_PER_PART // max(1, n_columns)))


@dataclasses.dataclass
class Part:
    """Rows of a file.

    Attributes
    ----------
    table : pyarrow.Table
    rows : ndarray of int
        Place of each row in the file, from 0, lines that could not be read counted.
    malformed : dict of int to (str, str)
        Lines of this part that could not be read, with the reason and the line itself.
    last : bool
        Whether the file ends with it.
    is_text : bool, default=False
        Whether the values are those of CSV or the like, as they stand in the file.
    """

    table: pa.Table
    rows: np.ndarray[Any, np.dtype[np.int64]]
    malformed: dict[int, tuple[str, str]]
    last: bool
    is_text: bool = False

    def column(self, name: str) -> pa.ChunkedArray:
        """Values of a column, of text without those that stand for none.

        A key is taken from `table`, where nothing is lost: NA may be somebody's name.
        """
        column = self.table.column(name)
        # (Those that a folder's name gives may be numbers.)
        if not self.is_text or not pa.types.is_string(column.type):
            return column
        return pc.if_else(pc.is_in(column, value_set=NO_VALUES), pa.scalar(None, column.type), column)

    def frame(
        self, names: Sequence[str], types: tuple[str | None, ...]
    ) -> tuple[pd.DataFrame, dict[int, str]]:
        """Columns as a model takes them, as `to_frame` says."""
        table = pa.table({name: self.column(name) for name in names})
        return to_frame(table, list(names), types)


class Reader:
    """Reads one file in parts.

    Parameters
    ----------
    item : Input
    wanted : Wanted
        Columns to read; no others are.

    Attributes
    ----------
    names : list of str
        The model's columns in this file.
    schema : pyarrow.Schema
        Types of the columns that are read.

    Raises
    ------
    DataError
        If the file cannot be opened or does not fit.
    """

    def __init__(self, item: Input, wanted: Wanted) -> None:
        self.item, self.wanted = item, wanted
        self._malformed: dict[int, tuple[str, str]] = {}
        # (Of a store the size may not be known.)
        if not item.size and "://" not in item.path:
            raise DataError(f"{item.path} is empty: it has 0 bytes.")
        try:
            self._dataset: Any = None
            if item.is_text:
                # Everything is text: types are for `_columns`, row by row.
                with open_text(item, lambda name: False) as text:
                    fields = [pa.field(name, pa.string()) for name in text.names]
            else:
                self._dataset = open_dataset(item)
                fields = list(self._dataset.schema)
            fields = [field for field in fields if field.name not in item.partition]
            fields += [pa.field(name, value.type) for name, value in item.partition.items()]
            present = pa.schema(fields)
            self.names = choose(wanted, present, item.path)
            self._columns = list(dict.fromkeys([*wanted.keys, *self.names]))
            if not item.is_text:
                check_types(wanted, self.names, present, item.path)
        except Exception as error:
            raise unreadable(error, item.path) from None
        self.schema = pa.schema([present.field(name) for name in self._columns])

    def _text_tables(self, columns: list[str]) -> Iterator[pa.Table]:
        text = open_text(self.item, columns.__contains__)

        def note(row: Any, position: int) -> str:
            reason = f"the line has {row.actual_columns} fields, not {row.expected_columns}"
            line = str(row.text)
            self._malformed.setdefault(position, text.bad.get(line, (reason, line[:SHOWN_CHARACTERS])))
            return "skip"

        convert = pacsv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=columns,
            null_values=[""],
            strings_can_be_null=True,
        )
        with text:
            yield from parse_text(text, self.item, convert, note)

    def _batches(self, n_rows: int) -> Iterator[pa.RecordBatch]:
        columns = [name for name in self._columns if name not in self.item.partition]
        if self.item.is_text:
            tables = self._text_tables(columns)
        else:
            scanner = self._dataset.scanner(
                columns=columns, batch_size=min(n_rows, 2**16), batch_readahead=2, fragment_readahead=1
            )
            tables = (pa.Table.from_batches([batch]) for batch in scanner.to_batches())
        for table in tables:
            yield from add_partition(table, self.item).select(self._columns).to_batches()

    def parts(self, n_rows: int) -> Iterator[Part]:
        """Cut the file into parts of `n_rows` rows; the last one may be shorter, and empty.

        Raises
        ------
        DataError
            If the file is damaged.
        """
        start, held, batches = 0, 0, []
        try:
            for batch in self._batches(n_rows):
                while batch.num_rows:
                    piece = batch.slice(0, n_rows - held)
                    batch = batch.slice(piece.num_rows)
                    batches.append(piece)
                    held += piece.num_rows
                    # Whether it is the last one shows when there is more.
                    if held == n_rows and batch.num_rows:
                        yield self._part(batches, start, held, last=False)
                        start, held, batches = start + held, 0, []
                if held == n_rows:
                    yield self._part(batches, start, held, last=False)
                    start, held, batches = start + held, 0, []
        except Exception as error:
            self._refuse_changed()
            raise unreadable(error, self.item.path) from None
        self._refuse_changed()
        yield self._part(batches, start, held, last=True)

    def _refuse_changed(self) -> None:
        """Refuse a file that was written to, or replaced, since it was found: parts of two do not make one."""
        if "://" in self.item.path:
            return
        now = self.item.filesystem.get_file_info(self.item.place)
        if (int(now.size or 0), int(now.mtime_ns or 0)) != (self.item.size, self.item.mtime):
            raise DataError(f"{self.item.path} has changed while it was read. Run again when it is complete.")

    def _part(self, batches: list[pa.RecordBatch], start: int, count: int, *, last: bool) -> Part:
        table = pa.Table.from_batches(batches, schema=self.schema)
        lines = np.array(sorted(self._malformed), dtype=np.int64)
        # Of each malformed line: the rows before it.
        before = lines - np.arange(len(lines))
        good = np.arange(start, start + count)
        rows = good + np.searchsorted(before, good, side="right")
        mine = lines[(before >= start) & ((before < start + count) | last)]
        malformed = {int(line): self._malformed[int(line)] for line in mine}
        return Part(table, rows, malformed, last, self.item.is_text)


class Alike:
    """What files of one run must have in common: types of keys, and names where a model goes by the order of columns.

    Parameters
    ----------
    wanted : Wanted

    Attributes
    ----------
    key_types : dict of str to pyarrow.DataType or None
        Those of the first file, and of later ones where that has no values; None before there is one.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.key_types: dict[str, pa.DataType] | None = None
        self._wanted, self._first = wanted, ("", list[str]())

    def check_names(self, reader: Reader) -> Reader:
        """The reader of a file, if a model without names takes its columns for the right ones.

        Raises
        ------
        DataError
        """
        path, names = self._first
        if not path:
            self._first = reader.item.path, reader.names
        elif self._wanted.names is None and reader.names != names:
            here, there = next(pair for pair in zip(reader.names, names, strict=True) if pair[0] != pair[1])
            raise DataError(
                f"{reader.item.path} has the column {here!r} where {path} has {there!r}. The model knows no names and "
                "goes by the order of columns: give all files the same, or fit it on named columns."
            )
        return reader

    def check(self, reader: Reader) -> Reader:
        """The reader of a file, if it has the names and the types of keys that the others have.

        Raises
        ------
        DataError
        """
        self.check_names(reader)
        types = {key: plain_type(reader.schema.field(key).type) for key in self._wanted.keys}
        if self.key_types is None:
            self.key_types = dict(types)
        for key, kind in types.items():
            known = self.key_types[key]
            if pa.types.is_null(known):
                self.key_types[key] = kind
            elif kind != known and not pa.types.is_null(kind):
                raise DataError(
                    f"Key column {key!r} of {reader.item.path} has the type {kind}, and that of the first file "
                    f"{known}. Convert one of them."
                )
        return reader


def first_line(error: Exception) -> str:
    """What an error says, shortened, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
