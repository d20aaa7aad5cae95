"""Time: `VAEDetector` beside pyod's VAE, in one process, taking turns.

Two questions.

1. *Equal work.* Both train pyod's default model (128-64-32 hidden units each way, ReLU, dropout .2, two latent
   dimensions, squared error: a normal likelihood of fixed variance) for as many epochs of as many rows in as large
   batches; nothing is held out, and the rows fill whole batches, because pyod leaves out a last one that is not full.
   The figure is the ratio of the times of `fit`, threshold included: what the training loops cost.
2. *Defaults.* Both run at their own defaults on five development tables of the one-class split. pyod's VAE reaches some
   mean AUROC in some time. `VAEDetector` is given 25, 50, 100, ... gradient steps until its mean AUROC is as high; the
   figure is the ratio of the times for those fits alone. Labels serve to measure and choose nothing that is kept.

Ratios below 1 say that we are faster. Times on a busy machine are worth little; their ratio more, because both meet
the same neighbours, and the quartiles tell how much.

Run::

    python benchmarks/vae_against_pyod.py --output benchmarks/results/vae-against-pyod.json
    python benchmarks/vae_against_pyod.py --quick      # seconds, without data; figures mean nothing
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, markdown, ratio, save, show, show_ratio
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_gen import VAEDetector
from anomalib_gen.benchmark.protocols import clean
from anomalib_gen.datasets import load_adbench, load_builtin

TABLES = ("cardio", "pendigits", "satellite", "thyroid", "vowels")
HIDDEN = (128, 64, 32)


def pyod_vae(seed: int, **parameters: Any) -> Any:
    from pyod.models.vae import VAE

    return VAE(random_state=seed, verbose=0, device="cpu", **parameters)


def stack(widths: tuple[int, ...]) -> Any:
    """Factory of a perceptron with pyod's layers, ``factory(n_inputs, n_outputs)``."""

    def make(n_inputs: int, n_outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in zip((n_inputs, *widths), widths, strict=False):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], n_outputs))

    return make


def timed(fit: Any, X: np.ndarray) -> float:
    start = time.perf_counter()
    # pyod seeds the global generator: leave it as it was.
    state = torch.get_rng_state()
    fit(X)
    torch.set_rng_state(state)
    return time.perf_counter() - start


def equal_work(n_rows: int, n_features: int, batch: int, epochs: int, repeats: int) -> dict[str, float]:
    X = np.random.default_rng(0).normal(size=(n_rows, n_features)).astype(np.float32)
    ours, peer = [], []
    for seed in range(repeats):
        detector = VAEDetector(
            n_components=2,
            variance=1.0,
            encoder=stack(HIDDEN),
            decoder=stack(HIDDEN[::-1]),
            batch_size=batch,
            max_iter=epochs * -(-n_rows // batch),
            validation_fraction=0,
            random_state=seed,
            device="cpu",
        )
        ours.append(timed(detector.fit, X))
        peer.append(timed(pyod_vae(seed, batch_size=batch, epoch_num=epochs).fit, X))
    return ratio(ours, peer)


def splits(names: tuple[str, ...], seed: int) -> list[Any]:
    load = load_builtin if names == ("digits",) else load_adbench
    return [clean(*load(name, return_X_y=True), seed=seed) for name in names]


def total(make: Any, tables: list[Any]) -> tuple[float, float]:
    """Seconds of all fits together, and the mean AUROC (the higher score is the more normal row)."""
    seconds, aurocs = 0.0, []
    for split in tables:
        detector, sign = make()
        seconds += timed(detector.fit, split.X_train)
        # pyod's reconstruction error overflows for some far rows: they are the most abnormal.
        scores = np.nan_to_num(sign * detector.decision_function(split.X_test))
        aurocs.append(roc_auc_score(split.y_test == 1, scores))
    return seconds, float(np.mean(aurocs))


def at_defaults(names: tuple[str, ...], seeds: int, ladder: tuple[int, ...]) -> list[dict[str, Any]]:
    runs = []
    for seed in range(seeds):
        tables = splits(names, seed)
        peer_seconds, target = total(lambda s=seed: (pyod_vae(s), -1), tables)
        run: dict[str, Any] = {
            "seed": seed,
            "pyod": {"seconds": peer_seconds, "auroc": target},
            "steps": None,
        }
        for steps in ladder:
            seconds, auroc = total(
                lambda s=seed, n=steps: (VAEDetector(max_iter=n, random_state=s, device="cpu"), 1), tables
            )
            run.update(ours={"seconds": seconds, "auroc": auroc})
            if auroc >= target:
                run.update(steps=steps, ratio=seconds / peer_seconds)
                break
        seconds, auroc = total(lambda s=seed: (VAEDetector(random_state=s, device="cpu"), 1), tables)
        run["default"] = {"seconds": seconds, "auroc": auroc, "ratio": seconds / peer_seconds}
        runs.append(run)
    return runs


def main(
    rows: Annotated[int, typer.Option(help="Rows of the equal-work comparison, in whole batches.")] = 5120,
    features: Annotated[int, typer.Option(help="Columns of the equal-work comparison.")] = 30,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 10,
    repeats: Annotated[int, typer.Option(help="Pairs of fits.")] = 5,
    seeds: Annotated[int, typer.Option(help="Splits of each table at defaults.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Compare times with pyod's VAE."""
    names, ladder = TABLES, (25, 50, 100, 200, 400, 800, 1600)
    if quick:
        rows, epochs, repeats, seeds, names, ladder = 512, 1, 1, 1, ("digits",), (25,)
    equal = {batch: equal_work(rows, features, batch, epochs, repeats) for batch in (32, 256)}
    default = at_defaults(names, seeds, ladder)
    header = ("batch", "time of fit against pyod's, same network, batch and epochs")
    table = [(str(batch), show_ratio(figures)) for batch, figures in equal.items()]
    show("Equal work", header, table)
    header_2 = (
        "seed",
        "pyod's AUROC",
        "ours",
        "steps to get there",
        "time against pyod's",
        "default",
        "its time",
    )
    table_2 = [
        (
            str(run["seed"]),
            f"{run['pyod']['auroc']:.3f}",
            f"{run['ours']['auroc']:.3f}",
            str(run["steps"] or "not reached"),
            f"{run['ratio']:.2f}" if run["steps"] else "-",
            f"{run['default']['auroc']:.3f}",
            f"{run['default']['ratio']:.2f}",
        )
        for run in default
    ]
    show(f"At each library's defaults, mean over {', '.join(names)}", header_2, table_2)
    if output is not None:
        text = markdown("Equal work", header, table) + "\n"
        text += markdown(f"At each library's defaults, mean over {', '.join(names)}", header_2, table_2)
        figures = {"environment": environment(), "equal_work": equal, "defaults": default}
        save(output, figures, text)


if __name__ == "__main__":
    typer.run(main)
