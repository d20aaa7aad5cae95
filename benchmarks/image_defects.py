"""How well heat maps of each family find synthetic defects: pixel AUROC and AUPRO, with masks.

    python benchmarks/image_defects.py --output defects.json                        # MNIST
    python benchmarks/image_defects.py --collection cifar10 --output defects.json   # beside it, in the same file

One detector of each family at its defaults is fitted on sound images; scratches, blobs and missing parts are put into
held-out ones (`anomalib_gen.datasets.make_defects`), and all kinds of maps that the family has are compared, as they
are and less the mean map of 200 training images. Beside them stands a baseline without a model: the squared distance of
each pixel from its mean over the training images, as it is and averaged over the same window as maps are. A family is
written to the file as soon as it is measured, and is not measured again by the next call. The seconds are those of a
fit with all threads that torch takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from _measure import continued, image_options, markdown, save, show
from scipy.ndimage import uniform_filter

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.benchmark.pixels import aupro, pixel_auroc
from anomalib_gen.datasets import load_images, make_defects
from anomalib_gen.heatmaps import explain_images

FAMILIES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "vae": (VAEDetector, {}, ("residual", "likelihood", "score")),
    "flow": (FlowDetector, {}, ("likelihood", "score")),
    "energy": (EnergyDetector, {}, ("score",)),
    "diffusion": (DiffusionDetector, {"denoiser": "network"}, ("residual", "score")),
    "closed form": (DiffusionDetector, {"denoiser": "closed-form"}, ("matching", "residual", "score")),
}
"""Class of each family, what makes it, and its kinds of maps, the default first."""
HEADER = ["map", "pixel AUROC", "AUPRO", "less usual: pixel AUROC", "AUPRO", "fit s"]
N_USUAL = 200
"""Training images whose mean map is what is usual."""
WINDOW = 3
"""Side of the window over which maps of 28 x 28 and 32 x 32 pixels are averaged by default."""


def judge(masks: np.ndarray, maps: np.ndarray, usual: np.ndarray) -> dict[str, float]:
    """Both figures of maps, and of maps less what is usual."""
    less = maps - usual
    return {
        "pixel_auroc": pixel_auroc(masks, maps),
        "aupro": aupro(masks, maps),
        "pixel_auroc_less_usual": pixel_auroc(masks, less),
        "aupro_less_usual": aupro(masks, less),
    }


def measure(
    family: str, train: np.ndarray, defective: np.ndarray, masks: np.ndarray, max_iter: int | str, seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Fit a family and judge each kind of its maps, on all kinds of defects together."""
    if family == "distance from the mean":
        mean = train.mean(axis=0)
        maps, usual = (((X - mean) ** 2).sum(axis=1) for X in (defective, train[:N_USUAL]))
        yield family, judge(masks, maps, usual.mean(axis=0))
        maps, usual = (uniform_filter(m, (0, WINDOW, WINDOW), mode="nearest") for m in (maps, usual))
        yield f"{family}, averaged", judge(masks, maps, usual.mean(axis=0))
        return
    cls, made, kinds = FAMILIES[family]
    start = time.perf_counter()
    detector = cls(**made, max_iter=max_iter, random_state=seed).fit(train)
    seconds = time.perf_counter() - start
    for kind in kinds:
        maps, usual = (explain_images(detector, X, kind=kind) for X in (defective, train[:N_USUAL]))
        yield f"{family}, {kind}", {**judge(masks, maps, usual.mean(axis=0)), "fit_seconds": seconds}


def report(found: dict[str, Any]) -> str:
    """Show and return the tables of all collections."""
    parts = []
    for collection, one in found["collections"].items():
        lines = [
            [
                name,
                f"{figures['pixel_auroc']:.3f}",
                f"{figures['aupro']:.3f}",
                f"{figures['pixel_auroc_less_usual']:.3f}",
                f"{figures['aupro_less_usual']:.3f}",
                f"{figures['fit_seconds']:.0f}" if "fit_seconds" in figures else "",
            ]
            for part in one["figures"].values()
            for name, figures in part.items()
        ]
        title = (
            f"Defects in {one['n_test']} images of {collection}, {100 * one['share_of_pixels']:.1f} % of the pixels, "
            f"{one['n_train']:,} training images"
        )
        show(title, HEADER, lines)
        parts.append(markdown(title, HEADER, lines))
    return "\n".join(parts)


def main() -> None:
    quick = {"train": 50, "test": 10, "families": ["vae"], "max_iter": 2}
    options = image_options(__doc__, list(FAMILIES), n_test=200, quick=quick)
    rng = np.random.default_rng(options.seed)
    X, other = (
        load_images(options.collection, normal=0, subset=subset, return_X_y=True)[0]
        for subset in ("train", "test")
    )
    train = X[np.sort(rng.choice(len(X), options.train, replace=False))]
    sound = other[np.sort(rng.choice(len(other), options.test, replace=False))]
    defective, masks = make_defects(sound, random_state=options.seed)
    setting = {
        "n_train": len(train),
        "n_test": len(sound),
        "max_iter": options.max_iter,
        "seed": options.seed,
        "share_of_pixels": float(masks.mean()),
    }
    found, here = continued(options.output, options.collection, setting)
    for family in ("distance from the mean", *options.families):
        if family not in here["figures"]:
            here["figures"][family] = dict(
                measure(family, train, defective, masks, options.max_iter, options.seed)
            )
        if options.output is not None:
            save(options.output, found, report(found))
    if options.output is None:
        report(found)


if __name__ == "__main__":
    main()
