r"""Noise distributions: densities that are easy to fit, to sample and to evaluate, for others to be compared with.

All of them live in the coordinates y = t(x) of compressed tails (networks.tails),

    log p(x) = log q(t(x)) + sum log t'(x),                                          (1)

so that a few rows far out neither widen the noise nor get a density that underflows. q is one of

    q(y) = N(y; mu, S)                       a normal, S shrunk towards a multiple of I,                    (2)
    q(y) = prod_d 1/M sum_m N(y_d; c_dm, h_dm^2)     independent columns, c the quantiles of each,          (3)

or a normalizing flow (models.flow) after a short training. The shrinkage is that of Chen et al. (2010,
arXiv:0907.4698, equation 23). In (3) each kernel is as wide as the gap to its neighbours, so every column has kernels
as fine as its rows are dense; it is a density whatever the centres and widths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from anomalib_gen._runtime import SinglePrecision, check_shape, forked_rng
from anomalib_gen.models.flow import FlowModel, make_flow_transform
from anomalib_gen.networks import compress_tails, expand_tails

NOISES = ("gaussian", "product-of-marginals", "flow")
"""Names that `fit_noise` knows."""
LOG_2PI = math.log(2 * math.pi)
MIN_DEVIATION = 1e-3
"""Smallest width of noise, in standard deviations of a column: a constant column has none of its own."""
N_KERNELS = 32
"""Kernels M of each column in equation 3."""


class GaussianNoise(nn.Module):
    """A normal with full covariance in compressed coordinates (equation 2).

    Parameters
    ----------
    mean : Tensor of shape (D,)
    covariance : Tensor of shape (D, D)
        Positive definite.
    """

    mean: torch.Tensor
    factor: torch.Tensor

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", torch.linalg.cholesky(covariance))

    @classmethod
    def fit(cls, x: torch.Tensor) -> GaussianNoise:
        """Fit to rows ``(n, D)``, n >= 2."""
        y = compress_tails(x)[0].double()
        n, features = y.shape
        mean = y.mean(0)
        covariance = (y - mean).T @ (y - mean) / n
        trace, square = covariance.trace(), covariance.square().sum()
        up = (1 - 2 / features) * square + trace.square()
        down = (n + 1 - 2 / features) * (square - trace.square() / features)
        share = (up / down).clamp(0, 1) if down > 0 else torch.ones(()).to(y)
        target = (trace / features).clamp(min=MIN_DEVIATION**2) * torch.eye(features).to(y)
        floor = MIN_DEVIATION**2 * torch.eye(features).to(y)
        covariance = (1 - share) * covariance + share * target + floor
        return cls(mean, covariance).to(x.dtype)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density ``(B,)`` of rows ``(B, D)``."""
        y, log_det = compress_tails(x)
        u = torch.linalg.solve_triangular(self.factor, (y - self.mean).T, upper=False)
        log_width = self.factor.diagonal().log().sum()
        return -0.5 * (u.square().sum(0) + len(self.mean) * LOG_2PI) - log_width + log_det

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, D)`` rows."""
        u = torch.randn(
            (n, len(self.mean)), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        return expand_tails(self.mean + u @ self.factor.T)[0]


class MarginalNoise(nn.Module):
    """Independent columns, each a mixture of normals in compressed coordinates (equation 3).

    Parameters
    ----------
    centres, widths : Tensor of shape (D, M)
    """

    centres: torch.Tensor
    widths: torch.Tensor

    def __init__(self, centres: torch.Tensor, widths: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centres", centres)
        self.register_buffer("widths", widths)

    @classmethod
    def fit(cls, x: torch.Tensor) -> MarginalNoise:
        """Fit to rows ``(n, D)``, n >= 2."""
        y = compress_tails(x)[0].sort(0).values
        n_kernels = min(N_KERNELS, len(y))
        middle = (torch.arange(n_kernels, dtype=torch.float32, device=y.device) + 0.5) / n_kernels * len(y)
        centres = y[middle.long()].T.contiguous()
        gaps = centres.diff(dim=1)
        # At either end there is one neighbour, and all of the tail to cover.
        ends = torch.cat([gaps[:, :1], gaps, gaps[:, -1:]], 1)
        widths = torch.maximum(ends[:, 1:], ends[:, :-1]).clamp(min=MIN_DEVIATION)
        return cls(centres, widths)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density ``(B,)`` of rows ``(B, D)``."""
        y, log_det = compress_tails(x)
        u = (y.unsqueeze(2) - self.centres) / self.widths
        kernels = -0.5 * u.square() - self.widths.log()
        columns = kernels.logsumexp(2) - math.log(self.centres.shape[1]) - 0.5 * LOG_2PI
        return columns.sum(1) + log_det

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, D)`` rows."""
        features, n_kernels = self.centres.shape
        place: dict[str, Any] = {"generator": generator, "device": self.centres.device}
        kernel = torch.randint(n_kernels, (features, n), **place)
        u = torch.randn((features, n), dtype=self.centres.dtype, **place)
        y = self.centres.gather(1, kernel) + self.widths.gather(1, kernel) * u
        return expand_tails(y.T)[0]


class FoldedNoise(nn.Module):
    """A noise distribution of rows as one of images of a shape.

    Parameters
    ----------
    noise : module
        Of rows of as many values, with ``log_prob`` and ``sample``.
    event_shape : tuple of int
    """

    def __init__(self, noise: Any, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.noise = noise
        self.event_shape = event_shape

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density ``(B,)`` of images ``(B, *E)``."""
        log_density: torch.Tensor = self.noise.log_prob(x.flatten(1))
        return log_density

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)`` images."""
        rows: torch.Tensor = self.noise.sample(n, generator)
        return rows.unflatten(1, self.event_shape)


class NoiseBase(nn.Module):
    """A noise distribution as the base of an energy model: ``E_base = -log p_noise``, normalised.

    Parameters
    ----------
    noise : object
        With ``log_prob(x)`` and ``sample(n, generator)``.
    """

    def __init__(self, noise: Any) -> None:
        super().__init__()
        self.noise = noise

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Energy ``(B,)`` of rows ``(B, D)``."""
        return -check_shape(self.noise.log_prob(x), x.shape[:1], "The noise's log_prob")


