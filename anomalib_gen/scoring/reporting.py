"""What a report says of a scoring run, gathered in two passes: over the scores, and over the files they were made from.

The record beside the scores (``scores.parquet.run.json``) names the files, and the quarantine file what was left out of
them, so that row k of the scores is found in its file again. Only the most abnormal rows, a sample of normal ones and
summaries of columns are kept, so that memory does not grow with the run. Where files are gone or have changed since,
the report is made without what needs them, and says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv

from anomalib_gen.monitoring import (
    Batch,
    Distribution,
    DriftReport,
    Reference,
    Summariser,
    compare,
    load_reference,
)
from anomalib_gen.monitoring.history import History, HistoryError
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.scoring._columns import Wanted, plain_type, wanted_by
from anomalib_gen.scoring._errors import DONE, PARTIAL, DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.config import MonitorOptions, ReportOptions
from anomalib_gen.scoring.explaining import Explainer, top_fields
from anomalib_gen.scoring.monitor import job_of, thresholds_of
from anomalib_gen.scoring.partitions import Partitioning
from anomalib_gen.scoring.parts import (
    digest,
    quarantine_beside,
    read_quarantine,
    read_record,
    record_of,
    write_output,
)
from anomalib_gen.scoring.rows import load_model
from anomalib_gen.scoring.run import ADDED, HASH_DIGITS
from anomalib_gen.scoring.sources import (
    Input,
    Reader,
    check_beside_model,
    find_inputs,
    is_remote,
    local_place,
    named_values,
    open_text,
    parse_text,
    rows_per_part,
)

BACKGROUND_ROWS = 1000
"""Normal rows of the run, by which contributions are measured."""
MAX_TOP_FIELDS = 100
"""Columns of explanations in the scores that are known for such by their names."""
MAX_QUARANTINED = 100
"""Rows and files listed that could not be scored; the others are counted."""


@dataclasses.dataclass
class Anomaly:
    """A row that scored below the threshold.

    Attributes
    ----------
    row : int
        Place in the scores, from 0.
    score : float
    keys : dict of str to object
    p_value : float or None
        Where the model makes them.
    contributions : list of (name, value, contribution)
        Largest first; empty if they are not known.
    """

    row: int
    score: float
    keys: dict[str, Any]
    p_value: float | None = None
    contributions: list[tuple[str, Any, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Past:
    """A run that `monitor` has looked at.

    Attributes
    ----------
    run : str
    time : float
        In seconds since 1970.
    rows, outliers : int
    distance : float or None
        Kolmogorov-Smirnov distance of its scores from training, where they were compared.
    alert : bool
    """

    run: str
    time: float
    rows: int
    outliers: int
    distance: float | None
    alert: bool


@dataclasses.dataclass
class RunReport:
    """What a page is made from.

    Attributes
    ----------
    name : str
        Of the file of scores.
    written : str
        When, in UTC.
    model : dict
        What the model's folder says of itself.
    threshold : float
    rows, outliers, bad_rows, bad_files : int
    inputs : list of (path, bytes, rows)
        Rows are None where the file was not read again.
    quarantined : list of dict
        At most `MAX_QUARANTINED`.
    scores : Distribution or None
        Of a sample; None if there are no rows.
    anomalies : list of Anomaly
        The most abnormal ones, most abnormal first.
    weights : dict of str to float
        Mean contribution of each column over those rows, positive parts, largest first.
    reference : Reference or None
    drift : DriftReport or None
    columns : dict of str to Column
        Of the input, by name; empty if it was not read.
    earlier : list of Past or None
        Runs of the same job before this one, the first one first; None without a history.
    notes : list of str
        What is left out, and why.
    """

    name: str
    written: str
    model: dict[str, Any]
    threshold: float
    rows: int
    outliers: int
    bad_rows: int
    bad_files: int
    inputs: list[tuple[str, int, int | None]]
    quarantined: list[dict[str, Any]]
    scores: Distribution | None = None
    anomalies: list[Anomaly] = dataclasses.field(default_factory=list)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    reference: Reference | None = None
    drift: DriftReport | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    earlier: list[Past] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def report_run(options: ReportOptions, log: Log, judged: MonitorOptions | None = None) -> int:
    """Write the page of a scoring run; return the exit code.

    Parameters
    ----------
    options : ReportOptions
    log : Log
    judged : MonitorOptions, optional
        Whose thresholds and ignored columns say what is an alert, and whose history what is usual; the defaults, and
        no history, without them.

    Raises
    ------
    UsageError, DataError
        As the exit codes say.
    """
    if is_remote(options.scores) or is_remote(options.output or ""):
        raise UsageError(
            "report reads and writes files of this machine. Copy the scores and what lies beside them."
        )
    scores = Path(local_place(options.scores))
    output = Path(local_place(options.output or f"{scores}.html"))
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {output} must end in .html.")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder. Name a file.")
    if os.path.lexists(output) and not options.overwrite:
        raise UsageError(f"{output} exists already. Choose another output, or replace it with --overwrite.")
    check_beside_model(output, "--output", options.model)
    from anomalib_gen.scoring.page import render

    found = gather(scores, options, log, judged)
    page = render(found)
    try:
        write_output(output, page.encode())
    except OSError as error:
        raise explain_os_error(error, f"writing {output}") from error
    for note in found.notes:
        log.warning(note)
    alerts = len(found.drift.alerts) if found.drift else 0
    counts = f"{count(found.outliers, 'anomaly', 'anomalies')}, {count(alerts, 'alert')}"
    log.info(f"{output}: {counts}", output=str(output), alerts=alerts)
    return PARTIAL if found.notes else DONE


def gather(scores: Path, options: ReportOptions, log: Log, judged: MonitorOptions | None = None) -> RunReport:
    """Everything that the page of a run shows.

    Parameters
    ----------
    scores : Path
        Output of ``score``, with its record beside it.
    options : ReportOptions
    log : Log
    judged : MonitorOptions, optional
        As for `report_run`.

    Raises
    ------
    DataError
        If the scores, their record or the model cannot be read, or do not belong together.
    """
    record, folder = _read_record(scores), options.model
    quarantine = Path(record["quarantine"] or quarantine_beside(scores))
    entries = read_quarantine(quarantine, record["bad_rows"], record["bad_files"])
    model, facts = load_model(folder, options.trusted)
    if facts["hash"] != record["model"]:
        raise DataError(
            f"{scores} was made by the model {record['model'][:HASH_DIGITS]}, and {folder} is "
            f"{facts['hash'][:HASH_DIGITS]}. Name the folder of the former with --model."
        )
    found = RunReport(
        name=scores.name,
        written=_time_of(scores),
        model=facts,
        threshold=record["threshold"],
        rows=record["rows"],
        outliers=record["outliers"],
        bad_rows=record["bad_rows"],
        bad_files=record["bad_files"],
        inputs=[(path, size, None) for path, size, _ in record["inputs"]],
        quarantined=(entries or [])[:MAX_QUARANTINED],
    )
    normal, keys, places = _read_scores(scores, found, options.top, record["partition_by"], log)
    try:
        found.reference = load_reference(folder)
    except (ModelFolderError, OSError) as error:
        raise DataError(str(error)) from None
    if found.reference is None:
        found.notes.append(
            f"{folder} has no training reference, so drift is not known. Folders that `anomalib-gen fit` writes "
            "have one."
        )
    summariser = None
    if entries is None:
        found.notes.append(
            f"{quarantine} is not there or not whole, so the rows of the scores cannot be found in their files: "
            "contributions and drift of columns are left out."
        )
    else:
        try:
            wanted = wanted_by(facts["schema"], keys, model)
            summariser = _walk(found, _same_inputs(record), entries, wanted, model, normal, places, log)
        except (DataError, UsageError) as error:
            found.notes.append(f"Contributions and drift of columns are left out: {error}")
    if found.reference is not None:
        columns = () if summariser is None else summariser.columns()
        found.columns = {column.name: column for column in columns}
        if judged is not None and judged.history is not None:
            found.earlier = _earlier(judged, record, found)
        batch = Batch(found.rows, found.outliers, found.scores, columns, found.bad_rows, found.bad_files)
        found.drift = compare(
            found.reference,
            batch,
            thresholds=None if judged is None else thresholds_of(judged),
            recent_rows=[past.rows for past in found.earlier or ()],
            ignore=() if judged is None else judged.ignore,
        )
    return found


def _earlier(judged: MonitorOptions, record: dict[str, Any], found: RunReport) -> list[Past] | None:
    """Runs before this one in the history of `monitor`, which is left as it is; None, with a note, if it has none."""
    assert judged.history is not None
    history, job = History(local_place(judged.history)), job_of(judged)
    try:
        if not history.path.is_file():
            raise HistoryError(f"The history {history.path} is not there.")
        name = judged.run or history.name_of(
            judged.scores, job=job, model=record["model"], n_rows=record["rows"], n_flagged=record["outliers"]
        )
        entries = history.earlier(name or digest([record["plan"], record["model"]]), job=job)
    except HistoryError as error:
        found.notes.append(f"Earlier runs and the usual volume are not known: {error}")
        return None
    pasts = []
    for entry in reversed(entries):
        scores = entry.report["scores"]
        distance = None if scores is None else float(scores["distance"])
        pasts.append(Past(entry.run, entry.time, entry.n_rows, entry.n_flagged, distance, entry.alert))
    return pasts


def _time_of(path: Path) -> str:
    when = datetime.datetime.fromtimestamp(path.stat().st_mtime, tz=datetime.UTC)
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _read_record(scores: Path) -> dict[str, Any]:
    """The record that `score` left beside its output."""
    if not scores.exists():
        raise DataError(f"{scores} does not exist. Name the output of `anomalib-gen score`.")
    path = record_of(scores)
    try:
        return read_record(path.read_bytes(), path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing. It is written beside the scores; keep them together.") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from None


# The scores --------------------------------------------------------------------------------------------------


class _Places:
    """Where rows of the files are in the scores, which have them in the same order, if partitioned in each folder.

    Parameters
    ----------
    names : list of str
        Columns that the folders are named after; none for any other output, which is one folder here.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._next: dict[str, int] = {}
        self._ends: dict[str, int] = {}

    def add(self, folder: str, start: int, end: int) -> None:
        """Rows of the scores are in a folder, whose files follow each other."""
        self._next.setdefault(folder, start)
        self._ends[folder] = end

    def all_found(self) -> bool:
        """Whether each folder had as many rows as the scores."""
        return self._next == self._ends

    def of(self, table: pa.Table, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of the rows that come next, which are those of a table with these positions."""
        folders, numbers = [""] if len(rows) else [], np.zeros(len(rows), dtype=np.int64)
        if self.names:
            kinds = [pa.field(name, plain_type(table.field(name).type)) for name in self.names]
            named = table.select(self.names).take(pa.array(rows)).cast(pa.schema(kinds))
            folders, numbers = Partitioning(named.schema).folders(named)
        places = np.empty(len(rows), dtype=np.int64)
        ends = np.cumsum(np.bincount(numbers, minlength=len(folders)))
        groups = np.split(np.argsort(numbers, kind="stable"), ends[:-1])
        for folder, group in zip(folders, groups, strict=False):  # (Without a folder there is an empty one.)
            start = self._next.get(folder, 0)
            places[group] = np.arange(start, start + len(group))
            self._next[folder] = start + len(group)
        return places


def _batches(scores: Path, partition_by: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Tables of the scores, with the folder that each is in."""
    for item in find_inputs([str(scores)]):
        place = os.path.relpath(item.place, scores)
        values = named_values(place)
        for table in _tables_of(item):
            for name in partition_by if values else ():
                table = table.append_column(name, pa.repeat(pa.scalar(values[name], pa.string()), len(table)))
            yield os.path.dirname(place), table


def _tables_of(item: Input) -> Iterator[pa.Table]:
    import pyarrow.dataset as pads

    if item.is_text:
        # Keys are text, and not the numbers that they may look like.
        with open_text(item, lambda name: True) as text:
            keys = {name: pa.string() for name in text.names if name not in ADDED}
            convert = pacsv.ConvertOptions(column_types=keys, null_values=[""], strings_can_be_null=True)
            yield from parse_text(text, item, convert)
    else:
        dataset = pads.dataset(item.place, format=item.kind, filesystem=item.filesystem)
        for batch in dataset.scanner(batch_size=2**16, batch_readahead=2).to_batches():
            yield pa.Table.from_batches([batch])


def _read_scores(
    scores: Path, found: RunReport, n_top: int, partition_by: list[str], log: Log
) -> tuple[npt.NDArray[np.int64], tuple[str, ...], _Places]:
    """Distribution and most abnormal rows; also places of normal rows, drawn from all, keys' names, and folders."""
    drawn = np.sort(
        np.random.default_rng(0).choice(found.rows, min(found.rows, BACKGROUND_ROWS), replace=False)
        if found.rows
        else np.empty(0, dtype=np.int64)
    )
    normal: list[npt.NDArray[np.int64]] = []
    sample, start = Summariser(), 0
    added = {*ADDED, *(field.name for field in top_fields(MAX_TOP_FIELDS))}
    top: pd.DataFrame | None = None
    keys: tuple[str, ...] = ()
    places = _Places(partition_by)
    try:
        with log.progress("rows") as bar:
            for folder, table in _batches(scores, partition_by):
                values, labels = (table.column(name).to_numpy() for name in ("score", "label"))
                keys = tuple(name for name in table.column_names if name not in added)
                # (A density may be zero.)
                values = np.maximum(values, np.finfo(np.float64).min)
                sample.add(pd.DataFrame({"score": values}))
                here = drawn[(drawn >= start) & (drawn < start + len(values))] - start
                normal.append(here[labels[here] == 1] + start)
                odd = np.flatnonzero(labels == -1)
                odd = odd[np.argsort(values[odd], kind="stable")][:n_top]
                more = [name for name in ("score", "p_value") if name in table.column_names]
                # (A key may be called "row".)
                held = [f"key {name}" for name in keys]
                rows = table.select([*keys, *more]).rename_columns([*held, *more]).take(pa.array(odd))
                rows = rows.append_column("row", pa.array(odd + start))
                # (Whole numbers beside a missing one would become floats.)
                frame = rows.to_pandas(integer_object_nulls=True).astype(dict.fromkeys(held, object))
                top = frame if top is None else pd.concat([top, frame], ignore_index=True)
                top = top.sort_values("score", kind="stable", ignore_index=True)[:n_top]
                places.add(folder, start, start + len(values))
                start += len(values)
                bar.update(len(values))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{scores} cannot be read: {str(error).splitlines()[0]}") from None
    if start != found.rows:
        raise DataError(
            f"{scores} has {start} rows, and its record says {found.rows}. Score the files again."
        )
    if start and (whole := sample.columns()[0].distribution) is not None:
        # As `monitor` compares them.
        kept = whole.sample()
        found.scores = Distribution.of(kept, len(kept) + 1)
    for entry in [] if top is None else top.to_dict("records"):
        shown = {key: entry[f"key {key}"] for key in keys}
        found.anomalies.append(Anomaly(int(entry["row"]), float(entry["score"]), shown, entry.get("p_value")))
    return np.concatenate(normal) if normal else drawn, keys, places


# The files ---------------------------------------------------------------------------------------------------


def _same_inputs(record: dict[str, Any]) -> list[Input]:
    inputs = find_inputs([path for path, _, _ in record["inputs"]])
    now = {item.path: (item.size, item.mtime) for item in inputs}
    for path, size, mtime in record["inputs"]:
        if now.get(path) != (size, mtime):
            raise DataError(f"{path} has changed since it was scored.")
    return inputs


def _walk(
    found: RunReport,
    inputs: list[Input],
    entries: list[dict[str, Any]],
    wanted: Wanted,
    model: Any,
    normal: npt.NDArray[np.int64],
    places: _Places,
    log: Log,
) -> Summariser:
    summariser = Summariser(None if found.reference is None else found.reference.columns)
    bad_files = {entry["file"] for entry in entries if entry["row"] is None}
    bad_rows: dict[str, list[int]] = {}
    for entry in entries:
        if entry["row"] is not None:
            bad_rows.setdefault(entry["file"], []).append(entry["row"])
    most = np.array([anomaly.row for anomaly in found.anomalies], dtype=np.int64)
    odd: list[pd.DataFrame] = []
    background: list[pd.DataFrame] = []
    start = 0
    with log.progress("rows") as bar:
        for number, item in enumerate(inputs):
            count = 0
            if item.path not in bad_files:
                for part in Reader(item, wanted).parts(rows_per_part(wanted.count)):
                    names = list(wanted.names or [n for n in part.table.column_names if n not in wanted.keys])
                    frame, _ = part.frame(names, wanted.types)
                    # (A model without names has a reference without names.)
                    named = wanted.names is not None
                    summariser.add(
                        frame if named else frame.set_axis([str(j) for j in range(len(names))], axis=1)
                    )
                    kept = np.flatnonzero(~np.isin(part.rows, bad_rows.get(item.path, [])))
                    place = places.of(part.table, kept)
                    for chosen, frames in ((most, odd), (normal, background)):
                        here = np.isin(place, chosen)
                        frames.append(frame.iloc[kept[here]].set_axis(place[here]))
                    start, count = start + len(kept), count + len(part.rows)
                    bar.update(len(part.rows))
            found.inputs[number] = (item.path, item.size, count)
    if start != found.rows:
        raise DataError(f"the files have {start} rows to score, and the scores {found.rows}.")
    if not places.all_found():
        raise DataError(
            "the rows of the files belong to other folders than the scores have, so they are others."
        )
    if len(most):
        _explain(found, odd, background, model, named=wanted.names is not None, log=log)
    return summariser


def _explain(
    found: RunReport,
    odd: list[pd.DataFrame],
    background: list[pd.DataFrame],
    model: Any,
    *,
    named: bool,
    log: Log,
) -> None:
    # (In the order of the scores, whichever the files have.)
    rows, normal = (pd.concat(frames).sort_index() for frames in (odd, background))
    places = rows.index.to_numpy()
    rows, normal = rows.reset_index(drop=True), normal.reset_index(drop=True)
    again = model.score_samples(rows if named else rows.to_numpy())
    scores = {anomaly.row: anomaly.score for anomaly in found.anomalies}
    if not np.allclose(again, [scores[row] for row in places.tolist()], rtol=1e-5, atol=1e-6):
        raise DataError("the rows of the files do not have the scores that were written, so they are others.")
    names = [str(name) for name in rows]
    try:
        explainer = Explainer(model, names, named=named, log=log, background=normal if len(normal) else None)
        blocks = []
        with log.progress("rows explained") as bar:
            for block in explainer.contributions(rows):
                blocks.append(block)
                bar.update(len(block.values))
    except UsageError as error:
        found.notes.append(f"Contributions are left out: {error}")
        return
    tops: list[list[tuple[str, Any, float]]] = []
    for block in blocks:
        block.feature_names[:] = names
        tops += block.top(len(names))
    by_row = dict(zip(places.tolist(), tops, strict=True))
    for anomaly in found.anomalies:
        anomaly.contributions = by_row[anomaly.row]
    mean = np.concatenate([np.maximum(block.values, 0) for block in blocks]).mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    found.weights = {names[j]: float(mean[j]) for j in order if mean[j] > 0}
