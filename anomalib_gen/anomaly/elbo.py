r"""Evidence lower bound: a row is as anomalous as the model's bound on its density is low,

    a(x) = -E_q[log p(x | z)] + KL(q(z | x) || N(0, I)) >= -log p(x).                        (1)

The expectation is over draws z = mean(x) + std(x) e with the same few e for every row, so that a row's score depends on
that row alone. The draws have mean 0 and variance 1 in each dimension, and more of them than there are dimensions the
covariances of a standard normal (`VAEModel.draw_balanced_noise`).
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class NegativeELBO(Component):
    """Minus the evidence lower bound, in nats (equation 1).

    Parameters
    ----------
    n_draws : int or "auto", default="auto"
        Draws of z. "auto" takes one more than there are latent dimensions, the fewest that are exact for a linear
        decoder, but from 4 to 16.

    References
    ----------
    Kingma, D. P., Welling, M. (2014). Auto-encoding variational Bayes. ICLR. arXiv:1312.6114.
    """

    in_nats = True

    def __init__(self, *, n_draws: int | str = "auto") -> None:
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        q = model.encode(x)
        bounds = [model.elbo(x, e, q) for e in model.draw_balanced_noise(self.n_draws, generator)]
        return -torch.stack(bounds).mean(0)
