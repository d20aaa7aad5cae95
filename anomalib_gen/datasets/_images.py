"""Image collections as anomaly detection tasks: MNIST and CIFAR-10, from files that are on the machine."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from sklearn.utils import Bunch, check_random_state

from anomalib_gen.datasets._adbench import _DATA_VARIABLE
from anomalib_gen.datasets._builtin import _class_numbers
from anomalib_gen.datasets._manifest import resolve_name

_FILES = {
    "mnist": {"train": "mnist.npz", "test": "mnist.npz"},
    "cifar10": {"train": "cifar10-train.parquet", "test": "cifar10-test.parquet"},
}
_CLASSES = {
    "mnist": list("0123456789"),
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
_DESCRIPTIONS = {
    "mnist": "MNIST: 28 x 28 grey images of handwritten digits, 60,000 to train and 10,000 to test (LeCun et al. "
    "1998).",
    "cifar10": "CIFAR-10: 32 x 32 colour images of ten classes, 50,000 to train and 10,000 to test (Krizhevsky 2009). "
    "The files hold JPEG-coded copies: compare them with images of the same coding only.",
}

OTHER_SOURCES = ("mnist", "photographs")
"""Second sources that `load_other_images` knows."""
_SHRUNK = (2, 6)
"""Least and largest factor by which patches of photographs are shrunk."""


def load_images(
    name: str,
    *,
    normal: Any,
    subset: str = "train",
    data_home: str | os.PathLike[str] | None = None,
    return_X_y: bool = False,
) -> Any:
    """Load a collection of images with some classes as normal and all others as anomalies.

    Files are looked for in ``data_home`` and in the folder named by the environment variable ``ANOMALIB_GEN_DATA``,
    directly and in their subfolder ``images``. Nothing is downloaded. Images keep the order of the file, which may be
    sorted by class: shuffle them before you take a part.

    Parameters
    ----------
    name : {"mnist", "cifar10"}
        The collection, in any case. MNIST is ``mnist.npz`` with arrays X_train, y_train, X_test and y_test; CIFAR-10 is
        ``cifar10-train.parquet`` and ``cifar10-test.parquet`` with columns ``image`` (coded files) and ``label``, and
        needs pyarrow and Pillow.
    normal : int, str or sequence of these
        The normal classes, by number or by name.
    subset : {"train", "test"}, default="train"
        The collection's own split.
    data_home : str or path-like, optional
        First folder to look in.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead of a `Bunch`.

    Returns
    -------
    sklearn.utils.Bunch
        - data : uint8 array of shape (n_samples, channels, height, width)
        - target : int array of shape (n_samples,), +1 inlier, -1 anomaly
        - classes : int array of shape (n_samples,), the class of each image
        - class_names : list of str
        - name, DESCR, path

    Raises
    ------
    ValueError
        Unknown name or subset, or ``normal`` names a class that does not exist, no class, or all of them; or the
        file, which is named, cannot be read.
    FileNotFoundError
        If the file is not there; the message lists where it was looked for.
    """
    name = resolve_name(name, _FILES)
    if subset not in ("train", "test"):
        raise ValueError(f"subset must be 'train' or 'test', got {subset!r}.")
    names = _CLASSES[name]
    chosen = _class_numbers(normal, names)
    path = find_image_file(_FILES[name][subset], data_home)
    if name == "mnist":
        X, classes = _read_digits(path, subset)
    else:
        X, classes = _read_parquet(path)
    classes = classes.astype(np.int64)
    target = np.where(np.isin(classes, chosen), 1, -1)
    if return_X_y:
        return X, target
    return Bunch(
        data=X,
        target=target,
        classes=classes,
        class_names=names,
        name=name,
        DESCR=f"{_DESCRIPTIONS[name]} Normal: {', '.join(names[k] for k in chosen)}; all others are anomalies.",
        path=path,
    )


def load_other_images(
    source: str,
    *,
    n_samples: int = 10_000,
    random_state: Any = None,
    data_home: str | os.PathLike[str] | None = None,
) -> NDArray[np.uint8]:
    """Load images that are not CIFAR-10's, in the size and the coding of its files.

    What a detector tells apart should be what images show. A difference in how they were coded or resized is far easier
    to tell; so these go through the coder that the CIFAR-10 files on this machine came from, with its tables and its
    sampling of colours, and are decoded again. Files without loss ask for no coding.

    Parameters
    ----------
    source : {"mnist", "photographs"}
        "mnist" is the test part of MNIST in grey, with a black border of two pixels. "photographs" are square patches
        of the two photographs that ship with scikit-learn, at random places and shrunk to 32 x 32 pixels by the means
        of 2 x 2 to 6 x 6 pixels. How CIFAR-10 was shrunk is not known to be the same.
    n_samples : int, default=10000
        Images drawn; of MNIST at most as many as there are.
    random_state : int, RandomState instance or None, default=None
    data_home : str or path-like, optional
        As in `load_images`.

    Returns
    -------
    ndarray of uint8 of shape (n_samples, 3, 32, 32)

    Raises
    ------
    ValueError
        If the source is unknown, `n_samples` is not a positive integer, or a file cannot be read; it is named then.
    FileNotFoundError
        If the files of CIFAR-10 or of MNIST are not there.
    """
    if source not in OTHER_SOURCES:
        raise ValueError(f"source must be one of {', '.join(map(repr, OTHER_SOURCES))}, got {source!r}.")
    if not isinstance(n_samples, Integral) or int(n_samples) < 1:
        raise ValueError(f"n_samples must be a positive integer, got {n_samples!r}.")
    random = check_random_state(random_state)
    if source == "mnist":
        digits, _ = _read_digits(find_image_file(_FILES["mnist"]["test"], data_home), "test")
        digits = digits[:, 0]
        digits = digits[np.sort(random.permutation(len(digits))[:n_samples])]
        padded = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
        X = np.repeat(padded[:, None], 3, axis=1)
    else:
        X = _patches(load_sample_images().images, n_samples, random)
    recode = _coder_of(find_image_file(_FILES["cifar10"]["test"], data_home))
    return np.stack([recode(image) for image in X])


def _patches(
    photographs: list[NDArray[np.uint8]], n: int, random: np.random.RandomState
) -> NDArray[np.uint8]:
    X = np.empty((n, 3, 32, 32), dtype=np.uint8)
    for k in range(n):
        photograph = photographs[random.randint(len(photographs))]
        factor = random.randint(_SHRUNK[0], _SHRUNK[1] + 1)
        top, left = (random.randint(side - 32 * factor + 1) for side in photograph.shape[:2])
        patch = photograph[top : top + 32 * factor, left : left + 32 * factor].astype(float)
        means = patch.reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
        X[k] = np.moveaxis(np.rint(means), 2, 0)
    return X


def _coder_of(path: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Code and decode an image ``(3, height, width)`` as the first one of a file of coded images was."""
    _require_readers()
    import pyarrow.parquet as pq
    from PIL import Image, JpegImagePlugin

    with _naming(path):
        first = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=["image"]))["image"][0].as_py()
    with Image.open(io.BytesIO(first)) as image:
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            return lambda pixels: pixels
        options = {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}

    def recode(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, 2))).save(file, format="JPEG", **options)
        with Image.open(file) as decoded:
            return np.moveaxis(np.asarray(decoded), 2, 0)

    return recode


