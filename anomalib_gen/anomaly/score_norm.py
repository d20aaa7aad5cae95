r"""Score norm: a row is as anomalous as the slope on which it lies,

    a(x) = |g(x)|,                     g = grad log p(x),   or                                       (1)
    a(x) = 1/K sum_k |g(x, s_k)|,      s_1 < ... < s_K geometric between the model's noise levels,   (2)

for a model that is conditional on noise. Normal rows lie near modes and ridges of the density, where the score is
small; the noised scores at larger s see further. Row and score are taken as they are, *without* noise on the row: what
noise adds to the norm is the same for every row and hides the rest. As s g is the noise that a denoiser finds in the
row, (2) weights the noise found at level s by 1 / s. (Score norms over levels are from Mahmood et al. 2021,
arXiv:2010.13132, who use them as features for a second model.)

Beyond five standard deviations densities have log-like tails whose slope falls again. There the slope is taken per
unit of the compressed row t(x) (networks.tails), dE/dt = (1 + |x| - 5) dE/dx, which rises along every ray.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.networks import TAIL_START


class ScoreNorm(Component):
    """Norm of the gradient of the log-density (equations 1 and 2).

    Parameters
    ----------
    n_levels : int, default=10
        Levels K of the ladder for a model that is conditional on noise; the first is its smallest.

    References
    ----------
    Mahmood, A., Oliva, J., Styner, M. (2021). Multiscale score matching for out-of-distribution detection. ICLR.
    arXiv:2010.13132.
    """

    in_nats = False

    def __init__(self, *, n_levels: int = 10) -> None:
        self.n_levels = n_levels

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        stretch = 1 + (x.abs() - TAIL_START).clamp(min=0)
        levels = getattr(model, "noise_levels", None)
        if levels is None:
            return (stretch * model.score(x)).flatten(1).norm(dim=1)
        low, high = levels
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for k in range(self.n_levels):
            level = low * (high / low) ** (k / max(1, self.n_levels - 1))
            noise = x.new_full((len(x),), level)
            total += (stretch * model.score(x, noise)).flatten(1).norm(dim=1)
        return total / self.n_levels
