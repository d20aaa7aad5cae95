r"""Langevin dynamics: follow the score, add noise.

The diffusion dx = s(x) dt + sqrt(2 T) dw with s = grad log p has the stationary density p^(1/T). Its Euler step of
size h is the *unadjusted* Langevin algorithm (ULA),

    x' = x + h s(x) + sqrt(2 h T) e,     e ~ N(0, I).                                (1)

It is biased by O(h): for p = N(0, 1) and T = 1 its stationary variance is 1 / (1 - h / 2). Taking (1) at T = 1 as the
proposal of a Metropolis step removes the bias (MALA; Roberts & Tweedie 1996, doi:10.2307/3318418). With the proposal's
log-density -|x' - x - h s(x)|^2 / (4 h) + const, the log of the acceptance ratio is

    E(x) - E(x') + (|x' - x - h s(x)|^2 - |x - x' - h s(x')|^2) / (4 h).             (2)

Its best acceptance rate in high dimensions is 0.574 (Roberts & Rosenthal 1998, doi:10.1111/1467-9868.00123). Where the
energy is steep, h s overshoots by far and is refused again and again: the chain sticks. The *truncated* algorithm
(MALTA, of the same paper) proposes with

    s(x) min(1, b / |s(x)|)                                                          (3)

in place of s(x), in (1) and in (2) alike: MALA where scores are shorter than b, and elsewhere a random walk with a push
downhill, which does not stick.

Between separated modes neither moves. *Annealed* Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, algorithm 1)
runs (1) on the scores of data with noise of level sigma_1 > ... > sigma_L, each level starting where the last one
ended, with h_i = r sigma_i^2: the ratio of signal to noise in a step is then the same at all levels. A final step of
Tweedie's formula, x + sigma_L^2 s(x, sigma_L), removes the noise of the last level (Song & Ermon 2020,
arXiv:2006.09011).

Short-run chains, which train energies (Nijkamp et al. 2019, arXiv:1904.09770), are a few steps of `ula` from noise or
from data, usually with less noise than (1) has: ``ula(score_of(energy), x, 50, step_size=1.0, noise_scale=0.01, ...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from anomalib_gen._runtime import check_shape, expand_as_rows, normal_like
from anomalib_gen.samplers._chains import (
    ChainState,
    Energy,
    Kernel,
    Move,
    SamplerInfo,
    Score,
    as_rows,
    as_scale,
    check_positive,
    check_steps,
    metropolis,
    progress,
    run_chains,
    square_norm,
    stack,
    state_at,
    where_rows,
)


@torch.no_grad()
def ula(
    score: Score,
    x: torch.Tensor,
    n_steps: int,
    *,
    step_size: float,
    temperature: float = 1.0,
    noise_scale: float | None = None,
    max_score_norm: float | None = None,
    generator: torch.Generator,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Unadjusted Langevin algorithm (equation 1).

    Parameters
    ----------
    score : callable
        ``score(x: (B, *E)) -> (B, *E)``, the gradient of the log-density; `score_of` makes one of an energy.
    x : Tensor
        ``(B, *E)``, where the chains start.
    n_steps : int
        Steps.
    step_size : float
        h, in squared units of `x`.
    temperature : float, default=1.0
        T; the chains sample p^(1/T). 0 is gradient ascent.
    noise_scale : float, optional
        Standard deviation of a step's noise in units of `x`, in place of sqrt(2 h T). The chains then sample
        p^(1/T) at the temperature T = noise_scale^2 / (2 h).
    max_score_norm : float, optional
        Scores of a larger Euclidean norm over the event are scaled down to it. This stabilises the training of
        energies and adds a bias; the default leaves them alone.
    generator : torch.Generator
        On the device of `x`.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``, where the chains end. A move that would not be finite is not made.
    info : SamplerInfo
    """
    check_steps(n_steps, thin)
    check_positive(step_size, "step_size")
    if max_score_norm is not None:
        check_positive(max_score_norm, "max_score_norm")
    if not 0 <= temperature < math.inf or not (noise_scale is None or 0 <= noise_scale < math.inf):
        raise ValueError(
            "temperature and noise_scale must be finite and not negative, "
            f"got {temperature} and {noise_scale}."
        )
    noise = math.sqrt(2 * step_size * temperature) if noise_scale is None else noise_scale
    x, samples = as_rows(x), []
    divergences = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for step in progress(range(n_steps), verbose, "ULA"):
        x, divergent = _ula_step(score(x), x, step_size, noise, max_score_norm, generator)
        divergences += divergent
        if thin is not None and (step + 1) % thin == 0:
            samples.append(x)
    return x, SamplerInfo(
        n_evaluations=n_steps,
        step_size=(step_size,),
        divergences=divergences,
        samples=stack(samples, x) if thin is not None else None,
    )


