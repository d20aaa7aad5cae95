"""Do explanations name the column that is wrong? Anomalies injected into known columns of real tables.

Detectors are fitted to 1,000 distinct normal rows of a table. Of other normal rows one column each is changed:

- *shift*: moved by four deviations, up or down. Its own distribution gives it away, so the deviation from the mean
  alone finds it: the line "absolute z-score" is what there is to beat.
- *swap*: replaced by the value of another row, at least two deviations away. The value is a usual one, and only the
  other columns tell that it does not belong; some of these rows are not odd at all.

Constant columns are left out, and so are columns in which no other row lies two deviations away. For each family and
method: the mean rank of the changed column among all (1 is best) and the share of rows in which it comes first. SHAP
explains an isolation forest on the same rows. Chance is a mean rank of (columns + 1) / 2. Figures are means over rows,
with the standard error of the mean rank; seeds change rows, columns and fits.

What this does not show: anomalies of several columns at once, and whether people find the explanations useful.

Run::

    python benchmarks/explanations.py --output benchmarks/results/explanations.json
    python benchmarks/explanations.py --quick                      # seconds, without data; figures mean nothing
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
from sklearn.ensemble import IsolationForest

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.datasets import load_adbench, load_builtin
from anomalib_gen.explain import feature_contributions

TABLES = ["magic.gamma", "pendigits", "cardio", "satellite"]
Explain = Callable[[np.ndarray], np.ndarray]


def families(train: np.ndarray, seed: int, quick: bool) -> dict[str, Explain]:
    """Functions from rows to contributions ``(n, D)``, by family and method."""
    shared: dict[str, Any] = {"random_state": seed, "device": "cpu"}
    if quick:
        shared["max_iter"] = 10
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    found: dict[str, Explain] = {"absolute z-score": lambda X: np.abs(X - mean) / deviation}

    def add(name: str, detector: Any, *methods: str, background: bool = True) -> None:
        for method in methods:
            kind = {"integrated-gradients": "path", "reconstruction": "residual"}.get(method, method)
            found[f"{name}, {kind}"] = lambda X, method=method: (  # type: ignore[misc]
                feature_contributions(
                    detector, X, method=method, background=train if background else None
                ).values
            )

    flow = FlowDetector(**shared).fit(train)
    add("flow", flow, "integrated-gradients")
    add("flow from the mean", flow, "integrated-gradients", background=False)
    one_layer = FlowDetector(transform="nsf-autoregressive", n_layers=1, **shared).fit(train)
    add("flow of one layer", one_layer, "conditional")
    add("autoencoder", VAEDetector(**shared).fit(train), "integrated-gradients", "reconstruction")
    add("energy", EnergyDetector(**shared).fit(train), "score", "integrated-gradients")
    steps = {} if quick else {"max_iter": 1500}
    diffusion = DiffusionDetector(**{**shared, "hidden_features": 128, **steps}).fit(train)
    add("diffusion", diffusion, "score", "reconstruction")
    try:
        import shap
    except ImportError:
        print("shap is not installed: its line is missing (pip install '.[benchmark]').", flush=True)
    else:
        forest = IsolationForest(random_state=seed).fit(train)
        # The forest's score is lower for anomalies.
        found["isolation forest, SHAP"] = lambda X: -shap.TreeExplainer(forest).shap_values(X)
    return found


def inject(
    X: np.ndarray, train: np.ndarray, kind: str, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one changed column each, and that column."""
    deviation = train.std(axis=0)
    usable = np.flatnonzero(deviation > 0)
    changed, columns = X.copy(), np.empty(len(X), dtype=int)
    for i, row in enumerate(changed):
        while True:
            j = int(random.choice(usable))
            if kind == "shift":
                row[j] += random.choice([-4.0, 4.0]) * deviation[j]
                break
            far = np.flatnonzero(np.abs(train[:, j] - row[j]) >= 2 * deviation[j])
            if len(far):
                row[j] = train[random.choice(far), j]
                break
        columns[i] = j
    return changed, columns


