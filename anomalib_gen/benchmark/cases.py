"""Pictures of single test images: what a detector found, what it missed, and what it took for an anomaly.

A figure says how often a detector is wrong, and pictures say on what. Three kinds are kept of a cell on images:

- *found*: the anomalies with the lowest scores;
- *missed*: the anomalies with the highest scores;
- *false alarms*: the normal images with the lowest scores.

They are stored with the cell as strips of PNG, so that a report needs neither the detector nor the data.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["KINDS", "describe_cases", "pick_cases", "strip_png"]

KINDS = ("found", "missed", "false alarms")
"""Kinds of cases, in the order in which they are shown."""
N_SHOWN = 8
"""Images of each kind."""


def pick_cases(y: ArrayLike, scores: ArrayLike, n: int = N_SHOWN) -> dict[str, NDArray[np.int64]]:
    """Positions of the best and worst cases.

    Parameters
    ----------
    y : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly.
    scores : array-like of shape (n_images,)
        Lower = more abnormal.
    n : int, default=8
        The most of each kind.

    Returns
    -------
    dict of str to ndarray of int
        For each of `KINDS`, the most extreme case first.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    order = np.argsort(scores, kind="stable")
    anomalies, normal = order[y[order] == -1], order[y[order] == 1]
    return dict(zip(KINDS, (anomalies[:n], anomalies[::-1][:n], normal[:n]), strict=True))


def strip_png(images: NDArray[np.uint8]) -> bytes:
    """Images side by side, one pixel apart, as a file.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width)
        uint8, grey (1) or colour (3).

    Returns
    -------
    bytes
        A PNG; the gaps are transparent.

    Raises
    ------
    ValueError
        If the images have neither one channel nor three, or are of another type.
    """
    from PIL import Image

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "Pictures need images (n, 1 or 3, height, width) of uint8, got an array of shape "
            f"{images.shape} and type {images.dtype}."
        )
    n, channels, height, width = images.shape
    strip = np.zeros((height, n * (width + 1) - 1, channels + 1), dtype=np.uint8)
    for k, image in enumerate(images):
        columns = slice(k * (width + 1), k * (width + 1) + width)
        strip[:, columns, :channels] = np.moveaxis(image, 0, 2)
        strip[:, columns, channels] = 255
    file = io.BytesIO()
    Image.fromarray(strip, mode="LA" if channels == 1 else "RGBA").save(file, format="PNG", optimize=True)
    return file.getvalue()


def describe_cases(X: NDArray[np.uint8], y: ArrayLike, scores: ArrayLike) -> dict[str, Any]:
    """Best and worst cases of a cell, ready for its file.

    Parameters
    ----------
    X : ndarray of shape (n_images, channels, height, width)
        Test images of uint8.
    y, scores : array-like of shape (n_images,)
        As for `pick_cases`.

    Returns
    -------
    dict of str to dict
        For each of `KINDS`: ``png``, a strip in base64; ``positions`` of its images in the test part; and ``ranks``,
        the share of the normal test images with a lower score than each, from 0 (more abnormal than all of them) on.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    normal = np.sort(scores[y == 1])
    return {
        kind: {
            "png": base64.b64encode(strip_png(X[chosen])).decode("ascii"),
            "positions": chosen.tolist(),
            "ranks": (np.searchsorted(normal, scores[chosen], side="left") / len(normal)).tolist(),
        }
        for kind, chosen in pick_cases(y, scores).items()
    }


def ranks_in_words(case: Mapping[str, Any]) -> str:
    """Where the images of a strip lie among the normal ones, for a caption."""
    low, high = (f"{100 * rank:.0f} %" for rank in (min(case["ranks"]), max(case["ranks"])))
    return low if low == high else f"{low} to {high}"
