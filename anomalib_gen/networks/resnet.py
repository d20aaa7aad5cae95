"""A residual multilayer perceptron for rows, with an optional conditioning vector.

    h_0     = W_in x + V c
    h_{k+1} = h_k + A_k act(B_k act(h_k) + V_k c)
    out     = W_out act(h_K)

The pre-activation form of He et al. (2016), "Identity mappings in deep residual networks", arXiv:1603.05027,
equation 1, with fully connected layers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.networks.spectral import make_linear


class ResidualMLP(nn.Module):
    """Residual multilayer perceptron.

    Parameters
    ----------
    n_inputs, n_outputs : int
        Widths of the input and the output.
    hidden_features : int, default=64
        Width of every hidden layer.
    n_blocks : int, default=2
        Residual blocks of two linear layers each.
    context_features : int, default=0
        Width of the conditioning vector; 0 means none.
    spectral_norm : float, optional
        Bound c on the spectral norm of every weight matrix but those of the context; None for no bound. The network
        is then Lipschitz with constant ``1.1 c^2 (1 + 1.21 c^2)^n_blocks``, 1.1 being that of the SiLU.
    zero_output : bool, default=True
        Start with an output that is zero everywhere, so that what the network steers starts neutral.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        hidden_features: int = 64,
        n_blocks: int = 2,
        context_features: int = 0,
        spectral_norm: float | None = None,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        self.input = make_linear(n_inputs, hidden_features, spectral_norm=spectral_norm)
        self.context = nn.ModuleList(
            nn.Linear(context_features, hidden_features, bias=False)
            for _ in range(n_blocks + 1 if context_features else 0)
        )
        self.first, self.second = (
            nn.ModuleList(
                make_linear(hidden_features, hidden_features, spectral_norm=spectral_norm)
                for _ in range(n_blocks)
            )
            for _ in range(2)
        )
        self.output = make_linear(hidden_features, n_outputs, spectral_norm=spectral_norm)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, n_inputs)`` and, if conditioned, ``(B, context_features)`` to ``(B, n_outputs)``."""
        h = self.input(x)
        if len(self.context):
            h = h + self.context[0](context)
        for k, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            r = first(F.silu(h))
            if len(self.context):
                r = r + self.context[k + 1](context)
            h = h + second(F.silu(r))
        return self.output(F.silu(h))
