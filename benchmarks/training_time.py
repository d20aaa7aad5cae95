"""Training time as a knob: what half and twice the gradient steps do to detection.

`DiffusionDetector` chooses its number of gradient steps by the number of rows (`max_iter="auto"`). Here it is given
multiples of that, on the one-class splits of the benchmark's suite `clean`. Early stopping is off by default, so that a
multiple is what it says; with ``--early-stopping`` it is on, as in use. The figures are means over tables, and the mean
difference to the default number with its standard error over tables.

Run (an hour on one core)::

    python benchmarks/training_time.py --output benchmarks/results/training-time.json
    python benchmarks/training_time.py --quick      # seconds, without ADBench; figures mean nothing
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _measure import environment, markdown, save, show
from joblib import Parallel, delayed

from anomalib_gen import DiffusionDetector
from anomalib_gen._base import TABLE_BATCH
from anomalib_gen.benchmark import anomaly_metrics, clean
from anomalib_gen.datasets import list_adbench, load_adbench, load_builtin

FACTORS = (0.5, 1.0, 2.0)


def judge(name: str, seed: int, factor: float, early_stopping: bool, quick: bool) -> dict[str, Any]:
    """Fit with a multiple of the default's steps and judge on the test rows."""
    load = load_builtin if quick else load_adbench
    split = clean(*load(name, return_X_y=True), seed=seed)
    detector = DiffusionDetector(random_state=seed, device="cpu")
    n_train = len(split.X_train) - round(detector.validation_fraction * len(split.X_train))
    steps = detector._auto_max_iter(-(-n_train // TABLE_BATCH))
    steps = max(1, round(factor * (20 if quick else steps)))
    patience = detector.n_iter_no_change if early_stopping else 10**6
    detector.set_params(max_iter=steps, n_iter_no_change=patience).fit(split.X_train)
    auroc, average_precision = anomaly_metrics(split.y_test, detector.score_samples(split.X_test))
    return {
        "table": name,
        "seed": seed,
        "factor": factor,
        "steps": detector.n_iter_,
        "auroc": 100 * auroc,
        "average_precision": 100 * average_precision,
    }


def main(
    seeds: Annotated[int, typer.Option(help="Splits of each table.")] = 1,
    every: Annotated[int, typer.Option(help="Take every so manieth table, in alphabetical order.")] = 1,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    early_stopping: Annotated[bool, typer.Option("--early-stopping", help="Stop as in use.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report the effect of training time."""
    names = ["wine"] if quick else list_adbench(available_only=True)[::every]
    cells = Parallel(n_jobs=jobs)(
        delayed(judge)(name, seed, factor, early_stopping, quick)
        for name in names
        for seed in range(seeds)
        for factor in FACTORS
    )

    def column(factor: float, metric: str) -> np.ndarray:
        """Means over seeds of each table."""
        return np.array(
            [
                np.mean([c[metric] for c in cells if c["table"] == name and c["factor"] == factor])
                for name in names
            ]
        )

    header = ("steps, of the default's", "AUROC", "difference", "average precision", "difference")
    rows = []
    for factor in FACTORS:
        row = [f"{factor:g}"]
        for metric in ("auroc", "average_precision"):
            here = column(factor, metric)
            difference = here - column(1.0, metric)
            error = difference.std(ddof=1) / len(names) ** 0.5 if len(names) > 1 else float("nan")
            row += [f"{here.mean():.2f}", f"{difference.mean():+.2f} +- {error:.2f}"]
        rows.append(row)
    title = f"DiffusionDetector, {len(names)} tables, {seeds} seed{'s' if seeds > 1 else ''}"
    show(title, header, rows)
    if output is not None:
        save(output, {"environment": environment(), "cells": cells}, markdown(title, header, rows))


if __name__ == "__main__":
    typer.run(main)
