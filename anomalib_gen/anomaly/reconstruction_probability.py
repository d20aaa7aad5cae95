r"""Reconstruction probability: the log-likelihood of a row given causes that the encoder finds likely,

    a(x) = -E_q[log p(x | z)].                                                               (1)

It is the first term of the evidence lower bound: unlike a reconstruction error it weighs each column by how well the
model knows it, and takes the spread of the posterior into account (An and Cho 2015, algorithm 4).
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class ReconstructionProbability(Component):
    """Minus the expected log-likelihood of a row under its posterior, in nats (equation 1).

    Parameters
    ----------
    n_draws : int or "auto", default="auto"
        Draws of z. "auto" takes one more than there are latent dimensions, the fewest that are exact for a linear
        decoder, but from 4 to 16.

    References
    ----------
    An, J., Cho, S. (2015). Variational autoencoder based anomaly detection using reconstruction probability. Special
    Lecture on IE, 2(1), SNU Data Mining Center.
    """

    in_nats = True

    def __init__(self, *, n_draws: int | str = "auto") -> None:
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        q = model.encode(x)
        noise = model.draw_balanced_noise(self.n_draws, generator)
        return -torch.stack([model.log_likelihood(x, q.draw(e)) for e in noise]).mean(0)
