"""Rows a second from Parquet to Parquet, for every family beside scikit-learn's and pyod's detectors.

Each detector is fitted at its defaults to the same rows of a real table. Then the rows of a larger file, those of the
table drawn again with noise of a hundredth of each column's deviation, go through the code behind `anomalib-gen score`:
read, checked, scored, written, flushed and renamed, with a key column. All detectors take the same way, so that the
model is what differs; those of other libraries get a thin wrapper with `score_samples` and `offset_`.

Two figures belong to each detector.

1. *Rows a second*, from file to file, by the clock and by the processor time of all threads. The latter is what is left
   of a figure on a busy machine; beside it stands the ratio to the isolation forest of the same round.
2. *Overhead*: that time for as long as `score_samples` takes for the same rows, in memory already.

For detectors of this package a third one tells what the first can be at most: the rows a second that their matrix
products alone allow, by operations counted and by the rate at which this machine multiplies matrices of such sizes in
float64 (the best of many tries; on as many threads as torch has).

Detectors take turns, round by round, so that a slow spell meets all of them; slow ones get fewer rows, as many as take
about `--seconds`. Threads are as each library sets them: `OMP_NUM_THREADS` rules torch, and scikit-learn's forest works
on one core unless told otherwise.

Run (half an hour; a quiet machine, or look at the processor times alone)::

    python benchmarks/scoring_throughput.py --output benchmarks/results/scoring-throughput.json
    python benchmarks/scoring_throughput.py --quick     # seconds, without data; figures mean nothing
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import typer
from _measure import environment, markdown, ratio, save, show, show_ratio

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector, load
from anomalib_gen import save as save_model
from anomalib_gen.anomaly import NegativeELBO
from anomalib_gen.datasets import load_adbench, load_builtin
from anomalib_gen.persistence import inspect
from anomalib_gen.scoring import run as pipeline
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import ScoreOptions

PILOT_ROWS = 2000
REFERENCE = "IsolationForest (scikit-learn)"


class Peer:
    """A detector of another library in the words of the pipeline: higher scores are more normal."""

    def __init__(self, detector: Any, scores: Callable[[Any], Any]) -> None:
        self.detector, self._scores, self.offset_ = detector, scores, 0.0

    def score_samples(self, X: Any) -> Any:
        return self._scores(X)


def fit_sklearn(X: pd.DataFrame) -> Peer:
    from sklearn.ensemble import IsolationForest

    detector = IsolationForest(random_state=0).fit(X)
    return Peer(detector, detector.score_samples)


def fit_pyod(module: str, name: str, **parameters: Any) -> Callable[[pd.DataFrame], Peer]:
    def fit(X: pd.DataFrame) -> Peer:
        import importlib

        cls = getattr(importlib.import_module(f"pyod.models.{module}"), name)
        # pyod's networks seed the global generator: leave it as it was.
        state = torch.get_rng_state()
        detector = cls(**parameters).fit(X.to_numpy())
        torch.set_rng_state(state)
        return Peer(detector, lambda rows: -detector.decision_function(np.asarray(rows)))

    return fit


PEERS: dict[str, Callable[[pd.DataFrame], Peer]] = {
    REFERENCE: fit_sklearn,
    "IForest (pyod)": fit_pyod("iforest", "IForest", random_state=0),
    "ECOD (pyod)": fit_pyod("ecod", "ECOD"),
    "KNN (pyod)": fit_pyod("knn", "KNN"),
    "AutoEncoder (pyod)": fit_pyod("auto_encoder", "AutoEncoder", random_state=0, verbose=0),
}


def families(quick: bool) -> dict[str, Any]:
    """Unfitted detectors at their defaults, and the one whose defaults trade most speed for precision at less of both.

    Training, of which nothing is measured, is short if `quick`.
    """
    common: dict[str, Any] = {"random_state": 0, "device": "cpu", **({"max_iter": 5} if quick else {})}
    return {
        "VAEDetector": VAEDetector(**common),
        "VAEDetector, two draws": VAEDetector(anomaly=NegativeELBO(n_draws=2), **common),
        "FlowDetector (realnvp)": FlowDetector(**common),
        "FlowDetector maf": FlowDetector(transform="maf", **common),
        "FlowDetector nsf-coupling": FlowDetector(transform="nsf-coupling", **common),
        "FlowDetector nsf-autoregressive": FlowDetector(transform="nsf-autoregressive", **common),
        "EnergyDetector": EnergyDetector(**common),
        "DiffusionDetector (hybrid)": DiffusionDetector(**common),
        "DiffusionDetector closed-form": DiffusionDetector(denoiser="closed-form", **common),
    }


def make_rows(table: str, n_train: int, n_rows: int, quick: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training rows, and rows to score with the column "id"."""
    X, y = (load_builtin if quick else load_adbench)(table, return_X_y=True)
    X = np.asarray(X[y == 1], dtype=np.float64)
    rng = np.random.default_rng(0)
    drawn = X[rng.integers(0, len(X), n_rows)]
    drawn += 0.01 * X.std(axis=0) * rng.standard_normal(drawn.shape)
    names = [f"x{j}" for j in range(X.shape[1])]
    train = X[rng.permutation(len(X))[:n_train]]
    return pd.DataFrame(train, columns=names), pd.DataFrame(drawn, columns=names).assign(id=np.arange(n_rows))


