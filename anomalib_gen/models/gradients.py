r"""Histograms of oriented gradients: what an image is drawn with, place by place.

An image x has at each pixel the central differences (d_1, d_2) of the channel in which they are longest, of length
m = sqrt(d_1^2 + d_2^2) and direction a. Over a grid of cells that cover the image, m is counted by direction,

    C_kc = sum_p w_c(p) v_k(a_p) m_p,     k = 1, ..., 18,                                                  (1)

where v spreads each pixel over the two nearest of 18 directions, and w over the four nearest cells, in proportion to
how near they are; over the pixels of an inner cell w sums to 1, so that C is a mean, whatever the size of cells. Two
directions that differ in sign are one orientation, U_kc = C_kc + C_(k+9)c, for edges whose bright side does not matter.
The histogram is H = (C, U): 27 numbers a cell (Dalal and Triggs 2005, doi:10.1109/CVPR.2005.177; with both kinds,
Felzenszwalb et al. 2010, doi:10.1109/TPAMI.2009.167).

Small shifts and deformations change pixels much and (1) little, and so distances between histograms say more about
what is drawn than distances between pixels do. The price is that they are blind to brightness and colour.

Divided by the norm of U over the whole image,

    H / sqrt(sum_kc U_kc^2 + eps^2),                                                                       (2)

they are blind to contrast, too. The published descriptors divide cell by cell instead, which makes much of the noise in
empty ones.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from anomalib_gen._runtime import row_blocks
from anomalib_gen.models.neighbors import values_per_block

ORIENTATIONS = 9
CELL, MOST_CELLS = 4, 8
"""Pixels a side of a cell, and cells a side of an image: larger images have larger cells."""
LEAST_CONTRAST = 1e-2
"""eps of equation 2, in deviations of the data: a flat image has no directions."""
IMAGES_AT_ONCE = 64
"""Images whose directions are held at once, at most: fewer large ones, as they take 18 numbers a pixel."""


def gradient_histograms(x: torch.Tensor) -> torch.Tensor:
    """Histograms of images (equation 1).

    Parameters
    ----------
    x : Tensor of shape (B, channels, height, width)

    Returns
    -------
    Tensor of shape (B, 27, n_rows, n_columns)
        Of cells of four pixels a side, eight of them a side at most.
    """
    rows, columns = _windows(x.shape[2], x), _windows(x.shape[3], x)
    signed = x.new_empty(len(x), 2 * ORIENTATIONS, len(rows), len(columns))
    fitting = values_per_block(x.device) // (2 * ORIENTATIONS * x.shape[2] * x.shape[3])
    for block in row_blocks(len(x), max(1, min(IMAGES_AT_ONCE, fitting))):
        signed[block] = torch.einsum("ih,bkhw,jw->bkij", rows, _directions(x[block]), columns)
    return torch.cat([signed, signed[:, :ORIENTATIONS] + signed[:, ORIENTATIONS:]], dim=1)


def without_contrast(histograms: torch.Tensor) -> torch.Tensor:
    """Equation 2 of histograms ``(B, 27, n_rows, n_columns)``, of the same shape."""
    energy = histograms[:, 2 * ORIENTATIONS :].square().sum((1, 2, 3), keepdim=True)
    return histograms / (energy + LEAST_CONTRAST**2).sqrt()


def _directions(x: torch.Tensor) -> torch.Tensor:
    """Length of the gradient at each pixel by direction, ``(B, 18, height, width)``."""
    across = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
    down = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    longest = (across.square() + down.square()).argmax(1, keepdim=True)
    across, down = across.gather(1, longest), down.gather(1, longest)
    length = (across.square() + down.square()).sqrt()
    position = torch.atan2(down, across) * (ORIENTATIONS / math.pi) % (2 * ORIENTATIONS)
    first = position.floor()
    share = position - first
    first = first.long() % (2 * ORIENTATIONS)
    counts = x.new_zeros(len(x), 2 * ORIENTATIONS, *x.shape[2:])
    counts.scatter_(1, first, (1 - share) * length)
    return counts.scatter_(1, (first + 1) % (2 * ORIENTATIONS), share * length)


def _windows(side: int, like: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel of a side in each cell, ``(n_cells, side)``.

    It falls from the middle of a cell to 0 at the middle of the next one, and sums to about 1 in an inner cell.
    """
    n_cells = max(1, min(MOST_CELLS, side // CELL))
    width = side / n_cells
    pixel = torch.arange(side, dtype=like.dtype, device=like.device) + 0.5
    middle = (torch.arange(n_cells, dtype=like.dtype, device=like.device) + 0.5).unsqueeze(1) * width
    return (1 - (pixel - middle).abs() / width).clamp(min=0) / width
