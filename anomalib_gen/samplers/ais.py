r"""Annealed importance sampling: the normalising constant of an energy, with an interval.

To find log Z with Z = ∫ exp(-E(x)) dx, start from a normalised base p_0 and go through the energies

    U_b(x) = -(1 - b) log p_0(x) + b E(x),     0 = b_0 < b_1 < ... < b_K = 1.        (1)

A chain draws x_0 ~ p_0, and for k = 1 ... K first gains the weight and then moves by a kernel that leaves exp(-U_{b_k})
invariant (Neal 2001, arXiv:physics/9803008, equation 11):

    log w <- log w + U_{b_{k-1}}(x) - U_{b_k}(x).                                    (2)

Then E[w] = Z exactly, however badly the kernels mix, and log Z is estimated by the log of the mean of the weights of n
independent chains. That holds for kernels fixed beforehand only. So whatever is tuned is tuned on pilot chains,
which are thrown away:

- the b_k, so that each step of (2) has the same standard deviation over the chains: equal steps of thermodynamic
  length, the choice of least variance (Gelman & Meng 1998, doi:10.1214/ss/1028905934, section 4.3);
- the length scale of each coordinate at each b_k: the standard deviation over the chains;
- the step size at each b_k, which follows the acceptance rate (Robbins & Monro 1951).

A trajectory of HMC is as many leapfrog steps long as make a quarter turn, pi / 2: a Gaussian of these length scales has
then forgotten where it came from, while after half a turn it would be at the mirror image, with the same energy.

The interval is log Z +- t se, with se = std(w) / (mean(w) sqrt(n)) the standard error of the log of a mean (delta
method) and t a quantile of Student's distribution with ESS - 1 degrees of freedom, ESS = (sum w)^2 / sum w^2: a few
large weights determine a variance no better than a few draws would. No interval covers where the weights that matter
were never drawn, and by Jensen's inequality the estimate is then too low. Of 256 log-normal weights of known mean,
intervals of 95 % cover it in 94 % of the runs whose ESS is above 0.3 n, in 84 % of those between 0.1 n and 0.2 n, and
in 69 % of those between 0.05 n and 0.1 n. So below 0.1 n there is a warning, and also below 0.5 n where the weights
have a tail too heavy for any mean (`pareto_k` above 0.7). The cause is mostly a base far too narrow or far too wide,
which shows in how much the chains had to widen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from scipy.special import stdtrit

from anomalib_gen import _runtime
from anomalib_gen._warnings import warn_user
from anomalib_gen.samplers._chains import Energy, Kernel, mean_acceptance, progress, state_at
from anomalib_gen.samplers.diagnostics import pareto_k
from anomalib_gen.samplers.hmc import hmc_kernel
from anomalib_gen.samplers.langevin import mala_kernel

FEW_DRAWS, SMALL_SHARE = 10, 0.1
"""Below this effective sample size, or below this share of the chains, the result comes with a warning."""
HEAVY_TAIL, EVEN_SHARE = 0.7, 0.5
"""So it does with a tail of a larger shape k, unless weights are worth this share of the chains: k knows no scale, and
the tail of weights that hardly differ does no harm."""
UNLIKE = 3.0
"""A base that is narrower or wider than the density by more than this factor is named as the likely cause."""


class Base(Protocol):
    """A normalised density that can be sampled."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density of rows ``(B, *E)``, ``(B,)``."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)``."""
        ...


@dataclass(frozen=True)
class GaussianBase:
    """Independent Gaussians, whose precision and device are those of `mean`.

    Attributes
    ----------
    mean : Tensor
        ``(*E)``.
    scale : Tensor or float, default=1.0
        Standard deviation, broadcast with ``(*E)``.
    """

    mean: torch.Tensor
    scale: torch.Tensor | float = 1.0

    def __post_init__(self) -> None:
        mean, scale = self.mean, torch.as_tensor(self.scale)
        if (
            not isinstance(mean, torch.Tensor)
            or not mean.is_floating_point()
            or not bool(mean.isfinite().all())
        ):
            raise ValueError(f"mean must be a tensor of finite floating-point numbers, got {mean!r}.")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"scale must be positive and finite, got {self.scale}.")

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density of rows ``(B, *E)``, ``(B,)``."""
        log_scale = torch.as_tensor(self.scale).to(self.mean).log().expand_as(self.mean)
        u = (x - self.mean) / self.scale
        constant = log_scale.sum() + 0.5 * self.mean.numel() * math.log(2 * math.pi)
        return -0.5 * u.flatten(1).square().sum(1) - constant

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)``."""
        shape = (n, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.scale * noise


@dataclass(frozen=True)
class AISResult:
    """What annealed importance sampling found.

    Attributes
    ----------
    log_z : float
        Estimate of the log of ∫ exp(-E), in nats.
    interval : tuple of float
        Confidence interval for log Z.
    log_weights : Tensor
        ``(n_chains,)``, log w of each chain; -inf where the energy stayed infinite.
    effective_sample_size : float
        (sum w)^2 / sum w^2, at most n_chains: the independent draws that the weights are worth. Not to be relied on
        below a tenth of n_chains.
    pareto_k : float
        Shape of the tail of the weights, see `samplers.pareto_k`. Not to be relied on above 0.7, unless the weights
        hardly differ.
    widening : Tensor
        ``(*E)``, deviation of the chains in the end over that in the beginning: far above 1 for a base that is too
        narrow, far below 1 for one that is too wide.
    acceptance : Tensor
        ``(n_levels,)``, mean acceptance probability at each b_k, k >= 1, over chains of finite energy.
    betas : Tensor
        ``(n_levels + 1,)``, the b_k.
    x : Tensor
        ``(n_chains, *E)``, where the chains ended: with the weights w, a sample of p ∝ exp(-E).
    n_evaluations : int
        Evaluations of the energy (with its gradient) for each weighted chain, those of the pilot chains not included.
    """

    log_z: float
    interval: tuple[float, float]
    log_weights: torch.Tensor
    effective_sample_size: float
    pareto_k: float
    widening: torch.Tensor
    acceptance: torch.Tensor
    betas: torch.Tensor
    x: torch.Tensor
    n_evaluations: int

    @property
    def reliable(self) -> bool:
        """Whether the weights are many and even enough for `log_z` and `interval` to be believed."""
        n, ess = len(self.log_weights), self.effective_sample_size
        few = ess < max(FEW_DRAWS, SMALL_SHARE * n)
        return not (few or (self.pareto_k > HEAVY_TAIL and ess < EVEN_SHARE * n))


@dataclass
class _Schedule:
    """What a run needs at each level k >= 1: b_k, step size and length scales ``(*E)``."""

    betas: list[float]
    step_sizes: list[float]
    scales: list[torch.Tensor]


def annealed_importance_sampling(
    energy: Energy,
    *,
    event_shape: Sequence[int] | None = None,
    base: Base | None = None,
    n_chains: int = 256,
    n_levels: int = 200,
    betas: Sequence[float] | None = None,
    transition: str = "hmc",
    n_transitions: int = 1,
    max_leapfrog: int = 10,
    n_pilot: int = 64,
    confidence: float = 0.95,
    generator: torch.Generator,
    verbose: int = 0,
) -> AISResult:
    """Estimate log ∫ exp(-E(x)) dx with a confidence interval (equations 1 and 2).

    Parameters
    ----------
    energy : callable
        ``energy(x: (B, *E)) -> (B,)``, differentiable by autograd. Where it is not finite, the density is zero.
    event_shape : sequence of int, optional
        E, for the default base.
    base : Base, optional
        p_0, with ``log_prob(x)`` and ``sample(n, generator)``: it should cover exp(-E) and be as like it as can be. The
        default is a standard normal of shape `event_shape` on the device of `generator`, in float64 where there is one;
        `GaussianBase` has another mean, scale or precision.
    n_chains : int, default=256
        n, independent weighted chains.
    n_levels : int, default=200
        K. The variance of log w falls as 1 / K.
    betas : sequence of float, optional
        b_0 = 0 < ... < b_K = 1, in place of those that the pilot chains find.
    transition : {"hmc", "mala"}, default="hmc"
        Kernel at each level.
    n_transitions : int, default=1
        Moves at each level.
    max_leapfrog : int, default=10
        Leapfrog steps at most in a move by HMC.
    n_pilot : int, default=64
        Pilot chains, at least 8.
    confidence : float, default=0.95
        Of the interval.
    generator : torch.Generator
        On the device of the chains.
    verbose : int, default=0
        1 shows progress bars.

    Returns
    -------
    AISResult

    Raises
    ------
    FloatingPointError
        If no chain found a state of finite energy.

    Warns
    -----
    UserWarning
        If the effective sample size is below ten or a tenth of the chains, or the weights have a heavy tail: the
        estimate then rests on a few chains and is likely too low. The message says so if the base is much narrower or
        wider than the density.
    """
    result = anneal(
        energy,
        event_shape=event_shape,
        base=base,
        n_chains=n_chains,
        n_levels=n_levels,
        betas=betas,
        transition=transition,
        n_transitions=n_transitions,
        max_leapfrog=max_leapfrog,
        n_pilot=n_pilot,
        confidence=confidence,
        generator=generator,
        verbose=verbose,
    )
    if not result.reliable:
        warn_user(_diagnosis(result))
    return result


def _diagnosis(result: AISResult) -> str:
    """What is wrong with the weights, why, and what helps."""
    n, ess = len(result.log_weights), result.effective_sample_size
    text = (
        f"The weights of {n} chains are worth {ess:.1f} independent draws (Pareto k {result.pareto_k:.2f}): log Z is "
        "likely too low and its interval too narrow. Raise n_levels, take more n_transitions, or start from a base "
        "more like the density"
    )
    factor = math.exp(float(result.widening.log().mean()))
    if math.isfinite(factor) and not 1 / UNLIKE <= factor <= UNLIKE:
        change = f"{factor:.3g} times as wide" if factor > 1 else f"{1 / factor:.3g} times as narrow"
        text += (
            f": the chains ended {change} as it is. With the result r of this run, "
            "base=GaussianBase(r.x.mean(0), r.x.std(0)) is closer"
        )
    return text + "."


def anneal(
    energy: Energy,
    *,
    event_shape: Sequence[int] | None = None,
    base: Base | None = None,
    n_chains: int = 256,
    n_levels: int = 200,
    betas: Sequence[float] | None = None,
    transition: str = "hmc",
    n_transitions: int = 1,
    max_leapfrog: int = 10,
    n_pilot: int = 64,
    confidence: float = 0.95,
    generator: torch.Generator,
    verbose: int = 0,
) -> AISResult:
    """`annealed_importance_sampling` without its warning, for those who want the chains."""
    _runtime.check_generator(generator)
    if transition not in ("hmc", "mala"):
        raise ValueError(f"transition must be 'hmc' or 'mala', got {transition!r}.")
    for name, value, least in (
        ("n_chains", n_chains, 2),
        ("n_levels", n_levels, 1),
        ("n_transitions", n_transitions, 1),
        ("max_leapfrog", max_leapfrog, 1),
        ("n_pilot", n_pilot, 8),
    ):
        _runtime.check_count(value, name, least=least)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}.")
    if base is None:
        if event_shape is None:
            raise ValueError("Give the event_shape for a standard normal base, or a base.")
        dtype = _runtime.scoring_dtype(generator.device)
        base = GaussianBase(torch.zeros(tuple(event_shape), dtype=dtype, device=generator.device))

    def n_leapfrog(step_size: float) -> int:
        return min(max_leapfrog, math.ceil(math.pi / 2 / step_size)) if transition == "hmc" else 1

    def make_kernel(scale: torch.Tensor, step_size: float) -> Kernel:
        if transition == "mala":
            return mala_kernel(scale=scale, generator=generator)
        return hmc_kernel(n_leapfrog=n_leapfrog(step_size), scale=scale, jitter=0.5, generator=generator)

    with torch.no_grad():
        if betas is None:
            # Close together at both ends, where a base much wider or narrower than the target changes fast.
            n_first = max(20, n_levels // 4)
            grid = torch.linspace(-4, 4, n_first + 1, dtype=torch.float64, device="cpu").sigmoid()
            first = ((grid - grid[0]) / (grid[-1] - grid[0])).tolist()
            _, lengths = _pilot(
                energy, base, first, make_kernel, transition, n_transitions, n_pilot, generator, verbose
            )
            levels = _equal_steps(first, lengths, n_levels)
        else:
            levels = [float(b) for b in betas]
            rising = all(a < b for a, b in pairwise(levels))
            if len(levels) < 2 or levels[0] != 0 or levels[-1] != 1 or not rising:
                raise ValueError(f"betas must rise strictly from 0 to 1, got {levels}.")
        schedule, _ = _pilot(
            energy, base, levels, make_kernel, transition, n_transitions, n_pilot, generator, verbose
        )
        x, log_weights, acceptance, widening = _weighted_run(
            energy, base, schedule, make_kernel, n_chains, n_transitions, generator, verbose
        )
    log_z, interval, ess = log_mean_interval(log_weights, confidence)
    return AISResult(
        log_z=log_z,
        interval=interval,
        log_weights=log_weights,
        effective_sample_size=ess,
        pareto_k=pareto_k(log_weights),
        widening=widening,
        acceptance=acceptance,
        betas=torch.tensor(levels, dtype=log_weights.dtype, device=log_weights.device),
        x=x,
        n_evaluations=1 + sum(1 + n_transitions * n_leapfrog(step) for step in schedule.step_sizes),
    )


def log_mean_interval(
    log_weights: torch.Tensor, confidence: float
) -> tuple[float, tuple[float, float], float]:
    """Log of the mean of weights ``(n,)``, its confidence interval and the effective sample size."""
    n = len(log_weights)
    top = float(log_weights.max())
    if not math.isfinite(top):
        raise FloatingPointError(
            f"No weight is positive and finite: the largest log-weight is {top}. The base must reach where the energy "
            "is finite."
        )
    w = (log_weights - top).exp()
    mean = float(w.mean())
    ess = float(w.sum()) ** 2 / float(w.square().sum())
    error = float(w.std()) / (mean * math.sqrt(n))
    # With nearly one draw even the t distribution has no width left to speak of; half a degree is its limit.
    half_width = float(stdtrit(max(ess - 1, 0.5), 0.5 + confidence / 2)) * error
    log_mean = top + math.log(mean)
    return log_mean, (log_mean - half_width, log_mean + half_width), ess


def _bridge(energy: Energy, base: Base, beta: float) -> Energy:
    """U_b of equation 1; an end where the other part has no weight does without it, even where it is infinite."""

    def base_log_prob(x: torch.Tensor) -> torch.Tensor:
        return _runtime.check_shape(base.log_prob(x), x.shape[:1], "base.log_prob")

    if beta == 0:
        return lambda x: -base_log_prob(x)
    if beta == 1:
        return energy
    return lambda x: (
        beta * _runtime.check_shape(energy(x), x.shape[:1], "energy") - (1 - beta) * base_log_prob(x)
    )


def _increment(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Equation 2 from the two energies ``(B,)``; an infinite energy has the weight zero, also twice in a row."""
    dtype = _runtime.scoring_dtype(after.device)
    return (before.to(dtype) - after.to(dtype)).nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=-math.inf)


