r"""Compressed tails: an elementwise bijection that leaves the bulk of the data alone and tames what lies beyond,

    t(x) = sign(x) (c + log(1 + |x| - c))  for |x| > c,  else x;   log t'(x) = -log(1 + |x| - c) or 0.          (1)

A density model of y = t(x) is one of x by log p(x) = log p(y) + sum log t'(x), and no row, however far out, makes its
network overflow: t(1e308) is about c + 709.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

TAIL_START = 5.0
"""c of equation 1, in the standard deviations that rows are given in; infinity leaves all values alone."""


def compress_tails(x: torch.Tensor, start: float = TAIL_START) -> tuple[torch.Tensor, torch.Tensor]:
    """Map ``(B, D)`` by t; also the log-determinant ``(B,)``."""
    y, log_slope = compress_values(x, start)
    return y, log_slope.flatten(1).sum(1)


def compress_values(x: torch.Tensor, start: float = TAIL_START) -> tuple[torch.Tensor, torch.Tensor]:
    """Map values of any shape by t; also log t' of each, of the same shape."""
    if math.isinf(start):  # softshrink takes finite numbers only
        return x, torch.zeros_like(x)
    excess = F.softshrink(x, start)
    log_excess = torch.log1p(excess.abs())
    return x.clamp(-start, start) + torch.copysign(log_excess, excess), -log_excess


def expand_tails(y: torch.Tensor, start: float = TAIL_START) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `compress_tails`; the log-determinant is that of the inverse."""
    log_excess = (y.abs() - start).clamp(min=0)
    x = y.clamp(-start, start) + y.sign() * torch.expm1(log_excess)
    return x, log_excess.flatten(1).sum(1)
