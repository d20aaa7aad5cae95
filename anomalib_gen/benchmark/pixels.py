r"""How well heat maps find the pixels of defects.

*Pixel AUROC* is the probability that a pixel of a defect has a higher value than one of what is sound; large defects
count more than small ones. *AUPRO* gives each connected region its own say (Bergmann et al. 2020, arXiv:1911.02357,
section 5): with TPR_r(t) the share of region r above a threshold t, and FPR(t) that of all sound pixels,

    PRO(t) = mean_r TPR_r(t),     AUPRO = 1/f int_0^f PRO d FPR,     f = 0.3.                               (1)

Chance is 0.5 for the first and f / 2 = 0.15 for the second.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

__all__ = ["aupro", "pixel_auroc"]


def _check(masks: ArrayLike, maps: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    masks, maps = np.asarray(masks, dtype=bool), np.asarray(maps, dtype=np.float64)
    if masks.shape != maps.shape or masks.ndim != 3:
        raise ValueError(
            f"masks and maps must have one shape (n, height, width), got {masks.shape}, {maps.shape}."
        )
    if not np.isfinite(maps).all():
        raise ValueError("maps hold values that are not finite.")
    if masks.all() or not masks.any():
        raise ValueError("masks must mark some pixels and not all.")
    return masks, maps


def pixel_auroc(masks: ArrayLike, maps: ArrayLike) -> float:
    """Area under the ROC curve over all pixels of all images.

    Parameters
    ----------
    masks : array-like of bool, of shape (n_images, height, width)
        True for the pixels of defects. Sound images have none.
    maps : array-like of shape (n_images, height, width)
        Higher is more anomalous.

    Returns
    -------
    float
    """
    masks, maps = _check(masks, maps)
    return float(roc_auc_score(masks.ravel(), maps.ravel()))


def aupro(masks: ArrayLike, maps: ArrayLike, *, max_fpr: float = 0.3) -> float:
    """Area under the curve of per-region overlap (equation 1), divided by its width.

    Parameters
    ----------
    masks : array-like of bool, of shape (n_images, height, width)
        True for the pixels of defects; regions are connected by sides or corners.
    maps : array-like of shape (n_images, height, width)
        Higher is more anomalous.
    max_fpr : float, default=0.3
        f of equation 1.

    Returns
    -------
    float
        1 for perfect maps.
    """
    masks, maps = _check(masks, maps)
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], got {max_fpr!r}.")
    # Every pixel of a region of n pixels adds 1 / n to the sum of TPR once the threshold is below it.
    weights = np.zeros(maps.shape)
    n_regions = 0
    for mask, weight in zip(masks, weights, strict=True):
        labels, n = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())
        weight[mask] = 1 / sizes[labels[mask]]
        n_regions += n
    order = np.argsort(-maps, axis=None, kind="stable")
    values, sound = maps.ravel()[order], ~masks.ravel()[order]
    pro, fpr = np.cumsum(weights.ravel()[order]) / n_regions, np.cumsum(sound) / sound.sum()
    # Pixels of one value cross the threshold together.
    last = np.append(values[1:] != values[:-1], True)
    pro, fpr = np.append(0.0, pro[last]), np.append(0.0, fpr[last])
    # The first threshold beyond f: of several with one FPR it is where the curve comes in, and not where it leaves.
    k = int(np.argmax(fpr >= max_fpr))
    end = pro[k - 1] + (pro[k] - pro[k - 1]) * (max_fpr - fpr[k - 1]) / (fpr[k] - fpr[k - 1])
    return float(trapezoid(np.append(pro[:k], end), np.append(fpr[:k], max_fpr)) / max_fpr)
