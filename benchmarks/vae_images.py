"""How autoencoders of images are trained, and with what variance: bits per dimension, and unknown digits.

For each variant: bits per dimension of held-out images of MNIST and CIFAR-10, beside those of probabilistic PCA with as
many components, which an autoencoder contains; and AUROC on the digits 6 and 8 of a model of the digits 0, 2 and 3, by
several anomalies of it. No image is of a test part, and no digit is one that the benchmark holds out.

Run (an hour)::

    python benchmarks/vae_images.py --output benchmarks/results/vae-images.json   # the same file continues a run
    python benchmarks/vae_images.py --quick                                       # seconds; figures mean nothing

Needs the files of both collections (``ANOMALIB_GEN_DATA``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _measure import environment, markdown, save, show
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from anomalib_gen import VAEDetector
from anomalib_gen.anomaly import InputComplexity
from anomalib_gen.datasets import load_images
from anomalib_gen.images import bits_per_dimension

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "400 steps": {"max_iter": 400},
    "rate .005, 400 steps": {"learning_rate": 0.005, "max_iter": 400},
    "rate .01, 400 steps": {"learning_rate": 0.01, "max_iter": 400},
    "a variance for each pixel": {"variance": "per-feature"},
}
ANOMALIES: dict[str, Any] = {
    "bound": "elbo",
    "reconstruction": "reconstruction_error",
    "typicality": "typicality",
    "less code length": InputComplexity(),
    "less code length, weighed": InputComplexity(weight="learned"),
}
KNOWN, UNKNOWN, N_ASKED = (0, 2, 3), (6, 8), 150
COLLECTIONS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
HEADER = ["variant", *COLLECTIONS.values(), *(f"{name}: 6 / 8" for name in ANOMALIES)]


def parts(collection: str, n_train: int, n_test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to train on and others, of the training part."""
    X = load_images(collection, normal=0, subset="train", return_X_y=True)[0]
    chosen = np.random.default_rng(seed).permutation(len(X))[: n_train + n_test]
    return X[chosen[:n_train]], X[chosen[n_train:]]


def digits(n_train: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Known digits to train on; known and unknown ones, and which they are."""
    data = load_images("mnist", normal=0, subset="train")
    rng = np.random.default_rng(seed)
    known = rng.permutation(np.flatnonzero(np.isin(data.classes, KNOWN)))
    asked = [known[n_train : n_train + N_ASKED]]
    asked += [rng.permutation(np.flatnonzero(data.classes == digit))[:N_ASKED] for digit in UNKNOWN]
    rows = np.concatenate(asked)
    return data.data[known[:n_train]], data.data[rows], data.classes[rows]


def measure(
    variant: dict[str, Any], collections: Sequence[str], sizes: dict[str, int], seed: int
) -> dict[str, Any]:
    """Figures of one variant."""
    found: dict[str, Any] = {}
    start = time.perf_counter()
    for collection in collections:
        X, test = parts(collection, sizes["train"], sizes["test"], seed)
        detector = VAEDetector(**variant, random_state=seed).fit(X)
        found[collection] = float(bits_per_dimension(detector.elbo(test), detector.event_shape_).mean())
        found[f"{collection}_best_step"] = detector.best_iter_
    X, asked, classes = digits(sizes["train"], seed)
    detector = VAEDetector(**variant, random_state=seed).fit(X)
    for name, anomaly in ANOMALIES.items():
        scores = -detector.with_anomaly(anomaly, X).score_samples(asked)
        for digit in UNKNOWN:
            rows = np.isin(classes, (*KNOWN, digit))
            found[f"{name}, {digit}"] = float(roc_auc_score(classes[rows] == digit, scores[rows]))
    return {**found, "seconds": time.perf_counter() - start}


def linear(collections: Sequence[str], sizes: dict[str, int], seed: int) -> dict[str, Any]:
    """Bits per dimension of probabilistic PCA with 32 components."""
    found = {}
    rng = np.random.default_rng(seed)
    for collection in collections:
        X, test = (
            part.reshape(len(part), -1) + rng.uniform(size=(len(part), part[0].size))
            for part in parts(collection, sizes["train"], sizes["test"], seed)
        )
        model = PCA(min(32, len(X) - 1), svd_solver="covariance_eigh").fit(X)
        found[collection] = float(bits_per_dimension(model.score_samples(test), (test.shape[1],)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file; the same one continues a run")
    parser.add_argument("--quick", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args()
    sizes = {"train": 12, "test": 10} if options.quick else {"train": 4000, "test": 500}
    found: dict[str, Any] = {"sizes": sizes, "seed": options.seed, "variants": {}}
    if options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
        if (found["sizes"], found["seed"]) != (sizes, options.seed):
            parser.error(f"{options.output} is of other sizes, or of another seed.")
    found["environment"] = environment()
    names = list(VARIANTS)[:1] if options.quick else list(VARIANTS)
    collections = list(COLLECTIONS)[:1] if options.quick else list(COLLECTIONS)
    text = ""
    for name in ["probabilistic PCA", *names]:
        if name not in found["variants"]:
            quick = {"max_iter": 2} if options.quick else {}
            found["variants"][name] = (
                measure({**VARIANTS[name], **quick}, collections, sizes, options.seed)
                if name in VARIANTS
                else linear(collections, sizes, options.seed)
            )
        lines = []
        for variant, one in found["variants"].items():
            line = [variant, *(f"{one[c]:.2f}" if c in one else "" for c in COLLECTIONS)]
            for anomaly in ANOMALIES:
                values = [one.get(f"{anomaly}, {digit}") for digit in UNKNOWN]
                line.append("" if None in values else " / ".join(f"{value:.3f}" for value in values))
            lines.append(line)
        title = "Autoencoders of images: bits per dimension, and AUROC on unknown digits"
        text = markdown(title, HEADER, lines)
        if options.output is not None:
            save(options.output, found, text)
    show(title, HEADER, lines)


if __name__ == "__main__":
    main()
