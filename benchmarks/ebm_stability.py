"""Do energies trained by contrast stay where they should, for a long time?

Each contrastive objective, at its defaults, trains an energy model for 20,000 steps on three real tables and on a
mixture in two dimensions: without early stopping, so that nothing ends a run that would go astray later. Printed and
saved for each run:

steps
    Gradient steps taken; fewer than asked for where the objective's own diagnosis stopped it.
energies
    Smallest and largest median energy of a batch of rows over the whole training, in nats, and the range of all
    energies seen, rows far out included.
judge
    Held-out loss (the objective's `validate`, or the loss itself) of the untrained and the trained model: lower is
    better. Figures of different objectives are different quantities.
diverged
    The diagnosis, or "no".

The model is the residual network of `EnergyDetector` at half its width, the optimiser has the detector's defaults.

Run::

    python benchmarks/ebm_stability.py                                  # an hour or more on one core
    python benchmarks/ebm_stability.py --steps 2000 --table mixture     # a minute
    python benchmarks/ebm_stability.py --output benchmarks/results/ebm-stability.json
    python benchmarks/ebm_stability.py --quick                          # seconds; figures mean nothing
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, save, show

from anomalib_gen._runtime import forked_rng, make_generator
from anomalib_gen._scaling import ArrayRows, Standardizer, column_grain
from anomalib_gen._training import TrainingOptions, evaluate, train
from anomalib_gen.datasets import load_adbench
from anomalib_gen.models import EnergyModel
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import OBJECTIVES

NAMES = ("contrastive-divergence", "persistent-contrastive-divergence", "noise-contrastive", "telescoping")
TABLES = ("mixture", "Pima", "thyroid", "vowels")
LOOK_EVERY = 50


class Watch:
    """An objective that records the energies of its rows as it goes."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.steps, self.medians, self.lowest, self.highest = 0, [], math.inf, -math.inf

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if torch.is_grad_enabled():
            if self.steps % LOOK_EVERY == 0:
                with torch.no_grad():
                    e = model.energy(x)
                self.medians.append(float(e.median()))
                self.lowest = min(self.lowest, float(e.min()))
                self.highest = max(self.highest, float(e.max()))
            self.steps += 1
        return self.objective(model, x, generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def load(table: str) -> np.ndarray:
    """Return the normal rows of a table."""
    if table == "mixture":
        rng = np.random.default_rng(0)
        centers = np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        return centers[rng.integers(3, size=3000)] + rng.normal(size=(3000, 2)) * [0.6, 0.25]
    X, y = load_adbench(table, return_X_y=True)
    return X[y == 1]


def run(table: str, name: str, *, steps: int, seed: int = 0) -> dict[str, Any]:
    """Train once and return what was seen."""
    X, cpu = load(table), torch.device("cpu")
    order = np.random.default_rng(seed).permutation(len(X))
    index, held_out = np.sort(order[len(X) // 10 :]), np.sort(order[: len(X) // 10])
    scaler = Standardizer.fit(X, index, None)
    rows, judged = ArrayRows(X, index, scaler, cpu), ArrayRows(X, held_out, scaler, cpu)
    features, heads = X.shape[1], 4 if name == "telescoping" else 1
    grain = torch.from_numpy(column_grain(X, index, scaler))
    with forked_rng(seed):
        network = ResidualMLP(features, heads, hidden_features=64, n_blocks=2)
        model = EnergyModel(network, features, grain=grain, n_heads=heads).float()
    watch = Watch(OBJECTIVES[name]())
    watch.prepare(model, rows, make_generator(seed, cpu))

    def judge() -> float:
        loss = getattr(watch, "validate", watch.objective)
        return evaluate(
            model, loss, judged, weights=None, rows_per_block=1024, generator=make_generator(1, cpu)
        )

    before = judge()
    options = TrainingOptions(max_iter=steps, batch_size=128, learning_rate=2e-3, weight_decay=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(model, watch, rows, options=options, seed=seed, device=cpu)
    told = [str(w.message) for w in caught if "diverged" in str(w.message)]
    return {
        "table": table,
        "objective": name,
        "rows": len(index),
        "columns": features,
        "steps": result.n_iter,
        "median_energy": [min(watch.medians), max(watch.medians)],
        "energy": [watch.lowest, watch.highest],
        "judge": [before, judge()],
        "diverged": told[0] if told else "no",
    }


def main(
    steps: Annotated[int, typer.Option(help="Gradient steps of each run.")] = 20_000,
    table: Annotated[list[str] | None, typer.Option(help="Tables; repeat for several.")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="Objectives; repeat for several.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the figures, as JSON.")] = None,
    quick: Annotated[bool, typer.Option(help="Run end to end in seconds; figures mean nothing.")] = False,
) -> None:
    torch.set_num_threads(1)
    tables, names = table or TABLES, objective or NAMES
    if quick:
        steps, tables = 20, ["mixture"]
    runs = []
    for one in tables:
        for name in names:
            runs.append(run(one, name, steps=steps))
            print(runs[-1], flush=True)
            if output is not None:
                save(output, {"environment": environment(), "runs": runs})
    show(
        "Energies trained by contrast",
        ["table", "objective", "steps", "median energy", "energies", "judge", "diverged"],
        [
            [
                r["table"],
                r["objective"],
                str(r["steps"]),
                "{:.1f} to {:.1f}".format(*r["median_energy"]),
                "{:.4g} to {:.4g}".format(*r["energy"]),
                "{:.3f} to {:.3f}".format(*r["judge"]),
                r["diverged"],
            ]
            for r in runs
        ],
    )


if __name__ == "__main__":
    typer.run(main)
