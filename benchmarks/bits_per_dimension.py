"""Bits per dimension of the families that have a density, on held-out images of CIFAR-10 or MNIST.

    python benchmarks/bits_per_dimension.py --output bits.json                      # 4,000 images, defaults
    python benchmarks/bits_per_dimension.py --preset full --output bits-full.json   # all images; a GPU

A flow has its exact likelihood, an autoencoder and a diffusion model have bounds; all are of 8-bit values, spread over
cells of width one, so that each is an upper bound on the length of the shortest code. Eight bits are what no model
takes. A family is written to the file as soon as it is measured, and is not measured again by the next call, so that
calls of bounded length (``--families vae``) add up. The files of CIFAR-10 are JPEG-coded copies, which are easier to
code than the images that published figures are about.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _measure import environment, markdown, save, show  # noqa: E402

from anomalib_gen import DiffusionDetector, FlowDetector, VAEDetector  # noqa: E402
from anomalib_gen.datasets import load_images  # noqa: E402
from anomalib_gen.images import bits_per_dimension  # noqa: E402

FAMILIES = {
    "flow": (FlowDetector, {}, lambda detector, X, n_steps: detector.log_prob(X)),
    "vae": (VAEDetector, {}, lambda detector, X, n_steps: detector.elbo(X)),
    "vae, variance of each pixel": (
        VAEDetector,
        {"variance": "per-feature"},
        lambda detector, X, n_steps: detector.elbo(X),
    ),
    "diffusion": (
        DiffusionDetector,
        {"denoiser": "network"},
        lambda detector, X, n_steps: detector.elbo(X, n_steps=n_steps),
    ),
}
PRESETS: dict[str, tuple[int | None, int, int, dict[str, Any]]] = {
    "small": (4000, 128, 50, {}),
    "full": (
        None,
        1000,
        200,
        {"hidden_features": 256, "batch_size": 256, "max_iter": 2000, "validation_fraction": 0.02},
    ),
    "dry": (60, 10, 4, {"hidden_features": 8, "max_iter": 2}),
}
"""Training images, test images, steps of the diffusion model's bound, and parameters of every family."""
HEADER = ["family", "bits per dimension", "standard error", "fit s", "score s", "device"]


def measure(family: str, X: np.ndarray, test: np.ndarray, n_steps: int, parameters: dict, seed: int) -> dict:
    cls, own, log_prob = FAMILIES[family]
    detector = cls(**parameters, **own, random_state=seed)
    start = time.perf_counter()
    detector.fit(X)
    fitted = time.perf_counter()
    bits = bits_per_dimension(log_prob(detector, test, n_steps), detector.event_shape_)
    return {
        "bits_per_dimension": float(bits.mean()),
        "standard_error": float(bits.std(ddof=1) / np.sqrt(len(bits))),
        "steps": detector.n_iter_,
        "fit_seconds": fitted - start,
        "score_seconds": time.perf_counter() - fitted,
        "device": environment()["device"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", default="cifar10", choices=["mnist", "cifar10"])
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; the same one continues a run")
    parser.add_argument("--quick", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.collection = "dry", "mnist"
    n_train, n_test, n_steps, parameters = PRESETS[options.preset]
    X, test = (
        load_images(options.collection, normal=0, subset=subset, return_X_y=True)[0]
        for subset in ("train", "test")
    )
    rng = np.random.default_rng(options.seed)
    if n_train is not None:
        X = X[np.sort(rng.choice(len(X), n_train, replace=False))]
    test = test[np.sort(rng.choice(len(test), n_test, replace=False))]
    setting = {
        "collection": options.collection,
        "preset": options.preset,
        "seed": options.seed,
        "n_train": len(X),
        "n_test": n_test,
        "n_steps": n_steps,
    }
    found: dict[str, Any] = {"setting": setting, "environment": environment(), "families": {}}
    if options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
        if found["setting"] != setting:
            parser.error(f"{options.output} is of another setting: {found['setting']}")

    def report() -> str:
        lines = [
            [
                name,
                f"{one['bits_per_dimension']:.2f}",
                f"{one['standard_error']:.2f}",
                f"{one['fit_seconds']:.0f}",
                f"{one['score_seconds']:.0f}",
                one["device"],
            ]
            for name, one in found["families"].items()
        ]
        title = f"Bits per dimension, {options.collection}, {len(X):,} training images, {n_test} test images"
        show(title, HEADER, lines)
        return markdown(title, HEADER, lines)

    for family in options.families:
        if family not in found["families"]:
            found["families"][family] = measure(family, X, test, n_steps, parameters, options.seed)
        if options.output is not None:
            save(options.output, found, report())
    if options.output is None:
        report()


if __name__ == "__main__":
    main()
