r"""Variational bound of a diffusion model: a row is as anomalous as the bound on its density is low,

    a(x) = -ELBO(x) >= -log p(x),                                                            (1)

the sum over levels of what a denoiser misses, see `models.likelihood` for its parts, and for what p is: the density of
rows with noise of sqrt(2) times the smallest level. The noise is the same for every row, so that a row's value depends
on that row alone.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class DiffusionELBO(Component):
    """Minus the variational bound on the log-density, in nats (equation 1).

    Parameters
    ----------
    n_steps : int, default=100
        Steps of the reverse process, over levels in equal ratios. With few of them the bound is loose.
    n_draws : int, default=1
        Pairs e and -e of noise at each step; each costs two evaluations of the denoiser.

    References
    ----------
    Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.

    Kingma, D. P., Salimans, T., Poole, B., Ho, J. (2021). Variational diffusion models. NeurIPS. arXiv:2107.00630.
    """

    in_nats = True

    def __init__(self, *, n_steps: int = 100, n_draws: int = 1) -> None:
        self.n_steps = n_steps
        self.n_draws = n_draws

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        terms = model.elbo_terms(x, generator, n_steps=self.n_steps, n_draws=self.n_draws)
        return -terms.elbo