def _ula_step(
    s: torch.Tensor,
    x: torch.Tensor,
    h: float,
    noise: float,
    max_score_norm: float | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one step of equation 1 from the scores `s`; also return which rows could not be moved, ``(B,)``."""
    s = check_shape(s, x.shape, "score").detach()
    moved = x + h * _cut(s, max_score_norm) + noise * normal_like(x, generator)
    finite = moved.flatten(1).isfinite().all(1)
    return where_rows(finite, moved, x), ~finite


def mala(
    energy: Energy,
    x: torch.Tensor,
    n_steps: int,
    *,
    step_size: float,
    scale: torch.Tensor | None = None,
    max_score_norm: float | None = None,
    n_warmup: int = 0,
    target_acceptance: float = 0.574,
    generator: torch.Generator,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Metropolis-adjusted Langevin algorithm: no bias, whatever the step size (equation 2).

    Parameters
    ----------
    energy : callable
        ``energy(x: (B, *E)) -> (B,)``, minus the unnormalised log-density, differentiable by autograd.
    x : Tensor
        ``(B, *E)``, where the chains start.
    n_steps : int
        Steps after the warm-up.
    step_size : float
        h, in squared units of `x` (of `scale`, if given); where adaptation starts if there is a warm-up.
    scale : Tensor, optional
        Length scale of each coordinate, broadcast with ``(*E)``, such as its standard deviation. The chains then run as
        if on x / scale.
    max_score_norm : float, optional
        b of equation 3, for scores of the density of x / scale. No bias comes with it; the default leaves scores alone.
    n_warmup : int, default=0
        Discarded steps before, during which the step size is adapted; it is one for all chains.
    target_acceptance : float, default=0.574
        Mean acceptance that adaptation aims at.
    generator : torch.Generator
        On the device of `x`.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``, where the chains end. States of non-finite energy are never accepted.
    info : SamplerInfo
    """
    if max_score_norm is not None:
        check_positive(max_score_norm, "max_score_norm")
    x = as_rows(x)
    with torch.no_grad():
        return run_chains(
            mala_kernel(scale=as_scale(scale, x), max_score_norm=max_score_norm, generator=generator),
            energy,
            x,
            n_steps,
            step_size=step_size,
            n_warmup=n_warmup,
            target_acceptance=target_acceptance,
            evaluations_per_step=1,
            thin=thin,
            verbose=verbose,
            label="MALA",
        )


def mala_kernel(
    *, scale: torch.Tensor | None, max_score_norm: float | None = None, generator: torch.Generator
) -> Kernel:
    """One step of `mala` as a function of the energy, the state and the step size."""
    c: torch.Tensor | float = 1.0 if scale is None else scale

    def drift(score: torch.Tensor, h: float) -> torch.Tensor:
        """Move of the proposal's mean in the coordinates z = x / c, in units of the noise sqrt(2 h)."""
        return math.sqrt(h / 2) * _cut(c * score, max_score_norm)

    def kernel(energy: Energy, state: ChainState, h: float) -> Move:
        # In the coordinates z = x / c, whose score is c s, the noise is (z' - z - h c s) / sqrt(2 h).
        noise, forward = normal_like(state.x, generator), drift(state.score, h)
        proposal = state_at(energy, state.x + math.sqrt(2 * h) * c * (forward + noise))
        # The noise that leads back; |forward|^2 / 2 = |z' - z - h c s|^2 / (4 h).
        back = -noise - forward - drift(proposal.score, h)
        log_ratio = state.energy - proposal.energy + 0.5 * (square_norm(noise) - square_norm(back))
        return metropolis(state, proposal, log_ratio, generator=generator)

    return kernel


def _cut(s: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Scale scores ``(B, *E)`` of a larger norm than `max_norm` down to it."""
    if max_norm is None:
        return s
    return s * expand_as_rows(max_norm / s.flatten(1).norm(dim=1).clamp(min=max_norm), s)


@torch.no_grad()
def annealed_langevin(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: Sequence[float] | torch.Tensor,
    *,
    n_steps_per_level: int = 100,
    step_ratio: float = 0.1,
    denoise: bool = True,
    generator: torch.Generator,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Annealed Langevin dynamics over falling noise levels (Song & Ermon 2019, algorithm 1).

    Parameters
    ----------
    score : callable
        ``score(x: (B, *E), sigma: (B,)) -> (B, *E)``, the gradient of the log-density of data with noise of standard
        deviation sigma.
    x : Tensor
        ``(B, *E)``, where the chains start: noise as wide as sigma_1, which should exceed the distances in the data.
    sigmas : sequence of float
        Noise levels, strictly falling. Neighbours should overlap: ratios near 1 + sqrt(2 / D) to 1.5 in D dimensions.
    n_steps_per_level : int, default=100
        Steps at each level.
    step_ratio : float, default=0.1
        r in h_i = r sigma_i^2. (In the symbols of the paper, epsilon = 2 r sigma_L^2.) Where the noise dominates, each
        level has the variance sigma^2 / (1 - r / 2), and from r = 2 on the chain diverges.
    denoise : bool, default=True
        Whether to end with Tweedie's formula, which removes the noise of the last level.
    generator : torch.Generator
        On the device of `x`.
    thin : int, optional
        Keep every `thin`-th state of the last level in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``, where the chains end. A move that would not be finite is not made.
    info : SamplerInfo
    """
    check_steps(n_steps_per_level, thin)
    levels = [float(sigma) for sigma in sigmas]
    falling = all(a > b for a, b in pairwise(levels))
    if not levels or not falling or not levels[0] < math.inf or not levels[-1] > 0:
        raise ValueError(f"sigmas must be positive, finite and strictly falling, got {levels}.")
    if not 0 < step_ratio < 2:
        raise ValueError(f"step_ratio must lie in (0, 2), or the chains diverge, got {step_ratio}.")
    x, samples = as_rows(x), []
    divergences = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for level in progress(range(len(levels)), verbose, "annealed Langevin"):
        h, sigma = step_ratio * levels[level] ** 2, x.new_full((len(x),), levels[level])
        for step in range(n_steps_per_level):
            x, divergent = _ula_step(score(x, sigma), x, h, math.sqrt(2 * h), None, generator)
            divergences += divergent
            if thin is not None and level == len(levels) - 1 and (step + 1) % thin == 0:
                samples.append(x)
    if denoise:
        clean = x + levels[-1] ** 2 * check_shape(score(x, sigma), x.shape, "score").detach()
        finite = clean.flatten(1).isfinite().all(1)
        divergences += ~finite
        x = where_rows(finite, clean, x)
    return x, SamplerInfo(
        n_evaluations=len(levels) * n_steps_per_level + int(denoise),
        step_size=tuple(step_ratio * sigma**2 for sigma in levels),
        divergences=divergences,
        samples=stack(samples, x) if thin is not None else None,
    )
