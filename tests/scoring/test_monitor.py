"""The command `monitor`: what it compares, remembers and tells."""

import json
import os
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from anomalib_gen import load, persistence
from anomalib_gen.monitoring import load_reference
from anomalib_gen.monitoring.history import History

FLOW = (
    "anomalib_gen.FlowDetector(transform='realnvp', n_layers=2, hidden_features=8, max_iter=20, device='cpu')"
)


@pytest.fixture(scope="module")
def fitted_model(tmp_path_factory, rows):
    """A folder that `fit` wrote; no test may change it."""
    from typer.testing import CliRunner

    from anomalib_gen.cli import app

    folder = tmp_path_factory.mktemp("monitored")
    rows(1000, 0).to_parquet(folder / "train.parquet")
    arguments = [
        "fit",
        f"{folder}/train.parquet",
        "--exclude",
        "id",
        "-m",
        f"{folder}/model",
        "--detector",
        FLOW,
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return folder / "model"


@pytest.fixture
def scored(run, rows, fitted_model, tmp_path):
    """Files that were scored: rows like those of training, and others."""
    for name, shift in (("same", 0.0), ("other", 2.0)):
        frame = rows(400, 5)
        frame["x"] += shift
        frame.to_parquet(tmp_path / f"{name}.parquet")
        arguments = (tmp_path / f"{name}.parquet", "-m", fitted_model, "-k", "id")
        assert run("score", *arguments, "-o", tmp_path / f"{name}.scores.parquet").exit_code == 0
    return tmp_path


def monitor(run, folder, name, model, *more, columns=True):
    given = ("--input", folder / f"{name}.parquet") if columns else ()
    return run("monitor", folder / f"{name}.scores.parquet", "-m", model, *given, *more)


def test_fit_keeps_a_reference(fitted_model, rows):
    frame = rows(1000, 0).drop(columns="id")
    reference = load_reference(fitted_model)
    assert reference.n_rows == 1000
    assert reference.held_out
    assert [column.name for column in reference.columns] == ["x", "n", "kind"]
    assert reference.n_scored == 100
    scores = load(fitted_model).score_samples(frame)
    assert set(reference.scores.values) <= set(scores)
    assert persistence.verify(fitted_model)


def test_rows_like_those_of_training_are_no_alert(run, scored, fitted_model):
    result = monitor(run, scored, "same", fitted_model)
    assert result.exit_code == 0, result.output
    assert "400 rows" in result.stdout
    assert "0 alerts" in result.stdout


def test_drift_is_code_3(run, scored, fitted_model):
    result = monitor(run, scored, "other", fitted_model, "-o", scored / "found.json", "--json")
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert json.loads((scored / "found.json").read_text()) == found
    assert found["alert"] is True
    kinds = {(alert["kind"], alert["column"]) for alert in found["report"]["alerts"]}
    assert {("scores", None), ("alert-rate", None), ("distribution", "x")} <= kinds
    assert "alert: x: has drifted" in result.stderr
    x = next(column for column in found["report"]["columns"] if column["name"] == "x")
    assert x["wasserstein"] == pytest.approx(2, abs=0.3)
    # Scores alone.
    result = monitor(run, scored, "other", fitted_model, "--json", columns=False)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["report"]["columns"] == []
    assert "--input compares the columns" in result.stderr
    # Thresholds far off, and a column that does not count.
    high = ("--distance", 1, "--psi", 99, "--wasserstein", 99, "--alert-rate", 99)
    assert monitor(run, scored, "other", fitted_model, *high).exit_code == 0
    result = monitor(run, scored, "other", fitted_model, "--ignore", "x", "--json")
    assert "distribution" not in {alert["kind"] for alert in json.loads(result.stdout)["report"]["alerts"]}
    assert monitor(run, scored, "other", fitted_model, "--ignore", "y").exit_code == 1


def test_thresholds_stand_in_the_configuration(run, scored, fitted_model):
    (scored / "run.toml").write_text(
        f"[monitor]\nscores = '{scored}/other.scores.parquet'\nmodel = '{fitted_model}'\ndistance = 1\npsi = 99\n"
        "wasserstein = 99\nalert-rate = 99\n"
    )
    assert run("monitor", "--config", scored / "run.toml").exit_code == 0
    assert run("monitor", "--config", scored / "run.toml", "--distance", 0.2).exit_code == 3
    (scored / "run.toml").write_text("[monitor]\npsy = 1\n")
    result = run("monitor", "--config", scored / "run.toml")
    assert result.exit_code == 1
    assert "monitor.psy is unknown. Did you mean 'psi'" in result.stderr
    result = run("monitor", "-m", fitted_model)
    assert result.exit_code == 1
    assert "needs SCORES" in result.stderr


def test_a_model_without_reference_says_how_to_get_one(run, rows, model, tmp_path):
    rows(50, 1).to_parquet(tmp_path / "a.parquet")
    assert run("score", tmp_path / "a.parquet", "-m", model, "-o", tmp_path / "s.parquet").exit_code == 0
    result = run("monitor", tmp_path / "s.parquet", "-m", model)
    assert result.exit_code == 2
    assert "has no training reference" in result.stderr
    assert "anomalib-gen calibrate NORMAL_FILES" in result.stderr


def test_what_is_no_output_of_this_model(run, rows, scored, fitted_model, model):
    result = run("monitor", scored / "same.parquet", "-m", fitted_model)
    assert result.exit_code == 2
    assert "same.parquet is no output of `score`: " in result.stderr
    assert run("monitor", scored / "none.parquet", "-m", fitted_model).exit_code == 2
    arguments = (scored / "same.parquet", "-m", model, "-o", scored / "foreign.parquet")
    assert run("score", *arguments).exit_code == 0
    result = run("monitor", scored / "foreign.parquet", "-m", fitted_model)
    assert result.exit_code == 2
    assert "was scored by the model" in result.stderr


@pytest.mark.parametrize("ending", [".csv", ".feather", ""])
def test_every_format_that_score_writes(run, scored, fitted_model, ending):
    output = scored / f"again{ending}"
    assert run("score", scored / "same.parquet", "-m", fitted_model, "-o", output).exit_code == 0
    result = run("monitor", output, "-m", fitted_model, "--input", scored / "same.parquet", "--json")
    assert result.exit_code == 0, result.output
    first = json.loads(monitor(run, scored, "same", fitted_model, "--json").stdout)["report"]
    assert json.loads(result.stdout)["report"] == first


def test_scores_in_an_object_store(run, rows, fitted_model, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").store.clear()
    frame = rows(300, 5)
    frame.loc[3, "x"] = np.nan
    frame.to_parquet(tmp_path / "a.parquet")
    more = ("--max-bad-rows", 1, "--work", tmp_path / "work")
    options = ("-m", fitted_model, "-o", "memory://monitored/s.parquet", *more)
    assert run("score", tmp_path / "a.parquet", *options).exit_code == 4
    result = run("monitor", "memory://monitored/s.parquet", "-m", fitted_model, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["n_bad_rows"] == 1
    assert json.loads(result.stdout)["report"]["n_rows"] == 299


# The history -----------------------------------------------------------------------------------------------


def test_a_run_has_one_entry_however_often_it_is_looked_at(run, scored, fitted_model):
    history = scored / "deep" / "h.sqlite"
    for name in ("same", "other", "same", "other", "other"):
        monitor(run, scored, name, fitted_model, "--history", history)
    entries = History(history).entries()
    assert [entry.alert for entry in entries] == [True, False]
    assert {entry.job for entry in entries} == {str(fitted_model)}
    # Scored once more from the same files it is the same run; by another name it is another.
    arguments = (scored / "same.parquet", "-m", fitted_model, "-k", "id", "--overwrite")
    assert run("score", *arguments, "-o", scored / "same.scores.parquet").exit_code == 0
    monitor(run, scored, "same", fitted_model, "--history", history)
    assert len(History(history).entries()) == 2
    monitor(
        run, scored, "same", fitted_model, "--history", history, "--run", "2024-01-31", "--job", "nightly"
    )
    assert History(history).entries()[0].run == "2024-01-31"
    with sqlite3.connect(history) as connection:
        assert connection.execute("SELECT count(*) FROM columns").fetchone() == (9,)


def test_a_model_is_one_series_however_its_path_is_written(run, scored, fitted_model, monkeypatch):
    history = scored / "h.sqlite"
    (scored / "current").symlink_to(fitted_model)
    monkeypatch.chdir(scored)
    for k, path in enumerate(
        ("current", "./current/", scored / "current", scored / ".." / scored.name / "current")
    ):
        assert monitor(run, scored, "same", path, "--history", history, "--run", k).exit_code == 0
    # The link is the series, whichever model it names.
    assert {entry.job for entry in History(history).entries()} == {str(scored / "current")}


def test_old_runs_are_forgotten(run, scored, fitted_model):
    history = scored / "h.sqlite"
    monitor(run, scored, "same", fitted_model, "--history", history)
    with sqlite3.connect(history) as connection:
        connection.execute("UPDATE runs SET time = time - 86400 * 50, run = 'old'")
    monitor(run, scored, "other", fitted_model, "--history", history, "--keep-days", 51)
    assert len(History(history).entries()) == 2
    monitor(run, scored, "other", fitted_model, "--history", history, "--keep-days", 49)
    assert len(History(history).entries()) == 2  # a clock far ahead would look like this pause
    monitor(run, scored, "same", fitted_model, "--history", history, "--run", "next", "--keep-days", 49)
    assert "old" not in [entry.run for entry in History(history).entries()]


def test_an_unusual_volume(run, scored, fitted_model):
    history = scored / "h.sqlite"
    monitor(run, scored, "same", fitted_model, "--history", history)
    with sqlite3.connect(history) as connection:
        (row,) = connection.execute("SELECT * FROM runs").fetchall()
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM runs")
        for k in range(5):
            values = (row[0], f"r{k}", row[2] - k - 1, *row[3:5], 1000, *row[6:])
            connection.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", values)
    result = monitor(run, scored, "same", fitted_model, "--history", history)
    assert result.exit_code == 3
    assert "400 rows, and 1000 are usual" in result.stderr


def test_a_history_that_cannot_be_written_is_code_2(run, scored, fitted_model):
    (scored / "h.sqlite").write_text("no database at all" * 100)
    result = monitor(run, scored, "same", fitted_model, "--history", scored / "h.sqlite")
    assert result.exit_code == 2
    assert "not a database" in result.stderr


# Who is told -----------------------------------------------------------------------------------------------


@pytest.fixture
def post(monkeypatch):
    """Documents that a webhook gets; the codes that it answers with may be set."""
    import requests

    class Answer:
        status_code = 200

        def close(self):
            pass

    def answer(session, url, *, json, **options):
        got.append(json)
        if codes:
            made = Answer()
            made.status_code = codes.pop(0)
            return made
        return Answer()

    got, codes = [], []
    monkeypatch.setattr(requests.Session, "post", answer)
    return got, codes


def test_an_alert_is_told_until_somebody_knows_and_then_no_more(run, scored, fitted_model, post):
    got, codes = post
    more = ("--history", scored / "h.sqlite", "--webhook", "http://host.example/s3cret")
    assert monitor(run, scored, "same", fitted_model, *more).exit_code == 0
    assert got == []
    codes += [500]
    result = monitor(run, scored, "other", fitted_model, *more)
    assert result.exit_code == 3
    assert "http://host.example answered with the code 500" in result.stderr
    assert "s3cret" not in result.output
    (entry, _) = History(scored / "h.sqlite").entries()
    assert entry.alert
    assert entry.notified is None
    for _ in range(2):
        assert monitor(run, scored, "other", fitted_model, *more).exit_code == 3
    assert len(got) == 2
    assert got[1]["alert"] is True
    assert got[1]["rows"] == 400
    assert "x: has drifted" in got[1]["text"]
    assert History(scored / "h.sqlite").entries()[0].notified is not None


def test_nothing_that_is_read_is_replaced(run, scored, fitted_model):
    scores, source = scored / "same.scores.parquet", scored / "same.parquet"
    before = {path: path.read_bytes() for path in scored.iterdir() if path.is_file()}
    (scored / "folder").mkdir()
    for flag in ("--output", "--prometheus", "--history"):
        for place, message in (
            (scores, "one of the inputs"),
            (source, "one of the inputs"),
            (scored, "one of the inputs"),
            (f"{scores}.run.json", "is the record of"),
            (scored / "folder", "is a folder"),
            (fitted_model / "found.json", "in the model folder"),
            ("memory://found.json", "must be a file of this machine"),
        ):
            result = monitor(run, scored, "same", fitted_model, flag, place)
            assert result.exit_code == 1, result.output
            assert f"{flag} {place}" in result.stderr
            assert message in result.stderr
    result = monitor(run, scored, "same", fitted_model, "-o", scored / "a", "--prometheus", scored / "a")
    assert result.exit_code == 1
    assert "is that of --output" in result.stderr
    assert {path: path.read_bytes() for path in scored.iterdir() if path.is_file()} == before
    persistence.verify(fitted_model)


def test_a_webhook_from_the_environment_and_one_that_is_none(run, scored, fitted_model, post, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_WEBHOOK", "http://host.example/a")
    assert monitor(run, scored, "other", fitted_model).exit_code == 3
    assert len(post[0]) == 1
    assert monitor(run, scored, "other", fitted_model, "--webhook", "host.example").exit_code == 1


def test_metrics_are_written(run, scored, fitted_model):
    path = scored / "metrics" / "a.prom"
    path.parent.mkdir()
    path.with_name("a.prom.tmp").write_text("half of what a killed run wrote")
    result = monitor(run, scored, "other", fitted_model, "--prometheus", path, "--job", "nightly")
    assert result.exit_code == 3
    assert "node exporter" not in result.stderr
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] == ["a.prom"]
    assert 'anomalib_gen_rows{job_name="nightly"} 400.0' in path.read_text()
    assert 'anomalib_gen_alerts{job_name="nightly",kind="scores"} 1.0' in path.read_text()
    result = monitor(run, scored, "same", fitted_model, "--prometheus", scored / "same.parquet" / "a.prom")
    assert result.exit_code == 2
    # That would be written every night, and read by nobody.
    result = monitor(run, scored, "same", fitted_model, "--prometheus", scored / "a.txt")
    assert result.exit_code == 0
    assert "the node exporter reads files that end in .prom alone" in result.stderr


# Input -----------------------------------------------------------------------------------------------------


def test_missing_values_and_new_categories(run, rows, fitted_model, tmp_path):
    frame = rows(400, 5)
    frame.loc[:99, "kind"] = "new"
    frame["n"] = frame["n"].astype(object)
    frame.loc[:99, "n"] = "much"
    frame.to_csv(tmp_path / "a.csv", index=False)
    options = ("-m", fitted_model, "--max-bad-rows", 100, "-o", tmp_path / "s.parquet")
    assert run("score", tmp_path / "a.csv", *options).exit_code == 4
    result = run(
        "monitor", tmp_path / "s.parquet", "-m", fitted_model, "--input", tmp_path / "a.csv", "--json"
    )
    assert result.exit_code == 3
    report = json.loads(result.stdout)["report"]
    assert report["n_bad_rows"] == 100
    assert {(alert["kind"], alert["column"]) for alert in report["alerts"]} >= {
        ("missing", "n"),
        ("unseen", "kind"),
    }


def test_input_that_cannot_be_read_is_code_4(run, scored, fitted_model):
    (scored / "broken.parquet").write_bytes(b"PAR1 no")
    inputs = (scored / "broken.parquet", scored / "same.parquet")
    options = ("-m", fitted_model, "--max-bad-files", 1, "--overwrite", "-o", scored / "same.scores.parquet")
    assert run("score", *inputs, *options).exit_code == 4
    more = ("--input", scored / "broken.parquet")
    result = monitor(run, scored, "same", fitted_model, *more)
    assert result.exit_code == 4, result.output
    assert "left out a file" in result.stderr
    assert monitor(run, scored, "same", fitted_model, *more, columns=False).exit_code == 2


def test_files_that_were_not_scored_are_not_compared(run, scored, fitted_model):
    """Those of another day, and those that came or changed after the run."""
    history = scored / "h.sqlite"
    scores, same, other = (scored / f"{name}.parquet" for name in ("same.scores", "same", "other"))
    arguments = ("monitor", scores, "-m", fitted_model, "--history", history, "--json")
    result = run(*arguments, "--input", other)
    assert result.exit_code == 2
    assert f"was made from {same}, and --input names {other}." in result.stderr
    assert not history.exists()
    # A file that came later is left out of the comparison.
    expected = json.loads(run(*arguments, "--input", same).stdout)["report"]
    result = run(*arguments, "--input", same, "--input", other)
    assert result.exit_code == 0, result.output
    assert f"left out {other}: it was not scored" in result.stderr
    assert json.loads(result.stdout)["report"] == expected
    # One of several that were scored is enough to compare, but not all.
    both = ("score", same, other, "-m", fitted_model, "-o", scored / "both.parquet")
    assert run(*both).exit_code == 0
    result = run("monitor", scored / "both.parquet", "-m", fitted_model, "--input", other)
    assert "--input names 1 of the 2 files that were scored" in result.stderr
    # A file by another name but of the same time is the same; so is a copy of a later time, as far as is known.
    same.rename(scored / "renamed.parquet")
    result = run(*arguments, "--input", scored / "renamed.parquet")
    assert "warning" not in result.stderr
    (scored / "deep").mkdir()
    (scored / "deep" / "same.parquet").write_bytes((scored / "renamed.parquet").read_bytes())
    result = run(*arguments, "--input", scored / "deep" / "same.parquet")
    assert result.exit_code == 0
    assert "it is taken for a copy" in result.stderr
    # In its own place a later time is a change.
    (scored / "renamed.parquet").rename(same)
    os.utime(same)
    assert run(*arguments, "--input", same).exit_code == 2


def test_scores_and_their_record_must_be_of_one_run(run, scored, fitted_model):
    scores = scored / "same.scores.parquet"
    record = scored / "same.scores.parquet.run.json"
    whole = record.read_text()
    for text in ("{", "[]", "{}", whole.replace('"rows": 400', '"rows": 399')):
        record.write_text(text)
        result = run("monitor", scores, "-m", fitted_model)
        assert result.exit_code == 2, result.output
        assert "Score the files again" in result.stderr
    record.unlink()
    result = run("monitor", scores, "-m", fitted_model, "--input", scored / "other.parquet")
    assert "no record, so it is not known" in result.stderr


def test_a_batch_without_rows_is_an_alert(run, rows, fitted_model, tmp_path):
    rows(5, 0)[:0].to_csv(tmp_path / "a.csv", index=False)
    assert run("score", tmp_path / "a.csv", "-m", fitted_model, "-o", tmp_path / "s.parquet").exit_code == 0
    result = run("monitor", tmp_path / "s.parquet", "-m", fitted_model, "--input", tmp_path / "a.csv")
    assert result.exit_code == 3, result.output
    assert "there are no rows" in result.stderr


def test_two_at_once(run, scored, fitted_model):
    """Threads in one process stand for processes; the file's lock is the same."""
    codes = []
    threads = [
        threading.Thread(
            target=lambda name=name: codes.append(
                monitor(run, scored, name, fitted_model, "--history", scored / "h.sqlite").exit_code
            )
        )
        for name in ("same", "other")
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert sorted(codes) == [0, 3]
    assert len(History(scored / "h.sqlite").entries()) == 2


def test_a_reference_of_training_rows_says_so(run, rows, tmp_path):
    rows(300, 0).drop(columns="id").to_parquet(tmp_path / "a.parquet")
    detector = FLOW.replace("max_iter=20", "max_iter=20, validation_fraction=0.0")
    assert run("fit", tmp_path / "a.parquet", "-m", tmp_path / "model", "--detector", detector).exit_code == 0
    options = (tmp_path / "a.parquet", "-m", tmp_path / "model", "-o", tmp_path / "s.parquet")
    assert run("score", *options).exit_code == 0
    result = run("monitor", tmp_path / "s.parquet", "-m", tmp_path / "model")
    assert result.exit_code == 0
    assert "so scores raise no alert" in result.stderr


def test_a_table_of_real_measurements(run, tmp_path):
    """Wine of the same growers is no alert, that of another one is."""
    from sklearn.datasets import load_wine

    wine = load_wine(as_frame=True)
    mine = wine.data[wine.target < 2].sample(frac=1, random_state=0).reset_index(drop=True)
    parts = {"train": mine[:90], "same": mine[90:], "other": wine.data[wine.target == 2]}
    for name, frame in parts.items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
    assert run("fit", tmp_path / "train.parquet", "-m", tmp_path / "model", "--detector", FLOW).exit_code == 0
    codes = {}
    for name in ("same", "other"):
        output = tmp_path / f"{name}.scores.parquet"
        assert (
            run("score", tmp_path / f"{name}.parquet", "-m", tmp_path / "model", "-o", output).exit_code == 0
        )
        codes[name] = monitor(run, tmp_path, name, tmp_path / "model").exit_code
    assert codes == {"same": 0, "other": 3}
    assert np.isfinite(pd.read_parquet(tmp_path / "other.scores.parquet")["score"]).all()


MONITOR = """
import sys
from anomalib_gen.cli import app
from anomalib_gen.scoring import monitor
print("ready", flush=True)
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_monitoring_that_is_killed_leaves_a_whole_history(run, scored, fitted_model):
    """Killed at 20 moments; each time the history is sound, and the run is there once or not at all."""
    history = scored / "h.sqlite"
    arguments = ("-m", fitted_model, "--input", scored / "other.parquet", "--history", history)
    command = ["monitor", scored / "other.scores.parquet", *arguments, "-o", scored / "found.json"]
    random = np.random.default_rng(0)
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", MONITOR, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(random.uniform(0.05, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        if (scored / "found.json").exists():
            assert json.loads((scored / "found.json").read_text())["alert"] is True
        if history.exists():
            assert len(History(history).entries()) <= 1
            with sqlite3.connect(history) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert killed > 3
    assert run(*command).exit_code == 3
    assert len(History(history).entries()) == 1


MEASURE = """
import resource, sys
from anomalib_gen.cli import app
try:
    app(sys.argv[1:])
except SystemExit as error:
    print(error.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(run, rows, fitted_model, tmp_path):
    used = []
    for copies in (2, 20):
        folder = tmp_path / f"{copies}"
        folder.mkdir()
        frame = rows(100_000, 1)
        for k in range(copies):
            frame.to_parquet(folder / f"{k:02d}.parquet")
        output = tmp_path / f"{copies}.scores.parquet"
        assert run("score", folder, "-m", fitted_model, "-o", output).exit_code == 0
        arguments = ["monitor", output, "-m", fitted_model, "--input", folder, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        code, megabytes = map(int, done.stdout.split())
        assert code == 0
        used.append(megabytes)
    print(used)
    assert used[1] < used[0] + 60
