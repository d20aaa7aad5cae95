r"""Layers of bounded spectral norm,

    y = W x / max(1, sigma(W) / c) + b,   sigma(W) = max_{|v| = 1} |W v|,                (1)

so that no layer stretches a distance by more than c and a network of such layers has a known Lipschitz constant
(Miyato et al. 2018, arXiv:1802.05957; the form that only ever shrinks is that of Gouk et al. 2021, arXiv:1804.04368,
section 3.2). Training follows sigma by one step of power iteration a call, v <- W^T u, u <- W v; in evaluation it is
exact, so that the bound holds for whatever weights were put in (averaged ones, say) and calls change nothing.

A convolution with k x k kernels is the matrix R of its kernels, one a row, times the patches of the image. As a pixel
lies in at most k^2 patches, its norm is at most k sigma(R), which takes the place of sigma (the bound is conservative:
the norm may be as little as sigma(R)).

torch's own parametrisation is not used: modules that carry it cannot be pickled.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _bounded(layer: nn.Module, weight: torch.Tensor, u: torch.Tensor, bound: float) -> torch.Tensor:
    """Weights of a layer, whose matrix form is ``weight.flatten(1)``, divided as in equation 1."""
    matrix = weight.flatten(1)
    if layer.training:
        with torch.no_grad():
            v = F.normalize(matrix.t() @ u, dim=0)
            new = F.normalize(matrix @ v, dim=0)
            u.copy_(new)
        # Not through the buffer, which the next call overwrites before this graph is walked back.
        sigma = new @ matrix @ v
    else:
        # Detached, or its last bits would depend on whether gradients are recorded.
        sigma = torch.linalg.matrix_norm(matrix.detach(), 2)
    return weight / (sigma / bound).clamp(min=1)


class SpectralLinear(nn.Linear):
    """Linear layer whose weight matrix has a spectral norm of at most `bound` (equation 1).

    Parameters
    ----------
    in_features, out_features : int
    bound : float
        c of equation 1.
    bias : bool, default=True
    """

    u: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bound: float, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.bound = bound
        self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, in_features)`` to ``(B, out_features)``."""
        return F.linear(x, _bounded(self, self.weight, self.u, self.bound), self.bias)


class SpectralConv(nn.Conv2d):
    """Convolution that keeps the size of maps and whose operator norm is at most `bound`.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        k, odd.
    bound : float
        c of equation 1.
    """

    u: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bound: float) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.bound = bound
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        weight = _bounded(self, self.weight, self.u, self.bound / self.kernel_size[0])
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def make_linear(
    in_features: int, out_features: int, *, spectral_norm: float | None, bias: bool = True
) -> nn.Linear:
    """Return a linear layer, of bounded spectral norm unless `spectral_norm` is None."""
    if spectral_norm is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return SpectralLinear(in_features, out_features, bound=spectral_norm, bias=bias)


def make_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, spectral_norm: float | None
) -> nn.Conv2d:
    """Return a convolution that keeps the size of maps, of bounded norm unless `spectral_norm` is None."""
    if spectral_norm is None:
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return SpectralConv(in_channels, out_channels, kernel_size, bound=spectral_norm)
