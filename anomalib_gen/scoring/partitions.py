"""Folders of a partitioned output, ``column=value/...``, as pyarrow, Spark and DuckDB take them for columns.

Values are written as pyarrow writes them: as text, URL-encoded, with ``__HIVE_DEFAULT_PARTITION__`` for a missing one.
(Its own function for that, ``Partitioning.format``, came after the oldest pyarrow that will do here.) Readers know no
types of such columns. They guess them, and take text that looks like a number for one.
"""

from __future__ import annotations

import re
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anomalib_gen.scoring._columns import kind_of
from anomalib_gen.scoring._errors import DataError, UsageError
from anomalib_gen.scoring.sources import NULL_FOLDER

MAX_FOLDERS = 1024
"""Of the rows of one part, as for pyarrow's own writer."""
MAX_NAME_BYTES = 255
"""Of a folder, in the file systems that there are."""


class Partitioning:
    """Which folder a row belongs to.

    Parameters
    ----------
    schema : pyarrow.Schema
        Names and types of the columns, the outermost first.

    Raises
    ------
    UsageError
        If a column is of a type that no folder is named after.
    """

    def __init__(self, schema: pa.Schema) -> None:
        for field in schema:
            suited = kind_of(field.type) in ("text", "integer", "boolean")
            if not (suited or pa.types.is_date(field.type) or pa.types.is_null(field.type)):
                raise UsageError(
                    f"--partition-by {field.name} is of type {field.type}, and folders are named after text, whole "
                    "numbers, booleans or dates. Convert the column in the input (times to dates, for one), or name "
                    "another."
                )
        self.names: list[str] = schema.names
        # (pyarrow decodes names, but writes them as they are; what begins with a dot or an underscore it passes over.)
        self._shown = [re.sub(r"^[._]|[%/=\0-\x1f]", _escaped, name) for name in self.names]

    def folders(self, table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Folders that rows belong to.

        Parameters
        ----------
        table : pyarrow.Table
            With the columns, of the types that were given.

        Returns
        -------
        folders : list of str
            Each once.
        numbers : ndarray of shape (n_rows,)
            Place of each row's folder in that list.

        Raises
        ------
        DataError
            If there are too many, or the name of one is too long.
        """
        numbers, first, counts = np.zeros(len(table), dtype=np.int64), np.empty(0, dtype=np.int64), []
        for name in self.names:
            column = table.column(name)
            if pa.types.is_null(column.type):
                column = column.cast(pa.string())
            encoded = pc.dictionary_encode(column, null_encoding="encode").unify_dictionaries()
            codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
            numbers = numbers * (len(table) + 1) + np.concatenate([*codes, np.empty(0, dtype=np.int64)])
            _, first, numbers = np.unique(numbers, return_index=True, return_inverse=True)
            counts.append(f"of {name!r}: {len(pc.unique(column)):,}")
        if len(first) > MAX_FOLDERS:
            raise DataError(
                f"--partition-by would make {len(first):,} folders of {len(table):,} rows, more than "
                f"{MAX_FOLDERS:,}. Values {', '.join(counts)}. Partition by columns of fewer values."
            )
        rows = table.select(self.names).take(pa.array(first))
        names = [self._folder(row) for row in zip(*(_texts(column) for column in rows.columns), strict=True)]
        # (A text may be the very one that stands for a missing value.)
        folders, same = np.unique(np.array(names, dtype=object), return_inverse=True)
        return folders.tolist(), same[numbers]

    def _folder(self, values: tuple[str | None, ...]) -> str:
        """Folder of rows with these values."""
        parts = [
            f"{name}={NULL_FOLDER if value is None else quote(value, safe='')}"
            for name, value in zip(self._shown, values, strict=True)
        ]
        for name, part in zip(self.names, parts, strict=True):
            if len(part.encode()) > MAX_NAME_BYTES:
                raise DataError(
                    f"--partition-by {name}: a folder would be called {part[:80]}..., which is longer than the "
                    f"{MAX_NAME_BYTES} bytes that a name may have. Partition by columns of shorter values."
                )
        return "/".join(parts)


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    texts: list[str | None] = column.cast(pa.string()).to_pylist()
    return texts


def _escaped(character: re.Match[str]) -> str:
    return f"%{ord(character[0]):02X}"