def _weighted_run(
    energy: Energy,
    base: Base,
    schedule: _Schedule,
    make_kernel: Callable[[torch.Tensor, float], Kernel],
    n_chains: int,
    n_transitions: int,
    generator: torch.Generator,
    verbose: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the chains whose weights count.

    Returns their final states ``(n, *E)``, log-weights ``(n,)``, acceptance ``(K,)``, and how much they widened
    ``(*E)``.
    """
    state = state_at(_bridge(energy, base, 0.0), base.sample(n_chains, generator))
    width = state.x.std(0)
    log_weights = torch.zeros(n_chains, dtype=_runtime.scoring_dtype(state.x.device), device=state.x.device)
    acceptance = []
    for k in progress(range(1, len(schedule.betas)), verbose, "AIS"):
        target = _bridge(energy, base, schedule.betas[k])
        before, state = state.energy, state_at(target, state.x)
        log_weights = log_weights + _increment(before, state.energy)
        scale, step_size = schedule.scales[k - 1], schedule.step_sizes[k - 1]
        kernel, rate = make_kernel(scale, step_size), torch.zeros_like(log_weights[0])
        for _ in range(n_transitions):
            before_move = state
            state, probability, _ = kernel(target, state, step_size)
            rate += mean_acceptance(probability, before_move) / n_transitions
        acceptance.append(rate)
    return state.x, log_weights, torch.stack(acceptance), state.x.std(0) / width


def _pilot(
    energy: Energy,
    base: Base,
    betas: list[float],
    make_kernel: Callable[[torch.Tensor, float], Kernel],
    transition: str,
    n_transitions: int,
    n_pilot: int,
    generator: torch.Generator,
    verbose: int,
) -> tuple[_Schedule, list[float]]:
    """Walk through the levels, tuning; also return the thermodynamic length of each step, (K,)."""
    state = state_at(_bridge(energy, base, 0.0), base.sample(n_pilot, generator))
    dimensions = state.x[0].numel()
    # The known rates at which the best step sizes fall with the dimension; the first level corrects the factor.
    log_step, target_acceptance = (
        (-math.log(dimensions) / 4, 0.8) if transition == "hmc" else (-math.log(dimensions) / 3, 0.574)
    )
    schedule, lengths = _Schedule(betas, [], []), []
    for k in progress(range(1, len(betas)), verbose, "AIS pilot"):
        target = _bridge(energy, base, betas[k])
        before, state = state.energy, state_at(target, state.x)
        increment = _increment(before, state.energy)
        finite = increment[increment.isfinite()]
        lengths.append(float(finite.std()) if len(finite) > 1 else math.nan)
        scale = state.x.std(0)
        schedule.scales.append(scale)
        for _ in range(n_transitions + (20 if k == 1 else 0)):
            step_size = math.exp(log_step)
            before_move = state
            state, probability, _ = make_kernel(scale, step_size)(target, state, step_size)
            rate = float(mean_acceptance(probability, before_move))
            if math.isfinite(rate):
                log_step += 0.5 * (rate - target_acceptance)
        schedule.step_sizes.append(math.exp(log_step))
    return schedule, lengths


def _equal_steps(betas: list[float], lengths: list[float], n_levels: int) -> list[float]:
    """Place betas at equal distances along the measured length of the path."""
    length = torch.tensor(lengths, dtype=torch.float64)
    known = length[length.isfinite()]
    mean = float(known.mean()) if len(known) and float(known.mean()) > 0 else 1.0
    # The estimates are noisy: no step may seem free, and those that could not be measured are average.
    length = length.nan_to_num(nan=mean).clamp(min=0.1 * mean)
    path = torch.cat([torch.zeros(1, dtype=torch.float64), length.cumsum(0)])
    wanted = torch.linspace(0, 1, n_levels + 1, dtype=torch.float64)[1:-1] * path[-1]
    b = torch.tensor(betas, dtype=torch.float64)
    right = torch.searchsorted(path, wanted).clamp(1, len(lengths))
    share = (wanted - path[right - 1]) / (path[right] - path[right - 1])
    return [0.0, *(b[right - 1] + share * (b[right] - b[right - 1])).tolist(), 1.0]
