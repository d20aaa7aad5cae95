r"""An anomaly in one file: minus the log-density of the model, smoothed by noise.

A density may have narrow spikes and cracks that the data do not ask for. Averaged over noise of deviation s they go,

    a(x) = -log E p(x + s e),     e ~ N(0, I),                                               (1)

which for a normal density of variance v is the one of variance v + s^2. The expectation is over a few draws that are
the same for every row: the score of a row then depends on that row alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import normal_noise


class SmoothedLikelihood(Component):
    """Minus the log of the smoothed density, in nats (equation 1).

    Parameters
    ----------
    noise : float, default=0.1
        s, in standard deviations of each column.
    n_draws : int, default=16
        Draws of noise, in pairs e and -e.
    """

    in_nats = True
    """A density in the units of the model's input: the detector adds the log-Jacobian of its scaling."""

    def __init__(self, *, noise: float = 0.1, n_draws: int = 16) -> None:
        self.noise = noise
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        terms = []
        for _ in range(max(1, self.n_draws // 2)):
            e = normal_noise(tuple(x.shape[1:]), x, generator)  # of the shape of one row
            terms += [model.log_prob(x + self.noise * e), model.log_prob(x - self.noise * e)]
        return math.log(len(terms)) - torch.stack(terms).logsumexp(0)
