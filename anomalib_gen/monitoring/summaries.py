"""What is kept of the rows of a table: of each column a distribution or its categories, and what is missing.

Rows may come in parts of any size: missing values, rows and categories are counted over all of them, and the
distributions of numbers are those of a sample of rows, each with the same chance, which is all rows where they are
few. Which rows are drawn depends on their order alone, not on how they were cut into parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomalib_gen.monitoring.distribution import MAX_COUNT, MAX_VALUES, Distribution

MAX_CATEGORIES = 1000
"""Categories kept of a column, the most frequent ones; the others are counted together."""
MAX_TRACKED = 10_000
"""Different categories that are counted while rows are read."""
MAX_UNSEEN = 10
"""New categories that are named."""
MAX_SAMPLED_VALUES = 2**22
MAX_SAMPLED_ROWS = 20_000
MIN_SAMPLED_ROWS = 2_000
MAX_NAME = 200
"""Characters of a category that are kept."""


def sampled_rows(n_columns: int) -> int:
    """Rows that are drawn of a table of so many columns of numbers: the p-values are theirs, the memory, too."""
    return max(MIN_SAMPLED_ROWS, min(MAX_SAMPLED_ROWS, MAX_SAMPLED_VALUES // max(1, n_columns)))


def kept_values(n_columns: int) -> int:
    """Values that are kept of each distribution of a table of so many columns."""
    return max(128, min(MAX_VALUES, 2**18 // max(1, n_columns)))


@dataclass(frozen=True)
class Column:
    """What is kept of a column.

    Attributes
    ----------
    name : str
    kind : {"number", "category"}
    n_rows, n_missing : int
        Over all rows; infinite numbers count as missing.
    distribution : Distribution or None
        Of numbers.
    categories : dict of str to int or None
        Rows of each category. Of a batch: of those that the reference keeps.
    n_other : int
        Rows of other categories: of a reference, of those that it does not keep; of a batch, of those that the
        reference does not keep.
    n_singletons : int
        Categories with one row.
    unseen : tuple of str
        Of a batch: some of the categories that the reference does not keep.
    """

    name: str
    kind: str
    n_rows: int
    n_missing: int
    distribution: Distribution | None = None
    categories: Mapping[str, int] | None = None
    n_other: int = 0
    n_singletons: int = 0
    unseen: tuple[str, ...] = ()

    @property
    def missing_rate(self) -> float:
        """Share of missing values."""
        return self.n_missing / self.n_rows if self.n_rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON.

        Returns
        -------
        dict
        """
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "rows": self.n_rows,
            "missing": self.n_missing,
        }
        if self.distribution is not None:
            return found | {"distribution": self.distribution.to_dict()}
        assert self.categories is not None
        return found | {
            "categories": dict(self.categories),
            "other": self.n_other,
            "singletons": self.n_singletons,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Column:
        """Column of `to_dict`.

        Parameters
        ----------
        document : mapping

        Returns
        -------
        Column

        Raises
        ------
        ValueError
            If it is none.
        """
        name, kind = document["name"], document["kind"]
        counts = [document["rows"], document["missing"]]
        categories, distribution = None, None
        if kind == "number":
            distribution = Distribution.from_dict(document["distribution"])
        else:
            categories = dict(document["categories"])
            counts += [*categories.values(), document["other"], document["singletons"]]
        if (
            type(name) is not str
            or kind not in ("number", "category")
            or not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts)
            or counts[1] > counts[0]
        ):
            raise ValueError("a column is malformed")
        other = {} if categories is None else {"n_other": counts[-2], "n_singletons": counts[-1]}
        return cls(
            name, kind, counts[0], counts[1], distribution=distribution, categories=categories, **other
        )


def kind_of(values: pd.Series[Any]) -> str | None:
    """Kind of a column of a data frame: "number", "category", or None for times and the like."""
    if pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values):
        return None if pd.api.types.is_complex_dtype(values) else "number"
    if pd.api.types.is_datetime64_any_dtype(values) or pd.api.types.is_timedelta64_dtype(values):
        return None
    if values.dtype == object:
        # Flags and whole numbers with gaps come as objects.
        known = values.dropna()
        if len(known) and all(isinstance(value, int | float | np.number | np.bool_) for value in known):
            return "number"
    return "category"


class _RowSample:
    """Rows of numbers ``(n, D)`` drawn from a stream, each with the same chance, by the smallest random keys."""

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self._n_rows = n_rows
        self._random = np.random.default_rng(0)
        self._keys = np.empty(0)
        self.rows: npt.NDArray[np.float64] = np.empty((0, n_columns))

    def add(self, rows: npt.NDArray[np.float64]) -> None:
        """See more rows."""
        keys = self._random.random(len(rows))
        if len(self._keys) == self._n_rows:
            near = keys < self._keys[-1]
            rows, keys = rows[near], keys[near]
        keys = np.concatenate([self._keys, keys])
        # (Sorted, so that the rows do not depend on how they came.)
        chosen = np.argsort(keys, kind="stable")[: self._n_rows]
        self.rows = np.concatenate([self.rows, rows])[chosen]
        self._keys = keys[chosen]


