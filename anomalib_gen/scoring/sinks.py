"""The result as one file, or a folder of them: complete under its name, or not there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq

from anomalib_gen.persistence import swap, sync_folder
from anomalib_gen.scoring._errors import DataError, UsageError
from anomalib_gen.scoring.partitions import Partitioning
from anomalib_gen.scoring.sources import CODECS, kind_of_file

_IS_PART = re.compile(r"part-\d{6,}\.parquet").fullmatch
"""Whether a file is named like ours: those of other programs are no output of a run, and stay."""
MAX_OPEN = 200
"""Files of a partitioned output that are written to at a time; a process may have 256 or more open by default."""
MAX_ROW_GROUPS = 32
"""Of each of them, after which comes the next one: a file that is open keeps a kilobyte for each column of a group."""


def kind_of_output(path: Path) -> str:
    """Format of an output by its name: as of inputs, or "folder".

    Raises
    ------
    UsageError
        If the name has an ending that no format has.
    """
    if not path.suffix:
        return "folder"
    kind = kind_of_file(path.name)
    if kind is None:
        raise UsageError(
            f"--output {path} is of no known format. Give it one of the endings .parquet, .feather, .arrow, .csv, "
            f".tsv or .csv.gz, or none for a folder of Parquet files."
        )
    return kind


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Refuse, before a row is scored, a column of a type that the format does not know.

    Raises
    ------
    UsageError
    """
    kind = kind_of_output(path)
    for field in schema:
        table = pa.table({field.name: pa.nulls(1, field.type)})
        try:
            with _writer(
                pa.BufferOutputStream(), "parquet" if kind == "folder" else kind, table.schema
            ) as writer:
                writer.write_table(table)
        except pa.ArrowException:
            raise UsageError(
                f"Column {field.name!r} is of type {field.type}, which {path.suffix or '.parquet'} files cannot hold. "
                "Leave it out, or choose another --output; .feather files hold every type."
            ) from None


def write_result(
    path: Path, tables: Iterable[pa.Table], schema: pa.Schema, partitioning: Partitioning | None = None
) -> None:
    """Write tables under a temporary name, flush them to the disk, and give them their name.

    Parameters
    ----------
    path : Path
    tables : iterable of pyarrow.Table
        Read one after the other.
    schema : pyarrow.Schema
        Of all of them.
    partitioning : Partitioning, optional
        Of a folder: which folder in it a row goes to.

    Raises
    ------
    DataError
        If a value cannot be written.
    """
    kind = kind_of_output(path)
    fresh = path.with_name(f".{path.name}.tmp")
    _remove(fresh)
    try:
        if kind == "folder":
            fresh.mkdir()
            if partitioning is None:
                for number, table in enumerate(tables):
                    if table.num_rows or not number:
                        _write(fresh / _part_name(number), "parquet", [table], schema)
            else:
                _write_partitions(fresh, tables, schema, partitioning)
            for folder, _, _ in os.walk(fresh, topdown=False):
                sync_folder(Path(folder))
        else:
            _write(fresh, kind, tables, schema, codec=CODECS.get(path.suffix.lower()))
        _rename(fresh, path)
        # (Of a run that was killed where names cannot be exchanged.)
        _remove(fresh.with_suffix(".old"))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be written: {str(error).splitlines()[0]}.") from None
    finally:
        _remove(fresh)
    sync_folder(path.parent)


def _write(
    path: Path, kind: str, tables: Iterable[pa.Table], schema: pa.Schema, codec: str | None = None
) -> None:
    with _opened(path, kind, schema, codec) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table)


def _part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _write_partitions(
    folder: Path, tables: Iterable[pa.Table], schema: pa.Schema, partitioning: Partitioning
) -> None:
    """Write each row to the folder that is named after some of its values, without these; without rows one empty file.

    Rows of a folder keep their order, over its files in the order of their names.
    """
    kept = pa.schema([field for field in schema if field.name not in partitioning.names])
    # Those written to last come last.
    files: dict[str, tuple[contextlib.ExitStack, Any, int]] = {}
    n_files: Counter[str] = Counter()
    try:
        for table in tables:
            names, numbers = partitioning.folders(table)
            rows = table.select(kept.names).take(pa.array(np.argsort(numbers, kind="stable")))
            start = 0
            for name, count in zip(names, np.bincount(numbers, minlength=len(names)), strict=True):
                if name not in files and len(files) == MAX_OPEN:
                    files.pop(next(iter(files)))[0].close()
                if name not in files:
                    place = folder / name
                    place.mkdir(parents=True, exist_ok=True)
                    file = contextlib.ExitStack()
                    try:
                        writer = file.enter_context(
                            _opened(place / _part_name(n_files[name]), "parquet", kept)
                        )
                    except FileExistsError:
                        raise DataError(
                            f"--partition-by: the folder {name} stands for two values that differ in upper and lower "
                            "case alone, which this file system does not tell apart. Write to another one, or "
                            "partition by other columns."
                        ) from None
                    files[name] = file, writer, 0
                    n_files[name] += 1
                file, writer, groups = files.pop(name)
                files[name] = file, writer, groups + 1
                writer.write_table(rows.slice(start, int(count)))
                start += int(count)
                if groups + 1 == MAX_ROW_GROUPS:
                    files.pop(name)[0].close()
        while files:
            files.pop(next(iter(files)))[0].close()
    finally:
        for file, _, _ in files.values():  # of what failed, and is removed
            with contextlib.suppress(OSError, pa.ArrowException):
                file.close()
    if not n_files:
        _write(folder / _part_name(0), "parquet", [], schema)


@contextlib.contextmanager
def _opened(path: Path, kind: str, schema: pa.Schema, codec: str | None = None) -> Iterator[Any]:
    """Writer of a file, which is on the disk when this is left."""
    # (Names are fresh: one that is there belongs to rows that would be lost.)
    with open(path, "xb") as file:
        stream = contextlib.nullcontext(file) if codec is None else pa.CompressedOutputStream(file, codec)
        with stream as sink, _writer(sink, kind, schema) as writer:
            yield writer
        if not file.closed:
            file.flush()
            os.fsync(file.fileno())
    with open(path, "rb") as file:  # (Arrow closes what it wrote to.)
        os.fsync(file.fileno())


def _writer(file: Any, kind: str, schema: pa.Schema) -> Any:
    if kind == "parquet":
        return papq.ParquetWriter(file, schema, compression="zstd")
    if kind == "feather":
        return pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    return pacsv.CSVWriter(file, schema, write_options=pacsv.WriteOptions(delimiter=kind))


def _rename(fresh: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        os.replace(fresh, path)
    else:
        # What was there before has the temporary name afterwards.
        swap(fresh, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of an output, of a folder those of its parts; zero of one that is not there."""
    files = filter(lambda file: _IS_PART(file.name), path.rglob("*.parquet")) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def is_replaceable(path: Path) -> bool:
    """Whether something under the name of an output looks like one: a file, or a folder of parts alone."""
    if kind_of_output(path) == "folder" and (path.is_symlink() or not path.is_dir()):
        return False
    return not path.is_dir() or _holds_parts(path)


def _holds_parts(folder: Path) -> bool:
    """Whether there is nothing else in a folder, or in those in it that are named like partitions."""
    return all(
        "=" in entry.name and not entry.is_symlink() and _holds_parts(entry)
        if entry.is_dir()
        else _IS_PART(entry.name) is not None
        for entry in folder.iterdir()
    )
