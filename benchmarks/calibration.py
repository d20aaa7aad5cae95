"""Do thresholds and p-values keep their promises on real tables? Realised rates beside nominal ones.

For each table, detector and split, the distinct normal rows are shuffled by the seed and cut into 500 that train, 1,000
that calibrate and up to 1,000 that judge; 50 anomalies join the first 450 of the latter as a batch of 500 rows. The
detector is fitted once to the training rows, and every decision below is made from that fit, except where it says
otherwise.

False positives, nominally 5 % of normal rows:

- *contamination*: the 5 % quantile of the training scores (scikit-learn's `contamination`); *all rows*: of a fit to
  training and calibration rows together, which is what is done where none are held out.
- *held-out*: `FalsePositiveRate(0.05)` on the calibration rows, the same as a split-conformal p-value of at most 0.05.
- *90 % sure*: `FalsePositiveRate(0.05, confidence=0.9)`; beside it, the share of splits whose rate came out above 5 %.
  (That is judged on at most 1,000 rows, so it is blurred towards one half.)
- *CV+* (five folds) and *after-bootstrap* (ten samples): `CrossConformalDetector` and `BootstrapConformalDetector` on
  training and calibration rows.
- *100 rows*: the same two, *jackknife+* and *split* (`SplitConformalDetector`, 50 rows to train and 50 to calibrate) on
  the first 100 training rows alone, where there are none to give away. With k = floor(.05 (n + 1)), p-values of at
  most 5 % are nominally k / (n + 1): 3.9 % for 50 calibration rows, 5.0 % for 100.
- *tail*: `TailProbability(0.001)`, nominally 0.1 %.

False discoveries, nominally 10 % of what is flagged in a batch of 500 rows:

- *contamination*: all rows below the 5 % and the 10 % quantile of the training scores. There is no nominal rate.
- *BH*, *Storey*: `adjust_p_values` on split-conformal p-values; *conditional*: BH after `conditional_p_values` (Simes,
  delta = 0.1).
- *LORD*, *SAFFRON*: the same p-values one after the other, in random order. One calibration set serves all rows, so
  the independence that their proofs ask for does not hold: these columns show how much that matters.

Means are over splits, with their standard errors. Splits share rows, so the errors are those of drawing splits of the
table at hand; expectations are exact all the same, because rows are exchangeable. What this does not show: drift, and
anomalies among the calibration rows.

The Gaussian, a Mahalanobis distance, is there because its fits cost nothing: with it CV+, jackknife+ and the
bootstrap are measured on every table, with other detectors on one.

Run (results that are in the output are not computed again)::

    python benchmarks/calibration.py --output benchmarks/results/calibration.json
    python benchmarks/calibration.py --table cover --splits 50
    python benchmarks/calibration.py --quick                      # seconds, without data; figures mean nothing
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
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import LeaveOneOut
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from anomalib_gen import FlowDetector
from anomalib_gen.calibration import (
    LORD,
    SAFFRON,
    BootstrapConformalDetector,
    Contamination,
    CrossConformalDetector,
    FalsePositiveRate,
    SplitConformalDetector,
    TailProbability,
    ThresholdDetector,
    adjust_p_values,
    conditional_p_values,
)
from anomalib_gen.datasets import load_adbench, load_builtin

ALPHA, TAIL, FDR = 0.05, 0.001, 0.1
TABLES = ["cover", "magic.gamma", "mammography", "pendigits", "shuttle", "thyroid"]
FLOW_TABLES = ["magic.gamma", "mammography"]  # the others would take an hour
CROSS_TABLES = ["mammography"]
GAUSSIAN_TABLES = [
    *["ALOI", "celeba", "landsat", "optdigits", "PageBlocks", "satellite", "satimage-2", "SpamBase", "Wilt"],
    *TABLES,
]
FEW = 100


def forest(seed: int) -> Any:
    return IsolationForest(n_estimators=25, random_state=seed)


def lof(seed: int) -> Any:
    return make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True))


class Gaussian(OutlierMixin, BaseEstimator):
    """Minus the Mahalanobis distance, of a covariance with a thousandth of the mean variance added."""

    def fit(self, X: np.ndarray, y: Any = None) -> Gaussian:
        self.mean_ = X.mean(axis=0)
        centred = (X - self.mean_) / (scale := np.where((s := X.std(axis=0)) > 0, s, 1.0))
        covariance = centred.T @ centred / len(X) + 1e-3 * np.eye(X.shape[1])
        self.whiten_ = np.linalg.inv(np.linalg.cholesky(covariance)) / scale
        return self

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        return -np.linalg.norm((X - self.mean_) @ self.whiten_.T, axis=1)


def flow(seed: int) -> Any:
    return FlowDetector(
        transform="realnvp", n_layers=2, hidden_features=32, max_iter=60, random_state=seed, device="cpu"
    )


DETECTORS: dict[str, Callable[[int], Any]] = {
    "isolation forest": forest,
    "LOF": lof,
    "flow": flow,
    "Gaussian": lambda seed: Gaussian(),
}
DETECTOR_TABLES = {
    "isolation forest": TABLES,
    "LOF": TABLES,
    "flow": FLOW_TABLES,
    "Gaussian": GAUSSIAN_TABLES,
}


def cut(X: np.ndarray, y: np.ndarray, seed: int, sizes: tuple[int, int, int, int]) -> tuple[np.ndarray, ...]:
    """Training, calibration and test normals, and anomalies."""
    random = np.random.default_rng(seed)
    n_train, n_calibration, n_test, n_abnormal = sizes
    normal = X[y == 1][random.permutation((y == 1).sum())[: n_train + n_calibration + n_test]]
    abnormal = X[y == -1][random.permutation((y == -1).sum())[:n_abnormal]]
    return *np.split(normal, [n_train, n_train + n_calibration]), abnormal


def measure_split(
    rows: tuple[np.ndarray, ...],
    make: Callable[[int], Any],
    seed: int,
    *,
    slow: bool,
    cross: bool,
    few: bool,
    batch: int,
) -> dict[str, float]:
    """Rates of one split."""
    train, calibration, test, abnormal = rows
    fitted = FrozenEstimator(make(seed).fit(train))
    found: dict[str, float] = {}

    def false_positives(name: str, detector: Any) -> None:
        found[f"false positives: {name}"] = float((detector.predict(test) == -1).mean())

    contaminated = ThresholdDetector(fitted, threshold=Contamination(ALPHA)).fit(train)
    false_positives("contamination", contaminated)
    if not slow:
        both = np.concatenate([train, calibration])
        everything = ThresholdDetector(make(seed), threshold=Contamination(ALPHA)).fit(both)
        false_positives("contamination, all rows", everything)
    for name, rule in (
        ("held-out", FalsePositiveRate(ALPHA)),
        ("90 % sure", FalsePositiveRate(ALPHA, confidence=0.9)),
        ("tail", TailProbability(TAIL)),
    ):
        false_positives(name, ThresholdDetector(fitted, threshold=rule).fit(calibration))
    for name in ("held-out", "90 % sure"):
        found[f"above nominal: {name}"] = float(found[f"false positives: {name}"] > ALPHA)
    if cross:
        both = np.concatenate([train, calibration])
        false_positives("CV+", CrossConformalDetector(make(seed), alpha=ALPHA, random_state=seed).fit(both))
        bagged = BootstrapConformalDetector(make(seed), n_estimators=10, alpha=ALPHA, random_state=seed)
        false_positives("after-bootstrap", bagged.fit(both))
    if few:
        shared: dict[str, Any] = {"alpha": ALPHA, "random_state": seed}
        for name, detector in (
            ("split, 100 rows", SplitConformalDetector(make(seed), **shared)),
            ("CV+, 100 rows", CrossConformalDetector(make(seed), **shared)),
            ("jackknife+, 100 rows", CrossConformalDetector(make(seed), cv=LeaveOneOut(), **shared)),
            (
                "after-bootstrap, 100 rows",
                BootstrapConformalDetector(make(seed), n_estimators=20, **shared),
            ),
        ):
            false_positives(name, detector.fit(train[:FEW]))

    normal = test[:batch]
    X = np.concatenate([normal, abnormal])
    is_normal = np.arange(len(X)) < len(normal)
    conformal = SplitConformalDetector(fitted).fit(calibration)
    p = conformal.p_values(X)
    order = np.random.default_rng(seed).permutation(len(X))

    def discoveries(name: str, flagged: np.ndarray) -> None:
        found[f"false discoveries: {name}"] = float((flagged & is_normal).sum() / max(flagged.sum(), 1))
        found[f"found: {name}"] = float(flagged[~is_normal].mean())

    def stream(control: Any) -> np.ndarray:
        flagged = np.zeros(len(X), dtype=bool)
        flagged[order] = list(control.test_each(p[order]))
        return flagged

    discoveries("contamination 5 %", contaminated.predict(X) == -1)
    tenth = ThresholdDetector(fitted, threshold=Contamination(0.1)).fit(train)
    discoveries("contamination 10 %", tenth.predict(X) == -1)
    discoveries("BH", adjust_p_values(p) <= FDR)
    discoveries("Storey", adjust_p_values(p, method="storey") <= FDR)
    conditional = conditional_p_values(p, conformal.n_calibration_, delta=0.1)
    discoveries("conditional", adjust_p_values(conditional) <= FDR)
    discoveries("LORD", stream(LORD(alpha=FDR)))
    discoveries("SAFFRON", stream(SAFFRON(alpha=FDR)))
    return found


def measure(table: str, detector: str, splits: int, quick: bool) -> dict[str, Any]:
    """Mean and standard error of each rate over the splits of a table."""
    task = load_builtin(table) if quick else load_adbench(table)
    X, y = np.asarray(task.data, dtype=np.float64), np.asarray(task.target)
    distinct = ~pd.DataFrame(X).duplicated().to_numpy()
    X, y = X[distinct], y[distinct]
    sizes, batch = ((100, 100, 100, 20), 80) if quick else ((500, 1000, 1000, 50), 450)
    start = time.process_time()
    lines = []
    for seed in range(splits):
        rows = cut(X, y, seed, sizes)
        lines.append(
            measure_split(
                rows,
                DETECTORS[detector],
                seed,
                slow=detector == "flow",
                cross=detector == "Gaussian" or (detector != "flow" and (quick or table in CROSS_TABLES)),
                few=detector == "Gaussian",
                batch=batch,
            )
        )
    took = time.process_time() - start
    print(f"{table}, {detector}: {splits} splits in {took:.0f} s of CPU time", flush=True)
    frame = pd.DataFrame(lines)
    return {
        "table": table,
        "detector": detector,
        "test_normals": len(rows[2]),
        "rates": {
            name: {"mean": float(frame[name].mean()), "standard_error": float(frame[name].sem())}
            for name in frame
        },
    }


def percent(rate: dict[str, float] | None, nominal: float | None = None) -> str:
    """Mean and standard error in percent, with an asterisk if more than two errors above the nominal rate."""
    if rate is None:
        return ""
    digits = 2 if nominal == TAIL else 1
    above = nominal is not None and rate["mean"] > nominal + 2 * rate["standard_error"]
    return (
        f"{100 * rate['mean']:.{digits}f} ± {100 * rate['standard_error']:.{digits}f}{' *' if above else ''}"
    )


def report(found: list[dict[str, Any]], splits: int) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of the report."""
    kinds = ["contamination", "contamination, all rows", "held-out", "90 % sure", "CV+", "after-bootstrap"]
    first = []
    for one in found:
        rates = one["rates"]
        first.append(
            [one["table"], one["detector"]]
            + [percent(rates.get(f"false positives: {kind}"), ALPHA) for kind in kinds]
            + [f"{100 * rates[f'above nominal: {kind}']['mean']:.0f}" for kind in ("held-out", "90 % sure")]
            + [percent(rates["false positives: tail"], TAIL)]
        )
    few = ["split, 100 rows", "CV+, 100 rows", "jackknife+, 100 rows", "after-bootstrap, 100 rows"]
    small = [
        [one["table"], one["detector"]]
        + [percent(one["rates"][f"false positives: {kind}"], ALPHA) for kind in few]
        for one in found
        if f"false positives: {few[0]}" in one["rates"]
    ]
    procedures = ["contamination 5 %", "contamination 10 %", "BH", "Storey", "conditional", "LORD", "SAFFRON"]
    second, third = [], []
    for one in found:
        rates, name = one["rates"], [one["table"], one["detector"]]
        second.append(name + [percent(rates[f"false discoveries: {kind}"], FDR) for kind in procedures])
        third.append(name + [percent(rates[f"found: {kind}"]) for kind in procedures])
    return [
        (
            f"False-positive rate in %, nominally 5, {splits} splits (* more than two standard errors above)",
            [
                "table",
                "detector",
                *kinds,
                "held-out: splits above",
                "90 % sure: splits above",
                "tail, nominally 0.1",
            ],
            first,
        ),
        *(
            [
                (
                    f"False-positive rate in %, nominally 5, of {FEW} rows (* more than two standard errors above)",
                    ["table", "detector", *few],
                    small,
                )
            ]
            if small
            else []
        ),
        (
            f"False-discovery rate in %, nominally 10, {splits} splits (* more than two standard errors above)",
            ["table", "detector", *procedures],
            second,
        ),
        ("Anomalies found in %", ["table", "detector", *procedures], third),
    ]


