r"""Variance-preserving paths: rows shrink as noise grows, so that rows of unit variance keep it.

With beta(t) = beta_min + t (beta_max - beta_min) and B(t) = the integral of beta from 0 to t,

    VP:      alpha = exp(-B / 2),     sigma^2 = 1 - exp(-B),                                         (1)
    sub-VP:  alpha = exp(-B / 2),     sigma   = 1 - exp(-B)                                          (2)

(Song et al. 2021, arXiv:2011.13456, equations 33 and 34). (1) is the limit of many small steps of DDPM.
"""

from __future__ import annotations

import torch

from anomalib_gen.paths._path import Path


class _LinearRate(Path):
    """What (1) and (2) share."""

    def __init__(self, *, beta_min: float = 0.1, beta_max: float = 20.0, time_min: float = 1e-5) -> None:
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.time_min = time_min

    @property
    def time_range(self) -> tuple[float, float]:
        """``time_min`` and 1."""
        return self.time_min, 1.0

    def _beta(self, t: torch.Tensor) -> torch.Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: torch.Tensor) -> torch.Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _inverse_integral(self, value: torch.Tensor) -> torch.Tensor:
        """Time at which the integral of beta has a value: the root of a quadratic, in a form without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * value / (self.beta_min + (self.beta_min**2 + 2 * slope * value).sqrt())

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """``exp(-B / 2)``."""
        return torch.exp(-0.5 * self._integral(t))

    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `alpha`."""
        return -0.5 * self._beta(t) * self.alpha(t)


class VariancePreserving(_LinearRate):
    """The VP-SDE (equation 1).

    Parameters
    ----------
    beta_min, beta_max : float, default=0.1 and 20.0
        Rate of noising at t = 0 and t = 1.
    time_min : float, default=1e-5
        First time; the noise there is what rows are known to.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """``sqrt(1 - exp(-B))``."""
        return (-torch.expm1(-self._integral(t))).sqrt()

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `sigma`."""
        return 0.5 * self._beta(t) * torch.exp(-self._integral(t)) / self.sigma(t)

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time of a noise level: sigma^2 / alpha^2 = exp(B) - 1."""
        return self._inverse_integral(torch.log1p(noise_level.square()))


class SubVariancePreserving(_LinearRate):
    """The sub-VP-SDE (equation 2), with less noise than the VP-SDE at all times.

    Parameters
    ----------
    beta_min, beta_max : float, default=0.1 and 20.0
        Rate of noising at t = 0 and t = 1.
    time_min : float, default=1e-5
        First time; the noise there is what rows are known to.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """``1 - exp(-B)``."""
        return -torch.expm1(-self._integral(t))

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `sigma`."""
        return self._beta(t) * torch.exp(-self._integral(t))

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time of a noise level: sigma / alpha = 2 sinh(B / 2)."""
        return self._inverse_integral(2 * torch.asinh(0.5 * noise_level))
