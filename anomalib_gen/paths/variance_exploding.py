r"""Variance-exploding paths: rows stay as they are and noise is added, x_t = x_0 + sigma(t) e.

- `VarianceExploding`: sigma(t) = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, arXiv:2011.13456, equation 30).
- `GeometricLadder`: the same at n_steps + 1 levels, the noise levels of NCSN (Song and Ermon 2019, arXiv:1907.05600,
  section 4.1).
- `EDM`: sigma(t) = t, with a grid dense near the data (Karras et al. 2022, arXiv:2206.00364, equation 5),

    sigma_i = (sigma_max^(1/rho) + i / N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
"""

from __future__ import annotations

import math

import torch

from anomalib_gen.paths._path import Path


class VarianceExploding(Path):
    """Geometric noise levels in continuous time.

    Parameters
    ----------
    sigma_min, sigma_max : float, default=0.01 and 50.0
        Noise levels at t = 0 and t = 1, in standard deviations of the data.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """

    def __init__(self, *, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    @property
    def time_range(self) -> tuple[float, float]:
        """Times 0 and 1."""
        return 0.0, 1.0

    @property
    def _log_ratio(self) -> float:
        # (Levels that are none are refused where they are met, as those of the other paths: `noise_levels`.)
        levels = self.sigma_max > 0 and self.sigma_min > 0
        return math.log(self.sigma_max / self.sigma_min) if levels else math.nan

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """``sigma_min (sigma_max / sigma_min)^t``."""
        return self.sigma_min * torch.exp(self._log_ratio * t)

    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `sigma`."""
        return self._log_ratio * self.sigma(t)

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time at which `sigma` has a value."""
        return torch.log(noise_level / self.sigma_min) / self._log_ratio


class GeometricLadder(VarianceExploding):
    """`VarianceExploding` at a ladder of levels, as in NCSN.

    Parameters
    ----------
    n_steps : int, default=100
        Steps of the ladder, one less than its levels.
    sigma_min, sigma_max : float, default=0.01 and 50.0
        Smallest and largest level.

    References
    ----------
    Song, Y., Ermon, S. (2019). Generative modeling by estimating gradients of the data distribution. NeurIPS.
    arXiv:1907.05600.
    """

    def __init__(self, *, n_steps: int = 100, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__(sigma_min=sigma_min, sigma_max=sigma_max)
        self.n_steps = n_steps

    def grid(self, n_steps: int | None = None) -> torch.Tensor:
        """Rising times, ``(n_steps + 1,)``: steps of the ladder, as even as can be, and no more than it has."""
        ladder = super().grid()
        if n_steps is None or n_steps >= len(ladder) - 1:
            return ladder
        return ladder[torch.round(super().grid(n_steps) * (len(ladder) - 1)).long()]


class EDM(Path):
    """Time is the noise level itself.

    Parameters
    ----------
    sigma_min, sigma_max : float, default=0.002 and 80.0
        Smallest and largest level.
    rho : float, default=7.0
        How much denser the grid is near the data; 1 is an even grid.

    References
    ----------
    Karras, T., Aittala, M., Aila, T., Laine, S. (2022). Elucidating the design space of diffusion-based generative
    models. NeurIPS. arXiv:2206.00364.
    """

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    @property
    def time_range(self) -> tuple[float, float]:
        """``sigma_min`` and ``sigma_max``."""
        return self.sigma_min, self.sigma_max

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The time."""
        return t

    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """One."""
        return torch.ones_like(t)

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """The noise level."""
        return noise_level

    def grid(self, n_steps: int | None = None) -> torch.Tensor:
        """Rising levels, ``(n_steps + 1,)``, denser near the data."""
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be positive and finite, got {self!r}.")
        even = (super().grid(n_steps) - self.sigma_min) / (self.sigma_max - self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + even * (high - low)) ** self.rho
