r"""Convolutional networks between images and vectors, for any size from 8 x 8 up and any number of channels.

Both are pyramids of residual blocks without normalisation,

    h <- h + conv(act(conv(act(h)) + V c)),

whose second convolution starts at zero, so that a deep pyramid starts as a shallow one (Zhang, Dauphin and Ma 2019,
arXiv:1901.09321). Between levels the longer sides are halved by averaging, or doubled by repetition, until both are at
most 4; channels double from level to level, up to four times the first. act is the SiLU, which has derivatives of
every order: score matching differentiates an energy twice. Nothing depends on the other images of a batch.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.networks.spectral import make_conv, make_linear

MIN_SIDE, MAX_WIDENING = 4, 4


def pyramid(height: int, width: int, smallest: int = MIN_SIDE) -> list[tuple[int, int]]:
    """Sizes of maps from ``(height, width)`` down: sides above `smallest` are halved and rounded up."""
    sizes = [(height, width)]
    while max(sizes[-1]) > smallest:
        sizes.append(tuple(math.ceil(side / 2) if side > smallest else side for side in sizes[-1]))  # type: ignore[arg-type]
    return sizes


def shrink(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Average maps ``(B, C, H, W)`` down to the next `size` of a pyramid."""
    factors = [-(-side // new) for side, new in zip(x.shape[2:], size, strict=True)]
    return F.avg_pool2d(x, factors, ceil_mode=True)


def widths(channels: int, n_levels: int) -> list[int]:
    """Channels of each level of a pyramid."""
    return [channels * min(2**level, MAX_WIDENING) for level in range(n_levels)]


class ConvBlock(nn.Module):
    """Residual block of two convolutions with an optional conditioning vector."""

    def __init__(self, channels: int, context_features: int, spectral_norm: float | None) -> None:
        super().__init__()
        self.first, self.second = (
            make_conv(channels, channels, 3, spectral_norm=spectral_norm) for _ in range(2)
        )
        self.context = nn.Linear(context_features, channels, bias=False) if context_features else None
        nn.init.zeros_(self.second.weight)

    def forward(self, h: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        r = self.first(F.silu(h))
        if self.context is not None:
            r = r + self.context(context)[:, :, None, None]
        return h + self.second(F.silu(r))


class ConvNet(nn.Module):
    """Residual convolutional network from images to vectors: an energy, or an encoder.

    Parameters
    ----------
    event_shape : tuple of int
        ``(channels, height, width)`` of the images.
    n_outputs : int
    channels : int, default=16
        Channels of the finest level.
    n_blocks : int, default=1
        Residual blocks a level.
    context_features : int, default=0
        Width of the conditioning vector; 0 means none.
    spectral_norm : float, optional
        Bound on the operator norm of every convolution and of the last layer; None for no bound.
    zero_output : bool, default=True
        Start with an output that is zero everywhere, so that what the network steers starts neutral.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        n_outputs: int,
        *,
        channels: int = 16,
        n_blocks: int = 1,
        context_features: int = 0,
        spectral_norm: float | None = None,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        n_channels, height, width = event_shape
        self.sizes = pyramid(height, width)
        wide = widths(channels, len(self.sizes))
        self.input = make_conv(n_channels, channels, 3, spectral_norm=spectral_norm)
        self.widen = nn.ModuleList(make_conv(a, b, 1, spectral_norm=spectral_norm) for a, b in pairwise(wide))
        self.blocks = nn.ModuleList(
            nn.ModuleList(ConvBlock(c, context_features, spectral_norm) for _ in range(n_blocks))
            for c in wide
        )
        features = wide[-1] * math.prod(self.sizes[-1])
        self.output = make_linear(features, n_outputs, spectral_norm=spectral_norm)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, C, H, W)`` and, if conditioned, ``(B, context_features)`` to ``(B, n_outputs)``."""
        h = self.input(x)
        for level, blocks in enumerate(self.blocks):
            if level:
                h = self.widen[level - 1](shrink(h, self.sizes[level]))
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, context)
        return self.output(F.silu(h).flatten(1))


class ConvDecoder(nn.Module):
    """Residual convolutional network from vectors to images.

    Parameters
    ----------
    n_inputs : int
    event_shape : tuple of int
        ``(channels, height, width)`` of the images.
    channels : int, default=16
        Channels of the finest level.
    n_blocks : int, default=1
        Residual blocks a level.
    zero_output : bool, default=False
        Start with an output that is zero everywhere.
    """

    def __init__(
        self,
        n_inputs: int,
        event_shape: tuple[int, ...],
        *,
        channels: int = 16,
        n_blocks: int = 1,
        zero_output: bool = False,
    ) -> None:
        super().__init__()
        n_channels, height, width = event_shape
        self.sizes = pyramid(height, width)[::-1]
        wide = widths(channels, len(self.sizes))[::-1]
        self.start = (wide[0], *self.sizes[0])
        self.input = nn.Linear(n_inputs, math.prod(self.start))
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(wide))
        self.blocks = nn.ModuleList(
            nn.ModuleList(ConvBlock(c, 0, None) for _ in range(n_blocks)) for c in wide
        )
        self.output = nn.Conv2d(channels, n_channels, 3, padding=1)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map ``(B, n_inputs)`` to ``(B, C, H, W)``."""
        h = self.input(z).unflatten(1, self.start)
        for level, blocks in enumerate(self.blocks):
            if level:
                h = F.interpolate(self.narrow[level - 1](h), size=self.sizes[level])
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h)
        return self.output(F.silu(h))
