r"""Denoisers: what a diffusion model is, seen from one side.

With a clean row x_0 and noise of level s, the mean of the clean rows behind a noisy one,

    D(x, s) = E[x_0 | x_0 + s e = x],     e ~ N(0, I),                                               (1)

gives the score of the noised density by Tweedie's formula (Robbins 1956; Efron 2011,
doi:10.1198/jasa.2011.tm11181),

    grad log p_s(x) = (D(x, s) - x) / s^2,                                                           (2)

and with a path (paths) the noise, the velocity and all other views of a diffusion model. A `NetworkDenoiser` learns
(1). What its network F gives is one of four parametrisations, all of which see the row at unit variance,
y = x / sqrt(s^2 + d^2) for data of deviation d:

    "x0":  D = F(y, s),
    "eps": D = x - s F(y, s)                                                 (Ho et al. 2020, arXiv:2006.11239),
    "v":   D = (x - s sqrt(1 + s^2) F(y, s)) / (1 + s^2)            (Salimans and Ho 2022, arXiv:2202.00512),
    "edm": D = (d^2 x + s d sqrt(s^2 + d^2) F(y, s)) / (s^2 + d^2)     (Karras et al. 2022, arXiv:2206.00364, table 1).

For d = 1 the last two are one, up to the sign of F. In "edm" the error of F counts most where noise and row are of a
size, and F has unit variance at every level, which is why it is the default.

The other way round, (2) makes a denoiser of any score at all levels: `ScoreDenoiser` of a noise-conditional energy, or
of a mixture of Gaussians in closed form.

Beyond a box of twelve deviations F sees the row at the edge of the box, and (1) goes on as for normal data:
what is left of a step beyond the edge is d^2 / (s^2 + d^2) of it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from anomalib_gen._runtime import check_count, check_shape, expand_as_rows, normal_like
from anomalib_gen.models.likelihood import ELBOTerms, balanced_elbo_terms, ode_log_prob
from anomalib_gen.paths import Path, Prediction
from anomalib_gen.samplers import SAMPLERS

PARAMETRIZATIONS = ("edm", "v", "eps", "x0")
NETWORK_BOUND = 12.0
"""Half the side of the box, in deviations of the noised data."""
N_FREQUENCIES = 8
LEVEL_FEATURES = 1 + 2 * N_FREQUENCIES
"""Numbers by which a network is told the noise level."""


def embed_levels(level: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Features ``(B, LEVEL_FEATURES)`` of noise levels ``(B,)``: log s scaled to [-1, 1], and waves of it."""
    u = (2 * level.log() - math.log(low * high)) / math.log(high / low)
    k = torch.arange(1, N_FREQUENCIES + 1, dtype=level.dtype, device=level.device)
    phase = 0.5 * math.pi * u.unsqueeze(1) * k
    return torch.cat([u.unsqueeze(1), phase.sin(), phase.cos()], dim=1)


def output_shape(x: torch.Tensor, learned_variance: bool) -> tuple[int, ...]:
    """Shape of what a network gives for rows ``(B, *E)``; twice as wide where it learns variances too."""
    return len(x), (2 if learned_variance else 1) * x.shape[1], *x.shape[2:]


