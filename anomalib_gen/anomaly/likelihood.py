"""Likelihood: a row is as anomalous as it is improbable, a(x) = -log p(x) (Bishop 1994)."""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class Likelihood(Component):
    """Minus the model's log-density, in nats.

    It finds rows in empty regions. It depends on the units and on the choice of coordinates, and on images it is
    known to rate simple pictures from another source as normal (Nalisnick et al. 2019, arXiv:1810.09136).

    References
    ----------
    Bishop, C. M. (1994). Novelty detection and neural network validation. IEE Proceedings - Vision, Image and
    Signal Processing, 141(4). doi:10.1049/ip-vis:19941330.
    """

    in_nats = True
    """A density in the units of the model's input: the detector adds the log-Jacobian of its scaling."""

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return -model.log_prob(x)
