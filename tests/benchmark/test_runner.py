import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pebble", reason="the benchmark extra is not installed")

from anomalib_gen.benchmark import DataError, load_results, run_benchmark, runner

KNN = "kNN=anomalib_gen.benchmark.KNNDistance(n_neighbors=1)"
FOREST = "forest=sklearn.ensemble.IsolationForest(n_estimators=10)"
FIGURES = ["dataset", "detector", "seed", "status", "auroc", "average_precision", "n_train", "n_test"]


def test_cells_and_columns(tables, tmp_path):
    output = tmp_path / "out"
    results = run_benchmark([KNN, FOREST], suite="clean", datasets=tables, seeds=(0, 2), output=output)
    assert len(results) == 12
    assert (results["status"] == "ok").all()
    assert results["auroc"].between(0.5, 1).all()
    assert set(results["n_train"]) == {40}
    assert set(results["n_anomalies"]) == {16}
    assert (results["fit_seconds"] > 0).all()
    assert "scikit-learn" in json.loads(results["versions"][0])
    assert len(list((output / "cells").glob("*.json"))) == 12
    pd.testing.assert_frame_equal(pd.read_parquet(output / "results.parquet"), load_results(output))
    text = "".join(path.read_text() for path in (output / "cells").iterdir())
    assert str(tmp_path) not in text

    # More seeds later: the old cells stay, a renamed detector keeps its cells, the folder keeps its suite.
    stamps = {path.name: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    renamed = KNN.replace("kNN=", "nearest=")
    more = run_benchmark([renamed], suite="clean", datasets=tables, seeds=(0, 1, 2), output=output)
    assert len(more) == 9
    after = {path.name: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    assert {name: after[name] for name in stamps} == stamps
    assert len(after) == 15
    with pytest.raises(ValueError, match="another output folder"):
        run_benchmark([KNN], suite="published", datasets=tables, output=output)


def test_every_kind_of_failure_is_recorded(tables, tmp_path, helpers):
    bad = "misbehaving_detectors"
    results = run_benchmark(
        [
            f"{bad}.Raises",
            f"{bad}.Garbled",
            f"{bad}.Mute",
            f"{bad}.Panics",
            f"{bad}.Exits",
            f"{bad}.Exits(code=0)",
            f"{bad}.Killed",
            f"{bad}.NotFinite",
            f"{bad}.Sleeps",
            f"{bad}.Writes",
            KNN,
        ],
        suite="clean",
        datasets=tables[:1],
        seeds=(0,),
        time_limit=4,
        jobs=2,
        output=tmp_path / "out",
    ).set_index("detector")
    assert results["failure"].to_dict() == {
        "Raises": "exception",
        "Garbled": "exception",
        "Mute": "exception",
        "Panics": "exception",
        "Exits": "worker died",
        "Exits(code=0)": "worker died",
        "Killed": "worker died",
        "NotFinite": "exception",
        "Sleeps": "time limit",
        "Writes": "",
        "kNN": "",
    }
    assert results.loc["Raises", "error"] == "RuntimeError: no <b>luck</b> today"
    assert "in fit" in results.loc["Raises", "traceback"]
    assert helpers not in results.loc["Raises", "traceback"]
    assert results.loc["Garbled", "error"] == r"OSError: no file caf\udce9"
    assert results.loc["Mute", "error"] == "_Mute: <its message cannot be made: AttributeError>"
    assert "in fit" in results.loc["Mute", "traceback"]
    assert results.loc["Panics", "error"] == "_Panic: no <b>luck</b> at all"
    assert results.loc["Sleeps", "error"] == "time limit of 4 s exceeded"
    assert "exit code 3" in results.loc["Exits", "error"]
    assert "SIGKILL" in results.loc["Killed", "error"]
    assert "returned NaN for row 0" in results.loc["NotFinite", "error"]
    assert results.loc[results["status"] != "ok", "auroc"].isna().all()
    # A detector that overwrites its input leaves the next one's alone.
    alone = run_benchmark([KNN], suite="clean", datasets=tables[:1], seeds=(0,), output=tmp_path / "alone")
    assert results.loc["kNN", "auroc"] == alone["auroc"][0]


@pytest.mark.parametrize(("times", "failure"), [(2, ""), (3, "worker died")])
def test_a_broken_pool_is_tried_again_and_then_given_up(tables, tmp_path, monkeypatch, times, failure):
    record, broken = runner._record, []

    def breaks(*arguments):
        if len(broken) < times:
            broken.append(1)
            raise BrokenProcessPool
        return record(*arguments)

    monkeypatch.setattr(runner, "_record", breaks)
    # (Lists among the arguments cannot be hashed.)
    results = run_benchmark(
        ["mixture=sklearn.mixture.GaussianMixture(weights_init=[1.0])"],
        suite="clean",
        datasets=tables[:1],
        seeds=(0,),
        output=tmp_path / "out",
    )
    assert results["failure"].tolist() == [failure]


def test_failed_cells_run_again_only_when_asked(tables, tmp_path, helpers):
    log = tmp_path / "log"
    arguments = {"suite": "clean", "datasets": tables[:1], "seeds": (0,), "output": tmp_path / "out"}
    counting = f"misbehaving_detectors.Counts(log={str(log)!r}, seconds=30.0)"
    for retry, fits in ((False, 1), (False, 1), (True, 2)):
        results = run_benchmark([counting], time_limit=1, retry_failed=retry, **arguments)
        assert results["failure"].tolist() == ["time limit"]
        assert len(log.read_text().splitlines()) == fits


@pytest.mark.parametrize("jobs", [1, 2])
def test_views_of_one_model_share_its_fit(tables, tmp_path, jobs):
    flow = (
        "anomalib_gen.FlowDetector(transform='realnvp', n_layers=2, hidden_features=8, max_iter=20, device='cpu', "
        "anomaly='{}')"
    )
    views = [f"{name}={flow.format(name)}" for name in ("likelihood", "typicality")]
    arguments = {"suite": "clean", "datasets": tables[:2], "seeds": (0, 1), "jobs": jobs}
    shared = run_benchmark(views, output=tmp_path / "shared", **arguments).set_index("detector")
    alone = run_benchmark(views[1:], output=tmp_path / "alone", **arguments).set_index("detector")
    seconds = shared["fit_seconds"]
    assert seconds["likelihood"].tolist() == seconds["typicality"].tolist()
    assert seconds["typicality"].nunique() == 4
    assert shared.loc["typicality", "auroc"].tolist() == alone["auroc"].tolist()
    assert shared.loc["typicality", "auroc"].tolist() != shared.loc["likelihood", "auroc"].tolist()


def test_a_split_without_anomalies_is_a_failure_of_its_cells(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "rare.npz"
    np.savez(path, X=rng.normal(size=(40, 2)), y=np.r_[-1, np.ones(39, int)])
    output = tmp_path / "out"
    results = run_benchmark(
        [KNN], suite="clean-unsupervised", datasets=[str(path)], seeds=range(6), output=output
    )
    failed = results[results["status"] != "ok"]
    assert 0 < len(failed) < 6
    assert set(failed["failure"]) == {"data"}
    assert failed["error"].str.contains("no test anomalies").all()


@pytest.mark.parametrize(("jobs", "allowed"), [(512, "many"), (1, "1")])
def test_workers_share_the_cores(tables, tmp_path, helpers, monkeypatch, jobs, allowed):
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    results = run_benchmark(
        ["misbehaving_detectors.Threads"],
        suite="clean",
        datasets=tables[:1],
        seeds=(0,),
        jobs=jobs,
        output=tmp_path / "out",
    )
    assert results["error"].tolist() == [""]


SCRIPT = """
import sys
from anomalib_gen.benchmark import run_benchmark
if __name__ == "__main__":
    log, output, *tables = sys.argv[1:]
    run_benchmark(
        ["misbehaving_detectors.Counts(log=%r, seconds=0.3)" % log],
        suite="clean", datasets=tables, seeds=(0, 1), output=output,
    )
"""


def wait_until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="kills with POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_without_repeating_finished_cells(how, tables, tmp_path, helpers):
    script, log, output = tmp_path / "script.py", tmp_path / "log", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(log), str(output), *tables]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    cells = output / "cells"
    wait_until(lambda: cells.is_dir() and len(list(cells.glob("*.json"))) >= 2)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    finished = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    assert 2 <= len(finished) < 6
    if how == signal.SIGINT:
        assert "run the same command again to resume" in errors
    started = len(log.read_text().splitlines())
    assert started <= len(finished) + 1
    # The workers of a killed run end with it.
    wait_until(lambda: not _alive(process.pid), seconds=10)

    def run(folder):
        detector = f"misbehaving_detectors.Counts(log={str(log)!r}, seconds=0.3)"
        return run_benchmark([detector], suite="clean", datasets=tables, seeds=(0, 1), output=folder)

    resumed = run(output)
    assert {name: (cells / name).read_bytes() for name in finished} == finished
    assert len(log.read_text().splitlines()) == started + 6 - len(finished)
    whole = run(tmp_path / "whole")  # the figures are those of a run that nobody disturbed
    pd.testing.assert_frame_equal(resumed[FIGURES], whole[FIGURES])


def _alive(session):
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (OSError, psutil.Error):
            continue
    return False


def test_a_half_written_cell_counts_as_missing(tables, tmp_path):
    arguments = {"suite": "clean", "datasets": tables[:1], "seeds": (0,), "output": tmp_path / "out"}
    first = run_benchmark([KNN], **arguments)
    (cell,) = (tmp_path / "out" / "cells").glob("*.json")
    cell.write_text(cell.read_text()[:40])
    again = run_benchmark([KNN], **arguments)
    pd.testing.assert_frame_equal(first[FIGURES], again[FIGURES])


def test_a_changed_table_or_detector_is_another_cell(tables, tmp_path):
    arguments = {"suite": "clean", "datasets": tables[:1], "seeds": (0,), "output": tmp_path / "out"}
    run_benchmark([KNN], **arguments)
    with np.load(tables[0]) as archive:
        X, y = archive["X"], archive["y"]
    np.savez(tables[0], X=X + np.arange(3) * X[:, :1], y=y)
    run_benchmark([KNN], **arguments)
    results = run_benchmark([KNN.replace("=1", "=2")], **arguments)
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 3
    assert len(results) == len(load_results(tmp_path / "out")) == 1


def test_one_run_at_a_time_in_a_folder(tables, tmp_path):
    from filelock import FileLock

    output = tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(RuntimeError, match="Another run is writing"):
        run_benchmark([KNN], suite="clean", datasets=tables, output=output)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"suite": "dirty"}, ValueError, "'clean-unsupervised'"),
        ({"seeds": []}, ValueError, "seeds"),
        ({"seeds": [-1]}, ValueError, "seeds"),
        ({"jobs": 0}, ValueError, "jobs"),
        ({"time_limit": 0}, ValueError, "time_limit"),
        ({"detectors": []}, ValueError, "detectors"),
        ({"detectors": ["no_such.Thing"]}, ImportError, "no_such"),
        ({"datasets": ["cardioo"]}, DataError, "Did you mean cardio"),
        ({"datasets": ["builtin:iris"]}, DataError, "builtin:digits"),
        ({"datasets": ["absent.npz"]}, DataError, "does not exist"),
    ],
)
def test_wrong_arguments(changes, error, words, tables, tmp_path):
    arguments = {
        "detectors": [KNN],
        "suite": "clean",
        "datasets": tables,
        "output": tmp_path / "out",
    } | changes
    with pytest.raises(error, match=words):
        run_benchmark(arguments.pop("detectors"), **arguments)