def seconds(work: Callable[[], Any]) -> dict[str, float]:
    """Time of the clock, and of the processor in all threads."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


@contextmanager
def in_place_of_a_folder(model: Any, facts: dict[str, Any]) -> Iterator[None]:
    """Let the pipeline find a model that is in memory: those of other libraries have no folder."""
    with mock.patch.object(pipeline, "load_model", return_value=(model, facts)):
        yield


def multiplications(model: Any, X: pd.DataFrame) -> float | None:
    """Floating-point operations of matrix products for a row; None for models that are not torch's."""
    from torch.utils.flop_counter import FlopCounterMode

    # It counts in its own thread alone.
    one = mock.patch("anomalib_gen._runtime.scoring_threads", return_value=1)
    with one, FlopCounterMode(display=False) as counter:
        model.score_samples(X)
    return counter.get_total_flops() / len(X) or None


def matrix_rate() -> float:
    """Floating-point operations a second of products as they occur here, ``(1024, 128) @ (128, 128)``."""
    x, w = torch.ones(1024, 128, dtype=torch.float64), torch.ones(128, 128, dtype=torch.float64)
    best = min(seconds(lambda: x @ w)["clock"] for _ in range(200))
    return 2 * 1024 * 128 * 128 / best


class Case:
    """A fitted detector with the rows that it gets."""

    def __init__(
        self, name: str, model: Any, facts: dict[str, Any], rows: pd.DataFrame, folder: Path
    ) -> None:
        self.name, self.model, self.facts, self.folder = name, model, facts, folder
        self.source = folder / f"{len(rows)}.parquet"
        if not self.source.exists():
            rows.to_parquet(self.source)
        self.rows = rows.drop(columns="id")
        self.flops = None if isinstance(model, Peer) else multiplications(model, self.rows[:1000])
        self.files: list[dict[str, float]] = []
        self.memory: list[dict[str, float]] = []

    def measure(self) -> None:
        """One round: from file to file, and in memory."""
        output = self.folder / "scores.parquet"
        options = ScoreOptions(
            input=(str(self.source),), model="model", output=str(output), key=("id",), overwrite=True
        )
        with in_place_of_a_folder(self.model, self.facts):
            self.files.append(seconds(lambda: pipeline.score_files(options, Log(quiet=True))))
        found: list[Any] = []
        self.memory.append(seconds(lambda: found.append(self.model.score_samples(self.rows))))
        written = pd.read_parquet(output)
        # Both did the same work: all rows, in order. (pyod's ECOD scores a row by those beside it.)
        np.testing.assert_array_equal(written["id"], np.arange(len(self.rows)))
        if not self.name.startswith("ECOD"):
            np.testing.assert_allclose(written["score"], found[0], rtol=1e-4, atol=1e-6)


