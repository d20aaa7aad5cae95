"""Compare a scored batch with the training reference, remember what was found, and tell those who should know.

The order is that of what must not be lost: the history is written first, then metrics and the JSON file, and last of
all a webhook is called, which may fail without a loss. A run has one name however often it is looked at, so nothing is
counted twice, and of alerts that were told before nobody is told again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anomalib_gen import persistence
from anomalib_gen.monitoring import (
    Batch,
    Distribution,
    DriftReport,
    Reference,
    Summariser,
    Thresholds,
    compare,
    load_reference,
)
from anomalib_gen.monitoring.history import History, HistoryError
from anomalib_gen.monitoring.metrics import metrics_of
from anomalib_gen.monitoring.webhook import WebhookError, post, where
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.scoring._columns import Wanted
from anomalib_gen.scoring._errors import ALERT, DONE, PARTIAL, DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.config import MonitorOptions
from anomalib_gen.scoring.parts import digest, read_record, record_of, to_json, write_output
from anomalib_gen.scoring.run import HASH_DIGITS
from anomalib_gen.scoring.sources import (
    Input,
    Reader,
    check_beside_model,
    check_output,
    find_inputs,
    is_remote,
    local_place,
    rows_per_part,
)

NO_REFERENCE = (
    "{folder} has no training reference to compare with. `anomalib-gen fit` writes one into the folder; to add one to "
    "this model, describe normal rows that it was not fitted to: anomalib-gen calibrate NORMAL_FILES -m {folder} "
    "--method keep --overwrite"
)
SHOWN_COLUMNS = 20
"""In the printed table; the JSON has all."""
TOLD_ALERTS = 20
"""In a webhook's document."""


def reference_of_folder(folder: str) -> tuple[Reference, dict[str, Any]]:
    """Training reference of a model folder, and what the folder says of itself.

    Raises
    ------
    DataError
        If there is none; the message says how to get one.
    """
    try:
        facts = persistence.inspect(folder)
        reference = load_reference(folder)
    except (ModelFolderError, OSError) as error:
        raise DataError(str(error)) from None
    if reference is None:
        raise DataError(NO_REFERENCE.format(folder=folder))
    return reference, facts


@dataclass(frozen=True)
class Scored:
    """What a scored output holds.

    Attributes
    ----------
    n_rows, n_flagged, n_bad_rows, n_bad_files : int
    scores : Distribution
        Of a sample of the rows.
    run : str
        Name of the run: the same for the same files and model.
    inputs : list of (str, int, int) or None
        Path, size and time of the files that were scored; None without a record.
    """

    n_rows: int
    n_flagged: int
    n_bad_rows: int
    n_bad_files: int
    scores: Distribution
    run: str
    inputs: list[tuple[str, int, int]] | None


def read_scored(path: str, model_hash: str, log: Log) -> Scored:
    """Read the output of ``score``.

    Parameters
    ----------
    path : str
        A file, or a folder of them.
    model_hash : str
        Of the model that must have made it.
    log : Log

    Raises
    ------
    DataError
        If it is no output of ``score``, or of another model or run than its record.
    """
    inputs = find_inputs([path])
    wanted = Wanted(("score", "label", "model"), 3, ("float", "integer", "text"))
    summary, n_rows, n_flagged = Summariser(), 0, 0
    with log.progress("rows") as bar:
        for item in inputs:
            try:
                reader = Reader(item, wanted)
            except DataError as error:
                raise DataError(f"{item.path} is no output of `score`: {error}") from None
            for part in reader.parts(rows_per_part(3)):
                frame, bad = part.frame(["score", "label", "model"], wanted.types)
                if bad or part.malformed or frame["score"].isna().any():
                    raise DataError(f"{item.path} has rows without a score: it is no output of `score`.")
                others = frame["model"][frame["model"] != model_hash[:HASH_DIGITS]]
                if len(others):
                    raise DataError(
                        f"{item.path} was scored by the model {others.iloc[0]}, and the folder holds "
                        f"{model_hash[:HASH_DIGITS]}. Give the model's own folder, or score again."
                    )
                n_rows += len(frame)
                n_flagged += int((frame["label"] == -1).sum())
                # (A density may be zero.)
                low = np.finfo(np.float64).min
                summary.add(pd.DataFrame({"score": frame["score"].clip(lower=low).astype(np.float64)}))
                bar.update(len(part.rows))
    record = _record(path)
    if record is not None and (record["model"], record["rows"]) != (model_hash, n_rows):
        raise DataError(
            f"{path} has {count(n_rows, 'row')}, and its record is that of another run. Score the files again."
        )
    columns = summary.columns()
    sample = columns[0].distribution.sample() if columns and columns[0].distribution else np.empty(0)
    files = [[Path(item.path).name, item.size, item.mtime] for item in inputs]
    return Scored(
        n_rows=n_rows,
        n_flagged=n_flagged,
        n_bad_rows=record["bad_rows"] if record else 0,
        n_bad_files=record["bad_files"] if record else 0,
        scores=Distribution.of(sample, len(sample) + 1),
        run=digest([record["plan"] if record else files, model_hash]),
        inputs=record["inputs"] if record else None,
    )


