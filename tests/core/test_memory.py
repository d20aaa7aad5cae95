"""Scoring a file on disk takes memory for a block and for the scores, not for the file."""

import json
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest

psutil = pytest.importorskip("psutil")

N_FEATURES = 10

MEASURE = """
import json, sys, threading, time
import joblib, numpy as np, psutil

model, path, n_rows, n_features = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
process = psutil.Process()

def resident():
    '''All resident bytes, and those that are not pages of files.'''
    rss = process.memory_info().rss
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return rss, rss
    fields = dict(line.split(":", 1) for line in lines)
    return rss, 1024 * int(fields["RssAnon"].split()[0])

detector = joblib.load(model)
X = np.memmap(path, dtype=np.float64, mode="r", shape=(n_rows, n_features))
detector.score_samples(X[:10_000])  # libraries load and pools start on first use
before, peak, done = resident(), resident(), threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = tuple(map(max, peak, resident()))
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
scores = detector.score_samples(X)
seconds = time.perf_counter() - start
done.set()
watcher.join()
peak = tuple(map(max, peak, resident()))
print(json.dumps({
    "rss": peak[0] - before[0], "anonymous": peak[1] - before[1], "seconds": seconds,
    "finite": bool(np.isfinite(scores).all()), "last": float(scores[-1]),
}))
"""


def measure(detector, tmp_path, n_rows):
    """Score `n_rows` rows from a file in a process of its own."""
    path = tmp_path / "rows.bin"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, n_rows, 100_000):
            last = rng.normal(size=(min(100_000, n_rows - start), N_FEATURES))
            last.tofile(file)
    joblib.dump(detector, tmp_path / "model.joblib")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.joblib"), str(path), str(n_rows), "10"]
    printed = subprocess.run(command, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    measured = json.loads(printed.stdout)
    print({name: round(value / 1e6, 1) for name, value in measured.items() if name in ("rss", "anonymous")})
    assert measured["finite"]
    assert measured["last"] == pytest.approx(detector.score_samples(last[-1:])[0], rel=1e-9)
    assert Path(path).stat().st_size == n_rows * N_FEATURES * 8
    return measured


@pytest.fixture(scope="module")
def detector(tiny):
    return tiny(n_layers=1).fit(np.random.default_rng(1).normal(size=(500, N_FEATURES)))


def test_scoring_a_file_takes_memory_for_a_block(detector, tmp_path):
    n_rows = 600_000
    measured = measure(detector, tmp_path, n_rows)
    # Scores and their negative, and blocks; a copy of the rows alone would be 48 MB.
    assert measured["anonymous"] < 2 * 8 * n_rows + 20e6
    assert measured["rss"] < 2 * 8 * n_rows + 20e6 + 8 * n_rows * N_FEATURES


@pytest.mark.slow
def test_five_million_rows_from_a_file_stay_under_500_mb(detector, tmp_path):
    measured = measure(detector, tmp_path, 5_000_000)
    # The system may drop the file's own 400 MB at any time; they count as resident all the same.
    assert measured["rss"] < 500e6
    assert measured["anonymous"] < 120e6
