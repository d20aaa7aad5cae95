r"""Defects in images, drawn at random, with masks that say where they are.

    "scratch"   a line of one to three pixels across part of the image (wider above 32 x 32), dark on a bright image and
                bright on a dark one;
    "blob"      an ellipse of another grey, with soft edges;
    "missing"   a rectangle filled with the image's commonest value, as if a part of it were not there.

A mask marks the pixels that a defect changes visibly, by `MIN_CHANGE` grey levels at least: a part that is missing
where there was nothing is no defect.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

KINDS = ("blob", "missing", "scratch")
MIN_SIDE = 8
MIN_CHANGE = 32
MIN_PIXELS, MAX_TRIES = 4, 100
"""A defect changes so many pixels visibly; where it does not, another is drawn."""


def make_defects(
    X: NDArray[np.uint8], *, kind: str = "mixed", random_state: Any = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Put one defect into each image.

    Parameters
    ----------
    X : uint8 array of shape (n_samples, channels, height, width)
    kind : {"mixed", "blob", "missing", "scratch"}, default="mixed"
        "mixed" draws one of the others for each image.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    defective : uint8 array of shape (n_samples, channels, height, width)
        A copy with defects.
    masks : bool array of shape (n_samples, height, width)
        True where a defect changes a value by 32 grey levels or more.

    Raises
    ------
    ValueError
        If X is no array of images of 8 bits, the kind is unknown, or an image takes no visible defect in 100 tries (a
        part cannot be missing from an image of one value).

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.datasets import make_defects
    >>> images = np.zeros((3, 1, 28, 28), np.uint8)
    >>> defective, masks = make_defects(images, kind="blob", random_state=0)
    >>> masks.shape, bool((defective[:, 0][~masks] < 32).all())
    ((3, 28, 28), True)
    """
    X = np.asarray(X)
    if X.ndim != 4 or X.dtype != np.uint8:
        raise ValueError(
            f"X must be uint8 images (n, channels, height, width), got {X.dtype} of shape {X.shape}."
        )
    if min(X.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f"X has shape {X.shape}, which is read as (images, channels, height, width); height and width must be at "
            f"least {MIN_SIDE}. Put the channels before them, e.g. by anomalib_gen.images.ChannelsFirst."
        )
    if kind not in ("mixed", *KINDS):
        raise ValueError(f"kind={kind!r} is unknown. Known kinds: 'mixed', {', '.join(map(repr, KINDS))}.")
    random = check_random_state(random_state)
    defective = X.copy()
    masks = np.zeros((len(X), *X.shape[2:]), dtype=bool)
    for k, image in enumerate(X):
        chosen = KINDS[random.randint(len(KINDS))] if kind == "mixed" else kind
        for _ in range(MAX_TRIES):
            changed = _DRAW[chosen](image.astype(np.float64), random)
            changed = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
            visible = np.abs(changed.astype(int) - image).max(axis=0) >= MIN_CHANGE
            if visible.sum() >= MIN_PIXELS:
                break
        else:
            raise ValueError(f"Image {k} takes no visible defect of the kind {chosen!r}.")
        defective[k], masks[k] = changed, visible
    return defective, masks


def _grid(image: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.mgrid[: image.shape[1], : image.shape[2]]  # type: ignore[return-value]


def _contrast(image: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.float64]:
    """A colour ``(channels, 1, 1)`` away from the image's mean."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return np.where(mean > 127, random.uniform(0, 60), random.uniform(195, 255))


def _scratch(image: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.float64]:
    rows, columns = _grid(image)
    height, width = rows.shape
    i, j = random.uniform(0, height), random.uniform(0, width)
    angle, length = random.uniform(0, np.pi), random.uniform(0.3, 0.8) * max(height, width)
    along = (rows - i) * np.sin(angle) + (columns - j) * np.cos(angle)
    across = (rows - i) * np.cos(angle) - (columns - j) * np.sin(angle)
    half = random.uniform(0.5, 1.0) * max(1.0, max(height, width) / 32)
    inside = (np.abs(along) <= length / 2) & (np.abs(across) <= half)
    return np.where(inside, _contrast(image, random), image)


def _blob(image: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.float64]:
    rows, columns = _grid(image)
    height, width = rows.shape
    i, j = random.uniform(0.1, 0.9) * height, random.uniform(0.1, 0.9) * width
    a, b = random.uniform(0.06, 0.18, size=2) * max(height, width)
    distance = ((rows - i) / max(a, 1.5)) ** 2 + ((columns - j) / max(b, 1.5)) ** 2
    share = np.clip(1.5 * (1.2 - distance), 0, 1)
    return image + share * (_contrast(image, random) - image)


def _missing(image: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.float64]:
    height, width = image.shape[1:]
    h, w = (max(2, round(random.uniform(0.15, 0.4) * side)) for side in (height, width))
    i, j = random.randint(height - h + 1), random.randint(width - w + 1)
    changed = image.copy()
    for channel in changed:
        channel[i : i + h, j : j + w] = np.bincount(channel.astype(int).ravel()).argmax()
    return changed


_DRAW = {"blob": _blob, "missing": _missing, "scratch": _scratch}
