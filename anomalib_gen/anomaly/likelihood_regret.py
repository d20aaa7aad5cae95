r"""Likelihood regret: how much a row's own best posterior improves on the one that the encoder gives it,

    a(x) = max_q ELBO(x; q) - ELBO(x; q(z | x)),   q = N(mean, diag std^2).                  (1)

An encoder that was trained on normal rows serves them well, so there is little to gain; a foreign row gains more.
Unlike the density itself this does not favour simple rows (Xiao et al. 2020, equation 5).

The maximum is sought by Adam on mean and log std of each row, from the encoder's values on. Adam works number by
number, so rows refit in one batch do not know of each other. Draws of z come from the same few e at every step and for
every row: each row climbs a fixed function, and the best point met on the way, the start included, is what counts.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count

BETAS = (0.8, 0.9)
"""Adam's memory: short, because what is climbed has no noise and the steps are few."""


class LikelihoodRegret(Component):
    """Gain in the evidence lower bound by refitting the posterior of each row, in nats (equation 1).

    It helps where the encoder, rather than the decoder, does not know a row, and takes some of the favour for simple
    images away. It fails where an anomaly is encoded as well as normal rows are, and on tables it is behind the bound.

    Parameters
    ----------
    n_steps : int, default=100
        Steps of Adam. Each costs a pass through the decoder and back for each draw: this is by far the slowest anomaly
        of an autoencoder.
    learning_rate : float, default=0.4
        First step size; it falls to zero along half a cosine.
    n_draws : int, default=4
        Draws of z.

    References
    ----------
    Xiao, Z., Yan, Q., Amit, Y. (2020). Likelihood regret: An out-of-distribution detection score for variational
    auto-encoder. NeurIPS. arXiv:2003.02977.
    """

    in_nats = False

    def __init__(self, *, n_steps: int = 100, learning_rate: float = 0.4, n_draws: int = 4) -> None:
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        with torch.inference_mode(False), torch.no_grad():
            return self._regret(model, x.clone(), generator)

    def _regret(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # Without a step that leads somewhere all rows have a regret of zero.
        check_count(self.n_steps, "n_steps")
        if not (isinstance(self.learning_rate, Real) and 0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate!r}.")
        encoded = model.encode(x)
        noise = model.draw_balanced_noise(self.n_draws, generator)

        def bound(q: Any) -> torch.Tensor:
            return torch.stack([model.elbo(x, e, q) for e in noise]).mean(0)

        parts = [part.detach().clone().requires_grad_() for part in encoded]
        optimiser = torch.optim.Adam(parts, lr=self.learning_rate, betas=BETAS)
        start = best = bound(encoded).detach()
        for step in range(self.n_steps):
            optimiser.param_groups[0]["lr"] = (
                self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.n_steps))
            )
            with torch.enable_grad():
                values = bound(type(encoded)(*parts))
                gradients = torch.autograd.grad(-values.sum(), parts)
            # A refit that runs away does not count.
            best = torch.fmax(best, values.detach())
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
            optimiser.step()
        return torch.fmax(best, bound(type(encoded)(*parts)).detach()) - start
