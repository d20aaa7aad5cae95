"""How well heat maps of each family find synthetic defects: pixel AUROC and AUPRO, with masks.

    python benchmarks/image_defects.py --collection mnist --train 2000 --test 200

One detector of each family at its defaults is fitted on sound images; scratches, blobs and missing parts are put into
held-out ones (`anomalib_gen.datasets.make_defects`). Beside the maps stands a baseline without a model: the squared
distance of each pixel from its mean over the training images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.benchmark.pixels import aupro, pixel_auroc
from anomalib_gen.datasets import load_images, make_defects
from anomalib_gen.heatmaps import explain_images

FAMILIES = {
    "vae": VAEDetector,
    "flow": FlowDetector,
    "energy": EnergyDetector,
    "diffusion": DiffusionDetector,
}


def measure(
    collection: str,
    n_train: int,
    n_test: int,
    families: list[str],
    max_iter: int | str,
    seed: int,
    data_home: str | None = None,
) -> dict:
    """Fit the families and judge their maps on all kinds of defects together."""
    rng = np.random.default_rng(seed)
    X, _ = load_images(collection, normal=0, subset="train", data_home=data_home, return_X_y=True)
    other, _ = load_images(collection, normal=0, subset="test", data_home=data_home, return_X_y=True)
    train = X[np.sort(rng.choice(len(X), n_train, replace=False))]
    sound = other[np.sort(rng.choice(len(other), n_test, replace=False))]
    defective, masks = make_defects(sound, random_state=seed)
    mean = train.mean(axis=0)
    maps = {"distance from the mean": ((defective - mean) ** 2).sum(axis=1)}
    seconds = {}
    for name in families:
        start = time.perf_counter()
        detector = FAMILIES[name](max_iter=max_iter, random_state=seed).fit(train)
        seconds[name] = time.perf_counter() - start
        maps[name] = explain_images(detector, defective, subtract=train[:200])
    return {
        "collection": collection,
        "n_train": n_train,
        "n_test": n_test,
        "max_iter": max_iter,
        "seed": seed,
        "share of defective pixels": float(masks.mean()),
        "fit_seconds": seconds,
        "figures": {
            name: {"pixel_auroc": pixel_auroc(masks, m), "aupro": aupro(masks, m)} for name, m in maps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", default="mnist", choices=["mnist", "cifar10"])
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--max-iter", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="A JSON file for the figures.")
    parser.add_argument(
        "--quick", action="store_true", help="One family and next to no training, to see it run."
    )
    options = parser.parse_args()
    if options.quick:
        options.train, options.test, options.families, options.max_iter = 50, 10, ["vae"], 2
    steps = "auto" if options.max_iter is None else options.max_iter
    result = measure(options.collection, options.train, options.test, options.families, steps, options.seed)
    for name, figures in result["figures"].items():
        print(f"{name:24} pixel AUROC {figures['pixel_auroc']:.3f}  AUPRO {figures['aupro']:.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
