r"""Observation likelihoods: what a decoder's location means, log p(x | z) = sum_j log p(x_j | m_j(z)).

    gaussian               x_j ~ N(m_j, s_j^2)
    student-t              x_j ~ m_j + s_j T_nu
    discretised-logistic   the mass of x_j's cell under Logistic(m_j, s_j), divided by the cell's width
    bernoulli              x_j ~ Bernoulli(sigmoid(m_j))                 a probability; the others are densities

The first three work on x' = x / spread, spread_j = sqrt(1 + grain_j^2), so that a rare flag, which lies many standard
deviations out, comes back to the order of one. The Gaussian and the logistic are composed with compressed tails
(networks.tails),

    log p(x | z) = log p(t(x') | z) + log |dt/dx|,                                           (1)

which leaves |x'| <= 5 alone and keeps every finite row's density finite. Student's t falls off like a power of x and
needs no such help.

*Floors.* A decoder that reconstructs a column exactly may let s_j go to 0, and the likelihood to infinity: always so
for a constant column, and for any column on a grid (flags, counts), whose values a decoder can name exactly
(Mattei and Frellsen 2018, "Leveraging the exact likelihood of deep latent variable models", arXiv:1802.04826,
proposition 1). A learned deviation is therefore at least sqrt(noise^2 + grain_j^2): the density is that of rows known
to `noise`, with each value spread over its cell. The discretised logistic needs `noise` alone: a mass is at most 1, so
dividing it by the width of the cell has its own bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.networks import TAIL_START, compress_values, expand_tails

START_DEVIATION = 0.5
"""Where learned deviations start: below that of the data, or the latent variables would look useless at first."""
QUICK_DEVIATION = 10.0
"""Factor on the step size of the deviations of images, which have far to go from where they start."""
MAX_DRAWN = 80.0
"""Compressed values drawn beyond this end here; expanded they are near the end of float32."""
MIN_FREEDOM = 1.0
"""Learned degrees of freedom stay above this, so that the distribution has a mean."""
LARGE_FREEDOM = 100.0
"""Degrees of freedom from which on the constant of Student's t is a series: its gamma functions would cancel."""
MIN_CELL = 1e-6
"""Narrowest cell of the discretised logistic; a narrower one gives the same density up to rounding."""


