r"""A detector in one file: a mixture of normal distributions, trained by gradient descent.

    p(x) = sum_k w_k N(t(x); m_k, (L_k L_k^T)^-1) t'(x),                                     (1)

with t the compression of far values that keeps every row finite (anomalib_gen.networks.compress_tails), and L_k lower
triangular. What follows is all that a family needs: a model, and a detector that says which parts belong together.
Scaling, training, early stopping, scoring in blocks, thresholds, weights of rows, persistence and scikit-learn's
conventions come with `GenerativeDetector`.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils._param_validation import Interval
from torch import nn

from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen.anomaly import Likelihood, Typicality
from anomalib_gen.networks import compress_tails, expand_tails
from anomalib_gen.objectives import MaximumLikelihood


class MixtureModel(nn.Module):
    """The density of equation 1.

    Parameters
    ----------
    n_components, n_features : int
    grain : Tensor of shape (n_features,)
        Width of the noise on columns whose values lie on a grid; the objective adds it.
    """

    def __init__(self, n_components: int, n_features: int, grain: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.randn(n_components, n_features))
        self.factors = nn.Parameter(torch.zeros(n_components, n_features, n_features))
        self.register_buffer("grain", grain)

    def _lower(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L ``(K, D, D)`` and the logarithms of its diagonal ``(K, D)``."""
        log_diagonal = self.factors.diagonal(dim1=1, dim2=2)
        return torch.tril(self.factors, -1) + torch.diag_embed(log_diagonal.exp()), log_diagonal

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density of ``(B, D)``, as ``(B,)``."""
        y, log_det = compress_tails(x)
        lower, log_diagonal = self._lower()
        u = torch.einsum("kji,bkj->bki", lower, y[:, None] - self.means)  # L^T (y - m)
        log_normal = -0.5 * u.square().sum(2) + log_diagonal.sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return (self.logits.log_softmax(0) + log_normal).logsumexp(1) + log_det

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Minus the log-density: by this the detector composes with those of other families."""
        return -self.log_prob(x)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, D)`` rows."""
        k = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=generator)
        u = torch.randn(
            n, self.means.shape[1], 1, generator=generator, dtype=self.means.dtype, device=k.device
        )
        y = self.means[k] + torch.linalg.solve_triangular(self._lower()[0][k].mT, u, upper=True).squeeze(2)
        return expand_tails(y)[0]


class MixtureDetector(GenerativeDetector):
    """Outlier detection by the likelihood of a mixture of normal distributions.

    Parameters
    ----------
    n_components : int, default=8
        Normal distributions.
    noise : float, default=0.05
        Noise in training, in standard deviations of each column: it bounds how narrow a component may become.
    anomaly, learning_rate, weight_decay, batch_size, max_iter, validation_fraction, n_iter_no_change, max_grad_norm, \
ema_decay, contamination, warm_start, random_state, device, verbose
        As for `anomalib_gen.FlowDetector`.
    """

    _objectives: ClassVar[Any] = {"likelihood": MaximumLikelihood}
    _anomalies: ClassVar[Any] = {"likelihood": Likelihood, "typicality": Typicality}
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "noise": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        *,
        n_components: int = 8,
        noise: float = 0.05,
        anomaly: Any = "likelihood",
        learning_rate: float = 2e-2,
        weight_decay: float = 0.0,
        batch_size: int | str = "auto",
        max_iter: int | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        max_grad_norm: float = 10.0,
        ema_decay: float = 0.995,
        contamination: float | str = "auto",
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = "auto",
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.noise = noise
        self.anomaly = anomaly
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.contamination = contamination
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def _make_model(self, event_shape: tuple[int, ...], grain: np.ndarray) -> nn.Module:
        if len(event_shape) > 1:
            raise ValueError("MixtureDetector takes tables, not images.")
        return MixtureModel(self.n_components, event_shape[0], torch.from_numpy(grain))

    def _default_objective(self) -> Component:
        return MaximumLikelihood(noise=self.noise)

    def _default_anomaly(self, model: nn.Module | None) -> Component:
        return Likelihood()

    def _auto_max_iter(self, steps_per_pass: int) -> int:
        return min(max(200 * steps_per_pass, 500), 2000)