class Denoiser(nn.Module):
    """Base of all denoisers: what follows from `denoise`.

    Parameters
    ----------
    path : Path
        The process that the denoiser belongs to. Its clock and its range of noise levels are what samplers,
        objectives and anomalies use; `denoise` itself knows levels only.
    event_shape : tuple of int, optional
        Shape E of a row, which `sample` needs.

    Attributes
    ----------
    noise_levels : tuple of float
        Smallest and largest noise level.
    """

    def __init__(self, path: Path, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.path = path
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.noise_levels = path.noise_levels

    @abstractmethod
    def denoise(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones (equation 1).

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows with noise added, not scaled.
        level : Tensor of shape (B,)
            Deviation of the noise.

        Returns
        -------
        Tensor of shape (B, *E)
        """

    def score(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Gradient of the log-density of rows with noise (equation 2), ``(B, *E)``."""
        return (self.denoise(x, level) - x) / expand_as_rows(level.square(), x)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """All views of rows `x_t` ``(B, *E)`` on the path at times `t` ``(B,)``."""
        return self.path.predict(self.denoise, x_t, t)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        sampler: str = "heun",
        n_steps: int = 100,
        **options: Any,
    ) -> torch.Tensor:
        """Draw ``(n, *E)`` rows, from N(0, alpha^2 + sigma^2) at the path's last time back to its first.

        Parameters
        ----------
        n : int
        generator : torch.Generator
            On the model's device.
        sampler : str, default="heun"
            A name in `samplers.SAMPLERS`.
        n_steps : int, default=100
            Steps of the path's grid; a discrete path has at most its own.
        **options : Any
            Passed on to the sampler, such as ``eta`` or ``variance="learned"``.
        """
        if self.event_shape is None:
            raise ValueError(f"{type(self).__name__} was made without the event_shape that sampling needs.")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is unknown. Known: {', '.join(map(repr, SAMPLERS))}.")
        grid = self.path.grid(n_steps).flip(0)
        width = float((self.path.alpha(grid[0]).square() + self.path.sigma(grid[0]).square()).sqrt())
        like = next(chain(self.parameters(), self.buffers()), torch.empty((), dtype=torch.float32))
        start = width * normal_like(like.new_empty((n, *self.event_shape)), generator)
        learned = options.get("variance") == "learned"
        denoise = self.denoise_and_variance if learned else self.denoise
        x, _ = SAMPLERS[sampler](denoise, start, grid, path=self.path, generator=generator, **options)
        return x

    def denoise_and_variance(
        self, x: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`denoise`, and where the variance of a reverse step lies: 0 lower bound, 1 upper; None if not learned."""
        return self.denoise(x, level), None

    def log_prob(
        self, x: torch.Tensor, generator: torch.Generator | None = None, **options: Any
    ) -> torch.Tensor:
        """Log-density ``(B,)`` of rows with noise of the smallest level, in nats; see `ode_log_prob` for options.

        The generator is needed for rows of more than 32 coordinates only.
        """
        options = {"estimate_error": False, **options}
        return ode_log_prob(self.denoise, x, self.noise_levels, generator=generator, **options).log_prob

    def elbo_terms(
        self, x: torch.Tensor, generator: torch.Generator, *, n_steps: int = 100, n_draws: int = 1
    ) -> ELBOTerms:
        """Variational bound in its parts, over levels in equal ratios; see `balanced_elbo_terms`.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
        generator : torch.Generator
            On any device. The noise has the event's shape and is the same for all rows.
        n_steps : int, default=100
            Steps. With few of them the bound is loose.
        n_draws : int, default=1
            Pairs of noise; each costs two evaluations of the model for each step.
        """
        check_count(n_steps, "n_steps")
        low, high = self.noise_levels
        levels = torch.logspace(math.log10(low), math.log10(high), n_steps + 1, dtype=torch.float64)
        return balanced_elbo_terms(self.denoise, x, levels, generator, n_draws=n_draws)


class NetworkDenoiser(Denoiser):
    """A network as a denoiser.

    Parameters
    ----------
    network : module
        ``forward(y: (B, *E), context: (B, LEVEL_FEATURES)) -> (B, *E)``, or ``(B, 2 E_1, ...)`` with
        `learned_variance`.
    path : Path
    parametrization : {"edm", "v", "eps", "x0"}, default="edm"
        What the network's output means.
    grain : Tensor of shape E, optional
        Deviation of the dequantisation noise of each column; the data are x + grain * e. The training objective adds
        it; here it only sets the deviation d of the data.
    learned_variance : bool, default=False
        Whether the network has a second output of the same size, which says where the variance of a reverse step lies
        between its two bounds (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 15).
    event_shape : tuple of int, optional
        Shape E of a row, which `sample` needs.
    """

    grain: torch.Tensor
    spread: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        *,
        parametrization: str = "edm",
        grain: torch.Tensor | None = None,
        learned_variance: bool = False,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, event_shape)
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization={parametrization!r} is unknown. Known: {', '.join(map(repr, PARAMETRIZATIONS))}."
            )
        self.network = network
        self.parametrization = parametrization
        self.learned_variance = learned_variance
        grain = torch.zeros(()) if grain is None else grain
        self.register_buffer("grain", grain)
        self.register_buffer("spread", (1 + grain.square()).sqrt())

    def denoise(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones (equation 1)."""
        return self.denoise_and_variance(x, level)[0]

    def denoise_and_variance(
        self, x: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`denoise`, and where the variance of a reverse step lies: 0 lower bound, 1 upper; None if not learned."""
        s, d = expand_as_rows(level, x), self.spread
        total = (s.square() + d.square()).sqrt()
        y = x / total
        inside = y.clamp(-NETWORK_BOUND, NETWORK_BOUND)
        out = self.network(inside, embed_levels(level, *self.noise_levels))
        check_shape(out, output_shape(x, self.learned_variance), "The network")
        share = None
        if self.learned_variance:
            out, share = out.chunk(2, dim=1)
            share = 0.5 * (share + 1)
        keep = d.square() / total.square()
        at_edge = inside * total
        if self.parametrization == "edm":
            clean = keep * at_edge + (s * d / total) * out
        elif self.parametrization == "v":
            clean = (at_edge - s * (1 + s.square()).sqrt() * out) / (1 + s.square())
        elif self.parametrization == "eps":
            clean = at_edge - s * out
        else:
            clean = out
        return clean + keep * (x - at_edge), share


class ScoreDenoiser(Denoiser):
    """The denoiser of a model that has scores at all noise levels, D = x + s^2 score (equation 2).

    Parameters
    ----------
    model : module
        With ``score(x: (B, *E), level: (B,)) -> (B, *E)``, such as an `EnergyModel` that is conditional on noise, or
        `GaussianMixtureEnergy`, whose denoiser is then exact.
    path : Path
        Its noise levels should be those of the model.
    event_shape : tuple of int, optional
        Shape E of a row, which `sample` needs.
    """

    def __init__(self, model: nn.Module, path: Path, *, event_shape: Sequence[int] | None = None) -> None:
        super().__init__(path, event_shape)
        self.model: Any = model

    def denoise(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones (equation 1)."""
        return x + expand_as_rows(level.square(), x) * self.score(x, level)

    def score(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The model's score, ``(B, *E)``."""
        score: torch.Tensor = self.model.score(x, level)
        return score
