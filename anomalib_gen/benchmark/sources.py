"""Where data sets come from: names to tables, images and their splits."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .protocols import IMAGE_SUITES, PROTOCOLS, Split, images


class DataError(ValueError):
    """A data set that cannot be found or read."""


IMAGE_CLASSES = {"mnist": 10, "cifar10": 10}
"""Collections of images and their numbers of classes."""
IMAGE_TASKS = (
    *(f"mnist:not-{digit}" for digit in (1, 4, 5, 7, 9)),
    *(f"mnist:only-{digit}" for digit in range(10)),
    *(f"cifar10:only-{label}" for label in range(10)),
    "cifar10:against-mnist",
    "cifar10:against-photographs",
)
"""Tasks that a suite of images has by default: those with published figures, and CIFAR-10 against other sources of the
same coding."""
OTHER_IMAGES = 10_000
"""Images of another source in the test part, as many as there are of CIFAR-10."""


def _refuse_text(datasets: Any) -> None:
    """Refuse one name in place of a list, whose letters would be taken for names."""
    if isinstance(datasets, str):
        raise TypeError(f"datasets must be a list, got the text {datasets!r}. Put it into one.")


def find_sources(datasets: Sequence[str] | None, data_home: str | None) -> dict[str, str]:
    """Map the name of each data set to where it comes from; names are checked, nothing is read."""
    from anomalib_gen.datasets import list_adbench, list_builtin

    _refuse_text(datasets)
    if datasets is None:
        names = list_adbench(data_home=data_home, available_only=True)
        if not names:
            raise DataError(
                "No ADBench table was found on this machine. Name data sets to have them downloaded "
                "(datasets), give "
                "the folder of the files (data_home or the environment variable ANOMALIB_GEN_DATA), or use "
                "the data "
                "shipped with scikit-learn: builtin:breast_cancer, builtin:digits, builtin:wine."
            )
        return {name: name for name in names}
    known = {name.lower(): name for name in list_adbench()}
    sources: dict[str, str] = {}
    for item in datasets:
        text = os.fspath(item)
        if text.startswith("builtin:"):
            if text.removeprefix("builtin:") not in list_builtin():
                raise DataError(
                    f"Unknown data set {text!r}. Choose from builtin:{', builtin:'.join(list_builtin())}."
                )
            name = source = text
        elif text.endswith(".npz"):
            path = Path(text).expanduser().resolve()
            if not path.is_file():
                raise DataError(f"The file {text} does not exist.")
            name, source = path.stem, os.fspath(path)
        elif text.lower() in known:
            name = source = known[text.lower()]
        else:
            import difflib

            near = [known[key] for key in difflib.get_close_matches(text.lower(), known, n=3)]
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"Unknown data set {text!r}. {hint}A data set is an ADBench name, "
                f"builtin:{'|'.join(list_builtin())}, "
                "or the path of an npz file with X and y."
            )
        if sources.setdefault(name, source) != source:
            raise DataError(f"Two data sets are called {name!r}; rename one of the files.")
    if not sources:
        raise DataError("datasets is empty: name at least one, or leave the argument out.")
    return sources


def find_image_sources(datasets: Sequence[str] | None, data_home: str | None) -> dict[str, str]:
    """Names of image tasks, which are their sources; names are checked, nothing is read."""
    _refuse_text(datasets)
    names = list(IMAGE_TASKS if datasets is None else map(str, datasets))
    for name in names:
        match = re.fullmatch(r"(\w+):(not|only)-(\d)", name)
        if name not in IMAGE_TASKS and (match is None or match[1] not in IMAGE_CLASSES):
            raise DataError(
                f"Unknown image task {name!r}. A task is a collection ({', '.join(IMAGE_CLASSES)}), 'not' for one "
                "class as the anomaly or 'only' for one as the normal class, and its number: mnist:not-1, "
                "cifar10:only-0. CIFAR-10 as a whole stands against other sources in cifar10:against-mnist and "
                "cifar10:against-photographs."
            )
    if not names:
        raise DataError("datasets is empty: name at least one, or leave the argument out.")
    return {name: name for name in names}


@functools.lru_cache(maxsize=1)  # cells come ordered by data set and seed
def load_source(source: str, data_home: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read a data set: an ADBench name, ``builtin:`` and a name, or the path of an npz file."""
    from anomalib_gen.datasets import load_adbench, load_builtin

    if source.startswith(tuple(f"{name}:" for name in IMAGE_CLASSES)):
        train, test = _load_image_task(source, data_home)
        return np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    try:
        if source.startswith("builtin:"):
            bunch = load_builtin(source.removeprefix("builtin:"))
            X, y = bunch.data, bunch.target
        elif source.endswith(".npz"):
            with np.load(source, allow_pickle=False) as archive:
                X, y = archive["X"], archive["y"].ravel()
        else:
            bunch = load_adbench(source, data_home=data_home)
            X, y = bunch.data, bunch.target
        X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    except Exception as error:  # archives, numbers and downloads: each raises its own
        raise DataError(f"The data set {source} cannot be read: {error}") from error
    if X.ndim != 2 or y.shape != (len(X),) or not set(np.unique(y).tolist()) <= {1, -1}:
        raise DataError(
            f"The data set {source} must hold a table X and one label a row in y, +1 for a normal row and "
            f"-1 for an "
            f"anomaly; found X of shape {X.shape}, y of shape {y.shape} and the labels "
            f"{np.unique(y)[:5].tolist()}."
        )
    return X, y.astype(np.int64)


@functools.lru_cache(maxsize=1)
def load_split(suite: str, source: str, data_home: str | None, seed: int) -> Split:
    """Split a data set by the protocol of a suite; the last one is kept."""
    if suite in IMAGE_SUITES:
        return images(*_load_image_task(source, data_home), seed, caps=IMAGE_SUITES[suite])
    return PROTOCOLS[suite](*load_source(source, data_home), seed)


@functools.lru_cache(maxsize=1)
def _load_image_task(
    source: str, data_home: str | None
) -> tuple[tuple[NDArray[Any], NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.int64]]]:
    """Images and labels to train on, and to test on."""
    from anomalib_gen.datasets import load_other_images

    collection, _, task = source.partition(":")
    kind, _, label = task.partition("-")
    everything = range(IMAGE_CLASSES[collection])
    normal = [0] if kind == "against" else [k for k in everything if (k == int(label)) == (kind == "only")]
    try:
        train, test = (
            (X, np.where(np.isin(classes, normal), 1, -1))
            for X, classes in (
                _load_collection(collection, subset, data_home) for subset in ("train", "test")
            )
        )
        if kind == "against":
            other = load_other_images(label, n_samples=OTHER_IMAGES, random_state=0, data_home=data_home)
            train = train[0], np.ones_like(train[1])
            target = np.repeat([1, -1], [len(test[0]), len(other)])
            test = np.concatenate([test[0], other]), target
    except Exception as error:  # archives, images and downloads: each raises its own
        raise DataError(f"The data set {source} cannot be read: {error}") from error
    return train, test


@functools.lru_cache(maxsize=2)  # both parts of one collection
def _load_collection(
    name: str, subset: str, data_home: str | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of a collection and their classes; decoding takes seconds, and its tasks share them."""
    from anomalib_gen.datasets import load_images

    found = load_images(name, normal=0, subset=subset, data_home=data_home)
    return found.data, found.classes


def fingerprint(X: NDArray[np.float64], y: NDArray[np.int64]) -> str:
    """Hash the content of a data set."""
    digest = hashlib.sha256(f"{X.shape}".encode())
    digest.update(np.ascontiguousarray(X).tobytes())
    digest.update(np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()[:16]
