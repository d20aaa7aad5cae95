r"""Reconstruction error: a row is anomalous if it does not survive the way through the latent space,

    a(x) = mean_j (y_j(x) - y_j(xhat))^2,   xhat = decode(mean of q(z | x)),                 (1)

where y are the observation's coordinates: standardised columns whose tails are compressed, so that no row overflows.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class ReconstructionError(Component):
    """Mean squared difference between a row and its reconstruction (equation 1).

    It knows no probabilities: a row in an empty part of the latent space that decodes well counts as normal, and all
    columns count alike, however well they can be predicted.

    References
    ----------
    Sakurada, M., Yairi, T. (2014). Anomaly detection using autoencoders with nonlinear dimensionality reduction. MLSDA.
    doi:10.1145/2689746.2689747.
    """

    in_nats = False

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        coordinates = model.observation.coordinates
        return (coordinates(x) - coordinates(model.reconstruct(x))).square().flatten(1).mean(1)
