"""What is a choice without labels worth? Detectors chosen by each criterion, beside the oracle and a fixed default.

For each table the one-class split of the benchmark's suite `clean` is made; at most 1,000 of its training rows train,
and at most 1,000 normal rows and 1,000 anomalies test. Tables with fewer than 100 training rows or more than 200
columns are left out. Each of a fixed set of candidates gets

- its test AUROC, after a fit to all training rows: what the choice is judged by;
- the mean over three folds of the training rows, which are all normal, of each criterion of `anomalib_gen.selection`;
  none where a fit fails, as with fewer rows than neighbours.

A criterion chooses the candidate with its best value (ties share). For the choice are reported, as means over tables
with 95 % intervals (percentile bootstrap over tables): its AUROC; how far that is behind the *oracle*, the candidate
with the best test AUROC of that table, which nobody has; the gain over a choice at *random*, the mean of the
candidates; and the difference to the *best default*, the one candidate that is best on average over all the other
tables. Beside these, the rank correlation of the criterion with the AUROC over candidates.

Likelihood compares densities only, so all criteria are compared a second time on the candidates that are densities.

Last, detectors that are broken on purpose: where would each criterion place them among the candidates?

What this does not show: how the criteria fare if anomalies are among the training rows, and on tables of another kind.

Run (ten minutes a seed; cells that are in the output are not computed again)::

    python benchmarks/label_free_selection.py --output benchmarks/results/label-free-selection.json
    python benchmarks/label_free_selection.py --quick              # seconds, without data; figures mean nothing
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from _measure import environment, markdown, save, show
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.svm import OneClassSVM

from anomalib_gen import DiffusionDetector, FlowDetector
from anomalib_gen.benchmark import KNNDistance, anomaly_metrics, clean, parse_detector, score_rows
from anomalib_gen.datasets import list_adbench, load_adbench, load_builtin
from anomalib_gen.selection import (
    ColumnReplacement,
    ExcessMass,
    LogLikelihood,
    MassVolume,
    RankStability,
    model_centrality,
)

ROWS = 1000
FEWEST_ROWS, MOST_COLUMNS = 100, 200
FOLDS = 3


def mixture(n: int) -> Callable[[int], Any]:
    return lambda seed: GaussianMixture(n, reg_covar=1e-3, random_state=seed)


DENSITIES: dict[str, Callable[[int], Any]] = {
    "Gaussian": mixture(1),
    "Gaussian mixture (4)": mixture(4),
    "Gaussian mixture (16)": mixture(16),
    "kernel density (.3)": lambda seed: KernelDensity(bandwidth=0.3),
    "flow (small)": lambda seed: FlowDetector(
        transform="realnvp", n_layers=2, hidden_features=32, max_iter=60, random_state=seed, device="cpu"
    ),
}
CANDIDATES: dict[str, Callable[[int], Any]] = {
    **DENSITIES,
    "isolation forest": lambda seed: IsolationForest(random_state=seed),
    "LOF (20)": lambda seed: LocalOutlierFactor(novelty=True),
    "one-class SVM": lambda seed: OneClassSVM(),
    "kNN (1)": lambda seed: KNNDistance(n_neighbors=1),
    "kNN (20)": lambda seed: KNNDistance(n_neighbors=20),
    "diffusion, closed form": lambda seed: DiffusionDetector(
        denoiser="closed-form", random_state=seed, device="cpu"
    ),
    "HBOS": lambda seed: parse_detector("pyod.models.hbos.HBOS()").build(seed=seed, n_features=0),
}
CRITERIA: dict[str, Any] = {
    "log-likelihood": LogLikelihood(),
    "mass-volume": MassVolume(n_points=2000),
    "mass-volume, 3 columns": MassVolume(n_points=2000, n_columns=3, n_subsets=5),
    "excess-mass": ExcessMass(n_points=2000),
    "replaced columns, uniform": ColumnReplacement(),
    "replaced columns, marginal": ColumnReplacement(reference="marginal"),
    "stability": RankStability(n_fits=2),
}


class Noise(OutlierMixin, BaseEstimator):
    """A broken detector: scores that have nothing to do with rows, though the same for the same row."""

    def fit(self, X: np.ndarray, y: Any = None) -> Noise:
        self.n_features_in_ = X.shape[1]
        return self

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        return np.sin(1e6 * X.sum(axis=1))


class FirstColumn(Noise):
    """A broken detector: it looks at one column alone."""

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        return -np.abs(X[:, 0])


class UpsideDown(KNNDistance):
    """A broken detector: the distance to the nearest row with the wrong sign."""

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        return -super().score_samples(X)


class Shuffled(KNNDistance):
    """A broken detector: each column of its training rows was shuffled by itself."""

    def fit(self, X: np.ndarray, y: Any = None) -> Shuffled:
        super().fit(np.random.default_rng(0).permuted(X, axis=0))
        return self


BROKEN: dict[str, Callable[[int], Any]] = {
    "noise": lambda seed: Noise(),
    "kNN (1), wrong sign": lambda seed: UpsideDown(n_neighbors=1),
    "first column alone": lambda seed: FirstColumn(),
    "kNN (1), columns shuffled": lambda seed: Shuffled(n_neighbors=1),
}
# The flow would be fitted for most of the run; nobody would do it for a choice.
TOO_DEAR = {("flow (small)", "mass-volume, 3 columns")}
CENTRALITY = "centrality"


def rows_of(table: str, seed: int, quick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Training rows, test rows and their labels; None if the table is left out."""
    load = load_builtin if quick else load_adbench
    split = clean(*load(table, return_X_y=True), seed=seed)
    if len(split.X_train) < FEWEST_ROWS or split.X_train.shape[1] > MOST_COLUMNS:
        return None
    rows = 150 if quick else ROWS
    # Normals come first.
    chosen = np.concatenate([np.flatnonzero(split.y_test == label)[:rows] for label in (1, -1)])
    return split.X_train[:rows], split.X_test[chosen], split.y_test[chosen]


