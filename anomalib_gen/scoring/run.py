"""Score files: reading, scoring and writing at the same time, in order, with nothing lost.

A thread reads the next part while the model scores one and another thread writes the one before; each waits for the
other, so that a handful of parts is all that is ever in memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from anomalib_gen._outlier import is_below
from anomalib_gen.calibration import SplitConformalDetector, conformal_p_values
from anomalib_gen.persistence import make_folder
from anomalib_gen.scoring._columns import Wanted, wanted_by
from anomalib_gen.scoring._errors import ALERT, DONE, PARTIAL, DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import ScoreOptions
from anomalib_gen.scoring.explaining import Explainer, top_columns, top_fields
from anomalib_gen.scoring.overlap import Ahead, Behind
from anomalib_gen.scoring.partitions import Partitioning
from anomalib_gen.scoring.parts import (
    Parts,
    digest,
    is_quarantine,
    quarantine_beside,
    read_quarantine,
    record_of,
    sole_run,
    to_json,
    write_file,
)
from anomalib_gen.scoring.remote import OTHER_SIZE, score_to_store
from anomalib_gen.scoring.rows import finite, load_model, score_rows, threshold_of
from anomalib_gen.scoring.sinks import check_schema, is_replaceable, kind_of_output, size_of, write_result
from anomalib_gen.scoring.sources import (
    Alike,
    Input,
    Part,
    Reader,
    check_beside_model,
    check_output,
    find_inputs,
    is_remote,
    local_place,
    rows_per_part,
)

ADDED = ("score", "p_value", "label", "threshold", "model")
"""Columns that the output may have beside the keys; those of explanations begin with ``top_``."""
HASH_DIGITS = 16
"""Of the model's content hash, in the output."""


@dataclasses.dataclass
class Summary:
    """What a run did.

    Attributes
    ----------
    rows, outliers, bad_rows, bad_files : int
    parts, resumed : int
        Parts of this run, and of an earlier one that were not scored again.
    code : int
        Exit code.
    """

    rows: int = 0
    outliers: int = 0
    bad_rows: int = 0
    bad_files: int = 0
    parts: int = 0
    resumed: int = 0
    code: int = DONE


def score_files(options: ScoreOptions, log: Log, *, shown: str | None = None) -> Summary:
    """Score files with a saved model.

    Parameters
    ----------
    options : ScoreOptions
    log : Log
    shown : str, optional
        What messages call the output; for one in a store it is not the file that is written here.

    Raises
    ------
    UsageError, DataError
        As the exit codes say. Earlier results are then untouched.
    """
    if options.quarantine is not None:
        place = local_place(options.quarantine)
        options = dataclasses.replace(options, quarantine=place)  # type: ignore[type-var]  # made one by `command`
    if is_remote(options.output):
        summary: Summary = score_to_store(
            options, log, lambda here: score_files(here, log, shown=options.output)
        )
        return summary
    output = Path(local_place(options.output))
    if kind_of_output(output) != "folder" and options.partition_by:
        raise UsageError(
            f"--partition-by makes folders, and --output {options.output} is one file. Name a folder, without an "
            f"ending, such as {output.with_suffix('').with_suffix('')}."
        )
    added = {*ADDED, *(field.name for field in top_fields(options.explain))}
    if clash := sorted(added.intersection(options.partition_by)):
        raise UsageError(
            f"--partition-by {clash[0]} is a column that scoring adds. Partition by columns of the input, named by "
            "--key."
        )
    if clash := sorted(added.intersection(options.key)):
        raise UsageError(f"--key {clash[0]} has the name of a column that is added. Rename it in the input.")
    model, facts = load_model(options.model, options.trusted)
    inputs = find_inputs(options.input)
    _refuse_overlap(options, output, inputs)
    keys = _kept(options, inputs)
    wanted = wanted_by(facts["schema"], keys, model)
    if options.p_values and not hasattr(model, "p_values"):
        raise UsageError(
            f"{options.model} makes no p-values. Make a model that does from normal rows that it was not fitted to: "
            f"anomalib-gen calibrate NORMAL_FILES -m {options.model} --method conformal -o NEW_FOLDER"
        )
    plan = {
        "columns": [list(keys), wanted.names and list(wanted.names)],
        "explain": options.explain,
        "inputs": [[item.path, item.size, item.mtime] for item in inputs],
        "model": facts["hash"],
        "output": output.name,
        "rows_per_part": rows_per_part(wanted.count),
        "version": 2,
        # (So that outputs without it, of earlier versions too, are still known.)
        **({"partition_by": options.partition_by} if options.partition_by else {}),
    }
    try:
        make_folder(output.parent)
        with sole_run(output):
            return _Run(options, output, model, facts["hash"], wanted, inputs, plan, log, shown).run()
    except OSError as error:
        raise explain_os_error(error, f"writing {output}") from error


