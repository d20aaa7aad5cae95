"""Which family sees which change of a whole image: darker, blurred, noisy, turned ... as cameras and files have them.

    python benchmarks/image_corruptions.py --output corruptions.json                        # MNIST
    python benchmarks/image_corruptions.py --collection cifar10 --output corruptions.json  # beside it, in the same file

One detector of each family at its defaults is fitted to sound images, and AUROC tells changed test images from other
test images as they are, each kind of change by itself, for every anomaly that is made for images. An AUROC below one
half means that a changed image looks *more* normal: what is darker or blurred is simpler, and densities and distances
like that. Nothing is chosen by these figures. A family is written to the file as soon as it is measured, and is not
measured again by the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _measure import continued, image_options, markdown, save, show
from scipy.ndimage import uniform_filter
from sklearn.metrics import roc_auc_score

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.anomaly import ScoreNorm
from anomalib_gen.datasets import load_images

FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "stored images": (DiffusionDetector, {"denoiser": "closed-form"}, {}),
    "flow": (FlowDetector, {}, {"input_complexity": "input_complexity", "typicality": "typicality"}),
    "vae": (
        VAEDetector,
        {},
        {"typicality": "typicality", "multiscale_reconstruction": "multiscale_reconstruction"},
    ),
    "energy": (
        EnergyDetector,
        {},
        {"energy": "energy", "score norm, mahalanobis": ScoreNorm(summary="mahalanobis")},
    ),
}
"""Class of each family, what makes it, and its anomalies by name beside the default."""
NOISE, SPECKS, GREY = 20, 0.02, 64
"""Deviation of noise in grey levels, share of specks, and grey levels added."""
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
CHANGES: dict[str, Change] = {
    "half as bright": lambda x, rng: x / 2,
    "a fifth as bright": lambda x, rng: x / 5,
    f"{GREY} added": lambda x, rng: x + GREY,
    "a third of the contrast": lambda x, rng: (x + 2 * x.mean(axis=(2, 3), keepdims=True)) / 3,
    "blurred (3 x 3)": lambda x, rng: uniform_filter(x, (0, 0, 3, 3), mode="nearest"),
    f"noise of {NOISE}": lambda x, rng: x + rng.normal(0, NOISE, x.shape),
    f"{100 * SPECKS:.0f} % specks": lambda x, rng: np.where(
        rng.uniform(size=(len(x), 1, *x.shape[2:])) < SPECKS, 255, x
    ),
    "negative": lambda x, rng: 255 - x,
    "turned by 90 degrees": lambda x, rng: np.rot90(x, axes=(2, 3)),
    "a quarter off": lambda x, rng: np.roll(x, x.shape[3] // 4, axis=3),
    "one grey": lambda x, rng: np.broadcast_to(x.mean(axis=(1, 2, 3), keepdims=True), x.shape),
}
"""Images of float64 between 0 and 255 to changed ones, rounded and cut off afterwards."""


def changed(images: np.ndarray, change: Change, seed: int) -> np.ndarray:
    values = change(images.astype(np.float64), np.random.default_rng(seed))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def measure(
    family: str, train: np.ndarray, test: np.ndarray, max_iter: int | str, seed: int
) -> dict[str, dict[str, float]]:
    """AUROC of each change, by name of family and anomaly."""
    cls, made, anomalies = FAMILIES[family]
    training = {} if made.get("denoiser") == "closed-form" else {"max_iter": max_iter}
    detector = cls(**made, **training, random_state=seed).fit(train)
    sound, others = test[::2], test[1::2]
    found = {}
    for title, anomaly in {"": None, **anomalies}.items():
        judged = detector if anomaly is None else detector.with_anomaly(anomaly, X=train)
        usual = -judged.score_samples(sound)
        row = {}
        for name, change in CHANGES.items():
            scores = -judged.score_samples(changed(others, change, seed))
            y = np.repeat([0, 1], [len(usual), len(scores)])
            row[name] = float(roc_auc_score(y, np.concatenate([usual, scores])))
        found[f"{family}, {title}" if title else family] = row
    return found


def report(found: dict[str, Any]) -> str:
    """Show and return the tables of all collections."""
    parts = []
    for collection, one in found["collections"].items():
        columns = {name: row for part in one["figures"].values() for name, row in part.items()}
        lines = [[change, *(f"{row[change]:.2f}" for row in columns.values())] for change in CHANGES]
        title = (
            f"AUROC of {one['n_test'] // 2} changed images of {collection} beside as many others, "
            f"{one['n_train']:,} training images"
        )
        show(title, ["change", *columns], lines)
        parts.append(markdown(title, ["change", *columns], lines))
    return "\n".join(parts)


def main() -> None:
    quick = {"train": 50, "test": 20, "families": ["flow"], "max_iter": 2}
    options = image_options(__doc__, list(FAMILIES), n_test=400, quick=quick)
    rng = np.random.default_rng(options.seed)
    X, other = (
        load_images(options.collection, normal=0, subset=subset, return_X_y=True)[0]
        for subset in ("train", "test")
    )
    train = X[np.sort(rng.choice(len(X), options.train, replace=False))]
    test = other[rng.choice(len(other), options.test, replace=False)]
    setting = {"n_train": len(train), "n_test": len(test), "max_iter": options.max_iter, "seed": options.seed}
    found, here = continued(options.output, options.collection, setting)
    for family in options.families:
        if family not in here["figures"]:
            here["figures"][family] = measure(family, train, test, options.max_iter, options.seed)
        if options.output is not None:
            save(options.output, found, report(found))
    if options.output is None:
        report(found)


if __name__ == "__main__":
    main()