class Observation(nn.Module):
    """Base class: a distribution of rows x ``(B, *E)`` around a location ``(B, *E)`` that a decoder gives."""

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, *E)`` in the bounded coordinates that an encoder sees and errors are measured in."""
        raise NotImplementedError

    def value_log_probs(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each value of rows ``(B, *E)``, of the same shape."""
        raise NotImplementedError

    def log_prob(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-likelihood ``(B,)`` of rows ``(B, *E)``."""
        return self.value_log_probs(x, location).flatten(1).sum(1)

    def centre(self, location: torch.Tensor) -> torch.Tensor:
        """The middle of the distribution, ``(B, *E)``, in the units of x: its mean, or its median under (1)."""
        raise NotImplementedError

    def sample(self, location: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a row ``(B, *E)`` for each location."""
        raise NotImplementedError


class ScaledObservation(Observation):
    """An observation with a deviation for each column.

    Parameters
    ----------
    features : int or tuple of int
        Columns D, or the shape E of images.
    grain : Tensor of shape E, optional
        Width of each column's grid as the deviation of a uniform over a cell; zeros if None.
    noise : float, default=0.0
        Floor of learned deviations, beside `grain`.
    variance : {"per-feature", "shared"} or float, default="per-feature"
        Learned for each column, learned once for all, or this number for all. In the units of x squared.
    """

    grain: torch.Tensor
    spread: torch.Tensor
    floor: torch.Tensor

    def __init__(
        self,
        features: int | tuple[int, ...],
        *,
        grain: torch.Tensor | None = None,
        noise: float = 0.0,
        variance: str | float = "per-feature",
    ) -> None:
        super().__init__()
        self.register_buffer("grain", torch.zeros(features) if grain is None else grain)
        self.register_buffer("spread", (1 + self.grain.square()).sqrt())
        self.register_buffer("floor", self._variance_floor(noise))
        self.log_deviation: torch.Tensor
        if isinstance(variance, str):
            if variance not in ("per-feature", "shared"):
                raise ValueError(
                    f"variance={variance!r} is unknown. Use 'per-feature', 'shared' or a positive number."
                )
            size = self.grain.shape if variance == "per-feature" else (1,)
            self.log_deviation = nn.Parameter(torch.full(size, math.log(START_DEVIATION)))
        else:
            self.floor.zero_()
            self.register_buffer("log_deviation", torch.full((1,), 0.5 * math.log(variance)))

    @property
    def rate_factors(self) -> dict[str, float]:
        """Factors on the step sizes of parameters, see `_training._AdamW`.

        Adam moves a deviation by no more than the learning rate a step, which is small for images, and the steps are
        few; until it is down at the residuals, latent variables are worth less than they cost.
        """
        learned = isinstance(self.log_deviation, nn.Parameter)
        return {"log_deviation": QUICK_DEVIATION} if learned and self.grain.ndim > 1 else {}

    def _variance_floor(self, noise: float) -> torch.Tensor:
        """Smallest learned variance of each column, ``E``."""
        return noise**2 + self.grain.square()

    @property
    def deviation(self) -> torch.Tensor:
        """s_j of each column, ``E``, in the units of x' = x / spread."""
        return (self.floor + torch.exp(2 * self.log_deviation)).sqrt() / self.spread

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, *E)`` as t(x')."""
        return compress_values(x / self.spread)[0]

    def centre(self, location: torch.Tensor) -> torch.Tensor:
        """The median, ``(B, *E)``."""
        return expand_tails(location.clamp(-MAX_DRAWN, MAX_DRAWN))[0] * self.spread


class GaussianObservation(ScaledObservation):
    """Normal around the location, in compressed coordinates."""

    def value_log_probs(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-density of each value of rows ``(B, *E)``, of the same shape."""
        y, log_slope = compress_values(x / self.spread)
        s = self.deviation
        log_peak = log_slope - ((s * self.spread).log() + 0.5 * math.log(2 * math.pi))
        return log_peak - 0.5 * ((y - location) / s).square()

    def sample(self, location: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a row ``(B, *E)`` for each location."""
        e = torch.randn(location.shape, generator=generator, dtype=location.dtype, device=location.device)
        return self.centre(location + self.deviation * e)


class StudentTObservation(ScaledObservation):
    """Student's t around the location: a value far out costs its logarithm, not its square.

    Parameters
    ----------
    features, grain, noise, variance
        As for `ScaledObservation`; the deviation is the scale s of s T_nu, which itself deviates by
        s sqrt(nu / (nu - 2)).
    degrees_of_freedom : float or "learned", default="learned"
        nu; learned for each column, above 1.
    """

    def __init__(
        self,
        features: int | tuple[int, ...],
        *,
        grain: torch.Tensor | None = None,
        noise: float = 0.0,
        variance: str | float = "per-feature",
        degrees_of_freedom: float | str = "learned",
    ) -> None:
        super().__init__(features, grain=grain, noise=noise, variance=variance)
        self.log_freedom: torch.Tensor
        if isinstance(degrees_of_freedom, str):
            self.min_freedom = MIN_FREEDOM
            self.log_freedom = nn.Parameter(torch.full(self.grain.shape, math.log(5.0)))
        else:
            self.min_freedom = 0.0
            self.register_buffer("log_freedom", torch.full((1,), math.log(degrees_of_freedom)))

    @property
    def freedom(self) -> torch.Tensor:
        """Degrees of freedom nu of each column."""
        return self.min_freedom + self.log_freedom.exp()

    def value_log_probs(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-density of each value of rows ``(B, *E)``, of the same shape."""
        nu, log_s = self.freedom, self.deviation.log()
        distance = (x / self.spread - location).abs().clamp(min=torch.finfo(x.dtype).tiny)
        # log(1 + d^2 / (nu s^2)) without a square that could overflow.
        log_kernel = -0.5 * (nu + 1) * F.softplus(2 * (distance.log() - log_s) - nu.log())
        return log_kernel + _log_norm_of_t(nu) - log_s - self.spread.log()

    def centre(self, location: torch.Tensor) -> torch.Tensor:
        """The mean, ``(B, *E)``."""
        return location * self.spread

    def sample(self, location: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a row ``(B, *E)`` for each location, by the polar method of Bailey (1994, Math. Comp. 62, 779-781)."""
        kind: dict[str, Any] = {"generator": generator, "dtype": location.dtype, "device": location.device}
        u, v = (torch.rand(location.shape, **kind) for _ in range(2))
        nu = self.freedom
        # u in [0, 1): 1 - u is never 0.
        radius = (nu * torch.expm1(-2 / nu * torch.log1p(-u))).sqrt()
        return (location + self.deviation * radius * torch.cos(2 * math.pi * v)) * self.spread


def _log_norm_of_t(nu: torch.Tensor) -> torch.Tensor:
    """Log of Gamma((nu + 1) / 2) / (Gamma(nu / 2) sqrt(pi nu)); for many degrees of freedom that of a normal."""
    few, r = nu.clamp(max=LARGE_FREEDOM), 1 / nu.clamp(min=LARGE_FREEDOM)
    exact = torch.lgamma((few + 1) / 2) - torch.lgamma(few / 2) - 0.5 * (few * math.pi).log()
    series = -r / 4 + r**3 / 24 - r**5 / 20 - 0.5 * math.log(2 * math.pi)
    return torch.where(nu < LARGE_FREEDOM, exact, series)


class DiscretisedLogisticObservation(ScaledObservation):
    r"""Mass of the cell around each value under a logistic, divided by the cell's width w.

    With G(x) the distribution function, log p(x) = log[G(x + w/2) - G(x - w/2)] - log w (Salimans et al. 2017,
    "PixelCNN++", arXiv:1701.05517, equation 2). Off the grid this is the density of a logistic variable plus a uniform
    one over a cell, so it integrates to one as well as it sums to one. A column without a grid has a cell of next to no
    width, and then this is the logistic density.
    """

    def _variance_floor(self, noise: float) -> torch.Tensor:
        return noise**2 + torch.zeros_like(self.grain)

    @property
    def cell(self) -> torch.Tensor:
        """Width of each column's cells, ``E``, in the units of x'."""
        return (math.sqrt(12) * self.grain / self.spread).clamp(min=MIN_CELL)

    def value_log_probs(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-density of each value of rows ``(B, *E)``, of the same shape."""
        x, w = x / self.spread, self.cell
        s = self.deviation * (math.sqrt(3) / math.pi)
        upper = (compress_values(x + w / 2)[0] - location) / s
        lower = (compress_values(x - w / 2)[0] - location) / s
        # The cell's width after t is (w - o) + log(1 + q), where o is the part of it beyond the start c of the tails,
        # whose inner end is at excess l, and q = o / (1 + l). Relative to w, as a logarithm, and without a difference
        # of large numbers:
        outer = (x.abs() + w / 2 - TAIL_START).clamp(min=0).minimum(w)
        excess = (x.abs() - w / 2 - TAIL_START).clamp(min=0)
        q = outer / (1 + excess)
        slope = (1 - outer / w) + outer / w * torch.where(q > 0, torch.log1p(q) / q.clamp(min=1e-30), 1.0)
        log_slope = slope.log() - torch.log1p(excess)
        # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^(b - a)), and the last factor over w:
        step = w / s * log_slope.exp()
        safe = step.clamp(min=1e-3)
        log_share = torch.where(step < 1e-3, -step / 2, torch.log(-torch.expm1(-safe) / safe))
        log_density = F.logsigmoid(upper) + F.logsigmoid(-lower) + log_share + log_slope - s.log()
        return log_density - self.spread.log()

    def sample(self, location: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a row ``(B, *E)`` for each location, anywhere in its cell."""
        kind: dict[str, Any] = {"generator": generator, "dtype": location.dtype, "device": location.device}
        u, v = (torch.rand(location.shape, **kind) for _ in range(2))
        s = self.deviation * (math.sqrt(3) / math.pi)
        u = u.clamp(min=torch.finfo(u.dtype).tiny)
        x = self.centre(location + s * (u.log() - torch.log1p(-u)))
        return x + (v - 0.5) * self.cell * self.spread


class BernoulliObservation(Observation):
    """Columns of zeros and ones; the location is the log-odds of a one."""

    def __init__(self, features: int | tuple[int, ...]) -> None:
        super().__init__()

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, *E)`` as -1 and 1."""
        return 2 * x - 1

    def value_log_probs(self, x: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        """Log-probability of each value of rows ``(B, *E)``, of the same shape."""
        return x * location - F.softplus(location)

    def centre(self, location: torch.Tensor) -> torch.Tensor:
        """The probability of a one, ``(B, *E)``."""
        return torch.sigmoid(location)

    def sample(self, location: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a row ``(B, *E)`` for each location."""
        u = torch.rand(location.shape, generator=generator, dtype=location.dtype, device=location.device)
        return (u < torch.sigmoid(location)).to(location.dtype)


OBSERVATIONS: Mapping[str, Callable[..., Observation]] = {
    "bernoulli": BernoulliObservation,
    "discretised-logistic": DiscretisedLogisticObservation,
    "gaussian": GaussianObservation,
    "student-t": StudentTObservation,
}