def fit_flow_noise(
    x: torch.Tensor, generator: torch.Generator, *, n_steps: int = 200, batch_size: int = 256
) -> FlowModel:
    """Fit a small coupling flow to rows by maximum likelihood, and freeze it.

    Parameters
    ----------
    x : Tensor of shape (n, D)
        Smoothed by whoever calls, or the flow collapses onto the rows.
    generator : torch.Generator
        Draws the first weights and the batches.
    n_steps, batch_size : int
        Short: the flow has to cover the data, and what it lacks is for the model to learn.

    Returns
    -------
    FlowModel
        Without gradients.
    """
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    with forked_rng(seed), SinglePrecision():
        transform = make_flow_transform(
            "nsf-coupling", x.shape[1], n_layers=4, hidden_features=32, n_blocks=1
        )
        flow = FlowModel(transform, x.shape[1]).to(x)
    optimiser = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    with torch.enable_grad():
        for _ in range(n_steps):
            index = torch.randint(
                len(x), (min(batch_size, len(x)),), generator=generator, device=generator.device
            )
            loss = -flow.log_prob(x[index.to(x.device)]).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimiser.step()
            schedule.step()
    return flow.eval().requires_grad_(False)


def fit_noise(noise: Any, x: torch.Tensor, generator: torch.Generator) -> Any:
    """Turn a name into a noise distribution fitted to rows; an object is returned as it is.

    Parameters
    ----------
    noise : {"gaussian", "product-of-marginals", "flow"} or object
        An object has ``sample(n, generator) -> (n, *E)`` and ``log_prob(x) -> (B,)``.
    x : Tensor of shape (n, *E)
        The names see images as rows of pixels; "gaussian" has a covariance of all pixels with all.
    generator : torch.Generator

    Returns
    -------
    object
        With ``sample`` and ``log_prob``.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If an object lacks one of the methods.
    """
    if isinstance(noise, str):
        if noise not in NOISES:
            known = ", ".join(repr(name) for name in NOISES)
            raise ValueError(f"noise={noise!r} is unknown. Known names: {known}; or pass a distribution.")
        if x.ndim > 2:
            return FoldedNoise(fit_noise(noise, x.flatten(1), generator), tuple(x.shape[1:]))
        if noise == "gaussian":
            return GaussianNoise.fit(x)
        return MarginalNoise.fit(x) if noise == "product-of-marginals" else fit_flow_noise(x, generator)
    if isinstance(noise, torch.distributions.Distribution):
        raise TypeError(
            f"noise={noise!r} draws from torch's global generator. Wrap it in an object with sample(n, generator), for "
            "the generator of a fit, and log_prob(x)."
        )
    if not (hasattr(noise, "sample") and hasattr(noise, "log_prob")):
        raise TypeError(f"noise={noise!r} must have sample(n, generator) and log_prob(x), or be a name.")
    return noise


def adopt_noise(model: Any, noise: Any, x: torch.Tensor, generator: torch.Generator) -> Any:
    """Fit a noise distribution to rows `x` and make it the base of a model that takes one (`EnergyModel.set_base`).

    What the network adds is then the log-ratio of data and noise, and where there are neither the model is the noise:
    without, mass would hide where no draw ever looks, and no constant would be right. A model that has such a base
    already keeps it.

    Returns
    -------
    object
        The noise, with ``sample`` and ``log_prob``.

    Raises
    ------
    ValueError
        If the model is conditional on noise levels.
    """
    if hasattr(model, "set_base") and getattr(model, "noise_levels", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is conditional on noise levels, and noise to compare with has but one density. "
            "Make it with noise_levels=None; a detector that was fitted with another objective does so in a fit with "
            "warm_start=False."
        )
    base = getattr(model, "base", None)
    if isinstance(base, NoiseBase):
        return base.noise
    fitted = fit_noise(noise, x, generator)
    if hasattr(model, "set_base"):
        model.set_base(NoiseBase(fitted))
        return model.base.noise
    return fitted
