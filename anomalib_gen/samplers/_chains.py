r"""What Markov chains share: what they report, gradients of energies, Metropolis' rule, step sizes.

An energy E is minus an unnormalised log-density, p(x) ∝ exp(-E(x)), and its score is s(x) = -grad E(x). A proposal x'
that was drawn with density q(x' | x) is accepted with probability

    min(1, exp(-E(x')) q(x | x') / (exp(-E(x)) q(x' | x)))                           (1)

(Metropolis et al. 1953; Hastings 1970, doi:10.1093/biomet/57.1.97), and otherwise the chain stays where it is. This
leaves p invariant for *any* drift of the proposal. So nothing is lost by calling components of a score zero where they
are not finite; an energy that is not finite counts as infinite, which is a density of zero.

The step size is tuned by dual averaging of log h (Nesterov 2009; Hoffman & Gelman 2014, arXiv:1111.4246, equation 6):
with a_t the mean acceptance over the chains at step t and a* its target,

    log h_{t+1} = mu - sqrt(t) / gamma * 1 / (t + t0) * sum_{i <= t} (a* - a_i)      (2)
    log hbar_{t+1} = t^-kappa log h_{t+1} + (1 - t^-kappa) log hbar_t                (3)

and hbar is used afterwards. While h adapts the chains have no invariant density: these steps are discarded. Chains
whose energy is not finite yet do not count in a_t: no step is short enough for them, and it would shrink to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from anomalib_gen._runtime import check_count, check_shape, expand_as_rows
from anomalib_gen._warnings import warn_user
from anomalib_gen.samplers.diagnostics import effective_sample_size

Energy = Callable[[torch.Tensor], torch.Tensor]
"""``energy(x: (B, *E)) -> (B,)``; row i of the result depends on row i alone."""
Score = Callable[[torch.Tensor], torch.Tensor]
"""``score(x: (B, *E)) -> (B, *E)``, the gradient of the log-density."""


@dataclass(frozen=True)
class SamplerInfo:
    """What a sampler did. Nothing in it is attached to a graph.

    Attributes
    ----------
    n_evaluations : int
        Evaluations of the field for each chain, those of the warm-up included. An energy with its gradient counts as
        one.
    step_size : tuple of float
        The step sizes used after the warm-up: one, or one for each noise level.
    divergences : Tensor
        ``(B,)``, for each chain the number of moves not made because they were not finite (or, in `hmc`, because the
        energy error was enormous). More than a few mean that the step is too large or the field is broken.
    acceptance : Tensor or None
        ``(B,)``, mean acceptance probability of each chain after the warm-up; None without a Metropolis step.
    energies : Tensor or None
        ``(n_steps, B)``, the energy after each step that follows the warm-up; None where the field is a score.
    samples : Tensor or None
        ``(n_steps // thin, B, *E)``, the states kept; None unless `thin` was given.
    """

    n_evaluations: int
    step_size: tuple[float, ...]
    divergences: torch.Tensor
    acceptance: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    samples: torch.Tensor | None = None

    @property
    def effective_sample_size(self) -> torch.Tensor | None:
        """``(*E)``, independent draws that the kept samples of all chains are worth; None without samples."""
        return None if self.samples is None else effective_sample_size(self.samples)


# Gradients -------------------------------------------------------------------------------------------------


def energy_and_score(
    energy: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, create_graph: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy and its exact negative gradient, from one forward and one backward pass.

    Parameters
    ----------
    energy : callable
        ``energy(x, *args) -> (B,)``; its rows must not mix (no batch statistics).
    x : Tensor
        ``(B, *E)``.
    *args : Any
        Passed on to `energy`.
    create_graph : bool, default=False
        Whether the results can be differentiated in turn (score matching); else they are attached to nothing.

    Returns
    -------
    energies : Tensor
        ``(B,)``.
    score : Tensor
        ``(B, *E)``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        # What was made in inference mode cannot be saved for a backward pass.
        args = tuple(a.clone() if isinstance(a, torch.Tensor) and a.is_inference() else a for a in args)
        energies = check_shape(energy(x, *args), x.shape[:1], "energy")
        gradient = None
        if energies.requires_grad:
            # Differentiating with respect to x alone leaves the parameters' .grad untouched.
            (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "energy must be differentiable with respect to x, and what it returned is not attached to x: "
                "is x detached in it, or are gradients off?"
            )
        return (energies, -gradient) if create_graph else (energies.detach(), -gradient)


def score_of(
    energy: Callable[..., torch.Tensor], *, create_graph: bool = False
) -> Callable[..., torch.Tensor]:
    """Score of an energy: the callable ``x, *args -> -grad_x energy(x, *args)``.

    It works under ``torch.no_grad`` and leaves the gradients of the energy's parameters alone.

    Parameters
    ----------
    energy : callable
        ``energy(x, *args) -> (B,)``; its rows must not mix (no batch statistics).
    create_graph : bool, default=False
        Whether the score can be differentiated in turn, as score matching does.

    Returns
    -------
    callable
        ``score(x: (B, *E), *args) -> (B, *E)``.
    """

    def score(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return energy_and_score(energy, x, *args, create_graph=create_graph)[1]

    return score


# Metropolis ------------------------------------------------------------------------------------------------


class ChainState(NamedTuple):
    """Where chains are: rows ``(B, *E)``, their energies ``(B,)`` and scores ``(B, *E)``."""

    x: torch.Tensor
    energy: torch.Tensor
    score: torch.Tensor


class Move(NamedTuple):
    """What one step of a kernel did: the new state, acceptance probabilities and divergences, ``(B,)`` each."""

    state: ChainState
    acceptance: torch.Tensor
    divergent: torch.Tensor


Kernel = Callable[[Energy, ChainState, float], Move]
"""``kernel(energy, state, step_size) -> Move``, which leaves exp(-energy) invariant."""


def state_at(energy: Energy, x: torch.Tensor) -> ChainState:
    """Evaluate an energy, with a non-finite one as infinite and non-finite score components as zero."""
    energies, score = energy_and_score(energy, x)
    energies = torch.where(energies.isfinite(), energies, math.inf)
    return ChainState(x, energies, score.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def metropolis(
    state: ChainState,
    proposal: ChainState,
    log_ratio: torch.Tensor,
    *,
    generator: torch.Generator,
    divergent: torch.Tensor | None = None,
) -> Move:
    """Accept or refuse each row of a proposal (equation 1).

    Parameters
    ----------
    state, proposal : ChainState
    log_ratio : Tensor
        ``(B,)``, log of the ratio in equation 1.
    generator : torch.Generator
    divergent : Tensor, optional
        ``(B,)``, rows to be counted as divergent beside those that are not finite.
    """
    broken = ~(proposal.energy.isfinite() & proposal.x.flatten(1).isfinite().all(1))
    probability = torch.where(broken | log_ratio.isnan(), 0.0, log_ratio.clamp(max=0).exp())
    uniform = torch.rand(log_ratio.shape, generator=generator, dtype=log_ratio.dtype, device=log_ratio.device)
    accepted = uniform < probability
    moved = ChainState(*(where_rows(accepted, new, old) for new, old in zip(proposal, state, strict=True)))
    return Move(moved, probability, broken if divergent is None else broken | divergent)


def mean_acceptance(probability: torch.Tensor, state: ChainState) -> torch.Tensor:
    """Mean of acceptance probabilities ``(B,)`` over chains that were at a finite energy; NaN where none was."""
    return probability[state.energy.isfinite()].mean()


def where_rows(condition: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Choose whole rows ``(B, *E)`` by a condition ``(B,)``."""
    return torch.where(expand_as_rows(condition, yes), yes, no)


def square_norm(x: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean norm of each row ``(B, *E)``, ``(B,)``."""
    return x.flatten(1).square().sum(1)


class DualAveraging:
    """Step size adaptation (equations 2 and 3), with the constants of Hoffman & Gelman (2014), section 3.2.1."""

    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, step_size: float, target: float) -> None:
        self.target, self.mu = target, math.log(10 * step_size)
        self.t, self.deficit, self.log_mean = 0, 0.0, math.log(step_size)
        self.step_size = step_size

    def update(self, acceptance: float) -> None:
        """Take in the mean acceptance at the current `step_size` and change it."""
        self.t += 1
        self.deficit += self.target - acceptance
        log_step = self.mu - math.sqrt(self.t) / self.gamma * self.deficit / (self.t + self.t0)
        weight = self.t**-self.kappa
        self.log_mean = weight * log_step + (1 - weight) * self.log_mean
        self.step_size = math.exp(log_step)

    @property
    def final(self) -> float:
        """The averaged step size, to be used once adaptation is over."""
        return math.exp(self.log_mean)


def run_chains(
    kernel: Kernel,
    energy: Energy,
    x: torch.Tensor,
    n_steps: int,
    *,
    step_size: float,
    n_warmup: int,
    target_acceptance: float,
    evaluations_per_step: int,
    thin: int | None,
    verbose: int,
    label: str,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Warm up, freeze the step size and run: the loop of every sampler with a Metropolis step."""
    check_steps(n_steps, thin)
    check_positive(step_size, "step_size")
    check_count(n_warmup, "n_warmup", least=0)
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie in (0, 1), got {target_acceptance!r}.")
    state = state_at(energy, x)
    adaptation = DualAveraging(step_size, target_acceptance)
    divergences = torch.zeros(len(x), dtype=torch.long, device=x.device)
    acceptance, energies, samples = torch.zeros_like(state.energy), [], []
    for step in progress(range(n_warmup + n_steps), verbose, label):
        if step < n_warmup:
            before = state
            state, probability, _ = kernel(energy, state, adaptation.step_size)
            rate = float(mean_acceptance(probability, before))
            if math.isfinite(rate):
                adaptation.update(rate)
            continue
        if step == n_warmup and n_warmup:
            step_size = adaptation.final
        state, probability, divergent = kernel(energy, state, step_size)
        acceptance += probability / n_steps
        divergences += divergent
        energies.append(state.energy)
        if thin is not None and (step - n_warmup + 1) % thin == 0:
            samples.append(state.x)
    outside = int((~state.energy.isfinite()).sum())
    if outside:
        warn_user(
            f"{outside} of {len(x)} chains never reached a finite energy, and no draw of theirs is one of the density. "
            "Start them where the energy is finite.",
        )
    return state.x, SamplerInfo(
        n_evaluations=1 + (n_warmup + n_steps) * evaluations_per_step,
        step_size=(step_size,),
        divergences=divergences,
        acceptance=acceptance,
        energies=torch.stack(energies),
        samples=stack(samples, x) if thin is not None else None,
    )


# Small things ----------------------------------------------------------------------------------------------


def stack(samples: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Stack kept states; none at all give ``(0, B, *E)``."""
    return torch.stack(samples) if samples else x.new_empty((0, *x.shape))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return rows ``(B, *E)`` attached to nothing; refuse what is no tensor of them."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 2:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"x must be a floating-point tensor (B, *E), of shape (B, 1) for a single coordinate, got {found}."
        )
    return x.detach()


def as_scale(scale: torch.Tensor | float | None, x: torch.Tensor) -> torch.Tensor | None:
    """Return length scales in the precision of rows `x` ``(B, *E)``; refuse those that would freeze or break chains."""
    if scale is None:
        return None
    values = torch.as_tensor(scale).detach()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    try:
        fits = torch.broadcast_shapes(values.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"scale must broadcast with rows {tuple(x.shape)}, got shape {tuple(values.shape)}.")
    return values.to(x)


def check_steps(n_steps: int, thin: int | None) -> None:
    """Refuse numbers of steps that can only be a mistake."""
    check_count(n_steps, "n_steps")
    if thin is not None:
        check_count(thin, "thin")


def check_positive(value: float, name: str) -> None:
    """Refuse a number that is not positive and finite; the message names it."""
    try:
        valid = 0 < value < math.inf
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def progress(steps: Iterable[int], verbose: int, label: str) -> Iterable[int]:
    """Wrap a loop in a progress bar if `verbose`."""
    if not verbose:
        return steps
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(steps, desc=label, unit="step")
    return bar
