r"""Divergence from the prior: how much the encoder has to say about a row,

    a(x) = KL(q(z | x) || N(0, I)).                                                          (1)

It is large where a row's causes lie far from the origin of the latent space, and blind to what the decoder makes of
them. Far outside the data the encoder sees a clipped row, and then (1) stays where it is.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class KLDivergence(Component):
    """Divergence of a row's posterior from the prior, in nats (equation 1).

    Mostly of use beside `ReconstructionProbability`, to see which of the two parts of the bound a row fails.
    """

    in_nats = False

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return model.kl(x)
