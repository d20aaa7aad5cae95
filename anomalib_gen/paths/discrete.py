r"""Paths of diffusion in discrete steps: at step k of N the row loses a share beta_k of its variance to noise,

    x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) e,
    alpha_k^2 = prod_{i <= k} (1 - beta_i),   sigma_k^2 = 1 - alpha_k^2.

- `LinearBetas`: beta rises evenly (DDPM; Ho et al. 2020, arXiv:2006.11239, section 4).
- `CosineBetas`: alpha_k^2 = g(k / N) / g(0), g(u) = cos^2(pi / 2 (u + s) / (1 + s)), and beta_k at most 0.999 (Improved
  DDPM; Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17).

Step k is the time k / N. Between steps log alpha is linear in time, so that continuous samplers and likelihoods can use
these paths too; they are exact at the steps. Before the first step there is no noise to speak of: the first time is
1 / N.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from anomalib_gen.paths._path import Path


class _DiscretePath(Path):
    n_steps: int

    @abstractmethod
    def betas(self) -> torch.Tensor:
        """Shares of the variance that the steps replace by noise, ``(n_steps,)``, float64."""

    @property
    def time_range(self) -> tuple[float, float]:
        """The first step, 1 / n_steps, and 1."""
        return 1.0 / self.n_steps, 1.0

    def grid(self, n_steps: int | None = None) -> torch.Tensor:
        """Rising times: the path's own ``(n_steps,)`` by default, else ``(n_steps + 1,)``, as even as can be."""
        if n_steps is None or n_steps >= self.n_steps:
            return torch.arange(1, self.n_steps + 1, dtype=torch.float64) / self.n_steps
        return torch.round(super().grid(n_steps) * self.n_steps) / self.n_steps

    def _log_alpha_table(self) -> torch.Tensor:
        """Log of alpha at steps 0 to n_steps, float64."""
        log_alpha = 0.5 * torch.log1p(-self.betas()).cumsum(0)
        return torch.cat([log_alpha.new_zeros(1), log_alpha])

    def _log_alpha(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of alpha, linear between steps, and its slope."""
        table = self._log_alpha_table().to(t)
        k = (t * self.n_steps).clamp(0, self.n_steps)
        below = k.floor().long().clamp(max=self.n_steps - 1)
        slope = (table[below + 1] - table[below]) * self.n_steps
        return table[below] + (k - below) / self.n_steps * slope, slope

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Root of the product of ``1 - beta``."""
        return self._log_alpha(t)[0].exp()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """``sqrt(1 - alpha^2)``."""
        return (-torch.expm1(2 * self._log_alpha(t)[0])).sqrt()

    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `alpha`; to the right at a step."""
        log_alpha, slope = self._log_alpha(t)
        return slope * log_alpha.exp()

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `sigma`; to the right at a step."""
        log_alpha, slope = self._log_alpha(t)
        return -slope * torch.exp(2 * log_alpha) / self.sigma(t)

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time of a noise level, between steps where it lies there."""
        table = self._log_alpha_table().to(noise_level)
        log_alpha = -0.5 * torch.log1p(noise_level.square())
        below = (torch.searchsorted(-table, -log_alpha.contiguous(), right=True) - 1).clamp(
            0, self.n_steps - 1
        )
        share = (log_alpha - table[below]) / (table[below + 1] - table[below])
        return (below + share) / self.n_steps


class LinearBetas(_DiscretePath):
    """The path of DDPM.

    Parameters
    ----------
    n_steps : int, default=1000
        Steps N.
    beta_min, beta_max : float, default=1e-4 and 0.02
        Shares replaced in the first and in the last step. With fewer steps than 1,000 they should grow in proportion,
        or noise never wins.

    References
    ----------
    Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.
    """

    def __init__(self, *, n_steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> None:
        self.n_steps = n_steps
        self.beta_min = beta_min
        self.beta_max = beta_max

    def betas(self) -> torch.Tensor:
        """Evenly rising shares, ``(n_steps,)``."""
        return torch.linspace(self.beta_min, self.beta_max, self.n_steps, dtype=torch.float64)


class CosineBetas(_DiscretePath):
    """The path of Improved DDPM, which spends more steps at small noise than `LinearBetas`.

    Parameters
    ----------
    n_steps : int, default=1000
        Steps N.
    offset : float, default=0.008
        s of the formula, which keeps the first steps from being too small.

    References
    ----------
    Nichol, A., Dhariwal, P. (2021). Improved denoising diffusion probabilistic models. ICML. arXiv:2102.09672.
    """

    def __init__(self, *, n_steps: int = 1000, offset: float = 0.008) -> None:
        self.n_steps = n_steps
        self.offset = offset

    def betas(self) -> torch.Tensor:
        """Shares of the cosine schedule, ``(n_steps,)``."""
        u = torch.arange(self.n_steps + 1, dtype=torch.float64) / self.n_steps
        g = torch.cos(0.5 * math.pi * (u + self.offset) / (1 + self.offset)).square()
        return (1 - g[1:] / g[:-1]).clamp(max=0.999)