def _kept(options: ScoreOptions, inputs: list[Input]) -> tuple[str, ...]:
    """Columns of the input that are kept: keys, and what folders of both input and output are named after.

    Raises
    ------
    UsageError
        If an output would be partitioned by others.
    """
    if len(set(options.partition_by)) != len(options.partition_by):
        raise UsageError("--partition-by names a column twice.")
    named = {name for item in inputs for name in item.partition}
    more = tuple(name for name in options.partition_by if name not in options.key)
    for name in more:
        if name not in named:
            raise UsageError(
                f"--partition-by {name} is none of the columns that are kept: those of --key "
                f"({', '.join(options.key) or 'none'}), and those that folders of the input are named after "
                f"({', '.join(sorted(named)) or 'none'}). Add --key {name}, if the files have it."
            )
    return options.key + more


def _refuse_overlap(options: ScoreOptions, output: Path, inputs: list[Input]) -> None:
    """Refuse to write over what is read or into the model, and a quarantine over the output.

    Raises
    ------
    UsageError
    """
    place, quarantine = output.resolve(), options.quarantine or quarantine_beside(output)
    if Path(quarantine).resolve() in (place, record_of(place)):
        raise UsageError(f"--quarantine {options.quarantine} is written by the run itself. Choose another.")
    for written, flag in ((str(output), "--output"), (str(quarantine), "--quarantine")):
        check_output(written, flag, inputs)
        check_beside_model(written, flag, options.model)
    if options.quarantine is not None and not is_quarantine(Path(quarantine)):
        raise UsageError(
            f"--quarantine {options.quarantine} would replace something else. Choose another name."
        )


