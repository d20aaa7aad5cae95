r"""A residual U-Net with attention: from images to images at several scales, told one vector (a noise level, say).

    down:  h_l = blocks(shrink(h_{l-1})),     up:  g_l = blocks(grow(g_{l+1}), h_l),

with a block h + conv(act(a(c) norm(conv(act(norm(h)))) + b(c))) that the vector c scales and shifts (Ronneberger et
al. 2015, arXiv:1505.04597; the form of Ho et al. 2020, arXiv:2006.11239, appendix B, and of Dhariwal and Nichol 2021,
arXiv:2105.05233, section 3.1). Sides are halved, and rounded up, until both are at most 8; there, pixels attend to one
another. Norms are over groups of channels of one image: nothing depends on the other images of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.networks.convolution import pyramid, shrink, widths

COARSEST = 8
"""Sides at the bottom of the U, where attention is."""
GROUPS = 8


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


class UNetBlock(nn.Module):
    """Residual block from `n_inputs` to `n_outputs` channels, scaled and shifted by a vector."""

    def __init__(self, n_inputs: int, n_outputs: int, context_features: int) -> None:
        super().__init__()
        self.norm, self.middle_norm = _norm(n_inputs), _norm(n_outputs)
        self.first = nn.Conv2d(n_inputs, n_outputs, 3, padding=1)
        self.second = nn.Conv2d(n_outputs, n_outputs, 3, padding=1)
        self.modulation = nn.Linear(context_features, 2 * n_outputs) if context_features else None
        self.skip = nn.Conv2d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, h: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Map ``(B, n_inputs, H, W)`` to ``(B, n_outputs, H, W)``."""
        r = self.middle_norm(self.first(F.silu(self.norm(h))))
        if self.modulation is not None:
            scale, shift = self.modulation(context)[:, :, None, None].chunk(2, dim=1)
            r = (1 + scale) * r + shift
        return self.skip(h) + self.second(F.silu(r))


class Attention(nn.Module):
    """Self-attention over the pixels of small maps, as a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # (About 32 channels a head, and the same number for all.)
        most = max(1, channels // 32)
        self.n_heads = next(n for n in range(most, 0, -1) if channels % n == 0)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.output.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        heads = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.n_heads, -1))
        q, k, v = heads.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return h + self.output(mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, tuple(h.shape[2:])))


class UNet(nn.Module):
    """Residual U-Net with attention at its coarsest level.

    Parameters
    ----------
    event_shape : tuple of int
        ``(channels, height, width)`` of the input.
    n_outputs : int
        Channels of the output.
    channels : int, default=16
        Channels of the finest level; twice as many on the next and four times as many below.
    n_blocks : int, default=1
        Residual blocks a level on the way down, and as many on the way up.
    context_features : int, default=0
        Width of the conditioning vector; 0 means none.
    zero_output : bool, default=True
        Start with an output that is zero everywhere.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        n_outputs: int,
        *,
        channels: int = 16,
        n_blocks: int = 1,
        context_features: int = 0,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        n_channels, height, width = event_shape
        self.sizes = pyramid(height, width, COARSEST)
        wide = widths(channels, len(self.sizes))
        embedding = 4 * channels if context_features else 0
        self.embedding = (
            nn.Sequential(
                nn.Linear(context_features, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
            )
            if context_features
            else None
        )
        self.input = nn.Conv2d(n_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = channels
        for c in wide:
            self.down.append(
                nn.ModuleList(UNetBlock(above if k == 0 else c, c, embedding) for k in range(n_blocks))
            )
            above = c if n_blocks else above
        self.middle = nn.ModuleList(
            [UNetBlock(above, wide[-1], embedding), UNetBlock(wide[-1], wide[-1], embedding)]
        )
        self.attention = Attention(wide[-1])
        below = wide[-1]
        skips = wide if n_blocks else [channels] * len(wide)
        for c, skipped in zip(wide[::-1], skips[::-1], strict=True):
            n = max(1, n_blocks)
            self.up.append(
                nn.ModuleList(UNetBlock(below + skipped if k == 0 else c, c, embedding) for k in range(n))
            )
            below = c
        self.norm, self.output = _norm(channels), nn.Conv2d(channels, n_outputs, 3, padding=1)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, C, H, W)`` and, if conditioned, ``(B, context_features)`` to ``(B, n_outputs, H, W)``."""
        e = None if self.embedding is None else self.embedding(context)
        h, skips = self.input(x), []
        for level, blocks in enumerate(self.down):
            if level:
                h = shrink(h, self.sizes[level])
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, e)
            skips.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, e)), e)
        for level, blocks in enumerate(self.up):
            skip = skips.pop()
            if level:
                h = F.interpolate(h, size=skip.shape[2:])
            h = torch.cat([h, skip], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, e)
        return self.output(F.silu(self.norm(h)))