def test_labels_of_a_file_are_checked(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, X=np.zeros((4, 2)), y=[0, 0, 1, 1])
    with pytest.raises(DataError, match=r"\+1 for a normal row"):
        run_benchmark([KNN], suite="clean", datasets=[str(path)], output=tmp_path / "out")


# -------------------------------------------------------------------------------- figures measured elsewhere


def anchors():
    data = os.environ.get("ANOMALIB_GEN_DATA")
    path = Path(data or ".").parent / "anchors" / "peers_clean_dev.csv"
    if not data or not path.is_file():
        pytest.skip("no anchors next to ANOMALIB_GEN_DATA")
    return pd.read_csv(path)


def compare_with_anchors(expected, tmp_path):
    forest = "sklearn.IsolationForest=sklearn.ensemble.IsolationForest()"
    nearest = [f"kNN({k})=anomalib_gen.benchmark.KNNDistance(n_neighbors={k})" for k in (1, 5)]
    seeds = sorted(expected["seed"].unique().tolist())
    results = run_benchmark(
        [forest, *nearest],
        suite="clean",
        datasets=expected["dataset"].unique().tolist(),
        seeds=seeds,
        output=tmp_path / "out",
    )
    both = expected.merge(
        results, left_on=["dataset", "method", "seed"], right_on=["dataset", "detector", "seed"]
    )
    assert len(both) == len(results) == 3 * len(seeds) * expected["dataset"].nunique()
    assert (both["auroc_x"] - both["auroc_y"]).abs().max() <= 0.002
    assert (both["aupr"] - both["average_precision"]).abs().max() <= 0.002
    assert (both["n_train_x"] == both["n_train_y"]).all()
    assert (both["n_test_x"] == both["n_test_y"]).all()


def test_clean_suite_reproduces_the_anchors(tmp_path):
    expected = anchors()
    compare_with_anchors(
        expected[expected["dataset"].isin(["Hepatitis", "wine", "cardio", "breastw"])], tmp_path
    )


@pytest.mark.slow
def test_clean_suite_reproduces_all_anchors(tmp_path):
    compare_with_anchors(anchors(), tmp_path)
