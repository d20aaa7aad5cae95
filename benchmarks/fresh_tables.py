"""Gain of DiffusionDetector on tables by which nothing about it was chosen.

The default was designed while looking at 29 tables of ADBench, so its figures there are those of development. Here are
others, taken before their figures were known, and all that were taken are reported:

- *digits*: MNIST's images of 28 x 28 pixels as means of blocks of 4 x 4, 49 columns; each digit in turn is normal;
- *photographs*: CIFAR-10's images in grey, as means of blocks of 4 x 4, 64 columns; each class in turn is normal;
- *flowers*: Fisher's irises, 4 columns; each species in turn is normal;
- *mixtures*: synthetic rows of three Gaussians in 4 and in 12 columns, with the four kinds of anomalies of
  `anomalib_gen.datasets.make_anomalies`.

Splits are those of the benchmark's suite `clean`. Beside the default stand the closed form alone, which trains nothing,
and peers. Figures are in points, means over seeds, then over tables; gains are over the nearest neighbour, kNN(1), with
their standard error over tables, and with the tables won and lost by more than .1 point. Tables of a group are alike,
so the means of groups stand there as if each were a table, too.

Run (an hour and a half on one core)::

    python benchmarks/fresh_tables.py --output benchmarks/results/fresh-tables.json
    python benchmarks/fresh_tables.py --quick     # seconds, the irises alone; figures mean nothing
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from _measure import environment, markdown, save, show
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.ensemble import IsolationForest

from anomalib_gen import DiffusionDetector
from anomalib_gen.benchmark import KNNDistance, anomaly_metrics, clean
from anomalib_gen.datasets import load_images, make_anomalies

METRICS = {"auroc": "AUROC", "average_precision": "average precision"}
REFERENCE = "kNN(1)"
BLOCK = 4
TIE = 0.1
KINDS = ("local", "global", "dependency", "clustered")
Table = tuple[Any, Any]


def detectors(quick: bool) -> dict[str, Any]:
    short: dict[str, Any] = {"max_iter": 20} if quick else {}
    return {
        "DiffusionDetector": DiffusionDetector(device="cpu", **short),
        "DiffusionDetector, closed form": DiffusionDetector(denoiser="closed-form", device="cpu"),
        REFERENCE: KNNDistance(n_neighbors=1),
        "kNN(5)": KNNDistance(n_neighbors=5),
        "sklearn.IsolationForest": IsolationForest(),
    }


def coarse(images: np.ndarray) -> np.ndarray:
    """Grey means of blocks of ``(n, channels, height, width)``, as rows."""
    n, _, height, width = images.shape
    grey = images.mean(axis=1).reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return grey.mean(axis=(2, 4)).reshape(n, -1)


def one_class(collection: str, normal: int) -> Table:
    images, y = load_images(collection, normal=normal, return_X_y=True)
    return coarse(images), y


def iris(normal: int) -> Table:
    X, species = load_iris(return_X_y=True)
    return X, np.where(species == normal, 1, -1)


def mixture(kind: str, n_features: int, seed: int) -> Table:
    X, y = make_anomalies(
        kind,
        n_samples=5000,
        n_features=n_features,
        contamination=0.2,
        random_state=seed,
        return_X_y=True,
    )
    return X, y


def tables(quick: bool) -> dict[tuple[str, str], Callable[[int], Table]]:
    """Group and name of each table, and what gives its rows for a seed."""
    found: dict[tuple[str, str], Callable[[int], Table]] = {
        ("flowers", f"iris {k}"): lambda seed, k=k: iris(k) for k in range(3)
    }
    if quick:
        return found
    for group, collection in (("digits", "mnist"), ("photographs", "cifar10")):
        for k in range(10):
            found[group, f"{collection} {k}"] = lambda seed, name=collection, k=k: one_class(name, k)
    for kind in KINDS:
        for columns in (4, 12):
            found["mixtures", f"{kind}, {columns} columns"] = lambda seed, kind=kind, columns=columns: (
                mixture(kind, columns, seed)
            )
    return found


def judge(group: str, name: str, seed: int, quick: bool) -> list[dict[str, Any]]:
    """Fit every detector to the same rows and judge it on the same."""
    split = clean(*tables(quick)[group, name](seed), seed=seed)
    cells = []
    for detector, unfitted in detectors(quick).items():
        model = clone(unfitted)
        if "random_state" in model.get_params():
            model.set_params(random_state=seed)
        model.fit(split.X_train)
        auroc, average_precision = anomaly_metrics(split.y_test, model.score_samples(split.X_test))
        cells.append(
            {
                "group": group,
                "table": name,
                "seed": seed,
                "detector": detector,
                "n_train": len(split.X_train),
                "auroc": 100 * auroc,
                "average_precision": 100 * average_precision,
            }
        )
    return cells


def summarise(cells: pd.DataFrame) -> list[list[str]]:
    """One line for all tables, for the groups as one table each, and for each group, and each detector."""
    lines = []
    tables = cells.pivot_table(index=["group", "table"], columns="detector", values=list(METRICS))
    groups = cells["group"].unique()
    parts = {"all": tables, "means of groups": tables.groupby(level="group").mean()}
    for group, wide in (parts | {group: tables.loc[[group]] for group in groups}).items():
        for detector in cells["detector"].unique():
            line = [f"{group} ({len(wide)})", detector]
            for metric in METRICS:
                here = wide[metric][detector]
                line.append(f"{here.mean():.2f}")
                if detector == REFERENCE:
                    line += ["", ""]
                    continue
                gain = here - wide[metric][REFERENCE]
                line.append(f"{gain.mean():+.2f} +- {gain.std(ddof=1) / len(gain) ** 0.5:.2f}")
                line.append(f"{(gain > TIE).sum()}-{(gain < -TIE).sum()}")
            lines.append(line)
    return lines


def main(
    seeds: Annotated[int, typer.Option(help="Splits of each table.")] = 2,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report gains over the nearest neighbour on tables that nothing was chosen by."""
    found = Parallel(n_jobs=jobs)(
        delayed(judge)(group, name, seed, quick) for seed in range(seeds) for group, name in tables(quick)
    )
    cells = pd.DataFrame([cell for some in found for cell in some])
    header = ("tables", "detector", "AUROC", "gain", "won-lost", "average precision", "gain", "won-lost")
    rows = summarise(cells)
    title = f"Tables that nothing was chosen by, {seeds} seed{'s' if seeds > 1 else ''}"
    show(title, header, rows)
    if output is not None:
        figures = {"environment": environment(), "cells": cells.round(3).to_dict("records")}
        save(output, figures, markdown(title, header, rows))


if __name__ == "__main__":
    typer.run(main)