def find_image_file(file: str, data_home: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a file of images, or say where it was looked for.

    Parameters
    ----------
    file : str
        Name of the file.
    data_home : str or path-like, optional
        First folder to look in.

    Raises
    ------
    FileNotFoundError
        If it is nowhere.
    """
    looked = list(_candidates(file, data_home))
    for path in looked:
        if path.is_file():
            return path
    where = "".join(f"\n  {path}" for path in looked) or "\n  nowhere, because no folder is known"
    raise FileNotFoundError(
        f"{file} was not found. Looked for:{where}\nPut it into one of these folders; data_home or the environment "
        f"variable {_DATA_VARIABLE} names a folder of yours."
    )


def _candidates(file: str, data_home: str | os.PathLike[str] | None) -> Iterator[Path]:
    for home in (data_home, os.environ.get(_DATA_VARIABLE)):
        if home:
            yield Path(home).expanduser() / "images" / file
            yield Path(home).expanduser() / file


def _require_readers() -> None:
    if find_spec("pyarrow") is None or find_spec("PIL") is None:
        raise ModuleNotFoundError(
            "Reading CIFAR-10 needs pyarrow and Pillow. Install them with: pip install 'anomalib-gen[benchmark]'"
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file on which a reader fails."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # archives, tables and coded images: each raises its own
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_digits(path: Path, subset: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``(n, 1, 28, 28)`` and classes of one part of MNIST."""
    with _naming(path), np.load(path, allow_pickle=False) as archive:
        return archive[f"X_{subset}"][:, None], archive[f"y_{subset}"]


def _read_parquet(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``(n, 3, 32, 32)`` and classes of a file with columns ``image`` and ``label``."""
    _require_readers()
    import pyarrow.parquet as pq
    from PIL import Image

    with _naming(path):
        table = pq.read_table(path, columns=["image", "label"])
        X = np.empty((table.num_rows, 3, 32, 32), dtype=np.uint8)
        for k, coded in enumerate(table["image"]):
            with Image.open(io.BytesIO(coded.as_py())) as image:
                X[k] = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
        return X, table["label"].to_numpy()