@dataclass
class _Counts:
    """Categories of a column: of those that are known, or of all as they come."""

    known: Collection[str] | None
    counts: dict[str, int] = field(default_factory=dict)
    other: int = 0
    unseen: dict[str, int] = field(default_factory=dict)

    def add(self, values: pd.Series[Any]) -> None:
        for value, count in values.astype(str).value_counts(sort=False).items():
            name = str(value)[:MAX_NAME]
            if (self.known is not None and name in self.known) or (
                self.known is None and (name in self.counts or len(self.counts) < MAX_TRACKED)
            ):
                self.counts[name] = self.counts.get(name, 0) + int(count)
                continue
            self.other += int(count)
            if self.known is not None and (name in self.unseen or len(self.unseen) < MAX_UNSEEN):
                self.unseen[name] = self.unseen.get(name, 0) + int(count)


class Summariser:
    """Summarises rows that come in parts.

    Parameters
    ----------
    like : sequence of Column or None, default=None
        Columns of a reference, whose kinds and categories are taken; with None the first part tells.
    max_rows : int or None, default=None
        Rows that are drawn; with None as many as `sampled_rows` says.
    """

    def __init__(self, like: Collection[Column] | None = None, *, max_rows: int | None = None) -> None:
        self._like = None if like is None else {column.name: column for column in like}
        self._max_rows = max_rows
        self._kinds: dict[str, str] | None = None
        self.n_rows = 0

    def add(self, frame: pd.DataFrame) -> None:
        """Add a part.

        Parameters
        ----------
        frame : DataFrame of shape (n_rows, n_columns)
            With the same columns each time; others than those of the reference are left out.

        Raises
        ------
        ValueError
            If a column of the reference is missing.
        """
        if self._kinds is None:
            self._begin(frame)
        assert self._kinds is not None
        self.n_rows += len(frame)
        numbers = np.empty((len(frame), len(self._numbers)))
        for j, name in enumerate(self._numbers):
            numbers[:, j] = _as_numbers(frame[name])
        bad = ~np.isfinite(numbers)
        self._missing[self._numbers] += bad.sum(axis=0)
        self._sample.add(np.where(bad, np.nan, numbers))
        for name, counts in self._categories.items():
            missing = frame[name].isna()
            self._missing[name] += int(missing.sum())
            counts.add(frame[name][~missing])

    def _begin(self, frame: pd.DataFrame) -> None:
        names = [str(name) for name in frame.columns]
        if self._like is None:
            found = {name: kind_of(frame[name]) for name in names}
            self._kinds = {name: kind for name, kind in found.items() if kind is not None}
        else:
            if missing := [name for name in self._like if name not in names]:
                raise ValueError(f"The rows have no column {missing[0]!r}, which the training reference has.")
            self._kinds = {name: column.kind for name, column in self._like.items()}
        self._numbers = [name for name, kind in self._kinds.items() if kind == "number"]
        self._missing = pd.Series(0, index=list(self._kinds), dtype=np.int64)
        self._sample = _RowSample(self._max_rows or sampled_rows(len(self._numbers)), len(self._numbers))
        self._categories = {
            name: _Counts(None if self._like is None else self._like[name].categories)
            for name, kind in self._kinds.items()
            if kind == "category"
        }

    def columns(self) -> tuple[Column, ...]:
        """What is known of each column so far.

        Returns
        -------
        tuple of Column
        """
        if self._kinds is None:
            like = () if self._like is None else self._like.values()
            return tuple(_empty(column) for column in like)
        max_values, found = kept_values(len(self._kinds)), []
        for name, kind in self._kinds.items():
            missing = int(self._missing[name])
            if kind == "number":
                sample = self._sample.rows[:, self._numbers.index(name)]
                # A batch is gone when it is compared: all of its sample counts.
                limit = max_values if self._like is None else len(sample) + 1
                distribution = Distribution.of(sample, limit)
                found.append(Column(name, kind, self.n_rows, missing, distribution=distribution))
                continue
            counts = self._categories[name]
            kept = sorted(counts.counts.items(), key=lambda item: (-item[1], item[0]))
            limit = MAX_CATEGORIES if self._like is None else len(kept)
            found.append(
                Column(
                    name,
                    kind,
                    self.n_rows,
                    missing,
                    categories=dict(kept[:limit]),
                    n_other=counts.other + sum(count for _, count in kept[limit:]),
                    n_singletons=sum(count == 1 for _, count in kept),
                    unseen=tuple(sorted(counts.unseen, key=lambda name: (-counts.unseen[name], name))),
                )
            )
        return tuple(found)


def _as_numbers(values: pd.Series[Any]) -> npt.NDArray[np.float64]:
    if values.dtype == object or pd.api.types.is_extension_array_dtype(values.dtype):
        return np.asarray(pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan))
    return values.to_numpy(dtype=np.float64)


def _empty(column: Column) -> Column:
    if column.kind == "number":
        return Column(column.name, "number", 0, 0, distribution=Distribution.of([]))
    return Column(column.name, "category", 0, 0, categories={})