def main(
    table: Annotated[str, typer.Option(help="ADBench table.")] = "cover",
    rows: Annotated[int, typer.Option(help="Rows to score, at most.")] = 1_000_000,
    train_rows: Annotated[int, typer.Option(help="Rows to fit to.")] = 5000,
    budget: Annotated[float, typer.Option("--seconds", help="Of a round of a slow detector.")] = 10.0,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help="Detectors whose names contain this; the reference stays.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; a table goes beside it as Markdown.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report rows a second."""
    if quick:
        table, rows, train_rows, repeats = "breast_cancer", 3000, 300, 1
    train, scored = make_rows(table, train_rows, rows, quick)

    def wanted(name: str) -> bool:
        return name == REFERENCE or not only or any(part.lower() in name.lower() for part in only)

    with tempfile.TemporaryDirectory() as place:
        folder, cases = Path(place), []
        named = list(train.columns)
        schema = {"columns": [{"name": n, "type": "float"} for n in named], "named": True}
        models: list[tuple[str, Any, dict[str, Any]]] = []
        for name, detector in families(quick).items():
            if wanted(name):
                print(f"fitting {name}", flush=True)
                save_model(detector.fit(train), folder / "model", X=train, overwrite=True)
                models.append((name, load(folder / "model"), inspect(folder / "model")))
        for name, fit in PEERS.items():
            if wanted(name):
                print(f"fitting {name}", flush=True)
                models.append((name, fit(train), {"schema": schema, "hash": "0" * 64}))
        for name, model, facts in models:
            pilot = scored[:PILOT_ROWS].drop(columns="id")
            model.score_samples(pilot)
            took = seconds(lambda m=model, p=pilot: m.score_samples(p))["clock"]
            n = min(rows, max(PILOT_ROWS, int(budget / took * len(pilot) / 1000) * 1000))
            cases.append(Case(name, model, facts, scored[:n], folder))
        for turn in range(repeats):
            print(f"round {turn + 1} of {repeats}", flush=True)
            for case in cases:
                case.measure()
    report(cases, table, train, output)


def report(cases: list[Case], table: str, train: pd.DataFrame, output: Path | None) -> None:
    rate = matrix_rate()
    reference = next(case for case in cases if case.name == REFERENCE)
    figures: dict[str, Any] = {}
    for case in cases:
        n = len(case.rows)
        rates = {kind: [n / one[kind] for one in case.files] for kind in ("clock", "cpu")}
        against = {
            kind: ratio(rates[kind], [len(reference.rows) / one[kind] for one in reference.files])
            for kind in rates
        }
        overhead = {
            kind: ratio([one[kind] for one in case.files], [one[kind] for one in case.memory])
            for kind in rates
        }
        figures[case.name] = {
            "rows": n,
            "rows_per_second": {kind: float(np.median(rates[kind])) for kind in rates},
            "against_isolation_forest": against,
            "overhead": overhead,
            "flops_per_row": case.flops,
            "bound": None if case.flops is None else rate / case.flops,
            "rounds": {"files": case.files, "memory": case.memory},
        }
    header = (
        "detector",
        "rows",
        "rows/s",
        "by isolation forest's",
        "rows/s of CPU time",
        "by isolation forest's",
        "bound, rows/s",
        "file to file, by scoring alone",
    )
    lines = [
        (
            name,
            f"{one['rows']:,}",
            f"{one['rows_per_second']['clock']:,.0f}",
            show_ratio(one["against_isolation_forest"]["clock"]),
            f"{one['rows_per_second']['cpu']:,.0f}",
            show_ratio(one["against_isolation_forest"]["cpu"]),
            "-" if one["bound"] is None else f"{one['bound']:,.0f}",
            show_ratio(one["overhead"]["clock"]),
        )
        for name, one in sorted(figures.items(), key=lambda item: -item[1]["rows_per_second"]["clock"])
    ]
    title = f"{table}, {train.shape[1]} columns, fitted to {len(train)} rows"
    show(title, header, lines)
    if output is not None:
        save(
            output,
            {"environment": environment(), "table": table, "matrix_rate": rate, "detectors": figures},
            markdown(title, header, lines),
        )


if __name__ == "__main__":
    typer.run(main)