def main(
    table: Annotated[
        list[str] | None, typer.Option(help="ADBench tables; by default fifteen of them.")
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option(help="Of 'isolation forest', 'LOF', 'flow', 'Gaussian'.")
    ] = None,
    splits: Annotated[int, typer.Option(help="Splits, by the seeds 0, 1, ...")] = 200,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; the tables go beside it as Markdown.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A dry run in seconds, on data that ship with sklearn.")
    ] = False,
) -> None:
    """Compare realised with nominal false-positive and false-discovery rates."""
    if quick:
        table, splits = ["digits"], 2
    setting = {"splits": splits, "alpha": ALPHA, "tail": TAIL, "fdr": FDR, "quick": quick}
    found: list[dict[str, Any]] = []
    if output is not None and output.exists():
        before = json.loads(output.read_text())
        if before["setting"] != setting:
            raise typer.BadParameter(f"{output} was made with other settings; move it away first.")
        found = before["results"]
    done = {(one["table"], one["detector"]) for one in found}
    order = list(DETECTORS)
    with warnings.catch_warnings():
        # The quick run has too few rows for the default level of the p-values; predict is not used there.
        warnings.filterwarnings("ignore", message="alpha=.* is below")
        for name in table or sorted({*TABLES, *GAUSSIAN_TABLES}, key=str.lower):
            for kind in detector or DETECTORS:
                if (table or name in DETECTOR_TABLES[kind]) and (name, kind) not in done:
                    found.append(measure(name, kind, splits, quick))
            found.sort(key=lambda one: (one["table"].lower(), order.index(one["detector"])))
            tables = report(found, splits)
            if output is not None:  # after each table, so that an interrupted run leaves those it finished
                figures = {"environment": environment(), "setting": setting, "results": found}
                save(output, figures, "\n".join(markdown(*one) for one in tables))
    for one in tables:
        show(*one)


if __name__ == "__main__":
    typer.run(main)