def measure(table: str, seeds: int, rows: int, quick: bool) -> list[dict[str, Any]]:
    """Rank of the changed column, for all families of a table."""
    task = load_builtin(table) if quick else load_adbench(table)
    X = np.asarray(task.data, dtype=np.float64)[np.asarray(task.target) == 1]
    X = X[~pd.DataFrame(X).duplicated().to_numpy()]
    ranks: dict[tuple[str, str], list[np.ndarray]] = {}
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        order = random.permutation(len(X))
        test, train = X[order[:rows]], X[order[rows:]][: 100 if quick else 1000]
        explainers = families(train, seed, quick)
        for kind in ("shift", "swap"):
            changed, columns = inject(test, train, kind, random)
            for name, explain in explainers.items():
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="The path integrals of")
                    values = explain(changed)
                own = values[np.arange(len(columns)), columns][:, None]
                # Ties share their ranks.
                rank = 1 + (values > own).sum(axis=1) + ((values == own).sum(axis=1) - 1) / 2
                ranks.setdefault((name, kind), []).append(rank)
                took = time.process_time() - start
                print(f"{table}, seed {seed}, {kind}, {name}: {rank.mean():.2f} ({took:.0f} s)", flush=True)
    found = []
    for (name, kind), parts in ranks.items():
        rank = np.concatenate(parts)
        found.append(
            {
                "table": table,
                "columns": int(X.shape[1]),
                "explanation": name,
                "injection": kind,
                "mean_rank": float(rank.mean()),
                "standard_error": float(rank.std(ddof=1) / np.sqrt(len(rank))),
                "first": float((rank == 1).mean()),
            }
        )
    return found


def report(found: list[dict[str, Any]], kind: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table for one kind of injection."""
    chosen = [one for one in found if one["injection"] == kind]
    tables = list(dict.fromkeys(one["table"] for one in chosen))
    names = list(dict.fromkeys(one["explanation"] for one in chosen))
    columns = {one["table"]: one["columns"] for one in chosen}
    lines = []
    for name in names:
        line, first = [name], []
        for table in tables:
            (one,) = (o for o in chosen if o["explanation"] == name and o["table"] == table)
            line.append(f"{one['mean_rank']:.2f} ± {one['standard_error']:.2f} ({one['first']:.0%})")
            first.append(one["first"])
        lines.append([*line, f"{np.mean(first):.0%}"])
    chance = [f"{(columns[table] + 1) / 2:.2f} ({1 / columns[table]:.0%})" for table in tables]
    mean = np.mean([1 / columns[table] for table in tables])
    lines.append(["chance", *chance, f"{mean:.0%}"])
    return ["explanation", *(f"{table}, {columns[table]} columns" for table in tables), "first, mean"], lines


def main(
    table: Annotated[list[str] | None, typer.Option(help="ADBench tables; by default four of them.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of rows, columns and fits.")] = 2,
    rows: Annotated[int, typer.Option(help="Changed rows of each kind and seed.")] = 100,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; the tables go beside it as Markdown.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A dry run in seconds, on data that ship with sklearn.")
    ] = False,
) -> None:
    """Measure whether contributions name the changed column."""
    if quick:
        table, seeds, rows = ["wine"], 1, 10
    found: list[dict[str, Any]] = []
    for name in table or TABLES:
        found += measure(name, seeds, rows, quick)
        text = []
        for kind in ("shift", "swap"):
            header, lines = report(found, kind)
            title = f"{kind}: mean rank of the changed column (share of rows in which it comes first)"
            show(title, header, lines)
            text.append(markdown(title, header, lines))
        if output is not None:  # after each table, so that an interrupted run leaves those it finished
            figures = {
                "environment": environment(),
                "setting": {"seeds": seeds, "rows": rows, "quick": quick},
                "results": found,
            }
            save(output, figures, "\n".join(text))


if __name__ == "__main__":
    typer.run(main)
