r"""A multilayer perceptron for rows, with an optional conditioning vector.

    h_1     = act(W_1 x + V_1 c)
    h_{k+1} = act(W_{k+1} h_k + V_{k+1} c)
    out     = W_out h_K

act is the SiLU, u / (1 + exp(-u)): it has derivatives of every order, which score matching needs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.networks.spectral import make_linear


class MLP(nn.Module):
    """Multilayer perceptron.

    Parameters
    ----------
    n_inputs, n_outputs : int
        Widths of the input and the output.
    hidden_features : int, default=64
        Width of every hidden layer.
    n_layers : int, default=2
        Hidden layers.
    context_features : int, default=0
        Width of the conditioning vector; 0 means none.
    spectral_norm : float, optional
        Bound on the spectral norm of every weight matrix but those of the context; None for no bound. The network is
        then Lipschitz with constant ``spectral_norm ** (n_layers + 1) * 1.1 ** n_layers``, 1.1 being that of the SiLU.
    zero_output : bool, default=True
        Start with an output that is zero everywhere, so that what the network steers starts neutral.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        hidden_features: int = 64,
        n_layers: int = 2,
        context_features: int = 0,
        spectral_norm: float | None = None,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        widths = [n_inputs, *[hidden_features] * n_layers]
        self.layers = nn.ModuleList(
            make_linear(a, b, spectral_norm=spectral_norm) for a, b in pairwise(widths)
        )
        self.context = nn.ModuleList(
            nn.Linear(context_features, hidden_features, bias=False)
            for _ in range(n_layers if context_features else 0)
        )
        self.output = make_linear(widths[-1], n_outputs, spectral_norm=spectral_norm)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, n_inputs)`` and, if conditioned, ``(B, context_features)`` to ``(B, n_outputs)``."""
        h = x
        for k, layer in enumerate(self.layers):
            h = layer(h)
            if len(self.context):
                h = h + self.context[k](context)
            h = F.silu(h)
        return self.output(h)
