r"""Importance-weighted bound: an estimate of -log p(x) from k draws of the latent variables,

    a(x) = -log (1/k) sum_i p(x | z_i) N(z_i; 0, I) / q(z_i | x),   z_i ~ q(z | x).          (1)

Its mean lies above -log p(x) and falls towards it as k grows (Burda et al. 2016, theorem 1).
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class ImportanceWeighted(Component):
    """Minus the importance-weighted bound on the log-density, in nats (equation 1).

    Parameters
    ----------
    n_draws : int, default=64
        k. The same draws of noise serve every row.

    References
    ----------
    Burda, Y., Grosse, R., Salakhutdinov, R. (2016). Importance weighted autoencoders. ICLR. arXiv:1509.00519.
    """

    in_nats = True

    def __init__(self, *, n_draws: int = 64) -> None:
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return -model.iwae(x, model.draw_noise(self.n_draws, generator))
