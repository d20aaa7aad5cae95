"""Width of DiffusionDetector's network, by what it leaves of rows that it has not seen.

A hybrid denoiser is a closed form and a network that learns what the closed form leaves. Whether a network of some
width learned anything shows without labels of anomalies: its mean squared error on other normal rows, over twelve
noise levels from .01 to 5, as a share of the closed form's own. Below 1 the network helps; above 1 it has learned the
rows by heart. Each table is trained on 33 to 1,000 of its normal rows, and judged on 600 others. The rule that
``hidden_features="auto"`` follows was made from such figures.

Run (half an hour on one core)::

    python benchmarks/network_width.py --output benchmarks/results/network-width.json
    python benchmarks/network_width.py --quick      # seconds, without ADBench; figures mean nothing
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, markdown, save, show
from joblib import Parallel, delayed

from anomalib_gen import DiffusionDetector
from anomalib_gen.datasets import load_adbench, load_builtin

TABLES = (
    "mammography",
    "magic.gamma",
    "pendigits",
    "satellite",
    "celeba",
    "SpamBase",
    "optdigits",
    "mnist",
    "InternetAds",
)
WIDTHS = (16, 32, 64, 128, 256)
N_JUDGED = 600


def left_over(detector: DiffusionDetector, X: np.ndarray) -> float:
    """Squared error on rows X under noise, by that of the closed form; each level by what it leaves of stored rows."""
    model: Any = detector.model_
    rows = torch.from_numpy(detector._scaler.transform(X))
    generator = torch.Generator().manual_seed(7)
    errors, closed = [], []
    with torch.inference_mode():
        for level in torch.logspace(-2, np.log10(5), 12, dtype=torch.float64):
            grain = model.grain * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            noised = rows + grain + level * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            levels = level.expand(len(rows))
            unit = model._left(levels)[0].square()
            for found, denoised in (
                (errors, model.denoise(noised, levels)),
                (closed, model._closed_form(noised, levels, None)[0]),
            ):
                found.append(float((denoised - rows - grain).square().mean() / unit))
    return float(np.mean(errors) / np.mean(closed))


def judge(name: str, n: int, quick: bool) -> dict[str, Any] | None:
    """Train on `n` rows at every width and judge; None where the table has too few rows."""
    load = load_builtin if quick else load_adbench
    X, y = load(name, return_X_y=True)
    X = np.unique(np.asarray(X, dtype=np.float64)[np.asarray(y) == 1], axis=0)
    order = np.random.default_rng(0).permutation(len(X))
    judged = min(N_JUDGED, len(X) - n)
    if judged < 2:
        return None
    short: dict[str, Any] = {"max_iter": 100} if quick else {}
    detector = DiffusionDetector(random_state=0, device="cpu", **short)
    trained = n - round(detector.validation_fraction * n)
    found: dict[str, Any] = {"table": name, "columns": X.shape[1], "n": n}
    found["auto"] = detector._width((trained, X.shape[1]))
    for width in WIDTHS:
        detector.set_params(hidden_features=width).fit(X[order[judged : judged + n]])
        found[str(width)] = left_over(detector, X[order[:judged]])
    return found


def main(
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report what networks of several widths leave of other rows."""
    names = ("wine",) if quick else TABLES
    sizes = (33,) if quick else (33, 100, 300, 1000)
    found = Parallel(n_jobs=jobs)(delayed(judge)(name, n, quick) for n in sizes for name in names)
    cells = [cell for cell in found if cell is not None]
    header = ("rows", "table", "columns", *map(str, WIDTHS), "auto")
    rows = [
        [str(cell["n"]), cell["table"], str(cell["columns"])]
        + [f"{cell[str(width)]:.3f}" for width in WIDTHS]
        + [str(cell["auto"])]
        for cell in cells
    ]
    title = "Squared error on other rows, by the closed form's"
    show(title, header, rows)
    if output is not None:
        save(output, {"environment": environment(), "cells": cells}, markdown(title, header, rows))


if __name__ == "__main__":
    typer.run(main)
