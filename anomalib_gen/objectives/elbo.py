r"""The evidence lower bound as a loss,

    L(x) = -E_q[log p(x | z)] + beta_t sum_j KL_j(x),                                        (1)

with KL_j the divergence of latent dimension j (Kingma and Welling 2014, arXiv:1312.6114, equation 10; beta: Higgins et
al. 2017). A strong decoder may ignore z, and then KL_j = 0 for good. Two things keep that from happening early on:

- *warm-up* (Sonderby et al. 2016, arXiv:1602.02282, section 2.3): beta_t rises from 0 to beta in a straight line over
  the first part of training;
- *free bits* (Kingma et al. 2016, arXiv:1606.04934, equation 15): KL_j is replaced by max(lambda, mean of KL_j over the
  batch), so that the first lambda nats of each dimension cost nothing.

With k > 1 draws the loss is the importance-weighted bound instead (Burda et al. 2016, arXiv:1509.00519, equation 8),

    L(x) = -log (1/k) sum_i p(x | z_i) [N(z_i; 0, I) / q(z_i | x)]^beta_t.                   (2)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import normal_like
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._smoothing import dequantise

VALIDATION_DRAWS = 4
"""Draws of z a held-out row is judged by."""


class EvidenceLowerBound(Component):
    """Minus the evidence lower bound (equation 1, or equation 2 with several draws).

    Held-out rows are judged by the plain bound: beta 1, no warm-up and no free bits, and noise that is the same at
    every evaluation.

    Parameters
    ----------
    beta : float, default=1.0
        Weight of the divergence. Above 1, latent dimensions are fewer and more independent, and minus the loss is still
        a bound on the log-density, if a looser one. Below 1, or with several draws, it is none.
    warmup : float, default=0.0
        Share of training over which the weight rises from 0 to `beta`.
    free_bits : float, default=0.0
        Nats of each latent dimension that cost nothing.
    n_draws : int, default=1
        Draws of z for each row; more than one tightens the bound.

    References
    ----------
    Kingma, D. P., Welling, M. (2014). Auto-encoding variational Bayes. ICLR. arXiv:1312.6114.

    Higgins, I. et al. (2017). beta-VAE: Learning basic visual concepts with a constrained variational framework. ICLR.
    """

    def __init__(
        self, *, beta: float = 1.0, warmup: float = 0.0, free_bits: float = 0.0, n_draws: int = 1
    ) -> None:
        self.beta = beta
        self.warmup = warmup
        self.free_bits = free_bits
        self.n_draws = n_draws

    @property
    def recordable(self) -> bool:
        """Whether steps are alike, as they are without a warm-up."""
        return self.warmup == 0

    def set_progress(self, fraction: float) -> None:
        """Take note of the share of training that has passed, from 0 to 1."""
        self.progress_ = fraction

    @property
    def weight(self) -> float:
        """beta_t: `beta`, or what warm-up has reached of it."""
        # Without a schedule, as in a stream of passes, there is no warm-up.
        progress = getattr(self, "progress_", 1.0)
        return self.beta * (min(1.0, progress / self.warmup) if self.warmup > 0 else 1.0)

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, D)``, as ``(B,)``."""
        self._check()
        x = dequantise(model, x, generator)
        q = model.encode(x)
        if self.n_draws == 1:
            log_likelihood = model.log_likelihood(x, q.draw(normal_like(q.mean, generator)))
            return self.weight * self._charged(q.kl()) - log_likelihood
        log_terms = []
        for _ in range(self.n_draws):
            noise = normal_like(q.mean, generator)
            z = q.draw(noise)
            log_ratio = (0.5 * (noise.square() - z.square()) + q.log_std).sum(1)
            log_terms.append(model.log_likelihood(x, z) + self.weight * log_ratio)
        return math.log(self.n_draws) - torch.logsumexp(torch.stack(log_terms), 0)

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: minus the bound, with as many draws as it has in training."""
        x = dequantise(model, x, generator)
        q = model.encode(x)
        draws = max(VALIDATION_DRAWS, self.n_draws)
        noise = [normal_like(q.mean, generator) for _ in range(draws)]
        if self.n_draws == 1:
            return -torch.stack([model.elbo(x, e, q) for e in noise]).mean(0)
        return math.log(draws) - torch.logsumexp(torch.stack([model.log_weight(x, e, q) for e in noise]), 0)

    def _charged(self, kl: torch.Tensor) -> torch.Tensor:
        """Divergence of each row, ``(B,)``, from that of each row and dimension, ``(B, L)``, less the free bits."""
        if self.free_bits == 0:
            return kl.sum(1)
        # The mean over rows of what is returned is sum_j max(lambda, mean KL_j). A dimension within its free bits has
        # no gradient from here, but keeps the one from the likelihood.
        return torch.where(kl.mean(0) > self.free_bits, kl, self.free_bits).sum(1)

    def _check(self) -> None:
        require(self, counts=("n_draws",), not_negative=("beta", "free_bits", "warmup"))
        if self.warmup > 1:
            raise ValueError(
                f"warmup of {self!r} must be a share of the steps, at most 1, got {self.warmup!r}."
            )
        if self.free_bits > 0 and self.n_draws > 1:
            raise ValueError(
                f"{self!r}: free bits need the divergence in closed form, which several draws do without. "
                "Set n_draws=1 or free_bits=0."
            )
