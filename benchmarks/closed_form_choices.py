"""What a choice among closed-form residuals is worth: all averages of the six, chosen on half of the tables.

`anomaly="closed_form"` averages six surprises: at the residuals of two closed-form denoisers, each in three
coordinates. Any subset of them could have been taken. Here all 63 are computed on the one-class splits of the
benchmark's suite `clean`. Then, many times, the tables are halved at random; the subset with the best mean on one
half, and the better of kNN(1) and kNN(5) there, are compared on the other. This is the gain that remains of a choice
among 63, and beside it stands that of the average of all six, which leaves nothing to choose.

Run (some minutes)::

    python benchmarks/closed_form_choices.py --output benchmarks/results/closed-form-choices.json
    python benchmarks/closed_form_choices.py --quick      # seconds, without ADBench; figures mean nothing
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, markdown, save, show
from joblib import Parallel, delayed

from anomalib_gen.benchmark import KNNDistance, anomaly_metrics, clean
from anomalib_gen.datasets import list_adbench, load_adbench, load_builtin
from anomalib_gen.models import Memory
from anomalib_gen.networks import compress_tails

METRICS = ("AUROC", "average precision")
MEMBERS = [
    f"{denoiser}, {where}" for denoiser in ("kernel", "linear") for where in ("standard", "arsinh", "rank")
]
SUBSETS = [list(s) for size in range(1, 7) for s in combinations(range(6), size)]


def judge(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Both metrics, in points, of every subset and of the neighbours; all rows train, none is held out."""
    load = load_builtin if quick else load_adbench
    split = clean(*load(name, return_X_y=True), seed=seed)
    train, test = (compress_tails(torch.from_numpy(part))[0] for part in (split.X_train, split.X_test))
    memory = Memory(train.shape[1])
    memory.remember([train])
    surprise = torch.cat([memory.surprise(block) for block in test.split(4096)], dim=1).numpy()
    peers = [KNNDistance(n_neighbors=k).fit(split.X_train).score_samples(split.X_test) for k in (1, 5)]
    scores = [-surprise[subset].mean(0) for subset in SUBSETS]
    return {
        "table": name,
        "seed": seed,
        "subsets": [[100 * v for v in anomaly_metrics(split.y_test, s)] for s in scores],
        "neighbours": [[100 * v for v in anomaly_metrics(split.y_test, s)] for s in peers],
    }


def main(
    seeds: Annotated[int, typer.Option(help="Splits of each table.")] = 3,
    draws: Annotated[int, typer.Option(help="Random halves.")] = 1000,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report what remains of a choice."""
    names = ["wine", "breast_cancer"] if quick else list_adbench(available_only=True)
    cells = Parallel(n_jobs=jobs)(
        delayed(judge)(name, seed, quick) for name in names for seed in range(seeds)
    )
    # Tables x subsets (or neighbours) x metrics, means over seeds.
    ours, peers = (
        np.array([np.mean([c[key] for c in cells if c["table"] == name], axis=0) for name in names])
        for key in ("subsets", "neighbours")
    )
    random, rows, figures = np.random.default_rng(0), [], {}
    for m, metric in enumerate(METRICS):
        chosen, whole = [], []
        for _ in range(draws):
            first, second = np.array_split(random.permutation(len(names)), 2)
            peer = peers[second, peers[first, :, m].mean(0).argmax(), m]
            chosen.append((ours[second, ours[first, :, m].mean(0).argmax(), m] - peer).mean())
            whole.append((ours[second, -1, m] - peer).mean())
        best = int(ours[:, :, m].mean(0).argmax())
        peer = peers[:, peers[:, :, m].mean(0).argmax(), m]
        figures[metric] = {
            "best": [MEMBERS[k] for k in SUBSETS[best]],
            "best_gain": float((ours[:, best, m] - peer).mean()),
            "six_gain": float((ours[:, -1, m] - peer).mean()),
            "confirmed": {
                "mean": float(np.mean(chosen)),
                "quantiles": np.quantile(chosen, [0.05, 0.95]).tolist(),
            },
            "positive": float(np.mean(np.array(chosen) > 0)),
            "six_on_other_half": {
                "mean": float(np.mean(whole)),
                "quantiles": np.quantile(whole, [0.05, 0.95]).tolist(),
            },
        }
        f = figures[metric]
        low, high = f["confirmed"]["quantiles"]
        rows.append(
            (
                metric,
                f"{f['six_gain']:+.2f}",
                f"{f['best_gain']:+.2f} ({len(SUBSETS[best])} of 6)",
                f"{f['confirmed']['mean']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{f['positive']:.0%}",
            )
        )
    header = ("metric", "all six", "best of 63", "chosen on one half, on the other (5 % to 95 %)", "positive")
    title = f"Gain over the better of kNN(1) and kNN(5), in points; {len(names)} tables, {seeds} seeds"
    show(title, header, rows)
    if output is not None:
        save(output, {"environment": environment(), "figures": figures}, markdown(title, header, rows))


if __name__ == "__main__":
    typer.run(main)
