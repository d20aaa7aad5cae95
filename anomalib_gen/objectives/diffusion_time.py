r"""Diffusion time estimation: learn to tell how much noise is in a row,

    L(x) = -log q(s | x + s e),     e ~ N(0, I),   s uniform over the model's range,                           (1)

with q a model's distribution of the level (models.diffusion_time): cross-entropy for bins, minus the log-density for an
inverse-gamma distribution. The minimum is the posterior of the level under the noised data. (Livernoche et al. 2024,
arXiv:2305.18593. The published classifier takes the softmax twice, in the network and in its loss, which bounds how
sure it can be; here it is taken once.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.models import InverseGammaTime, TimeClassifier
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._levels import JUDGED_ROWS, places
from anomalib_gen.objectives._smoothing import smooth


class DiffusionTimeEstimation(Component):
    """Minus the log-probability of the noise level of noised rows (equation 1), for `TimeClassifier` and the like.

    Parameters
    ----------
    distribution : {"categorical", "inverse-gamma"}, default="categorical"
        q, which says what model a detector makes: a `TimeClassifier` or an `InverseGammaTime`. The objective itself
        takes either.
    n_bins : int, default=7
        Bins of the categorical distribution, as in the reference.

    Raises
    ------
    ValueError
        When a model is made, if `distribution` is unknown.

    References
    ----------
    Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection. ICLR.
    arXiv:2305.18593.
    """

    def __init__(self, *, distribution: str = "categorical", n_bins: int = 7) -> None:
        self.distribution = distribution
        self.n_bins = n_bins

    def make_model(self, make_network: Callable[[int], nn.Module]) -> nn.Module:
        """Return a model of the distribution on a network of ``make_network(n_outputs)``."""
        require(self, counts=["n_bins"])
        if self.distribution == "categorical":
            return TimeClassifier(make_network(self.n_bins), n_bins=self.n_bins)
        if self.distribution == "inverse-gamma":
            return InverseGammaTime(make_network(1))
        raise ValueError(
            f"distribution={self.distribution!r} is unknown. Known: 'categorical', 'inverse-gamma'."
        )

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        levels = model.level(places(len(x), x, generator))
        x = smooth(model, x, 0.0, generator)
        noised = x + expand_as_rows(levels, x) * normal_like(x, generator)
        log_prob: torch.Tensor = model.log_prob_level(noised, levels)
        return -log_prob

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: the same over more draws, where there are few rows."""
        draws = max(1, min(8, JUDGED_ROWS // len(x)))
        return torch.stack([self(model, x, generator) for _ in range(draws)]).mean(0)
