r"""Likelihood of a diffusion model: a(x) = -log p(x), by the change of variables along the probability-flow equation.

It is the density of rows with noise of the model's smallest level (Song et al. 2021, arXiv:2011.13456, equation 39);
see `models.likelihood` for the equation that is solved.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class ODELikelihood(Component):
    """Minus the log-density of a denoiser, in nats.

    Parameters
    ----------
    n_steps : int, default=50
        Steps of the solver, the same for all rows; each costs four evaluations of the denoiser.
    divergence : {"auto", "exact", "hutchinson"}, default="auto"
        How the trace of the denoiser's Jacobian is found: by one backward pass a column, or by random probes, which all
        rows share. "auto" is exact up to 32 columns.
    n_probes : int, default=8
        Probes, if any.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """

    in_nats = True

    def __init__(self, *, n_steps: int = 50, divergence: str = "auto", n_probes: int = 8) -> None:
        self.n_steps = n_steps
        self.divergence = divergence
        self.n_probes = n_probes

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return -model.log_prob(
            x, generator, n_steps=self.n_steps, divergence=self.divergence, n_probes=self.n_probes
        )
