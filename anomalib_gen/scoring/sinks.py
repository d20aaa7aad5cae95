"""The result as one file, or a folder of them: complete under its name, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq

from anomalib_gen.persistence import swap, sync_folder
from anomalib_gen.scoring._errors import DataError, UsageError
from anomalib_gen.scoring.sources import CODECS, kind_of_file


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
            _write_to(pa.BufferOutputStream(), "parquet" if kind == "folder" else kind, [table], table.schema)
        except pa.ArrowException:
            raise UsageError(
                f"Column {field.name!r} is of type {field.type}, which {path.suffix or '.parquet'} files cannot hold. "
                "Leave it out, or choose another --output; .feather files hold every type."
            ) from None


def write_result(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables under a temporary name, flush them to the disk, and give them their name.

    Parameters
    ----------
    path : Path
    tables : iterable of pyarrow.Table
        Read one after the other.
    schema : pyarrow.Schema
        Of all of them.

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
            for number, table in enumerate(tables):
                if table.num_rows or not number:
                    _write(fresh / f"part-{number:06d}.parquet", "parquet", [table], schema)
            sync_folder(fresh)
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
    with open(path, "wb") as file:
        if codec is None:
            _write_to(file, kind, tables, schema)
        else:
            with pa.CompressedOutputStream(file, codec) as stream:
                _write_to(stream, kind, tables, schema)
        if not file.closed:
            file.flush()
            os.fsync(file.fileno())
    with open(path, "rb") as file:  # (Arrow closes what it wrote to.)
        os.fsync(file.fileno())


def _write_to(file: Any, kind: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    if kind == "parquet":
        writer: Any = papq.ParquetWriter(file, schema, compression="zstd")
    elif kind == "feather":
        writer = pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    else:
        writer = pacsv.CSVWriter(file, schema, write_options=pacsv.WriteOptions(delimiter=kind))
    with writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table)


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
    files = path.glob("part-*.parquet") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def is_replaceable(path: Path) -> bool:
    """Whether something under the name of an output looks like one: a file, or a folder of parts alone."""
    if kind_of_output(path) == "folder" and (path.is_symlink() or not path.is_dir()):
        return False
    if not path.is_dir():
        return True
    return all(entry.name.startswith("part-") and entry.suffix == ".parquet" for entry in path.iterdir())