def _record(path: str) -> dict[str, Any] | None:
    """What a run wrote beside its output, if it is there."""
    place = f"{path}.run.json" if is_remote(path) else record_of(Path(local_place(path)))
    try:
        if is_remote(path):
            import fsspec

            with fsspec.open(place, "rb") as file:
                return read_record(file.read(), place)
        return read_record(Path(place).read_bytes(), place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain_os_error(error, f"reading {place}") from None


def scored_inputs(options: MonitorOptions, scored: Scored, log: Log) -> list[Input]:
    """Files of ``--input`` that were scored: all of them, for all that is known without a record.

    A file is the same if it has the size and the time that it had when it was scored. A copy may have another time; it
    is taken for the same by its name and size, with a warning.

    Raises
    ------
    DataError
        If none of them was scored.
    """
    given = find_inputs(options.input)
    if scored.inputs is None:
        log.info(f"{options.scores} has no record, so it is not known whether --input names what was scored")
        return given
    chosen = []
    for item in given:
        likely = [entry for entry in scored.inputs if _may_be(item, *entry)]
        if likely:
            chosen.append(item)
            if all(mtime != item.mtime for _, _, mtime in likely):
                log.warning(
                    f"{item.path} has the name and the size of {likely[0][0]}, which was scored, and another time: it "
                    "is taken for a copy",
                    file=item.path,
                )
    if not chosen:
        raise DataError(
            f"None of the files of --input was scored, or they have changed since: {options.scores} was made from "
            f"{_listed([path for path, _, _ in scored.inputs])}, and --input names "
            f"{_listed([item.path for item in given])}. Name the files that were scored, or leave --input out."
        )
    for item in given:
        if item not in chosen:
            log.warning(f"left out {item.path}: it was not scored, or has changed since", file=item.path)
    if len(chosen) < len(scored.inputs):
        log.warning(
            f"--input names {len(chosen)} of the {count(len(scored.inputs), 'file')} that were scored"
        )
    return chosen


def _may_be(item: Input, path: str, size: int, mtime: int) -> bool:
    if item.size != size:
        return False
    # (Of a store the time may not be known.)
    if item.mtime == mtime and (mtime or item.path == path):
        return True
    return Path(item.path).name == Path(path).name and os.path.abspath(item.path) != os.path.abspath(path)


def _listed(paths: list[str]) -> str:
    return f"{paths[0]} and {count(len(paths) - 1, 'other')}" if len(paths) > 1 else "".join(paths)


def input_frames(
    inputs: list[Input], schema: dict[str, Any], keys: tuple[str, ...], reference: Reference, log: Log
) -> Iterator[pd.DataFrame | None]:
    """Rows of the model's columns in files, by the reference's names; None for a file that cannot be read."""
    columns = schema["columns"]
    names = [column.name for column in reference.columns]
    if columns is None or not schema["named"]:
        count = len(columns) if columns is not None else len(names)
        wanted = Wanted(None, count, tuple(c["type"] for c in columns) if columns else (None,) * count, keys)
    else:
        wanted = Wanted(
            tuple(column["name"] for column in columns),
            len(columns),
            tuple(column["type"] for column in columns),
        )
    with log.progress("rows") as bar:
        for item in inputs:
            try:
                reader = Reader(item, wanted)
                for part in reader.parts(rows_per_part(wanted.count)):
                    frame, _ = part.frame(reader.names, wanted.types)
                    if wanted.names is None:
                        frame.columns = pd.Index([str(j) for j in range(frame.shape[1])])
                    yield frame
                    bar.update(len(part.rows))
            except DataError as error:
                log.warning(f"left out a file: {error}", file=item.path)
                yield None


def thresholds_of(options: MonitorOptions) -> Thresholds:
    """What the options call an alert."""
    return Thresholds(**{field.name: getattr(options, field.name) for field in fields(Thresholds)})


def job_of(options: MonitorOptions) -> str:
    """Series that a run belongs to: the model's folder, however its path is written.

    Links are not followed: where one names the model of the day, the series goes on with the next model.
    """
    return options.job or os.path.abspath(options.model)


def monitor_files(options: MonitorOptions, log: Log) -> tuple[dict[str, Any], int]:
    """Compare, remember and tell.

    Returns
    -------
    document : dict
        "run", "job", "output", "model", "time", "alert" and "report", plain JSON.
    code : int
        Exit code.

    Raises
    ------
    UsageError, DataError
        As the exit codes say.
    """
    limits = thresholds_of(options)
    written = {name: getattr(options, name) for name in ("output", "prometheus", "history")}
    places = {name: local_place(place) for name, place in written.items() if place is not None}
    options = replace(options, **places)  # type: ignore[type-var]  # made one by `command`
    try:
        if options.webhook is not None:
            where(options.webhook)
    except WebhookError as error:
        raise UsageError(f"--webhook: {error}") from None
    _check_outputs(options)
    reference, facts = reference_of_folder(options.model)
    if not reference.held_out:
        log.warning(
            "the training reference has scores of training rows, which look too normal, so scores raise no alert; give "
            "it others: anomalib-gen calibrate NORMAL_FILES"
        )
    if unknown := sorted(set(options.ignore) - {column.name for column in reference.columns}):
        raise UsageError(f"--ignore {unknown[0]} is no column of the model.")
    scored = read_scored(options.scores, facts["hash"], log)
    run = options.run or scored.run
    job = job_of(options)
    batch, unreadable = _batch(options, scored, reference, facts, log)
    history = None if options.history is None else History(options.history)
    now, notified = time.time(), None
    try:
        if history is not None:
            persistence.make_folder(history.path.parent)
            recent = [entry.n_rows for entry in history.earlier(run, job=job)]
        report = compare(
            reference,
            batch,
            thresholds=limits,
            recent_rows=recent if history is not None else (),
            ignore=options.ignore,
        )
        if history is not None:
            entry = history.add(run, report, job=job, output=options.scores, model=facts["hash"])
            history.forget(job=job, days=options.keep_days)
            now, notified = entry.time, entry.notified
    except HistoryError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise explain_os_error(error, f"writing {options.history}") from None
    document = {
        "run": run,
        "job": job,
        "output": options.scores,
        "model": facts["hash"],
        "time": round(now, 3),
        "alert": bool(report.alerts),
        "report": report.to_dict(),
    }
    series: dict[str, Any] = {"job": job, "model": facts["hash"][:HASH_DIGITS], "time": now}
    for place, write in (
        (options.output, lambda path: write_output(Path(path), to_json(document) + b"\n")),
        (
            options.prometheus,
            lambda path: write_output(Path(path), metrics_of(report, **series)),
        ),
    ):
        if place is not None:
            try:
                write(place)
            except OSError as error:
                raise explain_os_error(error, f"writing {place}") from None
    if options.prometheus is not None and not options.prometheus.endswith(".prom"):
        log.warning(
            f"the node exporter reads files that end in .prom alone, and {options.prometheus} does not"
        )
    told = _tell(options, document, report, history, notified, log)
    if report.alerts:
        for alert in report.alerts:
            log.warning(f"alert: {alert.message}", kind=alert.kind, column=alert.column)
        return document, ALERT
    return document, DONE if told and not unreadable else PARTIAL


def _check_outputs(options: MonitorOptions) -> None:
    """Refuse to write over what is read, or one file over another.

    Raises
    ------
    UsageError
    """
    inputs = find_inputs([options.scores, *options.input])
    taken = {record_of(Path(item.path)).resolve(): f"the record of {item.path}" for item in inputs}
    for flag in ("--output", "--prometheus", "--history"):
        place = getattr(options, flag.removeprefix("--"))
        if place is None:
            continue
        check_output(place, flag, inputs)
        path = Path(place).resolve()
        if path.is_dir():
            raise UsageError(f"{flag} {place} is a folder. Name a file.")
        if path in taken:
            raise UsageError(f"{flag} {place} is {taken[path]}. Choose another file.")
        check_beside_model(place, flag, options.model)
        taken[path] = f"that of {flag}"


def _batch(
    options: MonitorOptions, scored: Scored, reference: Reference, facts: dict[str, Any], log: Log
) -> tuple[Batch, int]:
    """The batch, and how many files could not be read."""
    columns: Any = ()
    unreadable, read = 0, 0
    if options.input:
        summary = Summariser(reference.columns)
        for frame in input_frames(
            scored_inputs(options, scored, log), facts["schema"], options.key, reference, log
        ):
            unreadable += frame is None
            if frame is not None:
                read += 1
                summary.add(frame)
        if unreadable and not read:
            raise DataError("None of the files of --input can be read.")
        columns = summary.columns()
    else:
        log.info("comparing scores alone; --input compares the columns, too")
    batch = Batch(
        n_rows=scored.n_rows,
        n_flagged=scored.n_flagged,
        scores=scored.scores,
        columns=columns,
        n_bad_rows=scored.n_bad_rows,
        n_bad_files=max(scored.n_bad_files, unreadable),
    )
    return batch, unreadable


def _tell(
    options: MonitorOptions,
    document: dict[str, Any],
    report: DriftReport,
    history: History | None,
    notified: float | None,
    log: Log,
) -> bool:
    """Call the webhook where there is an alert of which nobody knows; return whether all went well."""
    if options.webhook is None or not report.alerts:
        return True
    if notified is not None:
        log.info("the webhook was told of this run's alert before")
        return True
    try:
        post(
            options.webhook,
            message(document, report),
            timeout=options.webhook_timeout,
            retries=options.webhook_retries,
            backoff=options.webhook_backoff,
        )
    except WebhookError as error:
        log.warning(f"the webhook was not told of the alert: {error} Run the command again to try again.")
        return False
    if history is not None:
        try:
            history.notify(document["run"], job=document["job"])
        except HistoryError as error:
            log.warning(f"the webhook was told, but that could not be noted: {error}")
    return True


def message(document: dict[str, Any], report: DriftReport) -> dict[str, Any]:
    """What a webhook gets: the alerts, and the same as "text", which chat services show."""
    alerts = [alert.message for alert in report.alerts]
    shown = alerts[:TOLD_ALERTS]
    more = [f"and {len(alerts) - len(shown)} more"] if len(alerts) > len(shown) else []
    lines = [f"{document['job']}: {count(len(alerts), 'alert')} in {document['output']}"]
    return {
        **{key: document[key] for key in ("run", "job", "output", "model", "time", "alert")},
        "rows": report.n_rows,
        "outliers": report.n_flagged,
        "alerts": shown + more,
        "text": "\n".join(lines + [f"- {line}" for line in shown + more]),
    }


def table(document: dict[str, Any]) -> str:
    """The outcome for people."""
    report = document["report"]
    rows, flagged = report["n_rows"], report["n_flagged"]
    lines = [
        f"run {document['run']} of {document['job']}: {count(rows, 'row')}, {count(flagged, 'outlier')}; left out: "
        f"{count(report['n_bad_rows'], 'bad row')}, {count(report['n_bad_files'], 'bad file')}"
    ]
    head = ("", "distance", "PSI", "Wasserstein", "p", "missing", "unseen", "")
    cells: list[tuple[str, ...]] = [head]
    if (scores := report["scores"]) is not None:
        alert = any(item["kind"] == "scores" for item in report["alerts"])
        p = min(scores["p_value"], scores["ks_p_value"])
        cells.append(
            ("scores", *_numbers(scores, p), "", "", "drifted" if alert else ""),
        )
    columns = sorted(report["columns"], key=lambda column: (not column["drifted"], -column["psi"]))
    for column in columns[:SHOWN_COLUMNS]:
        unseen = "" if column["unseen"] is None else f"{column['unseen']:.2%}"
        cells.append(
            (
                column["name"][:40],
                *_numbers(column, column["p_adjusted"]),
                f"{column['missing_batch']:.2%}",
                unseen,
                "drifted" if column["drifted"] else "",
            )
        )
    if len(cells) > 1:
        widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
        for row in cells:
            first = row[0].ljust(widths[0])
            rest = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:], strict=False)]
            lines.append("  ".join([first, *rest, row[-1]]).rstrip())
    if len(columns) > SHOWN_COLUMNS:
        lines.append(f"and {len(columns) - SHOWN_COLUMNS} more columns")
    return "\n".join([*lines, count(len(report["alerts"]), "alert")])


def _numbers(found: dict[str, Any], p: float) -> tuple[str, str, str, str]:
    moved = found["wasserstein"]
    return (
        f"{found['distance']:.3f}",
        f"{found['psi']:.3f}",
        "" if moved is None else f"{moved:.2f}",
        f"{p:.2g}",
    )
