r"""Variational autoencoders: a density with latent variables, and a bound on it that can be computed.

A row x has an unseen cause z of few dimensions, z ~ N(0, I) and x ~ p(x | z), so that

    p(x) = int p(x | z) N(z; 0, I) dz.                                                       (1)

p(x | z) is an observation likelihood (models.observation) around a location that the *decoder* computes from z. An
*encoder* guesses which causes are likely, q(z | x) = N(mean(x), diag std(x)^2), and by Jensen's inequality

    log p(x) >= ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || N(0, I))                        (2)

(Kingma and Welling 2014, arXiv:1312.6114, equation 3). The gap is KL(q(z | x) || p(z | x)). With k draws z_i ~ q,

    log p(x) >= E log (1/k) sum_i w_i >= ELBO(x),   w_i = p(x | z_i) N(z_i; 0, I) / q(z_i | x)      (3)

closes it as k grows (Burda et al. 2016, arXiv:1509.00519, theorem 1). With linear maps and one variance for all columns
the model is probabilistic PCA, and (2) can be tight (Lucas et al. 2019, arXiv:1911.02469).

The encoder sees rows clipped to a box: far outside it q is constant and bounded, so the bound falls off as p(x | z)
does, along every ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from anomalib_gen._runtime import check_count, check_shape, normal_noise
from anomalib_gen.models.observation import Observation

ENCODER_BOUND = 8.0
"""The encoder sees its inputs, in compressed coordinates, clipped to this box; it ends 24 standard deviations out."""
MIN_DRAWS, MAX_DRAWS = 4, 16
"""Bounds on the draws of z that stand for an expectation; a decoder bends too much for fewer."""
LOG_STD_RANGE = 6.0
"""Posterior deviations lie in exp(-6) .. exp(6), along a smooth curve whose gradient vanishes nowhere."""

Shape = int | tuple[int, ...]
"""Width of a row, or the shape of an image."""
NetworkFactory = Callable[[Shape, Shape], nn.Module]
"""``factory(inputs, outputs) -> module`` with ``forward((B, *inputs)) -> (B, *outputs)``, each a width or a shape."""


class Posterior(NamedTuple):
    """q(z | x) of each row.

    Attributes
    ----------
    mean, log_std : Tensor of shape (B, L)
    """

    mean: torch.Tensor
    log_std: torch.Tensor

    def kl(self) -> torch.Tensor:
        """KL divergence from the prior, in nats, of each row and latent dimension: ``(B, L)``."""
        return 0.5 * (self.mean.square() + torch.exp(2 * self.log_std) - 1) - self.log_std

    def draw(self, noise: torch.Tensor) -> torch.Tensor:
        """Return z = mean + std * noise, ``(B, L)``, for standard normal noise of shape (B, L) or (L,)."""
        return self.mean + self.log_std.exp() * noise


class VAEModel(nn.Module):
    """The density of equation 1 with its encoder.

    Parameters
    ----------
    encoder : NetworkFactory
        Called with D (or E) and 2 L; its outputs are the posterior means and log-deviations.
    decoder : NetworkFactory
        Called with L and D (or E); its outputs are the locations of the observation.
    observation : Observation
        p(x | location).
    features : int or tuple of int
        Columns D, or the shape E of images.
    n_components : int
        Latent dimensions L.
    """

    def __init__(
        self,
        encoder: NetworkFactory,
        decoder: NetworkFactory,
        observation: Observation,
        *,
        features: Shape,
        n_components: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder(features, 2 * n_components)
        self.decoder = decoder(n_components, features)
        self.observation = observation
        self.features = features
        self.event_shape = (features,) if isinstance(features, int) else tuple(features)
        self.n_components = n_components

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return q(z | x) of rows ``(B, *E)``."""
        seen = self.observation.coordinates(x).clamp(-ENCODER_BOUND, ENCODER_BOUND)
        output = check_shape(self.encoder(seen), (len(x), 2 * self.n_components), "The encoder")
        mean, raw = output.chunk(2, dim=1)
        return Posterior(mean, LOG_STD_RANGE * torch.tanh(raw / LOG_STD_RANGE))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Location ``(B, *E)`` of the observation for latent vectors ``(B, L)``."""
        return check_shape(self.decoder(z), (len(z), *self.event_shape), "The decoder")

    def log_likelihood(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return log p(x | z), ``(B,)``, of rows ``(B, *E)`` and latent vectors ``(B, L)``."""
        return self.observation.log_prob(x, self.decode(z))

    def kl(self, x: torch.Tensor) -> torch.Tensor:
        """KL(q(z | x) || N(0, I)) of rows ``(B, *E)``, in nats, ``(B,)``."""
        return self.encode(x).kl().sum(1)

    def elbo(self, x: torch.Tensor, noise: torch.Tensor, posterior: Posterior | None = None) -> torch.Tensor:
        """Equation 2 with the expectation taken over one draw and the divergence in closed form.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
        noise : Tensor of shape (B, L) or (L,)
            Standard normal; of shape (L,) all rows share it.
        posterior : Posterior, optional
            What to use in place of ``encode(x)``.

        Returns
        -------
        Tensor of shape (B,)
            In nats.
        """
        q = self.encode(x) if posterior is None else posterior
        return self.log_likelihood(x, q.draw(noise)) - q.kl().sum(1)

    def log_weight(
        self, x: torch.Tensor, noise: torch.Tensor, posterior: Posterior | None = None
    ) -> torch.Tensor:
        """Return log w of equation 3 for one draw, ``(B,)``; arguments as for `elbo`."""
        q = self.encode(x) if posterior is None else posterior
        z = q.draw(noise)
        # log N(z; 0, I) - log q(z | x); the constants of both cancel.
        log_ratio = 0.5 * (noise.square() - z.square()) + q.log_std
        return self.log_likelihood(x, z) + log_ratio.sum(1)

    def draw_noise(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw standard normal noise ``(n, L)``: a latent vector for each of n passes over all rows."""
        check_count(n, "n_draws")
        return normal_noise((n, self.n_components), next(self.parameters()), generator)

    def draw_balanced_noise(self, n: int | str, generator: torch.Generator) -> torch.Tensor:
        """Noise ``(n, L)`` with the moments of a standard normal, for the expectation in equation 2.

        All rows share the few draws, so what is off in them is off for all rows. Here they have mean 0 and variance 1
        in each dimension, and more than L of them no correlations: the expectation is then exact where log p(x | z) is
        quadratic in z, as for a linear decoder (L + 1 of them are the corners of a simplex, here turned at random:
        Stroud 1957, Math. Tables Aids Comput. 11, 257-261). Fewer draws are as nearly orthogonal as they can be.

        Parameters
        ----------
        n : int or "auto"
            "auto" takes L + 1, but from `MIN_DRAWS` to `MAX_DRAWS`.
        generator : torch.Generator

        Returns
        -------
        Tensor of shape (n, L)
        """
        if isinstance(n, str):
            if n != "auto":
                raise ValueError(f"n_draws must be a positive integer or 'auto', got {n!r}.")
            n = min(max(self.n_components + 1, MIN_DRAWS), MAX_DRAWS)
        noise = self.draw_noise(n, generator)
        if n == 1:
            return noise
        centred = noise.double().cpu()
        u, _, vt = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
        # Centring leaves at most n - 1 directions; all of them get the same weight.
        rank = min(n - 1, self.n_components)
        even = u[:, :rank] @ vt[:rank]
        return (even / even.std(0, correction=0)).to(noise)

    def iwae(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Equation 3, ``(B,)``, in nats, for k draws ``(k, L)`` or ``(k, B, L)`` of noise."""
        q = self.encode(x)
        # One draw at a time: memory does not grow with k, but for k numbers a row.
        log_weights = torch.stack([self.log_weight(x, e, q) for e in noise])
        return torch.logsumexp(log_weights, 0) - math.log(len(noise))

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Decode the posterior means of rows ``(B, *E)``, in the units of x."""
        return self.observation.centre(self.decode(self.encode(x).mean))

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)`` rows."""
        return self.observation.sample(self.decode(self.draw_noise(n, generator)), generator)
