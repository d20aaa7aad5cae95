"""Which anomaly stands for minus the log-density of a model."""

from __future__ import annotations

from typing import Any

from anomalib_gen.anomaly.diffusion_elbo import DiffusionELBO
from anomalib_gen.anomaly.elbo import NegativeELBO
from anomalib_gen.anomaly.energy import Energy


def density_anomaly(model: Any) -> Any:
    """The component that estimates minus the log-density of a model in the cheapest sound way."""
    if hasattr(model, "elbo_terms"):
        return DiffusionELBO(n_steps=32)
    if hasattr(model, "draw_balanced_noise"):
        return NegativeELBO()
    return Energy()
