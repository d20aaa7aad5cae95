"""Held-out log-likelihood of real tables: flows beside Gaussian mixtures.

Models are fitted to the training rows of the one-class split (normal rows only) and judged by the mean log-density
of the held-out *normal* rows, in nats a row, all in the units of the same standardised split: anomalies play no part.
Every model sees the same rows, so differences are taken row by row.

- The figure of a model is the mean over seeds; its standard error is that of one split's mean, averaged over the
  seeds and not divided by their root, because the splits share rows.
- The difference is to the best mixture *on the held-out rows* of the table, which favours the mixtures; likewise
  with the standard error of the paired differences. "Rows won" is the share of rows with a higher density than that
  mixture gives. Rare rows far out weigh heavily in a mean and not at all in a share.

No model's density is the data's alone. The flows are densities of the rows plus Gaussian noise of `noise` (0.02)
standard deviations at least; the mixtures have a floor of their own, a variance of `reg_covar` in each
direction (a deviation of .032 for 1e-3, of .001 for 1e-6). On columns with repeated values a lower floor buys density
without end, so read the figures with the floors beside them.

Tables come from ADBench: from the folder in ``ANOMALIB_GEN_DATA``, else the cache, else a download.

Run::

    python benchmarks/density.py                                  # cover and magic.gamma, seeds 0 to 2
    python benchmarks/density.py --table shuttle --table mammography
    python benchmarks/density.py --full --output benchmarks/results/density.json
    python benchmarks/density.py --quick                          # seconds, without data; figures mean nothing
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from _measure import environment, markdown, save, show
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from anomalib_gen import FlowDetector
from anomalib_gen.benchmark.protocols import clean
from anomalib_gen.datasets import load_adbench, load_builtin

LogProb = Callable[[np.ndarray], np.ndarray]


def fit_mixture(X: np.ndarray, seed: int, n_components: int, reg_covar: float) -> LogProb:
    mixture = GaussianMixture(n_components, reg_covar=reg_covar, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its 100 iterations are its default
        return mixture.fit(X).score_samples


def fit_flow(X: np.ndarray, seed: int, transform: str, max_iter: int | str) -> LogProb:
    return (
        FlowDetector(transform=transform, max_iter=max_iter, random_state=seed, device="cpu").fit(X).log_prob
    )


def make_models(quick: bool) -> dict[str, Callable[[np.ndarray, int], LogProb]]:
    """The models by name, each ``fit(X, seed) -> log_prob``."""
    k = 2 if quick else 20
    steps: int | str = 10 if quick else "auto"
    return {
        "Gaussian, 1e-6": lambda X, seed: fit_mixture(X, seed, 1, 1e-6),
        f"mixture of {k}, 1e-3": lambda X, seed: fit_mixture(X, seed, k, 1e-3),
        f"mixture of {k}, 1e-6": lambda X, seed: fit_mixture(X, seed, k, 1e-6),
        "flow maf": lambda X, seed: fit_flow(X, seed, "maf", steps),
        "flow realnvp": lambda X, seed: fit_flow(X, seed, "realnvp", steps),
        "flow nsf-coupling": lambda X, seed: fit_flow(X, seed, "nsf-coupling", steps),
        "flow nsf-autoregressive": lambda X, seed: fit_flow(X, seed, "nsf-autoregressive", steps),
    }


def is_flow(model: str) -> bool:
    return model.startswith("flow")


def split(X: np.ndarray, y: np.ndarray, seed: int, full: bool) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and held-out normal rows, standardised on the former.

    The clean one-class split; with `full` the same without its limit of 5,000 rows on either side.
    """
    if not full:
        rows = clean(X, y, seed)
        return rows.X_train, rows.X_test[rows.y_test == 1]
    X = X[y == 1]
    X = X[~pd.DataFrame(X).duplicated().to_numpy()]
    X = X[np.random.default_rng(seed).permutation(len(X))]
    train, held_out = X[: len(X) // 2], X[len(X) // 2 :]
    deviation = train.std(0)
    deviation[deviation == 0] = 1.0
    return (train - train.mean(0)) / deviation, (held_out - train.mean(0)) / deviation


def mean_and_error(per_seed: list[np.ndarray]) -> dict[str, Any]:
    """Mean over seeds of the mean over rows, and the standard error of one seed's mean."""
    means = [float(values.mean()) for values in per_seed]
    errors = [float(values.std(ddof=1) / np.sqrt(len(values))) for values in per_seed]
    return {"mean": float(np.mean(means)), "standard_error": float(np.mean(errors)), "per_seed": means}


def measure(table: str, seeds: int, full: bool, quick: bool) -> dict[str, Any]:
    """Fit all models to a table for each seed."""
    task = load_builtin(table) if quick else load_adbench(table)
    models = make_models(quick)
    densities: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for seed in range(seeds):
        train, held_out = split(task.data, task.target, seed, full)
        for name, fit in models.items():
            start = time.perf_counter()
            densities[name].append(fit(train, seed)(held_out))
            took = time.perf_counter() - start
            mean = densities[name][-1].mean()
            print(f"{table}, seed {seed}, {name}: {mean:.3f} nats ({took:.0f} s)", flush=True)
    reference = max((name for name in models if not is_flow(name)), key=lambda name: _mean(densities[name]))
    found: dict[str, Any] = {}
    for name, values in densities.items():
        differences = [a - b for a, b in zip(values, densities[reference], strict=True)]
        found[name] = {
            "log_likelihood": mean_and_error(values),
            "median": float(np.mean([np.median(v) for v in values])),
            "difference": mean_and_error(differences),
            "rows_won": float(np.mean([(d > 0).mean() for d in differences])),
        }
    return {
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "columns": int(train.shape[1]),
        "best_mixture": reference,
        "models": found,
    }


def _mean(per_seed: list[np.ndarray]) -> float:
    return float(np.mean([values.mean() for values in per_seed]))


HEADER = ["model", "nats a row", "median", "less the best mixture", "rows won"]


def lines_of(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of one table's report."""

    def plus_minus(figures: dict[str, Any], sign: str = "") -> str:
        return f"{figures['mean']:{sign}.3f} ± {figures['standard_error']:.3f}"

    return [
        [name, plus_minus(m["log_likelihood"]), f"{m['median']:.3f}"]
        + (
            ["(reference)", ""]
            if name == found["best_mixture"]
            else [plus_minus(m["difference"], "+"), f"{m['rows_won']:.0%}"]
        )
        for name, m in found["models"].items()
    ]


def main(
    table: Annotated[list[str] | None, typer.Option(help="ADBench tables; cover and magic.gamma.")] = None,
    seeds: Annotated[int, typer.Option(help="Splits, by the seeds 0, 1, ...")] = 3,
    full: Annotated[bool, typer.Option(help="All normal rows instead of 5,000 a side.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; the tables go beside it as Markdown.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A dry run in seconds, on data that ship with sklearn.")
    ] = False,
) -> None:
    """Compare held-out log-likelihoods of flows and Gaussian mixtures."""
    tables = table or ["cover", "magic.gamma"]
    if quick:
        tables, seeds = ["breast_cancer"], 1
    figures: dict[str, Any] = {
        "environment": environment(),
        "setting": {"seeds": seeds, "full": full, "quick": quick, "noise": FlowDetector().noise},
        "tables": {},
    }
    text = []
    for name in tables:
        found = figures["tables"][name] = measure(name, seeds, full, quick)
        title = (
            f"{name}: {found['train_rows']:,} training rows, {found['held_out_rows']:,} held-out normals, "
            f"{found['columns']} columns, {seeds} seed{'s' if seeds > 1 else ''}"
        )
        lines = lines_of(found)
        show(title, HEADER, lines)
        text.append(markdown(title, HEADER, lines))
    if output is not None:
        save(output, figures, "\n".join(text))


if __name__ == "__main__":
    typer.run(main)
