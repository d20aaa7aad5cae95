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

By (2) every place moves on its own, and a stroke may be put together from pieces of others. What is one thing moves
together. Let e_p(t) be the mean of nine squares in (2), t_p the shortest t at which it is least, and n_p the mean of
|g_x(p + q)|^2 over |q| <= 1, which is what there is around p. Places within r = 3 of p move by

    m_p = sum_{|q| <= r} n_{p+q} t_{p+q} / sum_{|q| <= r} n_{p+q}                                         (4)

on average, and in place of (2) stands

    c(x, y) = sum_p min_{|t| <= w} e_p(t) + k n_p |t - m_p|^2,                                            (5)

which charges a place for moving otherwise than its surroundings. It is never less than (2), and equal at a stiffness k
of 0; stored images are compared at 0.1. (Sums and minima run over squares, |t| and |q| there being the greater of both
coordinates; lengths of moves are Euclidean; sums of (4) end at the border.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from anomalib_gen._runtime import row_blocks
from anomalib_gen.models.gradients import LEAST_CONTRAST
from anomalib_gen.models.neighbors import values_per_block

MOST_PIXELS = 32
"""Pixels a side at which images are compared, at most."""
SIDES_PER_PIXEL = 14
"""Pixels a side for each pixel of w."""
STIFFNESS = 0.1
"""k of equation 5, where places move together."""
SURROUNDINGS = 3
"""r of equation 4."""


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


def unmatched(
    x: torch.Tensor, y: torch.Tensor, *, stiffness: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each place has that is not in the other image (the terms of equation 5), and the reverse.

    Parameters
    ----------
    x, y : Tensor of shape (B, 2, h, w)
        Pairs of `shapes_of` images.
    stiffness : float, default=0.0
        k. 0 lets every place move on its own (equation 2), which takes a fifth of the time.

    Returns
    -------
    there, back : Tensor of shape (B, h, w)
        At the places of x what x has and y has not, and at the places of y what y has and x has not.
    """
    h, w = x.shape[2:]
    reach = _reach(h, w)
    # Short moves first: of equal errors the first counts.
    span = range(-reach, reach + 1)
    moves = sorted(((i, j) for i in span for j in span), key=lambda move: move[0] ** 2 + move[1] ** 2)
    wide = F.pad(x, [reach + 1] * 4)
    wider = F.pad(y, [2 * reach + 1] * 4)
    height, width = wide.shape[2:]

    def errors() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i, j in moves:
            error = (wide - wider[:, :, reach + i :, reach + j :][:, :, :height, :width]).square_()
            sums = _sum_of_nine(error[:, 0] + error[:, 1])
            there = sums[:, reach : reach + h, reach : reach + w]
            yield there, sums[:, reach - i : reach - i + h, reach - j : reach - j + w]

    if stiffness == 0:
        best = [x.new_full((len(x), h, w), torch.inf) for _ in range(2)]
        for pair in errors():
            for least, error in zip(best, pair, strict=True):
                torch.minimum(least, error, out=least)
        return best[0] / 9, best[1] / 9
    there, back = zip(*errors(), strict=True)
    # Places of y move the other way. Either way short moves come first, in one order: D is symmetric.
    reverse = [back[moves.index((-i, -j))] for i, j in moves]
    t = x.new_tensor(moves).T
    return _together(x, there, t, stiffness), _together(y, reverse, t, stiffness)


def pairs_per_block(shapes: torch.Tensor, stiffness: float) -> int:
    """Pairs of images like these, ``(..., h, w)``, that `unmatched` may have at once."""
    h, w = shapes.shape[-2:]
    reach = _reach(h, w)
    values = (h + 2 * reach) * (w + 2 * reach)
    # With stiffness the errors of all moves are alive at a time.
    values *= (2 * reach + 1) ** 2 if stiffness else 2
    return max(1, values_per_block(shapes.device) // values)


def _reach(h: int, w: int) -> int:
    """Farthest move of equation 2, for the height and width of images."""
    return max(1, round(max(h, w) / SIDES_PER_PIXEL))


def _sum_of_nine(values: torch.Tensor) -> torch.Tensor:
    """Sums ``(..., h - 2, w - 2)`` of the neighbourhoods of values ``(..., h, w)``."""
    values = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    return values[..., :-2] + values[..., 1:-1] + values[..., 2:]


def _together(
    x: torch.Tensor, errors: Sequence[torch.Tensor], moves: torch.Tensor, stiffness: float
) -> torch.Tensor:
    """The terms ``(B, h, w)`` of equation 5, given 9 e, ``(B, h, w)`` for each of the moves t, ``(2, T)``."""
    h, w = x.shape[2:]
    least = errors[0].clone()
    chosen = torch.zeros_like(least, dtype=torch.int64)
    for k, error in enumerate(errors[1:], start=1):
        chosen.masked_fill_(error < least, k)
        torch.minimum(least, error, out=least)
    around = _sum_of_nine(F.pad(x, [1] * 4).square().sum(1))
    # (Sums of slices: torch's pooling takes several times as long on a CPU.)
    sums = F.pad(torch.cat([around * moves[:, chosen], around[None]]), [SURROUNDINGS] * 4)
    for side, dim in ((h, -2), (w, -1)):
        parts = [sums.narrow(dim, k, side) for k in range(2 * SURROUNDINGS + 1)]
        sums = parts[0] + parts[1]
        for part in parts[2:]:
            sums += part
    mean = sums[:2] / sums[2].clamp(min=torch.finfo(sums.dtype).tiny)
    # k n |t - m|^2 = k n |t|^2 - 2 k n m.t + k n |m|^2, of which the last term is the same for all t.
    weight = stiffness * around
    down, across = -2 * weight * mean
    found = torch.full_like(around, torch.inf)
    for error, (i, j) in zip(errors, moves.T.tolist(), strict=True):
        cost = error.add(weight, alpha=i * i + j * j)
        cost.add_(down, alpha=i).add_(across, alpha=j)
        torch.minimum(found, cost, out=found)
    return found.addcmul_(weight, mean.square().sum(0)).clamp_(min=0).div_(9)


def matching_distances(x: torch.Tensor, y: torch.Tensor, *, stiffness: float = 0.0) -> torch.Tensor:
    """Distances of images to candidates (equation 3, of equation 5 in place of 2 where there is stiffness).

    Parameters
    ----------
    x : Tensor of shape (B, 2, h, w)
    y : Tensor of shape (B, K, 2, h, w)
        Both of `shapes_of`.
    stiffness : float, default=0.0
        k of equation 5.

    Returns
    -------
    Tensor of shape (B, K)
        In float32. Each is a function of its two images alone.
    """
    B, K = y.shape[:2]
    pairs = torch.arange(B * K, device=x.device)
    found = x.new_empty(B * K)
    flat = y.flatten(0, 1)
    for block in row_blocks(B * K, pairs_per_block(x, stiffness)):
        there, back = unmatched(x[pairs[block] // K], flat[block], stiffness=stiffness)
        found[block] = torch.maximum(there.sum((1, 2)), back.sum((1, 2)))
    return found.view(B, K)
