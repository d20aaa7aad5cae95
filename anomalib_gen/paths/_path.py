r"""Noise paths: how much of a row is left, and how much noise is in it, at time t,

    x_t = alpha(t) x_0 + sigma(t) e,     e ~ N(0, I),                                                (1)

from t near 0 (the data) to t near 1 (noise). A path is a value object: it holds no network and no state. The process
with these marginals is the diffusion (Song et al. 2021, arXiv:2011.13456, equations 5 and 13)

    dx = f(t) x dt + g(t) dw,     f = alpha' / alpha,     g^2 = 2 sigma sigma' - 2 f sigma^2,         (2)

and the ordinary differential equation with the same marginals is dx / dt = f x - g^2 / 2 grad log p_t(x).

Dividing (1) by alpha gives a row with plain noise of the *level* s = sigma / alpha. So every path is the family
x_0 + s e seen through another scale and another clock, and one denoiser D(y, s) = E[x_0 | x_0 + s e = y] serves all of
them (Karras et al. 2022, arXiv:2206.00364, section 2): with y = x_t / alpha and s = sigma / alpha,

    x_0:   D(y, s),
    e:     (x_t - alpha D) / sigma,
    v:     alpha e - sigma x_0          (Salimans and Ho 2022, arXiv:2202.00512, section 4),
    score: -e / sigma,
    velocity, the x' of (1):  alpha' x_0 + sigma' e     (Lipman et al. 2023, arXiv:2210.02747, equation 14).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_shape, expand_as_rows

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``denoise(y: (B, *E), level: (B,)) -> (B, *E)``, the mean of clean rows given rows with noise of that level."""


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of rows on a path; each field ``(B, *E)``.

    Attributes
    ----------
    x0 : Tensor
        The clean row.
    eps : Tensor
        The noise e.
    v : Tensor
        alpha e - sigma x_0.
    score : Tensor
        Gradient of log p_t.
    velocity : Tensor
        Time derivative along the probability-flow equation.
    """

    x0: torch.Tensor
    eps: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor
    velocity: torch.Tensor


class Path(Component):
    """Base of all paths.

    A path gives `alpha`, `sigma`, their derivatives, `time` (the inverse of `noise_level`) and `time_range`. Times are
    tensors of any shape, and results have that shape.
    """

    n_steps: int | None = None
    """Steps of a path that is defined at a grid of times; None for a continuous one."""

    @property
    @abstractmethod
    def time_range(self) -> tuple[float, float]:
        """First time, where rows are nearly clean, and last time, where they are nearly noise."""

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Share of the row that is left."""

    @abstractmethod
    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the noise."""

    @abstractmethod
    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `alpha`."""

    @abstractmethod
    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Time derivative of `sigma`."""

    @abstractmethod
    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time at which the noise level sigma / alpha has a value."""

    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        """Deviation of the noise relative to the row, sigma / alpha."""
        return self.sigma(t) / self.alpha(t)

    @property
    def noise_levels(self) -> tuple[float, float]:
        """Noise levels at the two ends of `time_range`.

        Raises
        ------
        ValueError
            If the path's parameters are no numbers, or make no levels that are positive, finite and rise.
        """
        if self.n_steps is not None and not (isinstance(self.n_steps, Integral) and self.n_steps >= 1):
            raise ValueError(f"n_steps must be a positive integer, got {self!r}.")
        try:
            low, high = self.noise_level(torch.tensor(self.time_range, dtype=torch.float64)).tolist()
        except TypeError as error:
            raise ValueError(f"The parameters of {self!r} must be numbers: {error}.") from error
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"{self!r} has noise levels from {low:.3g} to {high:.3g}, which must be positive, finite and rise."
            )
        return low, high

    def drift(self, t: torch.Tensor) -> torch.Tensor:
        """Drift f of equation 2."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion_squared(self, t: torch.Tensor) -> torch.Tensor:
        """Squared diffusion g^2 of equation 2."""
        sigma = self.sigma(t)
        return 2 * sigma * self.sigma_dot(t) - 2 * self.drift(t) * sigma.square()

    def grid(self, n_steps: int | None = None) -> torch.Tensor:
        """Rising times from data to noise, ``(n_steps + 1,)``, float64; a discrete path has its own by default."""
        low, high = self.time_range
        n_steps = self.n_steps if n_steps is None else n_steps
        if n_steps is None or n_steps < 1:
            raise ValueError(f"n_steps must be a positive integer for {self!r}, got {n_steps!r}.")
        return torch.linspace(low, high, n_steps + 1, dtype=torch.float64)

    def add_noise(self, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Rows on the path, equation 1: ``(B, *E)`` of `x` and `e` ``(B, *E)`` and t ``(B,)``."""
        return expand_as_rows(self.alpha(t), x) * x + expand_as_rows(self.sigma(t), x) * e

    def predict(self, denoise: Denoiser, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """All that a denoiser says of rows `x_t` ``(B, *E)`` at times `t` ``(B,)``."""
        alpha, sigma = expand_as_rows(self.alpha(t), x_t), expand_as_rows(self.sigma(t), x_t)
        x0 = check_shape(denoise(x_t / alpha, self.noise_level(t)), x_t.shape, "denoise")
        eps = (x_t - alpha * x0) / sigma
        alpha_dot, sigma_dot = expand_as_rows(self.alpha_dot(t), x_t), expand_as_rows(self.sigma_dot(t), x_t)
        return Prediction(
            x0=x0,
            eps=eps,
            v=alpha * eps - sigma * x0,
            score=-eps / sigma,
            velocity=alpha_dot * x0 + sigma_dot * eps,
        )

    def velocity(self, denoise: Denoiser) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the right-hand side of the probability-flow equation, ``(x_t, t) -> (B, *E)``."""
        return lambda x_t, t: self.predict(denoise, x_t, t).velocity
