r"""Matching of images: how much of one is not in the other, if its parts may lie a little off.

Let g be the gradient of an image, smoothed across (Sobel), in the channel in which it is longest, over the length that
all gradients of the image have together,

    g(p) / sqrt(sum_q |g(q)|^2 + eps^2),                                                                  (1)

so that neither brightness nor contrast matters. What an image x has and y has not is

    d(x, y) = sum_p min_{|t| <= w} 1/9 sum_{|q| <= 1} |g_x(p + q) - g_y(p + q + t)|^2,                   (2)

where each place p of x, with its eight neighbours, looks for its like in y, at most w pixels off (the image distortion
model of Keysers, Deselaers, Gollan and Ney 2007, doi:10.1109/TPAMI.2007.1153). (2) does not see what y has and x has
not, which d(y, x) tells, and the greater of the two counts:

    D(x, y) = max(d(x, y), d(y, x)),                                                                      (3)

which is 0 for images that match and 1 to 2 for strokes that are apart; less for noise, which has some of everything
everywhere, and up to 4 for a ramp and its negative. Beyond the border g is 0. Written by another hand, a digit is
another point in the space of pixels, and nearly the same by (3); with a stroke too many or too few it is not. w is a
fourteenth of the longer side, at least 1, and images of more than 32 pixels a side are compared at 32.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from anomalib_gen._runtime import row_blocks
from anomalib_gen.models.gradients import LEAST_CONTRAST
from anomalib_gen.models.neighbors import values_per_block

MOST_PIXELS = 32
"""Pixels a side at which images are compared, at most."""
SIDES_PER_PIXEL = 14
"""Pixels a side for each pixel of w."""


def shapes_of(x: torch.Tensor) -> torch.Tensor:
    """Gradients without contrast (equation 1) of images at the size at which they are compared.

    Parameters
    ----------
    x : Tensor of shape (B, channels, height, width)

    Returns
    -------
    Tensor of shape (B, 2, h, w)
        Across and down, in float32.
    """
    x = x.float()
    scale = MOST_PIXELS / max(x.shape[2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in x.shape[2:]]
        # On MPS torch has no averages of windows of unlike size.
        x = F.interpolate(x.cpu() if x.device.type == "mps" else x, size, mode="area").to(x.device)
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    smooth = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    across = smooth[..., 2:] - smooth[..., :-2]
    smooth = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    down = smooth[..., 2:, :] - smooth[..., :-2, :]
    g = torch.stack([across[:, 0], down[:, 0]], dim=1)
    length = g.square().sum(1)
    for c in range(1, x.shape[1]):
        other = torch.stack([across[:, c], down[:, c]], dim=1)
        longer = other.square().sum(1) > length
        length = torch.where(longer, other.square().sum(1), length)
        g = torch.where(longer.unsqueeze(1), other, g)
    # Sobel's weights are four times those of central differences, and so is the least contrast.
    return g / (length.sum((1, 2)) + (4 * LEAST_CONTRAST) ** 2).sqrt()[:, None, None, None]


def unmatched(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each place has that is not in the other image (the terms of equation 2), and the reverse.

    Parameters
    ----------
    x, y : Tensor of shape (B, 2, h, w)
        Pairs of `shapes_of` images.

    Returns
    -------
    there, back : Tensor of shape (B, h, w)
        At the places of x what x has and y has not, and at the places of y what y has and x has not.
    """
    h, w = x.shape[2:]
    reach = max(1, round(max(h, w) / SIDES_PER_PIXEL))
    x = F.pad(x, [reach + 1] * 4)
    y = F.pad(y, [2 * reach + 1] * 4)
    there, back = (x.new_full((len(x), h, w), torch.inf) for _ in range(2))
    height, width = x.shape[2:]
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            error = (x - y[:, :, i : i + height, j : j + width]).square_()
            error = error[:, 0] + error[:, 1]
            error = error[:, :-2] + error[:, 1:-1] + error[:, 2:]
            error = error[..., :-2] + error[..., 1:-1] + error[..., 2:]
            torch.minimum(there, error[:, reach : reach + h, reach : reach + w], out=there)
            k, m = 2 * reach - i, 2 * reach - j
            torch.minimum(back, error[:, k : k + h, m : m + w], out=back)
    return there / 9, back / 9


def matching_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distances of images to candidates (equation 3).

    Parameters
    ----------
    x : Tensor of shape (B, 2, h, w)
    y : Tensor of shape (B, K, 2, h, w)
        Both of `shapes_of`.

    Returns
    -------
    Tensor of shape (B, K)
        In float32. Each is a function of its two images alone.
    """
    B, K = y.shape[:2]
    pairs = torch.arange(B * K, device=x.device)
    found = x.new_empty(B * K)
    flat = y.flatten(0, 1)
    for block in row_blocks(B * K, max(1, values_per_block(x.device) // (2 * math.prod(x.shape[1:])))):
        there, back = unmatched(x[pairs[block] // K], flat[block])
        found[block] = torch.maximum(there.sum((1, 2)), back.sum((1, 2)))
    return found.view(B, K)
