r"""Reverse-time samplers of diffusions: from noise back to rows, along a path and with a denoiser.

From time t back to an earlier time u. In levels s = sigma / alpha (paths, equation 1) the path's process is
Brownian, and given the clean row its position at u is normal (Ho et al. 2020, arXiv:2006.11239, equations 6 and 7, for
any path):

    x_u / alpha_u ~ N(D + r^2 (x_t / alpha_t - D), s_u^2 (1 - r^2)),     r = s_u / s_t,                           (1)

with the denoiser D(x_t / alpha_t, s_t) for the clean row. The step of the process itself has the variance

    sigma_{t|u}^2 = sigma_t^2 - (alpha_t / alpha_u)^2 sigma_u^2 = alpha_t^2 (s_t^2 - s_u^2).                         (2)

- `ancestral`: (1), with a variance between that of (1), which is right for data of a single row, and that of (2), which
  is right for data of unit variance on a path that preserves it. At the share v between their logs it is
  sigma_{t|u}^2 (sigma_u / sigma_t)^(2 - 2 v) (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 15).
- `ddim`: x_u = alpha_u D + sqrt(sigma_u^2 - c^2) e_t + c e, with e_t the noise that the denoiser finds, e fresh noise
  and c = eta sigma_u sqrt(1 - r^2) (Song et al. 2021, arXiv:2010.02502, equations 12 and 16): (1) for eta = 1, and
  deterministic for eta = 0.
- `probability_flow`: the ordinary differential equation with the same marginals, in levels

    dy/ds = (y - D(y, s)) / s,     y = x_t / alpha                                                                (3)

  (Karras et al. 2022, arXiv:2206.00364, equation 1; algorithm 1 with Heun's steps). Euler's step is `ddim` at eta = 0.
- `euler_maruyama`: dx = (f x - g^2 grad log p_t) dt + g dw, backward in time (Song et al. 2021, arXiv:2011.13456,
  equation 6).
- `predictor_corrector`: such a step followed by steps of Langevin dynamics at the new level (the same, algorithms 2
  and 3).
- `annealed`: Langevin dynamics alone, level after level (langevin).

All start from rows of the path's last time and end with the denoiser at the last level, which takes away the noise that
is left there; in (1), (3) and `ddim` that is the limit of a step to level zero.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from anomalib_gen._runtime import check_shape, expand_as_rows, normal_like
from anomalib_gen.paths import Path
from anomalib_gen.paths._path import Denoiser as Denoise
from anomalib_gen.samplers._chains import SamplerInfo, as_rows
from anomalib_gen.samplers._grids import Counted, check_grid, walk
from anomalib_gen.samplers.langevin import annealed_langevin
from anomalib_gen.samplers.ode import solve_ode, solve_ode_adaptively

Sampler = Callable[..., tuple[torch.Tensor, SamplerInfo]]
"""``sampler(denoise, x, grid, *, path, generator, **options) -> (x, info)``."""
PREDICTORS = ("ancestral", "reverse-diffusion")


class _Reverse:
    """A denoiser on a falling grid of a path: numbers at each time, and what is left of a sampler."""

    def __init__(self, denoise: Callable[..., Any], grid: torch.Tensor, path: Path, thin: int | None) -> None:
        self.grid = check_grid(grid, thin, falling=True)
        self.denoise = Counted(partial(_checked, denoise))
        self.alpha: list[float] = path.alpha(self.grid).tolist()
        self.sigma: list[float] = path.sigma(self.grid).tolist()
        self.levels = path.noise_level(self.grid)
        self.level: list[float] = self.levels.tolist()
        if not all(0 < level < math.inf for level in self.level):
            raise ValueError(
                f"grid must hold times at which {path!r} has a positive and finite noise level, got levels from "
                f"{self.level[0]:.3g} to {self.level[-1]:.3g}. Take path.grid(n_steps).flip(0), and final_denoise=True "
                "for the step to level zero."
            )

    def at(self, k: int, x: torch.Tensor) -> Any:
        """What the denoiser says of rows of the path at time k."""
        return self.denoise(x / self.alpha[k], x.new_full((len(x),), self.level[k]))

    def clean(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """Clean rows behind rows of the path at time k; without the share where the denoiser gives one."""
        rows = self.at(k, x)
        clean: torch.Tensor = rows[0] if isinstance(rows, tuple) else rows
        return clean

    def score(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """Gradient of log p of rows of the path at time k."""
        return (self.alpha[k] * self.clean(k, x) - x) / self.sigma[k] ** 2

    def posterior_mean(self, k: int, x: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Mean of equation 1, for the step from time k to k + 1."""
        keep = (self.level[k + 1] / self.level[k]) ** 2
        return self.alpha[k + 1] * ((1 - keep) * clean + (keep / self.alpha[k]) * x)

    def forward_std(self, k: int) -> float:
        """Root of equation 2, for the step from time k to k + 1."""
        return self.alpha[k] * math.sqrt(self.level[k] ** 2 - self.level[k + 1] ** 2)

    def ancestral(
        self, k: int, x: torch.Tensor, share: float | torch.Tensor | None, generator: torch.Generator
    ) -> torch.Tensor:
        """One step of `ancestral`; a share of None comes from the denoiser."""
        if share is None:
            clean, share = self.at(k, x)
            if share is None:
                raise ValueError("variance='learned' must come with a denoiser that has learned variances.")
        else:
            clean = self.clean(k, x)
        # As 1 - v falls from 1 to 0 the deviation rises from that of equation 1 to that of equation 2.
        std = self.forward_std(k) * (self.sigma[k + 1] / self.sigma[k]) ** (1 - share)
        return self.posterior_mean(k, x, clean) + std * normal_like(x, generator)

    def walk(
        self,
        step: Callable[[int, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        *,
        final_denoise: bool,
        thin: int | None,
        verbose: int,
        label: str,
    ) -> tuple[torch.Tensor, SamplerInfo]:
        last = partial(self.clean, len(self.grid) - 1) if final_denoise else None
        return walk(
            step, as_rows(x), self.grid, self.denoise, last=last, thin=thin, verbose=verbose, label=label
        )


def _checked(denoise: Callable[..., Any], y: torch.Tensor, level: torch.Tensor) -> Any:
    """What a denoiser gives, if the clean rows are as many and as wide as the noisy ones."""
    rows = denoise(y, level)
    check_shape(rows[0] if isinstance(rows, tuple) else rows, y.shape, "denoise")
    return rows


@torch.no_grad()
def ancestral(
    denoise: Callable[..., Any],
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator,
    variance: float | str = 0.0,
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Ancestral sampling: the reverse steps of DDPM, for any path on any grid (equation 1).

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``; with ``variance="learned"`` it gives a pair of these rows and
        the shares v, as `NetworkDenoiser.denoise_and_variance` does.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path.
    path : Path
    generator : torch.Generator
        On the device of `x`.
    variance : float or "learned", default=0.0
        The share v: 0 for the lower and 1 for the upper bound of a step's variance.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level. Else the rows are those of the path at the last time.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step in time.

    References
    ----------
    Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.

    Nichol, A., Dhariwal, P. (2021). Improved denoising diffusion probabilistic models. ICML. arXiv:2102.09672.
    """
    share = _share(variance)
    reverse = _Reverse(denoise, grid, path, thin)
    return reverse.walk(
        lambda k, x: reverse.ancestral(k, x, share, generator),
        x,
        final_denoise=final_denoise,
        thin=thin,
        verbose=verbose,
        label="ancestral",
    )


def _share(variance: float | str) -> float | None:
    if variance == "learned":
        return None
    if isinstance(variance, str) or not 0 <= variance <= 1:
        raise ValueError(f"variance must lie in [0, 1] or be 'learned', got {variance!r}.")
    return float(variance)


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Denoising diffusion implicit model, for any path on any grid.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path.
    path : Path
    generator : torch.Generator, optional
        On the device of `x`; not needed for ``eta=0``.
    eta : float, default=0.0
        0 is deterministic, 1 is `ancestral` with its lower variance.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level. Else the rows are those of the path at the last time.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step in time.

    References
    ----------
    Song, J., Meng, C., Ermon, S. (2021). Denoising diffusion implicit models. ICLR. arXiv:2010.02502.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    if eta > 0 and generator is None:
        raise ValueError("a generator must be given for eta > 0.")
    reverse = _Reverse(denoise, grid, path, thin)

    def step(k: int, x: torch.Tensor) -> torch.Tensor:
        clean = reverse.clean(k, x)
        found = (x - reverse.alpha[k] * clean) / reverse.sigma[k]
        fresh = eta * math.sqrt(1 - (reverse.level[k + 1] / reverse.level[k]) ** 2)
        noise = math.sqrt(1 - fresh**2) * found
        if generator is not None and eta > 0:
            noise = noise + fresh * normal_like(x, generator)
        return reverse.alpha[k + 1] * clean + reverse.sigma[k + 1] * noise

    return reverse.walk(step, x, final_denoise=final_denoise, thin=thin, verbose=verbose, label="DDIM")


@torch.no_grad()
def probability_flow(
    denoise: Denoise,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator | None = None,
    method: str = "heun",
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
    **tolerances: float,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Solve the probability-flow equation in levels (equation 3), on the levels of the grid.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path. Heun's steps are at their best on the grid of `EDM`, and
        lose to Euler's where a step spans levels of very different size far above the data.
    path : Path
    generator : torch.Generator, optional
        Not used; the solution is deterministic.
    method : {"euler", "heun", "rk4", "adaptive"}, default="heun"
        See `solve_ode` and `solve_ode_adaptively`, which solves for y / sqrt(1 + s^2) in log s.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level, Euler's step to level zero. Else the rows are those of the
        path at the last time.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``, divided by alpha; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar; "adaptive" has none.
    **tolerances : float
        ``rtol`` and ``atol`` for "adaptive".

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step in levels.

    References
    ----------
    Karras, T., Aittala, M., Aila, T., Laine, S. (2022). Elucidating the design space of diffusion-based generative
    models. NeurIPS. arXiv:2206.00364.
    """
    reverse = _Reverse(denoise, grid, path, thin)
    y = as_rows(x) / reverse.alpha[0]

    def field(y: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return (y - reverse.denoise(y, level)) / expand_as_rows(level, y)

    if method == "adaptive":
        y, info = _flow_adaptively(reverse.denoise, y, reverse.levels, thin, tolerances)
    else:
        y, info = solve_ode(field, y, reverse.levels, method=method, thin=thin, verbose=verbose, **tolerances)
    if not final_denoise:
        return reverse.alpha[-1] * y, info
    y, end = walk(
        lambda k, y: reverse.clean(-1, reverse.alpha[-1] * y),
        y,
        torch.tensor([reverse.level[-1], 0.0], dtype=torch.float64),
        reverse.denoise,
        thin=None,
        verbose=0,
        label="",
    )
    divergences = info.divergences + end.divergences
    return y, replace(info, n_evaluations=reverse.denoise.calls, divergences=divergences)


def _flow_adaptively(
    denoise: Denoise, y: torch.Tensor, levels: torch.Tensor, thin: int | None, tolerances: dict[str, float]
) -> tuple[torch.Tensor, SamplerInfo]:
    """Equation 3 for z = y / sqrt(1 + s^2) in log s, so that a tolerance means the same at all levels.

    In levels themselves a tolerance relative to the noise of the first ones would let a step pass by the data.
    """

    def field(z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        level = u.exp()
        width = expand_as_rows((1 + level.square()).sqrt(), z)
        return (z / width - denoise(width * z, level)) / width

    widths = (1 + levels.square()).sqrt()
    z, info = solve_ode_adaptively(field, y / float(widths[0]), levels.log(), thin=thin, **tolerances)
    if info.samples is not None and thin is not None:
        kept = expand_as_rows(widths[thin::thin].to(info.samples), info.samples)
        info = replace(info, samples=kept * info.samples)
    return float(widths[-1]) * z, info


@torch.no_grad()
def euler_maruyama(
    denoise: Denoise,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator,
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Euler's steps on the reverse stochastic differential equation, in the path's own time.

    It needs short steps where the path's rates change fast; `ancestral` takes the path's share of a step exactly.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path.
    path : Path
    generator : torch.Generator
        On the device of `x`.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level. Else the rows are those of the path at the last time.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step in time.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """
    reverse = _Reverse(denoise, grid, path, thin)
    drift, rate = path.drift(reverse.grid).tolist(), path.diffusion_squared(reverse.grid).tolist()
    h = (-reverse.grid.diff()).tolist()

    def step(k: int, x: torch.Tensor) -> torch.Tensor:
        velocity = drift[k] * x - rate[k] * reverse.score(k, x)
        return x - h[k] * velocity + math.sqrt(rate[k] * h[k]) * normal_like(x, generator)

    return reverse.walk(
        step, x, final_denoise=final_denoise, thin=thin, verbose=verbose, label="Euler-Maruyama"
    )


@torch.no_grad()
def predictor_corrector(
    denoise: Denoise,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator,
    predictor: str = "reverse-diffusion",
    n_corrections: int = 1,
    signal_to_noise: float = 0.16,
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """A reverse step, then Langevin steps that mend what it left, at each time.

    A Langevin step is x' = x + h score + sqrt(2 h) e. The paper chooses ``h = 2 (r |e| / |score|)^2`` with norms
    averaged over the batch, which couples its rows; here they are those of noise alone, ``|e| = sqrt(D)`` and
    ``|score| = sqrt(D) / sigma``, so that h = 2 r^2 sigma^2.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path.
    path : Path
    generator : torch.Generator
        On the device of `x`.
    predictor : {"reverse-diffusion", "ancestral"}, default="reverse-diffusion"
        "reverse-diffusion" is x_u = (2 - a) x_t + sigma_{t|u}^2 score + sigma_{t|u} e with a = alpha_t / alpha_u;
        "ancestral" is `ancestral` with its lower variance.
    n_corrections : int, default=1
        Langevin steps after each reverse step.
    signal_to_noise : float, default=0.16
        r. Where the noise dominates, Langevin steps diverge from r = 1 on.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level. Else the rows are those of the path at the last time.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step in time.

    References
    ----------
    Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
    arXiv:2011.13456.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor={predictor!r} is unknown. Known: {', '.join(map(repr, PREDICTORS))}.")
    if n_corrections < 0 or not 0 < signal_to_noise < 1:
        raise ValueError(
            "n_corrections must not be negative and signal_to_noise must lie in (0, 1), "
            f"got {n_corrections} and {signal_to_noise}."
        )
    reverse = _Reverse(denoise, grid, path, thin)

    def step(k: int, x: torch.Tensor) -> torch.Tensor:
        if predictor == "ancestral":
            x = reverse.ancestral(k, x, 0.0, generator)
        else:
            std = reverse.forward_std(k)
            shrink = reverse.alpha[k] / reverse.alpha[k + 1]
            x = (2 - shrink) * x + std**2 * reverse.score(k, x) + std * normal_like(x, generator)
        h = 2 * (signal_to_noise * reverse.sigma[k + 1]) ** 2
        for _ in range(n_corrections):
            x = x + h * reverse.score(k + 1, x) + math.sqrt(2 * h) * normal_like(x, generator)
        return x

    return reverse.walk(
        step, x, final_denoise=final_denoise, thin=thin, verbose=verbose, label="predictor-corrector"
    )


@torch.no_grad()
def annealed(
    denoise: Denoise,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    path: Path,
    generator: torch.Generator,
    n_steps_per_level: int = 10,
    step_ratio: float = 0.1,
    final_denoise: bool = True,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Annealed Langevin dynamics over the levels of the grid (see `annealed_langevin`).

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows of the path at the first time of the grid.
    grid : Tensor
        ``(n_steps + 1,)``, strictly falling times of the path.
    path : Path
    generator : torch.Generator
        On the device of `x`.
    n_steps_per_level : int, default=10
        Langevin steps at each level.
    step_ratio : float, default=0.1
        Step size over squared level; below 2.
    final_denoise : bool, default=True
        Whether to end with the denoiser at the last level. Else the rows are those of the path at the last time.
    thin : int, optional
        Keep every `thin`-th state of the last level in ``info.samples``, divided by alpha; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``. A move that would not be finite is not made.
    info : SamplerInfo

    References
    ----------
    Song, Y., Ermon, S. (2019). Generative modeling by estimating gradients of the data distribution. NeurIPS.
    arXiv:1907.05600.
    """
    reverse = _Reverse(denoise, grid, path, thin)

    def score(y: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return (reverse.denoise(y, level) - y) / expand_as_rows(level.square(), y)

    y, info = annealed_langevin(
        score,
        as_rows(x) / reverse.alpha[0],
        reverse.level,
        n_steps_per_level=n_steps_per_level,
        step_ratio=step_ratio,
        denoise=final_denoise,
        generator=generator,
        thin=thin,
        verbose=verbose,
    )
    return (y if final_denoise else reverse.alpha[-1] * y), info


SAMPLERS: Mapping[str, Sampler] = {
    "adaptive": partial(probability_flow, method="adaptive"),
    "ancestral": ancestral,
    "annealed-langevin": annealed,
    "ddim": ddim,
    "euler": partial(probability_flow, method="euler"),
    "euler-maruyama": euler_maruyama,
    "heun": partial(probability_flow, method="heun"),
    "predictor-corrector": predictor_corrector,
    "rk4": partial(probability_flow, method="rk4"),
}
"""Samplers by name, with one call: ``sampler(denoise, x, grid, path=..., generator=...) -> (x, info)``."""


def sampler_options(name: str) -> list[str]:
    """Names of the options that a sampler of `SAMPLERS` takes beside what all of them are given."""
    given = {"path", "generator", "method", "thin", "verbose"}
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given]
    return sorted([*options, "rtol", "atol"] if name == "adaptive" else options)