def judge_detector(
    name: str, make: Callable[[int], Any], seed: int, X: np.ndarray, test: np.ndarray, y: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """AUROC and criteria of a detector, and the ranks of the training rows within the folds that left them out."""
    found = {"auroc": anomaly_metrics(y, score_rows(make(seed).fit(X), test))[0]}
    parts: dict[str, list[float]] = {}
    left_out = np.empty(len(X))
    for train, held_out in KFold(FOLDS).split(X):
        fitted = make(seed).fit(X[train])
        # Folds have scores of different models: what compares are the ranks within.
        left_out[held_out] = score_rows(fitted, X[held_out]).argsort().argsort() / len(held_out)
        for criterion, scorer in CRITERIA.items():
            if (criterion == "log-likelihood" and name not in DENSITIES) or (name, criterion) in TOO_DEAR:
                continue
            if getattr(scorer, "n_columns", None) and X.shape[1] <= scorer.n_columns:
                scorer = CRITERIA["mass-volume"]
            try:
                parts.setdefault(criterion, []).append(scorer(fitted, X[held_out]))
            except ValueError as error:
                print(f"{name}, {criterion}: {str(error).splitlines()[0]}", flush=True)
    found.update({c: float(np.mean(values)) for c, values in parts.items() if len(values) == FOLDS})
    return found, left_out


def measure(table: str, seed: int, quick: bool) -> dict[str, Any] | None:
    """AUROC and criteria of every candidate on one table; None if it is left out."""
    rows = rows_of(table, seed, quick)
    if rows is None:
        return None
    start = time.process_time()
    judged = {name: judge_detector(name, make, seed, *rows) for name, make in CANDIDATES.items()}
    found = {name: figures for name, (figures, _) in judged.items()}
    for names in (CANDIDATES, DENSITIES):
        key = CENTRALITY if names is CANDIDATES else f"{CENTRALITY}, densities"
        for name, value in zip(names, model_centrality([judged[n][1] for n in names]), strict=True):
            found[name][key] = float(value)
    broken = {name: judge_detector(name, make, seed, *rows)[0] for name, make in BROKEN.items()}
    took = time.process_time() - start
    print(f"{table}, seed {seed}: {took:.0f} s of CPU time", flush=True)
    return {
        "table": table,
        "seed": seed,
        "columns": int(rows[0].shape[1]),
        "rows": len(rows[0]),
        "cpu_seconds": round(took, 1),
        "candidates": found,
        "broken": broken,
    }


def passed(cells: list[dict[str, Any]], broken: str, criterion: str) -> float:
    """Share of the candidates that a broken detector is placed above, ties counting half, in the mean over cells."""
    shares = []
    for cell in cells:
        own = cell["broken"][broken][criterion]
        others = np.array([c[criterion] for c in cell["candidates"].values() if criterion in c])
        shares.append(np.mean((own > others) + 0.5 * (own == others)))
    return float(np.mean(shares))


def chosen_auroc(cell: dict[str, Any], names: list[str], criterion: str) -> float:
    """Test AUROC, in points, of the candidate that a criterion chooses; the mean of those that tie."""
    values = {n: cell["candidates"][n][criterion] for n in names if criterion in cell["candidates"][n]}
    best = max(values.values())
    return 100 * float(np.mean([cell["candidates"][n]["auroc"] for n, v in values.items() if v == best]))


def rank_correlation(cell: dict[str, Any], names: list[str], criterion: str) -> float:
    pairs = [
        (c["auroc"], c[criterion]) for n, c in cell["candidates"].items() if n in names and criterion in c
    ]
    auroc, value = pd.DataFrame(pairs).rank().to_numpy().T
    return float(np.corrcoef(auroc, value)[0, 1]) if np.ptp(value) and np.ptp(auroc) else 0.0


def judge(cells: list[dict[str, Any]], names: list[str], criteria: list[str]) -> dict[str, Any]:
    """Means over tables, with intervals, of what each way to choose is worth."""
    tables = list(dict.fromkeys(cell["table"] for cell in cells))

    def by_table(value: Callable[[dict[str, Any]], float]) -> np.ndarray:
        return np.array([np.mean([value(c) for c in cells if c["table"] == t]) for t in tables])

    fixed = {n: by_table(lambda c, n=n: 100 * c["candidates"][n]["auroc"]) for n in names}  # type: ignore[misc]
    oracle = by_table(lambda c: 100 * max(c["candidates"][n]["auroc"] for n in names))
    random = np.mean(list(fixed.values()), axis=0)
    # The candidate that is best over the other tables, judged on this one.
    others = {n: values.sum() - values for n, values in fixed.items()}
    default = np.array([fixed[max(names, key=lambda n: others[n][k])][k] for k in range(len(tables))])
    ways: dict[str, np.ndarray] = {"oracle": oracle, "best default": default, "random": random}
    for criterion in criteria:
        key = (
            f"{criterion}, densities"
            if criterion == CENTRALITY and len(names) < len(CANDIDATES)
            else criterion
        )
        ways[criterion] = by_table(lambda c, key=key: chosen_auroc(c, names, key))  # type: ignore[misc]
    draws = np.random.default_rng(0).integers(len(tables), size=(10_000, len(tables)))

    def interval(values: np.ndarray) -> dict[str, Any]:
        return {
            "mean": float(values.mean()),
            "interval": np.quantile(values[draws].mean(axis=1), [0.025, 0.975]).tolist(),
        }

    found = {}
    for way, values in ways.items():
        found[way] = {
            "auroc": interval(values),
            "behind_oracle": interval(oracle - values),
            "gain_over_random": interval(values - random),
            "gain_over_default": interval(values - default),
            "by_table": dict(zip(tables, values.round(2).tolist(), strict=True)),
        }
        if way in criteria:
            key = f"{way}, densities" if way == CENTRALITY and len(names) < len(CANDIDATES) else way
            found[way]["rank_correlation"] = interval(
                by_table(lambda c, key=key: rank_correlation(c, names, key))  # type: ignore[misc]
            )
    return {
        "candidates": {n: float(v.mean()) for n, v in fixed.items()},
        "ways": found,
        "tables": len(tables),
    }


def report(judged: dict[str, Any], what: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of a table."""

    def shown(figures: dict[str, Any] | None, form: str) -> str:
        if figures is None:
            return ""
        low, high = figures["interval"]
        return f"{figures['mean']:{form}} [{low:{form}}, {high:{form}}]"

    lines = [
        [
            way,
            shown(f["auroc"], ".1f"),
            shown(f["behind_oracle"], ".1f"),
            shown(f["gain_over_random"], "+.1f"),
            shown(f["gain_over_default"], "+.1f"),
            shown(f.get("rank_correlation"), "+.2f"),
        ]
        for way, f in judged["ways"].items()
    ]
    return (
        f"Choice among {len(judged['candidates'])} {what}, {judged['tables']} tables",
        [
            "chosen by",
            "AUROC",
            "behind the oracle",
            "over random",
            "over the best default",
            "rank correlation",
        ],
        lines,
    )


def report_broken(cells: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of the table of broken detectors."""
    criteria = [criterion for criterion in CRITERIA if criterion != "log-likelihood"]
    lines = []
    for name in BROKEN:
        auroc = 100 * float(np.mean([cell["broken"][name]["auroc"] for cell in cells]))
        lines.append([name, f"{auroc:.1f}", *(f"{passed(cells, name, c):.0%}" for c in criteria)])
    return (
        f"Broken detectors: share of the {len(CANDIDATES)} candidates that each is placed above, {len(cells)} splits",
        ["broken detector", "AUROC", *criteria],
        lines,
    )


def main(
    table: Annotated[
        list[str] | None, typer.Option(help="ADBench tables; by default those on this machine.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Splits 0, 1, ... of each table.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; the tables go beside it as Markdown. It is resumed.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A dry run in seconds, on data that ship with sklearn.")
    ] = False,
) -> None:
    """Measure how far choices without labels are from the oracle."""
    if quick:
        table, seeds = ["breast_cancer", "digits"], 1
    setting = {
        "rows": ROWS,
        "folds": FOLDS,
        "quick": quick,
        "candidates": list(CANDIDATES),
        "broken": list(BROKEN),
        "criteria": {name: repr(scorer) for name, scorer in CRITERIA.items()},
    }
    cells: list[dict[str, Any]] = []
    if output is not None and output.exists():
        before = json.loads(output.read_text())
        if before["setting"] != setting:
            raise typer.BadParameter(f"{output} was made with other settings; move it away first.")
        cells = before["cells"]
    done = {(cell["table"], cell["seed"]) for cell in cells}
    reports: list[tuple[str, list[str], list[list[str]]]] = []
    criteria = [*CRITERIA, CENTRALITY]
    for seed in range(seeds):
        for name in table or list_adbench(available_only=True):
            if (name, seed) not in done:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cell = measure(name, seed, quick)
                if cell is None:
                    continue
                cells.append(cell)
            among = {
                "detectors": judge(cells, list(CANDIDATES), criteria[1:]),
                "densities": judge(cells, list(DENSITIES), criteria),
            }
            reports = [*(report(judged, what) for what, judged in among.items()), report_broken(cells)]
            if output is not None:  # after each table, so that an interrupted run goes on from there
                figures = {"environment": environment(), "setting": setting, "judged": among, "cells": cells}
                save(output, figures, "\n".join(markdown(*one) for one in reports))
    for one in reports:
        show(*one)


if __name__ == "__main__":
    typer.run(main)
