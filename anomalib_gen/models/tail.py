r"""How surprising a value is among reference values: minus the log of its tail probability.

Let F be the distribution function of the reference values, t its 90 % quantile and m the mean of s - t over the
values beyond t. Then

    u(s) = -log(1 - F(s))              for s <= t,                                                   (1)
    u(s) = log 10 + log(1 + (s - t) / m)    beyond,                                                  (2)

in nats. (1) is interpolated between the reference values, and below them down to u = 0 at zero, or, where there are
negative ones, at as much below the least as t is above it. (2) goes on where these end: it is minus the log of a
generalised Pareto tail (Pickands 1975, doi:10.1214/aos/1176343003) of shape 1 and scale m, which starts like the
exponential tail of the same mean and then grows ever more slowly. So u puts numbers of any unit on one scale, keeps
their order however far out they are, and lets no single one of several outweigh the rest, when they are averaged.
"""

from __future__ import annotations

import math

import torch

TAIL_SHARE = 0.1
"""Share of the reference values that lie beyond t."""


def tail_surprise(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Surprise of values among reference values (equations 1 and 2).

    Parameters
    ----------
    values : Tensor of shape (..., B)
    reference : Tensor of shape (..., n)
        Values of the same kind of normal rows, in rising order.

    Returns
    -------
    Tensor of shape (..., B)
        Not negative, and rising strictly with the values beyond t.
    """
    n = reference.shape[-1]
    reference = reference.to(values)
    threshold = torch.quantile(reference, 1 - TAIL_SHARE, dim=-1, keepdim=True)
    excess = (reference - threshold).clamp(min=0)
    beyond = (excess > 0).sum(-1, keepdim=True).clamp(min=1)
    # Where all reference values are equal nothing is known of the scale, and their own size stands in.
    scale = excess.sum(-1, keepdim=True) / beyond
    scale = torch.where(scale > 0, scale, threshold.abs().clamp(min=1e-6))

    least = reference[..., :1]
    start = torch.where(least > 0, 0.0, 2 * least - threshold)
    knots = torch.cat([start, reference], dim=-1).contiguous()
    heights = -torch.log1p(-torch.arange(n + 1, dtype=values.dtype, device=values.device) / (n + 1))
    limit = -math.log(TAIL_SHARE)
    # The quantile lies between two values: stretch the body so that it ends where the tail begins.
    body = limit / _interpolate(threshold, knots, heights).clamp(min=1e-12)
    inside = _interpolate(torch.minimum(values, threshold), knots, heights) * body
    return inside + torch.log1p((values - threshold).clamp(min=0) / scale)


def _interpolate(values: torch.Tensor, knots: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Height of values ``(..., B)`` on the line through knots ``(..., K)`` with heights ``(K,)``."""
    right = torch.searchsorted(knots, values.contiguous(), right=True).clamp(1, knots.shape[-1] - 1)
    start, end = knots.gather(-1, right - 1), knots.gather(-1, right)
    width = end - start
    share = torch.where(width > 0, (values - start) / torch.where(width > 0, width, 1.0), 1.0).clamp(0, 1)
    return heights[right - 1] + share * (heights[right] - heights[right - 1])
