r"""Noise-contrastive estimation: learn a normalised density by telling rows from noise.

Let p_n be a density that can be sampled and evaluated, and give each row nu draws y of it. The log-odds that a point is
a row are, for a model log p(x) = -E(x) - c with a *learned* constant c,

    G(x) = log p(x) - log p_n(x) - log nu,                                           (1)

and logistic regression on them is the loss of a row (Gutmann and Hyvarinen 2012, JMLR 13, equations 4 to 8),

    L(x) = softplus(-G(x)) + sum_{j=1}^{nu} softplus(G(y_j)).                        (2)

In expectation it is minimal where G is the true log-odds: E is then that of the data and c = log Z, although nothing
normalises them. The closer the noise is to the data, the less rows that requires; where the two hardly overlap (2) is
flat and c is anybody's guess (objectives.telescoping is for that).

For a fixed E, the c that minimises (2) is the solution of

    E_x[sigmoid(-G(x))] = nu E_y[sigmoid(G(y))],                                     (3)

the bridge estimate of log Z (Meng and Wong 1996, Statistica Sinica 6, equation 4.1; Bennett 1976). Training starts
there: from zero, c would have tens of nats to go on wide tables.

Rows get a little noise sigma first, as in objectives.contrastive_divergence: on a grid or a sheet the true log-odds
would be infinite. The held-out loss is (2) with the same draws at every evaluation, and a sound judge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_shape
from anomalib_gen.models.noise import adopt_noise
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._smoothing import smooth, some_rows

FITTED_ROWS, BRIDGE_ROWS = 20_000, 2_000
"""Training rows used at most to fit the noise, and for equation 3."""


class NoiseContrastive(Component):
    """Noise-contrastive estimation with a learned log Z (equation 2).

    The model needs `energy` ``(B, D) -> (B,)`` and a scalar parameter `log_z`; afterwards its log-density is
    ``-energy(x) - log_z``. The noise becomes the base of a model that has ``set_base(base)``.

    Parameters
    ----------
    noise : {"gaussian", "product-of-marginals", "flow"} or object, default="gaussian"
        The noise, fitted to the smoothed rows before training (models.noise). "flow" is closest to the data, and
        costs a short training and the flow's samples at each step. An object with ``sample(n, generator) -> (n, D)``
        and ``log_prob(x) -> (B,)`` is taken as it is.
    n_noise : int, default=4
        Noise rows nu for each row.
    data_noise : float, default=0.1
        Deviation of the noise on the data, in standard deviations of the training data. A model with a `grain` has it
        added in quadrature.

    References
    ----------
    Gutmann, M., Hyvarinen, A. (2010). Noise-contrastive estimation: A new estimation principle for unnormalized
    statistical models. AISTATS.

    Gutmann, M., Hyvarinen, A. (2012). Noise-contrastive estimation of unnormalized statistical models, with
    applications to natural image statistics. JMLR 13.
    """

    learns_log_z = True
    """Afterwards ``-energy(x) - log_z`` is a log-density."""

    def __init__(self, *, noise: Any = "gaussian", n_noise: int = 4, data_noise: float = 0.1) -> None:
        self.noise = noise
        self.n_noise = n_noise
        self.data_noise = data_noise

    @torch.no_grad()
    def prepare(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Fit the noise, make it the model's base, and set the model's `log_z` by equation 3."""
        require(self, counts=["n_noise"], not_negative=["data_noise"])
        x = smooth(model, some_rows(rows, FITTED_ROWS, generator), self.data_noise, generator)
        self.noise_ = adopt_noise(model, self.noise, x, generator)
        self._set_log_z(model, x, generator)

    @torch.no_grad()
    def conclude(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Set `log_z` by equation 3 once more: gradient steps leave it behind the energy, above all in a short fit."""
        x = smooth(model, some_rows(rows, BRIDGE_ROWS, generator), self.data_noise, generator)
        self._set_log_z(model, x, generator)

    def _set_log_z(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> None:
        x = x[:BRIDGE_ROWS]
        y = self.noise_.sample(self.n_noise * len(x), generator)
        check_shape(y, (self.n_noise * len(x), *x.shape[1:]), "The noise's sample")
        log_ratio = [self._log_ratio(model, z) for z in (x, y)]
        model.log_z.fill_(bridge_log_z(*log_ratio, n_noise=self.n_noise))

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, D)``, as ``(B,)``."""
        x = smooth(model, x, self.data_noise, generator)
        with torch.no_grad():
            y = self.noise_.sample(self.n_noise * len(x), generator)
        log_odds = self._log_ratio(model, torch.cat([x, y])) - model.log_z - math.log(self.n_noise)
        of_rows, of_noise = log_odds[: len(x)], log_odds[len(x) :].reshape(len(x), self.n_noise)
        return F.softplus(-of_rows) + F.softplus(of_noise).sum(1)

    def _log_ratio(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Log of the ratio of the model, without its constant, and the noise, ``(B,)``."""
        if getattr(getattr(model, "base", None), "noise", None) is self.noise_:
            return -model.head_energies(x).sum(1)
        with torch.no_grad():
            log_noise = check_shape(self.noise_.log_prob(x), x.shape[:1], "The noise's log_prob")
        return -model.energy(x) - log_noise


def bridge_log_z(of_rows: torch.Tensor, of_noise: torch.Tensor, *, n_noise: float) -> float:
    """Solve equation 3 for c, by bisection: its two sides are monotone in c.

    Parameters
    ----------
    of_rows, of_noise : Tensor of shape (n,) and (m,)
        ``-E - log p_n`` at rows of the data and of the noise.
    n_noise : float
        nu.

    Returns
    -------
    float
        The bridge estimate of log Z.
    """
    a, b = of_rows.double() - math.log(n_noise), of_noise.double() - math.log(n_noise)
    margin = math.log(n_noise) + math.log(len(a)) + math.log(len(b)) + 1
    low = float(torch.minimum(a.min(), b.min())) - margin
    high = float(torch.maximum(a.max(), b.max())) + margin
    for _ in range(100):
        c = 0.5 * (low + high)
        excess = torch.sigmoid(c - a).mean() - n_noise * torch.sigmoid(b - c).mean()
        low, high = (low, c) if excess > 0 else (c, high)
    return 0.5 * (low + high)
