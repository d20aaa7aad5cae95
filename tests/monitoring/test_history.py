"""The history: one entry a run, whoever writes, and nothing half done."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from anomalib_gen.monitoring import Alert, Batch, ColumnDrift, Distribution, Reference, compare
from anomalib_gen.monitoring.history import Entry, History, HistoryError
from anomalib_gen.monitoring.metrics import metrics_of

NORMAL = Distribution.of(np.random.default_rng(0).normal(size=500))
REFERENCE = Reference(500, (), NORMAL, 500, 25, True, -1.645)
QUIET = compare(REFERENCE, Batch(400, 20, NORMAL))
LOUD = compare(REFERENCE, Batch(0, 0, NORMAL))
FACTS = {"job": "nightly", "output": "scores.parquet", "model": "abc"}


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "h.sqlite")


def test_a_run_is_counted_once(history):
    first = history.add("a", QUIET, **FACTS, now=100.0)
    assert first == Entry(
        "a", 100.0, "nightly", "scores.parquet", "abc", 400, 20, False, None, QUIET.to_dict()
    )
    again = history.add("a", LOUD, **FACTS, now=200.0)
    assert (again.time, again.n_rows, again.alert) == (100.0, 0, True)
    history.add("b", QUIET, **FACTS, now=150.0)
    history.add("c", QUIET, **{**FACTS, "job": "other"}, now=160.0)
    assert [entry.run for entry in history.entries()] == ["c", "b", "a"]
    assert [entry.run for entry in history.entries(job="nightly", limit=1)] == ["b"]
    # (Through JSON tuples become lists.)
    assert history.entries(job="nightly")[1].report["alerts"][0]["kind"] == "volume"


def test_an_alert_is_told_once_and_forgotten_when_it_is_over(history):
    history.add("a", LOUD, **FACTS)
    history.notify("a", job="nightly", now=7.0)
    assert history.add("a", LOUD, **FACTS).notified == 7.0
    assert history.add("a", QUIET, **FACTS).notified is None
    assert history.add("a", LOUD, **FACTS).notified is None


def test_other_alerts_of_a_run_that_was_told_are_told(history):
    """Files that came later, and were scored under the same name: what was told was something else."""
    both = replace(LOUD, alerts=(*LOUD.alerts, Alert("missing", "x", "x: 9.00% are missing")))
    history.add("a", LOUD, **FACTS)
    history.notify("a", job="nightly", now=7.0)
    assert history.add("a", both, **FACTS).notified is None
    history.notify("a", job="nightly", now=8.0)
    assert history.add("a", LOUD, **FACTS).notified == 8.0


def test_jobs_that_call_their_runs_alike_keep_their_own(history):
    column = ColumnDrift("x", "number", 0.0, 0.0, None, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, None, (), False)
    other = {**FACTS, "job": "other"}
    history.add("2026-11-24", replace(LOUD, columns=(column,)), **FACTS, now=1.0)
    history.notify("2026-11-24", job="nightly", now=2.0)
    assert history.add("2026-11-24", LOUD, **other, now=3.0).notified is None
    history.notify("2026-11-24", job="other", now=4.0)
    assert [(entry.job, entry.notified) for entry in history.entries()] == [("other", 4.0), ("nightly", 2.0)]
    assert history.earlier("2026-11-24", job="nightly") == []
    assert history.add("2026-11-24", LOUD, **other).time == 3.0
    with sqlite3.connect(history.path) as connection:
        assert connection.execute("SELECT job, run, name FROM columns").fetchall() == [
            ("nightly", "2026-11-24", "x")
        ]


def test_the_usual_volume_is_that_of_earlier_runs_of_the_job(history):
    for k in range(40):
        history.add(f"r{k}", compare(REFERENCE, Batch(100 + k, 0, NORMAL)), **FACTS, now=float(k))
    history.add("other", QUIET, **{**FACTS, "job": "other"}, now=3.0)
    assert [entry.n_rows for entry in history.earlier("new", job="nightly")] == [139 - k for k in range(30)]
    assert [entry.n_rows for entry in history.earlier("r3", job="nightly")] == [102, 101, 100]


def test_a_run_is_known_by_what_came_out_of_it(history, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history.add("old", QUIET, **FACTS, now=1.0)
    history.add("new", QUIET, **FACTS, now=2.0)
    same = {"job": "nightly", "model": "abc", "n_rows": 400, "n_flagged": 20}
    assert history.name_of("./scores.parquet", **same) == "new"
    assert history.name_of(str(tmp_path / "scores.parquet"), **same) == "new"
    assert history.name_of("other.parquet", **same) is None
    for name, value in (("job", "other"), ("model", "b"), ("n_rows", 1), ("n_flagged", 1)):
        assert history.name_of("scores.parquet", **{**same, name: value}) is None


def test_old_runs_are_forgotten_with_their_columns(history):
    for k in range(5):
        history.add(f"r{k}", QUIET, **FACTS, now=86_400.0 * k)
    history.add("r0", QUIET, **{**FACTS, "job": "other"}, now=1.0)
    assert history.forget(job="nightly", days=2, now=86_400.0 * 4) == 2
    assert [entry.run for entry in history.entries(job="nightly")] == ["r4", "r3", "r2"]
    # A job that keeps less does not take from one that keeps more.
    assert [entry.run for entry in history.entries(job="other")] == ["r0"]
    with sqlite3.connect(history.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM columns").fetchone() == (0,)


def test_a_clock_far_ahead_takes_nothing(history):
    day, later = 86_400.0, 86_400.0 * 10_000
    for k in range(3):
        history.add(f"r{k}", QUIET, **FACTS, now=day * k)
    history.add("ahead", QUIET, **FACTS, now=later)
    assert history.forget(job="nightly", days=400, now=later) == 0
    history.add("right", QUIET, **FACTS, now=day * 3)
    assert history.forget(job="nightly", days=400, now=day * 3) == 0
    # After a pause, the second run says so.
    history.add("after", QUIET, **FACTS, now=later + day)
    assert history.forget(job="nightly", days=400, now=later + day) == 4
    assert [entry.run for entry in history.entries(job="nightly")] == ["after", "ahead"]


def test_files_that_are_no_history(tmp_path):
    (tmp_path / "text").write_text("no database at all " * 100)
    with pytest.raises(HistoryError, match="not a database"):
        History(tmp_path / "text").add("a", QUIET, **FACTS)
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(HistoryError, match="no history of this anomalib_gen"):
        History(tmp_path / "other").add("a", QUIET, **FACTS)
    with pytest.raises(HistoryError, match="unable to open"):
        History(tmp_path / "none" / "h").entries()


def test_what_fails_leaves_what_was_there(history):
    history.add("a", QUIET, **FACTS, now=1.0)
    column = ColumnDrift("x", "number", 0.0, 0.0, None, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, None, (), False)
    with pytest.raises(HistoryError, match="UNIQUE"):
        history.add("a", replace(LOUD, columns=(column, column)), **FACTS)
    assert history.entries()[0].report["alerts"] == []


def add_many(path, name):
    history = History(path)
    for k in range(15):
        history.add(f"{name}-{k}", QUIET, **FACTS, now=float(k))
        history.add("shared", QUIET, **FACTS, now=99.0)


def test_several_write_at_once(history):
    """Threads with connections of their own: the file's lock knows no difference."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add_many, [history.path] * 3, "abc"))
    assert len(history.entries()) == 46


def test_metrics_can_be_read_by_prometheus():
    parser = pytest.importorskip("prometheus_client.parser")
    data = metrics_of(QUIET, job='od"d\n', model="abc", time=12.5)
    samples = {
        (sample.name, sample.labels.get("kind")): sample
        for family in parser.text_string_to_metric_families(data.decode())
        for sample in family.samples
    }
    assert samples["anomalib_gen_rows", None].value == 400
    assert samples["anomalib_gen_run_timestamp_seconds", None].value == 12.5
    assert samples["anomalib_gen_alerts", "volume"].value == 0
    assert samples["anomalib_gen_outlier_rate", None].value == 0.05
    assert samples["anomalib_gen_model_info", None].labels == {"job_name": 'od"d\n', "model": "abc"}
    assert all(isinstance(alert, Alert) for alert in LOUD.alerts)
