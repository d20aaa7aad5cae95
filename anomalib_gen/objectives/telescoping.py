r"""Telescoping density-ratio estimation: from noise to data in small steps.

Where data and noise hardly overlap, a classifier tells them apart long before it knows their density ratio. Rhodes et
al. (2020, arXiv:2006.12204, equations 2 to 6) put *waymarks* between a row x_0 and a noise row x_K,

    x_k = sqrt(1 - alpha_k^2) x_0 + alpha_k x_K,   0 = alpha_0 < ... < alpha_K = 1,                 (1)

and learn the ratio of each neighbouring pair, r_k = p_k / p_{k+1}, by logistic regression with a *bridge* each:

    L(x) = 1/K sum_{k<K} softplus(-log r_k(x_k)) + softplus(log r_k(x_{k+1})).                       (2)

The ratios telescope into the density,

    log p(x) = log p_n(x) + sum_k log r_k(x),                                                        (3)

which is normalised up to the error of the estimate: at the minimum of (2) each bridge is the log-ratio of two
normalised densities, so its bias is the right constant and no log Z is left over. In an energy model the bridges are
the heads f_k = -log r_k, and the noise is the base: E = sum f_k - log p_n. They share a network and are trained
together.

alpha_k = (k / K)^power: data have detail at scales far below their width, so the first steps from them are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_shape
from anomalib_gen.models.noise import adopt_noise
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._smoothing import smooth, some_rows
from anomalib_gen.objectives.noise_contrastive import FITTED_ROWS


class Telescoping(Component):
    """Telescoping density-ratio estimation (equation 2), one bridge for each head of the model.

    The model needs ``head_energies(x) -> (B, K)``, `n_heads` and ``set_base(base)``; the base becomes the noise, and
    afterwards the model's log-density is ``-energy(x)``, with `log_z` zero.

    Parameters
    ----------
    noise : {"gaussian", "product-of-marginals", "flow"} or object, default="gaussian"
        The noise at the far end, fitted to the smoothed rows before training (models.noise); or an object with
        ``sample(n, generator) -> (n, D)`` and ``log_prob(x) -> (B,)``.
    data_noise : float, default=0.1
        Deviation of the noise on the data, in standard deviations of the training data. A model with a `grain` has it
        added in quadrature.
    power : float, default=2.0
        Of the spacing of the waymarks: 1 spaces them evenly in alpha, more puts them closer to the data.

    References
    ----------
    Rhodes, B., Xu, K., Gutmann, M. U. (2020). Telescoping density-ratio estimation. NeurIPS. arXiv:2006.12204.
    """

    learns_log_z = True
    """Afterwards ``-energy(x) - log_z`` is a log-density."""
    uses_heads = True
    """Asks for a model with several heads."""

    def __init__(self, *, noise: Any = "gaussian", data_noise: float = 0.1, power: float = 2.0) -> None:
        self.noise = noise
        self.data_noise = data_noise
        self.power = power

    @torch.no_grad()
    def prepare(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Fit the noise and make it the model's base; a model that has one already keeps it."""
        require(self, positive=["power"], not_negative=["data_noise"])
        x = smooth(model, some_rows(rows, FITTED_ROWS, generator), self.data_noise, generator)
        self.noise_ = adopt_noise(model, self.noise, x, generator)
        if hasattr(model, "log_z"):
            model.log_z.zero_()  # whatever another objective has left there

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, D)``, as ``(B,)``."""
        n, k = len(x), model.n_heads
        x = smooth(model, x, self.data_noise, generator)
        with torch.no_grad():
            noise = check_shape(self.noise_.sample(n, generator), x.shape, "The noise's sample")
        alpha = (torch.arange(k + 1, dtype=x.dtype, device=x.device) / k).pow(self.power)
        alpha = alpha.reshape(-1, *[1] * x.ndim)
        waymarks = (1 - alpha.square()).sqrt() * x + alpha * noise
        # (K + 1, B, K): every head at every waymark. A bridge meets its own two.
        heads = model.head_energies(waymarks.flatten(0, 1)).reshape(k + 1, n, k)
        near = heads[:-1].diagonal(dim1=0, dim2=2)
        far = heads[1:].diagonal(dim1=0, dim2=2)
        return (F.softplus(near) + F.softplus(-far)).mean(1)
