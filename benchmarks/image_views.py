"""What stored images should be looked at with: pixels, histograms of gradients, with and without contrast, matching.

Nearest neighbours in every view and in every mean of views: the surprise (`tail_surprise`) at the distance to the
nearest stored image, among the distances of stored images when they are left out. Beside them the same of matching
(`models.matching`) with the nearest in the last view: each place on its own, all together, and that relative to how far
apart stored images are (`models.memory`, equation 3), alone and beside the views. On MNIST each of the digits 0, 2, 3,
6 and 8 is held out, which the benchmark's held-out digits are not, and average precision is shown; on CIFAR-10 each
class is told from the rest, and AUROC is shown. All images are of the training parts.

Run::

    python benchmarks/image_views.py --output benchmarks/results/image-views.json   # minutes
    python benchmarks/image_views.py --quick                                        # seconds; figures mean nothing

Needs the files of both collections (``ANOMALIB_GEN_DATA``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import environment, markdown, save, show
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_gen.datasets import load_images
from anomalib_gen.models import nearest_rows
from anomalib_gen.models.matching import STIFFNESS, matching_distances, shapes_of
from anomalib_gen.models.memory import CLOSEST, KERNEL_NEIGHBORS, MATCHES, REFERENCE_ROWS, ImageMemory
from anomalib_gen.models.tail import tail_surprise

VIEWS = ("pixels", "gradients", "gradients without contrast")
MATCHINGS = ("matching, each place on its own", "matching, together", "matching, together and relative")
TASKS = {"mnist": (0, 2, 3, 6, 8), "cifar10": tuple(range(10))}


def surprises(stored: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Surprise at the distance of rows to their nearest stored row, ``(n_asked,)``."""
    positions = torch.arange(min(len(stored), REFERENCE_ROWS))
    usual = nearest_rows(stored[positions].double(), stored, 1, exclude=positions).squared[:, 0].sqrt()
    found = nearest_rows(asked.double(), stored, 1).squared[:, 0].sqrt()
    return tail_surprise(found[None], usual.sort().values[None])[0]


def matching_surprises(
    stored: torch.Tensor, asked: torch.Tensor, shapes: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Surprise at how well the best of the nearest stored rows match, ``(n_asked,)``, given the shapes of both."""
    everyone = torch.arange(len(stored))
    spacings = torch.cat(
        [
            nearest_rows(stored[block].double(), stored, 1, exclude=block).squared[:, 0].sqrt()
            for block in everyone.split(2000)
        ]
    )

    def distances(rows: torch.Tensor, own: torch.Tensor, exclude: torch.Tensor | None) -> list[torch.Tensor]:
        k = min(KERNEL_NEIGHBORS, len(stored) - 1)
        near = nearest_rows(rows.double(), stored, k, exclude=exclude).positions
        found = []
        for one, nearest in zip(own.split(200), near.split(200), strict=True):
            free, order = matching_distances(one, shapes[0][nearest]).sort(1)
            best = nearest.gather(1, order[:, :CLOSEST])
            together = matching_distances(one, shapes[0][best], stiffness=STIFFNESS).sort(1).values
            free, together = (values[:, :MATCHES].mean(1).sqrt().double() for values in (free, together))
            found.append(torch.stack([free, together, together / spacings[best].mean(1).sqrt()]))
        return list(torch.cat(found, dim=1))

    positions = everyone[: min(len(stored), REFERENCE_ROWS)]
    usual = distances(stored[positions], shapes[0][positions], positions)
    return {
        name: tail_surprise(found[None], reference.sort().values[None])[0]
        for name, found, reference in zip(MATCHINGS, distances(asked, shapes[1], None), usual, strict=True)
    }


def views_of(images: np.ndarray) -> list[torch.Tensor]:
    """Images, between 0 and 1, in all coordinates of an `ImageMemory`, and as they are matched."""
    memory = ImageMemory(images.shape[1:])
    blocks = torch.from_numpy(images.astype(np.float64) / 255).flatten(1).split(1000)
    views = [torch.cat(parts).float() for parts in zip(*map(memory.coordinates, blocks), strict=True)]
    return [*views, torch.cat([shapes_of(block.unflatten(1, images.shape[1:])) for block in blocks])]


def measure(collection: str, n_train: int, n_test: int, seed: int) -> dict[str, list[float]]:
    """Figure of each combination of views, for each class in turn."""
    rng = np.random.default_rng(seed)
    parts = {}
    data = load_images(collection, normal=0, subset="train")
    order = rng.permutation(len(data.data))
    n_test = min(n_test, len(order) // 3)
    for name, chosen in (("stored", order[:-n_test][:n_train]), ("asked", order[-n_test:])):
        parts[name] = views_of(data.data[chosen]), data.classes[chosen]
    (stored, classes), (asked, asked_classes) = parts["stored"], parts["asked"]
    found: dict[str, list[float]] = {}
    for label in TASKS[collection]:
        held_out = collection == "mnist"
        kept = torch.from_numpy((classes != label) if held_out else (classes == label))
        abnormal = (asked_classes == label) if held_out else (asked_classes != label)
        judge: Any = average_precision_score if held_out else roc_auc_score
        each = [surprises(view[kept], rows) for view, rows in zip(stored[:-1], asked[:-1], strict=True)]
        matching = matching_surprises(stored[-2][kept], asked[-2], (stored[-1][kept], asked[-1]))
        scores = {}
        for size in range(1, len(VIEWS) + 1):
            for chosen in combinations(range(len(VIEWS)), size):
                scores[" + ".join(VIEWS[v] for v in chosen)] = torch.stack([each[v] for v in chosen]).mean(0)
        views = torch.stack(each).mean(0)
        free, together, relative = matching.values()
        scores |= matching
        scores["views, and matching on their own at half of the weight"] = (views + free) / 2
        scores["views, and matching together at two thirds"] = (views + 2 * together) / 3
        scores["views, matching together, and relative, a third each"] = (views + together + relative) / 3
        scores["views at half of the weight, matching together, and relative"] = (
            views / 2 + (together + relative) / 4
        )
        for name, score in scores.items():
            found.setdefault(name, []).append(float(judge(abnormal, score.numpy())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--quick", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args()
    sizes = {"mnist": (12_000, 2500), "cifar10": (45_000, 1500)}
    if options.quick:
        sizes = {"mnist": (300, 100)}
    figures: dict[str, Any] = {"environment": environment(), "seed": options.seed, "sizes": sizes}
    text = ""
    for collection, (n_train, n_test) in sizes.items():
        figures[collection] = measure(collection, n_train, n_test, options.seed)
        title = f"Nearest stored images, {collection}, {n_train:,} images, {n_test:,} test images, " + (
            "average precision" if collection == "mnist" else "AUROC"
        )
        header = ["views", *map(str, TASKS[collection]), "mean"]
        lines = [
            [name, *(f"{value:.3f}" for value in [*values, float(np.mean(values))])]
            for name, values in figures[collection].items()
        ]
        show(title, header, lines)
        text += markdown(title, header, lines) + "\n"
    if options.output is not None:
        save(options.output, figures, text)


if __name__ == "__main__":
    main()
