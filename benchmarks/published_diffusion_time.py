"""The classifier of noise levels at the settings of its paper, on the paper's protocol.

Livernoche et al. (ICLR 2024, arXiv:2305.18593) train DTE-C for 400 passes over the rows in batches of 64, by Adam at a
rate of 1e-4 with a weight decay of 5e-4, holding nothing out; the network has hidden layers of 256, 512 and 256 ReLUs,
with half of the latter two dropped out. `DiffusionDetector(objective="diffusion-time")` defaults to fewer and longer
steps of a smaller network. This script gives it the paper's, on the suite `published`, and writes the AUROC and average
precision of every table. What stays ours: one softmax (the published network has two), a warm-up and a cosine decay of
the rate, decoupled weight decay on the matrices alone, the average of the weights, and rows compressed beyond four
deviations.

Tables of 25,000 training rows take 156,000 steps, a quarter of an hour of one core each. Cells are stored as they
finish, and the same command goes on after a stop::

    python benchmarks/published_diffusion_time.py FOLDER --jobs 2
    python benchmarks/published_diffusion_time.py FOLDER --quick      # a minute; figures mean nothing
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from sklearn.base import BaseEstimator
from torch import nn

from anomalib_gen import DiffusionDetector
from anomalib_gen.benchmark import run_benchmark

HIDDEN = (256, 512, 256)
BATCH, PASSES = 64, 400


def network(n_inputs: int, n_outputs: int, context_features: int) -> nn.Module:
    """The paper's network: ``(B, n_inputs) -> (B, n_outputs)``, logits."""
    layers: list[nn.Module] = []
    for depth, (a, b) in enumerate(zip((n_inputs, *HIDDEN), HIDDEN, strict=False)):
        layers += [nn.Linear(a, b), nn.ReLU()]
        if depth:
            layers.append(nn.Dropout(0.5))
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], n_outputs))


class PaperTimeClassifier(BaseEstimator):
    """`DiffusionDetector` with as many steps as the paper's passes over the rows at hand."""

    def __init__(self, *, passes: int = PASSES, random_state: Any = None) -> None:
        self.passes = passes
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> PaperTimeClassifier:
        """Train on rows ``(n, D)``."""
        self.detector_ = DiffusionDetector(
            objective="diffusion-time",
            network=network,
            batch_size=BATCH,
            max_iter=self.passes * -(-len(X) // BATCH),
            learning_rate=1e-4,
            weight_decay=5e-4,
            validation_fraction=0,
            random_state=self.random_state,
            device="cpu",
        ).fit(X)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Minus the estimated noise level of rows."""
        return self.detector_.score_samples(X)


def main(
    output: Annotated[Path, typer.Argument(help="Folder of the cells.")],
    seeds: Annotated[int, typer.Option(help="Splits of each table.")] = 1,
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One small table, two passes.")] = False,
) -> None:
    """Run the paper's classifier on the paper's protocol."""
    # The workers import this module by its name.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    passes = 2 if quick else PASSES
    results = run_benchmark(
        [f"DTE-C, the paper's settings={Path(__file__).stem}.PaperTimeClassifier(passes={passes})"],
        suite="published",
        output=output,
        datasets=["builtin:wine"] if quick else None,
        seeds=range(seeds),
        jobs=jobs,
    )
    columns = ["dataset", "seed", "status", "auroc", "average_precision"]
    print(results[columns].round(4).to_string(index=False))
    print(f"mean AUROC {results['auroc'].mean():.4f}, AP {results['average_precision'].mean():.4f}")


if __name__ == "__main__":
    typer.run(main)
