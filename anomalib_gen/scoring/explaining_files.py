"""Which columns made rows of files anomalous, as a table: a line for each row and column.

The lowest rows are found in one pass, with no more of them in memory than are asked for; all outliers are explained
as they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from anomalib_gen._outlier import is_below
from anomalib_gen.persistence import make_folder
from anomalib_gen.scoring._columns import Wanted, wanted_by
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.calibrating import scored_rows
from anomalib_gen.scoring.config import ExplainOptions
from anomalib_gen.scoring.explaining import BLOCK_ROWS, Explainer, shown
from anomalib_gen.scoring.parts import sole_run
from anomalib_gen.scoring.rows import load_model, score_rows, threshold_of
from anomalib_gen.scoring.sinks import check_schema, is_replaceable, kind_of_output, write_result
from anomalib_gen.scoring.sources import (
    Alike,
    Reader,
    check_beside_model,
    check_output,
    find_inputs,
    local_place,
    rows_per_part,
)

ADDED = {
    "file": pa.string(),
    "row": pa.int64(),
    "score": pa.float64(),
    "label": pa.int8(),
    "anomaly": pa.float64(),
    "baseline": pa.float64(),
    "rank": pa.int32(),
    "feature": pa.string(),
    "value": pa.string(),
    "contribution": pa.float64(),
}
MAX_BACKGROUND = 2000
"""Normal rows that explanations start from, drawn from the files of `--background`."""


class _Rows:
    """Rows with what is known of them: keys, place, score and the model's columns."""

    def __init__(self, keys: pa.Table, facts: pd.DataFrame, frame: pd.DataFrame) -> None:
        self.keys, self.facts, self.frame = keys, facts, frame

    def __len__(self) -> int:
        return len(self.facts)

    def take(self, rows: Any) -> _Rows:
        """Rows by position."""
        rows = np.asarray(rows, dtype=np.int64)
        facts, frame = (part.iloc[rows].reset_index(drop=True) for part in (self.facts, self.frame))
        return _Rows(self.keys.take(pa.array(rows)), facts, frame)

    def blocks(self) -> Iterator[_Rows]:
        """As many rows as are explained at once, and so on."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.take(np.arange(start, min(start + BLOCK_ROWS, len(self))))

    def join(self, other: _Rows) -> _Rows:
        """These rows, then others."""
        facts, frame = (
            pd.concat(pair, ignore_index=True)
            for pair in ((self.facts, other.facts), (self.frame, other.frame))
        )
        return _Rows(pa.concat_tables([self.keys, other.keys]), facts, frame)


def explain_files(options: ExplainOptions, log: Log) -> int:
    """Explain rows of files; return how many.

    Raises
    ------
    UsageError, DataError
        As the exit codes say. Earlier results are then untouched.
    """
    output = Path(local_place(options.output))
    kind_of_output(output)
    if clash := sorted(set(options.key) & set(ADDED)):
        raise UsageError(f"--key {clash[0]} has the name of a column that is added. Rename it in the input.")
    model, facts = load_model(options.model, options.trusted)
    wanted = wanted_by(facts["schema"], options.key, model)
    inputs = find_inputs(options.input)
    check_output(options.output, "--output", inputs)
    check_beside_model(options.output, "--output", options.model)
    try:
        make_folder(output.parent)
        with sole_run(output):
            if os.path.lexists(output) and not (options.overwrite and is_replaceable(output)):
                raise UsageError(
                    f"{output} exists already. Choose another output, or replace it with --overwrite."
                )
            return _Explanation(options, output, model, wanted, log).run()
    except OSError as error:
        raise explain_os_error(error, f"writing {output}") from error


class _Explanation:
    """One run, with the lock held."""

    def __init__(self, options: ExplainOptions, output: Path, model: Any, wanted: Wanted, log: Log) -> None:
        self.options, self.output, self.model, self.wanted, self.log = options, output, model, wanted, log
        self.threshold = threshold_of(model)
        alike = Alike(wanted)
        self.readers = [alike.check(Reader(item, wanted)) for item in find_inputs(options.input)]
        first, self.key_types = self.readers[0], alike.key_types or {}
        named = wanted.names is not None
        background = None
        if options.background:
            background = _sample(options.background, model, wanted, log)
            background.columns = pd.Index(first.names)
        self.explainer = Explainer(
            model, first.names, named=named, log=log, background=background, method=options.method
        )
        self.count = 0

    def run(self) -> int:
        schema = pa.schema(
            [*(pa.field(k, t) for k, t in self.key_types.items()), *map(pa.field, ADDED, ADDED.values())]
        )
        check_schema(self.output, schema)
        rows = self._flagged() if self.options.flagged else self._lowest()
        write_result(self.output, self._tables(rows, schema), schema)
        return self.count

    def _all(self) -> Iterator[_Rows]:
        """Rows of all files that can be scored."""
        left_out = 0
        with self.log.progress("rows") as bar:
            for reader in self.readers:
                for part in reader.parts(rows_per_part(self.wanted.count)):
                    frame, bad = part.frame(reader.names, self.wanted.types)
                    named = self.wanted.names is not None
                    scores, _ = score_rows(self.model, frame, named=named, limit=len(frame))
                    good = np.flatnonzero(~np.isnan(scores) & ~np.isin(np.arange(len(frame)), list(bad)))
                    left_out += len(frame) - len(good) + len(part.malformed)
                    keys = pa.table(
                        {key: part.table.column(key).cast(kind) for key, kind in self.key_types.items()}
                    )
                    facts = pd.DataFrame({"file": reader.item.path, "row": part.rows, "score": scores})
                    # (A table without columns has no rows.)
                    keys = keys if keys.num_columns else pa.table({"": pa.nulls(len(frame))})
                    yield _Rows(keys, facts, frame).take(good)
                    bar.update(len(part.rows))
        if left_out:
            self.log.warning(f"left out {count(left_out, 'row')} that cannot be scored")

    def _flagged(self) -> Iterator[_Rows]:
        for rows in self._all():
            yield rows.take(np.flatnonzero(is_below(rows.facts["score"], self.threshold)))

    def _lowest(self) -> Iterator[_Rows]:
        held: _Rows | None = None
        for rows in self._all():
            both = rows if held is None else held.join(rows)
            # (Of equal scores the first in the files.)
            held = both.take(np.argsort(both.facts["score"].to_numpy(), kind="stable")[: self.options.top])
        with self.log.progress("rows explained") as bar:
            for block in [] if held is None else held.blocks():
                yield block
                bar.update(len(block))

    def _tables(self, parts: Iterator[_Rows], schema: pa.Schema) -> Iterator[pa.Table]:
        for rows in parts:
            for block in rows.blocks():
                self.count += len(block)
                yield self._table(block, schema)

    def _table(self, rows: _Rows, schema: pa.Schema) -> pa.Table:
        (found,) = self.explainer.contributions(rows.frame)
        names = self.explainer.names
        n = min(len(names), self.options.features or len(names))
        order = np.argsort(-found.values, axis=1, kind="stable")[:, :n]
        at = np.repeat(np.arange(len(rows)), n)
        column = order.ravel()
        scores = rows.facts["score"].to_numpy()
        values: dict[str, Any] = {
            "file": rows.facts["file"].to_numpy()[at],
            "row": rows.facts["row"].to_numpy()[at],
            "score": scores[at],
            "label": np.where(is_below(scores, self.threshold), -1, 1)[at],
            "anomaly": found.anomaly[at],
            "baseline": found.baseline[at],
            "rank": np.tile(np.arange(1, n + 1), len(rows)),
            "feature": [names[j] for j in column],
            "value": [shown(found.data[i, j]) for i, j in zip(at, column, strict=True)],
            "contribution": found.values[at, column],
        }
        keys = rows.keys.take(pa.array(at))
        columns = {key: keys.column(key).combine_chunks() for key in self.key_types}
        columns |= {name: pa.array(values[name], kind) for name, kind in ADDED.items()}
        return pa.table(columns, schema=schema)


def _sample(patterns: tuple[str, ...], model: Any, wanted: Wanted, log: Log) -> pd.DataFrame:
    """Normal rows, drawn from files with the same chance each."""
    plain = Wanted(wanted.names, wanted.count, wanted.types)
    random = np.random.default_rng(0)
    held, keys = None, np.empty(0)
    for frame, _ in scored_rows(patterns, model, plain, log):
        fresh = random.random(len(frame))
        both = frame if held is None else pd.concat([held, frame], ignore_index=True)
        keys = np.concatenate([keys, fresh])
        chosen = np.argsort(keys, kind="stable")[:MAX_BACKGROUND]
        held, keys = both.iloc[chosen].reset_index(drop=True), keys[chosen]
    if held is None or held.empty:
        raise DataError("The files of --background have no rows.")
    return held
