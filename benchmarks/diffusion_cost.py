"""Cost: `DiffusionDetector` beside pyod's DeepSVDD, and beside the reverse process with many steps.

Two questions, on rows of a correlated Gaussian.

1. *Fit.* How long does the default take, and each of its parts alone, for as long as pyod's DeepSVDD takes at its
   defaults? Early stopping is left on, as in use.
2. *Scores.* How long does the default take to score rows, for as long as it takes to reconstruct them by an ancestral
   reverse process of many steps, as diffusion models for images do?

Ratios below 1 say that we are faster. Ours and the peer take turns, on one thread each.

Run::

    OMP_NUM_THREADS=1 python benchmarks/diffusion_cost.py --output benchmarks/results/diffusion-cost.json
    python benchmarks/diffusion_cost.py --quick      # seconds; figures mean nothing
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, markdown, ratio, save, show, show_ratio

from anomalib_gen import DiffusionDetector
from anomalib_gen.samplers import ancestral

DENOISERS = ("hybrid", "network", "closed-form")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def deep_svdd(X: np.ndarray, seed: int) -> None:
    from pyod.models.deep_svdd import DeepSVDD

    # pyod seeds the global generator: leave it as it was.
    state = torch.get_rng_state()
    DeepSVDD(n_features=X.shape[1], random_state=seed, verbose=0).fit(X)
    torch.set_rng_state(state)


def reconstruct(detector: DiffusionDetector, X: np.ndarray, n_steps: int) -> None:
    """Noise rows to level 1 and lead them back by an ancestral process."""
    model: Any = detector.model_
    x = torch.from_numpy(detector._scaler.transform(X))
    generator = torch.Generator().manual_seed(0)
    levels = torch.logspace(0, np.log10(model.noise_levels[0]), n_steps + 1, dtype=torch.float64)
    with torch.inference_mode():
        for block in x.split(2048):
            noised = block + torch.randn(block.shape, generator=generator, dtype=block.dtype)
            ancestral(model.denoise, noised, levels, path=model.path, generator=generator)


def main(
    rows: Annotated[int, typer.Option(help="Training rows, and rows to score.")] = 5000,
    features: Annotated[int, typer.Option(help="Columns.")] = 30,
    steps: Annotated[int, typer.Option(help="Steps of the ancestral process.")] = 250,
    repeats: Annotated[int, typer.Option(help="Pairs of times.")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Compare the cost of diffusion models."""
    limits: dict[str, Any] = {}
    if quick:
        rows, steps, repeats, limits = 300, 5, 1, {"max_iter": 20}
    random = np.random.default_rng(0)
    mixing = random.normal(size=(features, features))
    X, new = (random.normal(size=(rows, features)) @ mixing for _ in range(2))
    fits: dict[str, list[float]] = {name: [] for name in (*DENOISERS, "peer")}
    scores: dict[str, list[float]] = {"default": [], "ancestral": []}
    for seed in range(repeats):
        fits["peer"].append(seconds(lambda s=seed: deep_svdd(X, s)))
        detectors = {
            name: DiffusionDetector(denoiser=name, random_state=seed, device="cpu", **limits)
            for name in DENOISERS
        }
        for name, detector in detectors.items():
            fits[name].append(seconds(lambda d=detector: d.fit(X)))
        hybrid = detectors["hybrid"]
        scores["default"].append(seconds(lambda d=hybrid: d.score_samples(new)))
        scores["ancestral"].append(seconds(lambda d=hybrid: reconstruct(d, new, steps)))
    fit_ratios = {name: ratio(fits[name], fits["peer"]) for name in DENOISERS}
    score_ratio = ratio(scores["default"], scores["ancestral"])
    header = ("what", "time")
    table = [
        (f"fit, denoiser={name!r}, against pyod's DeepSVDD", show_ratio(figures))
        for name, figures in fit_ratios.items()
    ]
    table.append((f"scores of the default against {steps} ancestral steps", show_ratio(score_ratio)))
    title = f"Cost on {rows} rows of {features} columns"
    show(title, header, table)
    if output is not None:
        figures = {"environment": environment(), "fit": fit_ratios, "scores": score_ratio}
        save(output, figures, markdown(title, header, table))


if __name__ == "__main__":
    typer.run(main)
