"""Energy: a row is as anomalous as its unnormalised density is low, a(x) = E(x) = -log p(x) - log Z."""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class Energy(Component):
    """The model's energy: minus the log-density up to the constant log Z, which orders rows all the same.

    Of a model that is conditional on noise it is the energy at the smallest level.

    References
    ----------
    Zhai, S., Cheng, Y., Lu, W., Zhang, Z. (2016). Deep structured energy based models for anomaly detection. ICML.
    arXiv:1605.07717.
    """

    in_nats = True
    """An unnormalised density in the units of the model's input: the detector adds the log-Jacobian of its scaling."""

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        energy: torch.Tensor = model.energy(x)
        return energy
