"""Energy: a row is as anomalous as its energy is high, p(x) = exp(-E(x)) / Z (LeCun et al. 2006)."""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class Energy(Component):
    """The model's energy, in nats: minus its log-density up to a constant that all rows share.

    References
    ----------
    LeCun, Y., Chopra, S., Hadsell, R., Ranzato, M., Huang, F. J. (2006). A tutorial on energy-based learning.
    In Predicting Structured Data. MIT Press.
    Zhai, S., Cheng, Y., Lu, W., Zhang, Z. (2016). Deep structured energy based models for anomaly detection. ICML.
    arXiv:1605.07717.
    """

    in_nats = True

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        energies: torch.Tensor = model.energy(x)
        return energies
