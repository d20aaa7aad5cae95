r"""A linear layer of bounded spectral norm,

    y = W x / max(1, sigma(W) / c) + b,   sigma(W) = max_{|v| = 1} |W v|,                (1)

so that no layer stretches a distance by more than c and a network of such layers has a known Lipschitz constant
(Miyato et al. 2018, arXiv:1802.05957; the form that only ever shrinks is that of Gouk et al. 2021, arXiv:1804.04368,
section 3.2). Training follows sigma by one step of power iteration a call, v <- W^T u, u <- W v; in evaluation it is
exact, so that the bound holds for whatever weights were put in (averaged ones, say) and calls change nothing.

torch's own parametrisation is not used: modules that carry it cannot be pickled.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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
        if self.training:
            with torch.no_grad():
                v = F.normalize(self.weight.t() @ self.u, dim=0)
                u = F.normalize(self.weight @ v, dim=0)
                self.u.copy_(u)
            # Not through the buffer, which the next call overwrites before this graph is walked back.
            sigma = u @ self.weight @ v
        else:
            # Detached, or its last bits would depend on whether gradients are recorded.
            sigma = torch.linalg.matrix_norm(self.weight.detach(), 2)
        return F.linear(x, self.weight / (sigma / self.bound).clamp(min=1), self.bias)


def make_linear(
    in_features: int, out_features: int, *, spectral_norm: float | None, bias: bool = True
) -> nn.Linear:
    """Return a linear layer, of bounded spectral norm unless `spectral_norm` is None."""
    if spectral_norm is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return SpectralLinear(in_features, out_features, bound=spectral_norm, bias=bias)
