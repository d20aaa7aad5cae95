"""What earlier runs found, in one SQLite file: for trends, for the usual volume, and so that nobody is woken twice.

A run has a name that is the same whenever the same files are scored by the same model, and one entry in its job:
looking at it again replaces the entry. Jobs share a file without touching each other's runs, even where both call them
by the date. Every change is one transaction, so that a kill leaves what was there; several processes wait
for each other. SQLite serves better than a column store here: a few rows a night, written by several, read by anything.

    runs      job, run, time, output, model, n_rows, n_flagged, n_bad_rows, n_bad_files, alert, notified, report (JSON)
    columns   job, run, name, distance, psi, wasserstein, p_adjusted, missing, unseen, drifted
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from anomalib_gen.monitoring.drift import DriftReport

VERSION = 2
RECENT = 30
"""Runs that tell what is usual."""
WAIT_SECONDS = 30.0
"""How long one process waits for another."""
_SCHEMA = """
CREATE TABLE runs (
    job TEXT NOT NULL,
    run TEXT NOT NULL,
    time REAL NOT NULL,
    output TEXT NOT NULL,
    model TEXT NOT NULL,
    n_rows INTEGER NOT NULL,
    n_flagged INTEGER NOT NULL,
    n_bad_rows INTEGER NOT NULL,
    n_bad_files INTEGER NOT NULL,
    alert INTEGER NOT NULL,
    notified REAL,
    report TEXT NOT NULL,
    PRIMARY KEY (job, run)
) WITHOUT ROWID;
CREATE TABLE columns (
    job TEXT NOT NULL,
    run TEXT NOT NULL,
    name TEXT NOT NULL,
    distance REAL NOT NULL,
    psi REAL NOT NULL,
    wasserstein REAL,
    p_adjusted REAL NOT NULL,
    missing REAL NOT NULL,
    unseen REAL,
    drifted INTEGER NOT NULL,
    PRIMARY KEY (job, run, name),
    FOREIGN KEY (job, run) REFERENCES runs (job, run) ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX runs_by_time ON runs (job, time);
"""


_COLUMN_FIELDS = (
    "name",
    "distance",
    "psi",
    "wasserstein",
    "p_adjusted",
    "missing_batch",
    "unseen",
    "drifted",
)


class HistoryError(Exception):
    """The history cannot be read or written; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A run in the history.

    Attributes
    ----------
    run : str
        Name of the run.
    time : float
        When it was first looked at, in seconds since 1970.
    job : str
        The series that the run belongs to.
    output, model : str
        Where the scores are, and the model's hash.
    n_rows, n_flagged : int
    alert : bool
    notified : float or None
        When somebody was told of the alert.
    report : dict
        `DriftReport.to_dict`.
    """

    run: str
    time: float
    job: str
    output: str
    model: str
    n_rows: int
    n_flagged: int
    alert: bool
    notified: float | None
    report: dict[str, Any]


def _kinds(report: dict[str, Any]) -> set[tuple[str, str | None]]:
    """What the alerts of a report are about."""
    return {(alert["kind"], alert["column"]) for alert in report.get("alerts", ())}


_ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


class History:
    """A file of runs.

    Parameters
    ----------
    path : str or path
        Made if it is not there.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def _open(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction, which is kept if nothing is raised."""
        try:
            connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise HistoryError(
                f"The history {self.path} cannot be opened: {error}. Is it a file in a folder where you may write?"
            ) from None
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            if not self._has_runs(connection) and write:
                self._prepare(connection)
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise HistoryError(f"The history {self.path} cannot be used: {error}.") from None
        finally:
            # (What was not committed is rolled back.)
            connection.close()

    def _has_runs(self, connection: sqlite3.Connection) -> bool:
        """Whether the file is a history, or an empty one that may become a history."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return True
        if version or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise HistoryError(
                f"{self.path} is no history of this anomalib_gen (version {VERSION}). Choose another file."
            )
        return False

    def _prepare(self, connection: sqlite3.Connection) -> None:
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")

    def _select(self, query: str, values: tuple[object, ...]) -> list[Any]:
        """Rows of a query; reading needs no right to write."""
        with self._open(write=False) as connection:
            return connection.execute(query, values).fetchall() if self._has_runs(connection) else []

    def add(
        self, run: str, report: DriftReport, *, job: str, output: str, model: str, now: float | None = None
    ) -> Entry:
        """Keep what a run found, in place of what its job has under its name.

        Parameters
        ----------
        run : str
        report : DriftReport
        job, output, model : str
        now : float, optional
            Seconds since 1970; the clock's if None.

        Returns
        -------
        Entry
            With the time of the first look, and that of the notification if that told of every alert there is now.

        Raises
        ------
        HistoryError
            If the file cannot be written.
        """
        document = report.to_dict()
        alert = bool(report.alerts)
        with self._open() as connection:
            before = connection.execute(
                "SELECT time, notified, report FROM runs WHERE job = ? AND run = ?", (job, run)
            ).fetchone()
            first, notified, earlier = before or (time.time() if now is None else now, None, "{}")
            if not alert or not _kinds(document) <= _kinds(json.loads(earlier)):
                notified = None
            connection.execute("DELETE FROM runs WHERE job = ? AND run = ?", (job, run))
            text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
            counts = report.n_rows, report.n_flagged, report.n_bad_rows, report.n_bad_files
            connection.execute(
                f"INSERT INTO runs VALUES ({', '.join('?' * 12)})",
                (job, run, first, output, model, *counts, alert, notified, text),
            )
            connection.executemany(
                f"INSERT INTO columns VALUES ({', '.join('?' * 10)})",
                [
                    (job, run, *(getattr(column, name) for name in _COLUMN_FIELDS))
                    for column in report.columns
                ],
            )
        return Entry(
            run, first, job, output, model, report.n_rows, report.n_flagged, alert, notified, document
        )

    def notify(self, run: str, *, job: str, now: float | None = None) -> None:
        """Note that somebody was told of a run's alert.

        Parameters
        ----------
        run, job : str
        now : float, optional
        """
        with self._open() as connection:
            moment = time.time() if now is None else now
            connection.execute("UPDATE runs SET notified = ? WHERE job = ? AND run = ?", (moment, job, run))

    def entries(self, *, job: str | None = None, limit: int = -1) -> list[Entry]:
        """Runs, the latest first.

        Parameters
        ----------
        job : str, optional
            Those of this job alone.
        limit : int, default=-1
            No more than so many; -1 for all.

        Returns
        -------
        list of Entry
        """
        condition, values = ("WHERE job = ?", (job,)) if job is not None else ("", ())
        return self._entries(condition, values, limit)

    def _entries(self, condition: str, values: tuple[str, ...], limit: int) -> list[Entry]:
        query = f"SELECT {', '.join(_ENTRY_FIELDS)} FROM runs {condition} ORDER BY time DESC, run LIMIT ?"
        found = self._select(query, (*values, limit))
        rows = (dict(zip(_ENTRY_FIELDS, row, strict=True)) for row in found)
        return [Entry(**{**r, "alert": bool(r["alert"]), "report": json.loads(r["report"])}) for r in rows]

    def earlier(self, run: str, *, job: str, limit: int = RECENT) -> list[Entry]:
        """Runs of a job before this one, the latest first: they tell the usual volume.

        Parameters
        ----------
        run : str
            It is left out, and so is what came after it.
        job : str
        limit : int, default=30

        Returns
        -------
        list of Entry
        """
        condition = (
            "WHERE job = ? AND run != ? AND time <= "
            "coalesce((SELECT time FROM runs WHERE job = ? AND run = ?), 1e300)"
        )
        return self._entries(condition, (job, run, job, run), limit)

    def name_of(self, output: str, *, job: str, model: str, n_rows: int, n_flagged: int) -> str | None:
        """Name under which a run was kept, by what came out of it.

        Parameters
        ----------
        output, job, model : str
        n_rows, n_flagged : int

        Returns
        -------
        str or None
            None if it is not there.
        """
        query = (
            "SELECT run, output FROM runs WHERE job = ? AND model = ? AND n_rows = ? AND n_flagged = ? "
            "ORDER BY time DESC, run"
        )
        found = self._select(query, (job, model, n_rows, n_flagged))
        return next((run for run, place in found if os.path.abspath(place) == os.path.abspath(output)), None)

    def forget(self, *, job: str, days: float, now: float | None = None) -> int:
        """Remove runs of a job that are older; others may keep theirs for longer.

        Nothing is removed where only one run would be left: a clock that is far ahead looks like a long pause. After a
        pause, the next run removes them.

        Parameters
        ----------
        job : str
        days : float
        now : float, optional

        Returns
        -------
        int
            How many.
        """
        moment = (time.time() if now is None else now) - 86_400 * days
        with self._open() as connection:
            removed = connection.execute(
                "DELETE FROM runs WHERE job = ? AND time < ? "
                "AND (SELECT count(*) FROM runs WHERE job = ? AND time >= ?) > 1",
                (job, moment, job, moment),
            )
            return int(removed.rowcount)