class _Run:
    """One run over files, with the lock held."""

    def __init__(
        self,
        options: ScoreOptions,
        output: Path,
        model: Any,
        model_hash: str,
        wanted: Wanted,
        inputs: list[Input],
        plan: dict[str, Any],
        log: Log,
        shown: str | None,
    ) -> None:
        self.options, self.output, self.model, self.wanted = options, output, model, wanted
        self.inputs, self.plan, self.log = inputs, plan, log
        self.model_hash = model_hash[:HASH_DIGITS]
        self.threshold = threshold_of(model)
        self.has_p_values = hasattr(model, "p_values")
        self.explainer: Explainer | None = None
        self.parts = Parts(output.with_name(f".{output.name}.parts"))
        self.record = record_of(output)
        self.quarantine = Path(options.quarantine or quarantine_beside(output))
        self.shown = shown or str(output)
        self.shown_quarantine = options.quarantine or f"{self.shown}.quarantine.jsonl"
        self.summary = Summary()
        self.key_types: dict[str, pa.DataType] | None = None
        self.partitioning: Partitioning | None = None

    def run(self) -> Summary:
        if self._is_done():
            return self.summary
        readers = self._open_all()
        if self.options.explain:
            first = next(reader for reader in readers if isinstance(reader, Reader))
            named = self.wanted.names is not None
            self.explainer = Explainer(self.model, first.names, named=named, log=self.log)
        if self.parts.folder.exists() and not (self.options.resume and self.parts.has_plan(self.plan)):
            self.log.warning("discarding the parts of an unfinished run")
        if self.parts.begin(self.plan, resume=self.options.resume):
            self.log.info("resuming an unfinished run")
        elif self.options.resume:
            self.log.info("nothing to resume; starting from the beginning")
        try:
            self._score_all(readers)
        except BaseException:
            if not self.parts.any():
                self.parts.remove()
            raise
        self._finish()
        return self.summary

    def _is_done(self) -> bool:
        """Refuse an output that is there already, unless it is to be replaced, or is just what is wanted."""
        if not os.path.lexists(self.output):
            return False
        unfinished = self.parts.has_plan(self.plan)
        if (
            self.options.resume
            and not unfinished
            and (record := self._recorded())
            and self._is_whole(record)
            and self._is_as_asked(record)
        ):
            self.parts.remove()
            self.log.info(f"{self.shown} is complete already; nothing to do")
            self.summary.code = self._code()
            return True
        # (A run that was killed at its very end has left the output and its parts.)
        if not self.options.overwrite and not (self.options.resume and unfinished):
            raise UsageError(
                f"{self.shown} exists already. Choose another output, or replace it with --overwrite."
            )
        if not is_replaceable(self.output):
            raise UsageError(
                f"{self.shown} is nothing that `score` has made there (a folder with other things in it, a link to a "
                "folder, or a file where a folder is wanted), and is not replaced. Choose another output, or remove it."
            )
        return False

    def _recorded(self) -> dict[str, Any] | None:
        """What the record of a finished run with this plan says, if there is one."""
        try:
            record = json.loads(self.record.read_bytes())
            if record["plan"] == digest(self.plan):
                counts = {name: int(record[name]) for name in ("rows", "outliers", "bad_rows", "bad_files")}
                return {**counts, "quarantine": record["quarantine"], "bytes": record.get("bytes")}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None

    def _is_whole(self, record: dict[str, Any]) -> bool:
        """Whether the output is as large as it was when it was made; earlier versions did not record that.

        Raises
        ------
        DataError
            If it is not, and must not be replaced.
        """
        expected, found = record.pop("bytes"), size_of(self.output)
        if expected is None or expected == found:
            return True
        damage = OTHER_SIZE.format(output=self.shown, found=found, expected=expected)
        if not self.options.overwrite:
            raise DataError(f"{damage}. Score the files again with --overwrite, or choose another output.")
        self.log.warning(f"{damage}, so the files are scored again")
        return False

    def _is_as_asked(self, record: dict[str, Any]) -> bool:
        """Whether a finished run is what this one would be; a quarantine that is wanted elsewhere is moved there.

        Raises
        ------
        DataError
            If it left out more than is allowed now.
        """
        quarantine = record.pop("quarantine")
        self.summary = Summary(**record)
        for what, count, limit in (
            ("rows", self.summary.bad_rows, self.options.max_bad_rows),
            ("files", self.summary.bad_files, self.options.max_bad_files),
        ):
            if count > limit:
                raise DataError(
                    f"{self.shown} is complete, but without {count} bad {what}, more than {limit} "
                    f"(--max-bad-{what}). Allow as many, or mend them and run again."
                )
        if quarantine == self.options.quarantine:
            return True
        if self.summary.bad_rows or self.summary.bad_files:
            old = Path(quarantine or quarantine_beside(self.output))
            entries = read_quarantine(old, self.summary.bad_rows, self.summary.bad_files)
            mine = {item.path for item in self.inputs}
            if entries is None or not {entry.get("file") for entry in entries} <= mine:
                shown = quarantine or f"{self.shown}.quarantine.jsonl"
                self.log.warning(
                    f"{shown} is gone or another run's, so the files are scored again for {self.quarantine}"
                )
                self.summary = Summary()
                return False
            write_file(self.quarantine, b"".join(to_json(entry) + b"\n" for entry in entries))
            self.log.info(f"moved {old} to {self.quarantine}")
        self._write_record()
        if self.summary.bad_rows or self.summary.bad_files:
            old.unlink(missing_ok=True)
        return True

    def _open_all(self) -> list[Reader | str]:
        """Readers of all files, before anything is scored; the reason for a bad file that is left out."""
        readers: list[Reader | str] = []
        alike = Alike(self.wanted)
        for item in self.inputs:
            try:
                readers.append(alike.check(Reader(item, self.wanted)))
            except DataError as error:
                self._count_bad_file(item, error)
                readers.append(str(error))
        if alike.key_types is None:
            raise DataError("None of the files can be read.")
        self.key_types = alike.key_types
        check_schema(self.output, self._schema())
        if names := self.options.partition_by:
            self.partitioning = Partitioning(pa.schema([(name, self.key_types[name]) for name in names]))
        return readers

    def _count_bad_file(self, item: Input, error: Exception) -> None:
        self.summary.bad_files += 1
        if self.summary.bad_files > self.options.max_bad_files:
            if not self.options.max_bad_files:
                raise error
            raise DataError(
                f"More than {self.options.max_bad_files} bad files (--max-bad-files). The last: {error}"
            )
        self.log.warning(f"left out a file: {error}", file=item.path)

    def _count_bad_rows(self, item: Input, bad: list[dict[str, Any]]) -> None:
        self.summary.bad_rows += len(bad)
        if self.summary.bad_rows > self.options.max_bad_rows:
            allowed = self.options.max_bad_rows
            rule = f"more bad rows than {allowed} (--max-bad-rows)" if allowed else "a bad row"
            raise DataError(
                f"{item.path} has {rule}: row {bad[0]['row']}, {bad[0]['reason']}. Mend it and run again, or allow "
                f"more with --max-bad-rows; such rows go to {self.shown_quarantine}."
            )

    # Scoring ------------------------------------------------------------------------------------------------

    def _score_all(self, readers: list[Reader | str]) -> None:
        finished = [self.parts.finished(source) for source in range(len(readers))]
        for source, (count, _) in enumerate(finished):
            self._take_up(source, count, counted=isinstance(readers[source], str))
        if self.summary.bad_rows > self.options.max_bad_rows:
            raise DataError(
                f"The unfinished run left out {self.summary.bad_rows} bad rows, more than "
                f"{self.options.max_bad_rows} (--max-bad-rows). Allow as many, or start anew without --resume."
            )
        ahead, behind = Ahead(self._read_all(readers, finished)), Behind(self.parts.write)
        bar = self.log.progress("rows")
        try:
            for source, number, part in ahead:
                if isinstance(part, Part):
                    behind.put(source, number, *self._score(source, part))
                    self.summary.parts += 1
                    bar.update(len(part.rows))
                    continue
                behind.flush()
                if isinstance(readers[source], Reader):
                    # A file that broke off: what was scored of it does not count.
                    self.summary.bad_rows -= self._bad_rows_of(source)
                    self._count_bad_file(self.inputs[source], part)
                self.parts.discard(source)
                behind.put(source, 0, self._schema().empty_table(), self._bad_file(source, str(part)))
            behind.flush()
        finally:
            ahead.close()
            behind.close()
            bar.close()

    def _take_up(self, source: int, count: int, *, counted: bool) -> None:
        """Count what finished parts of an earlier run left out."""
        self.summary.resumed += count
        for number in range(count):
            for entry in self.parts.facts(source, number)["bad"]:
                self.summary.bad_rows += entry["row"] is not None
                self.summary.bad_files += entry["row"] is None and not counted

    def _read_all(
        self, readers: list[Reader | str], finished: list[tuple[int, bool]]
    ) -> Iterator[tuple[int, int, Part | DataError]]:
        """Parts that are not finished yet; an error in place of a file, or the rest of one, that cannot be read."""
        n_rows = rows_per_part(self.wanted.count)
        for source, (reader, (count, complete)) in enumerate(zip(readers, finished, strict=True)):
            if complete:
                continue
            if isinstance(reader, str):
                yield source, 0, DataError(reader)
                continue
            try:
                for number, part in enumerate(reader.parts(n_rows)):
                    if number >= count:
                        yield source, number, part
            except DataError as error:
                yield source, 0, error

    def _bad_rows_of(self, source: int) -> int:
        finished = self.parts.finished(source)[0]
        return sum(
            entry["row"] is not None for k in range(finished) for entry in self.parts.facts(source, k)["bad"]
        )

    def _bad_file(self, source: int, reason: str) -> dict[str, Any]:
        entry = {"file": self.inputs[source].path, "row": None, "reason": reason}
        return {"rows": 0, "outliers": 0, "bad": [entry], "last": True}

    def _score(self, source: int, part: Part) -> tuple[pa.Table, dict[str, Any]]:
        """Rows of the output for a part, and facts about it."""
        names = self.wanted.names or [n for n in part.table.column_names if n not in self.wanted.keys]
        frame, bad = part.frame(names, self.wanted.types)
        kept = np.setdiff1d(np.arange(len(frame)), list(bad))
        scores, refused = score_rows(
            self.model,
            frame if len(kept) == len(frame) else frame.iloc[kept],
            named=self.wanted.names is not None,
            limit=self.options.max_bad_rows - self.summary.bad_rows,
        )
        bad |= {int(kept[row]): reason for row, reason in refused.items()}
        entries = [self._bad_row(source, part, row, reason) for row, reason in bad.items()]
        entries += [
            {"file": self.inputs[source].path, "row": line, "reason": reason, "line": text}
            for line, (reason, text) in part.malformed.items()
        ]
        entries.sort(key=lambda entry: entry["row"])
        if entries:
            self._count_bad_rows(self.inputs[source], entries)
        good = ~np.isnan(scores)
        table = self._table(part.table, frame, kept[good], scores[good])
        if self.partitioning is not None:
            # (What it refuses is found here, and not when everything has been scored.)
            self.partitioning.folders(table)
        outliers = int(is_below(scores[good], self.threshold).sum())
        return table, {"rows": int(good.sum()), "outliers": outliers, "bad": entries, "last": part.last}

    def _bad_row(self, source: int, part: Part, row: int, reason: str) -> dict[str, Any]:
        """Entry of the quarantine: where the row is, why it is bad, and the row itself."""
        values = {name: part.table.column(name)[row].as_py() for name in part.table.column_names}
        shown = {
            name: value if isinstance(value, int | str | None) else str(value)
            for name, value in values.items()
        }
        return {
            "file": self.inputs[source].path,
            "row": int(part.rows[row]),
            "reason": reason,
            "values": shown,
        }

    def _table(
        self,
        table: pa.Table,
        frame: pd.DataFrame,
        rows: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
    ) -> pa.Table:
        keys = table.select(list(self.wanted.keys))
        keys = keys if len(rows) == table.num_rows else keys.take(pa.array(rows))
        n, schema, flagged = len(rows), self._schema(), is_below(scores, self.threshold)
        columns: dict[str, Any] = {
            **{key: keys.column(key).cast(schema.field(key).type) for key in self.wanted.keys},
            "score": pa.array(scores),
            "label": pa.array(np.where(flagged, -1, 1).astype(np.int8)),
            "threshold": pa.array(np.full(n, self.threshold)),
            "model": pa.array([self.model_hash] * n, pa.string()),
        }
        if self.has_p_values:
            columns["p_value"] = pa.array(self._p_values(frame, rows, scores))
        if self.explainer is not None:
            columns |= top_columns(self.explainer, frame.iloc[rows], flagged, self.options.explain)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _p_values(
        self, frame: pd.DataFrame, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        if not len(rows):
            return np.empty(0)
        if isinstance(self.model, SplitConformalDetector):
            # Those of the scores that there are.
            return conformal_p_values(scores, self.model.calibration_scores_)
        chosen = frame.iloc[rows]
        found: npt.NDArray[np.float64] = self.model.p_values(
            chosen if self.wanted.names is not None else chosen.to_numpy()
        )
        return found

    def _schema(self) -> pa.Schema:
        assert self.key_types is not None
        p_value = [pa.field("p_value", pa.float64())] if self.has_p_values else []
        added = [
            pa.field("score", pa.float64()),
            *p_value,
            pa.field("label", pa.int8()),
            pa.field("threshold", pa.float64()),
            pa.field("model", pa.string()),
            *top_fields(self.options.explain),
        ]
        return pa.schema([*(pa.field(key, self.key_types[key]) for key in self.wanted.keys), *added])

    # The end ------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Make the output from the parts; whenever this is cut short, it is done again from the same parts."""
        summary, quarantined = self.summary, []
        for _, facts in self.parts.all_facts(len(self.inputs)):
            summary.rows += facts["rows"]
            summary.outliers += facts["outliers"]
            quarantined += facts["bad"]
        tables = self.parts.tables(len(self.inputs))
        write_result(self.output, tables, self._schema(), self.partitioning)
        if quarantined:
            write_file(self.quarantine, b"".join(to_json(entry) + b"\n" for entry in quarantined))
        else:
            self.quarantine.unlink(missing_ok=True)
        summary.code = self._code()
        self._write_record()
        self.parts.remove()
        if not summary.rows:
            self.log.warning(f"no row was scored: {self.shown} is empty")
        if quarantined:
            self.log.warning(f"{len(quarantined)} bad rows or files are in {self.shown_quarantine}")

    def _write_record(self) -> None:
        record = {
            "plan": digest(self.plan),
            "model": self.plan["model"],
            "threshold": finite(self.threshold),
            "inputs": self.plan["inputs"],
            "quarantine": self.options.quarantine,
            "rows": self.summary.rows,
            "outliers": self.summary.outliers,
            "bad_rows": self.summary.bad_rows,
            "bad_files": self.summary.bad_files,
            "bytes": size_of(self.output),
            **({"partition_by": self.options.partition_by} if self.options.partition_by else {}),
        }
        write_file(self.record, to_json(record) + b"\n")

    def _code(self) -> int:
        limit, rows = self.options.alert_above, self.summary.rows
        if limit is not None and rows and self.summary.outliers / rows > limit:
            share = self.summary.outliers / rows
            self.log.warning(
                f"alert: {share:.2%} of the rows are outliers, more than {limit:.2%}",
                share=share,
                limit=limit,
            )
            return ALERT
        return PARTIAL if self.summary.bad_rows or self.summary.bad_files else DONE
