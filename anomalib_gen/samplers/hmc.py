r"""Hamiltonian Monte Carlo: glide along the energy with a random momentum.

With a momentum v ~ N(0, I) the pair (x, v) has the energy H(x, v) = E(x) + |v|^2 / 2, which Hamilton's equations
dx = v dt, dv = s(x) dt conserve (s = -grad E). The leapfrog integrator

    v <- v + eps / 2 s(x),   x <- x + eps v,   v <- v + eps / 2 s(x)                 (1)

is reversible (negate v and it retraces its steps), preserves volume and errs in H by O(eps^2). So its end point after
L steps is accepted with probability min(1, exp(H(x, v) - H(x', v'))), and p ∝ exp(-E) stays exactly invariant (Neal
2011, "MCMC using Hamiltonian dynamics", arXiv:1206.1901, section 3). The best acceptance rate in high dimensions is
0.651 (Beskos et al. 2013, arXiv:1001.4460); anything from 0.6 to 0.9 does nearly as well, and the larger ones are safer
(Betancourt et al. 2014, arXiv:1411.6669).

A trajectory of one fixed length can return to where it began, again and again; hence each chain draws its eps anew in
every step, which jitters the length L eps (Neal 2011, section 4.2).
"""

from __future__ import annotations

import torch

from anomalib_gen._runtime import check_count, expand_as_rows, normal_like
from anomalib_gen.samplers._chains import (
    ChainState,
    Energy,
    Kernel,
    Move,
    SamplerInfo,
    as_rows,
    as_scale,
    metropolis,
    run_chains,
    square_norm,
    state_at,
)

DIVERGENCE = 1000.0
"""A rise of H by more nats than this is called a divergence, as in Stan."""


def hmc(
    energy: Energy,
    x: torch.Tensor,
    n_steps: int,
    *,
    step_size: float,
    n_leapfrog: int = 10,
    scale: torch.Tensor | None = None,
    jitter: float = 0.2,
    n_warmup: int = 0,
    target_acceptance: float = 0.8,
    generator: torch.Generator,
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Hamiltonian Monte Carlo with the leapfrog integrator (equation 1).

    Parameters
    ----------
    energy : callable
        ``energy(x: (B, *E)) -> (B,)``, minus the unnormalised log-density, differentiable by autograd.
    x : Tensor
        ``(B, *E)``, where the chains start.
    n_steps : int
        Trajectories after the warm-up.
    step_size : float
        eps, in units of `x` (of `scale`, if given); where adaptation starts if there is a warm-up.
    n_leapfrog : int, default=10
        L, leapfrog steps in a trajectory.
    scale : Tensor, optional
        Length scale of each coordinate, broadcast with ``(*E)``, such as its standard deviation. The chains then run as
        if on x / scale, which is a diagonal mass matrix of scale^-2; the default is the identity.
    jitter : float, default=0.2
        Each trajectory of each chain has its own eps, uniform in step_size (1 - jitter) to step_size (1 + jitter).
    n_warmup : int, default=0
        Discarded trajectories before, during which the step size is adapted; it is one for all chains.
    target_acceptance : float, default=0.8
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
    x = as_rows(x)
    with torch.no_grad():
        return run_chains(
            hmc_kernel(n_leapfrog=n_leapfrog, scale=as_scale(scale, x), jitter=jitter, generator=generator),
            energy,
            x,
            n_steps,
            step_size=step_size,
            n_warmup=n_warmup,
            target_acceptance=target_acceptance,
            evaluations_per_step=n_leapfrog,
            thin=thin,
            verbose=verbose,
            label="HMC",
        )


def hmc_kernel(
    *, n_leapfrog: int, scale: torch.Tensor | None, jitter: float, generator: torch.Generator
) -> Kernel:
    """One trajectory of `hmc` as a function of the energy, the state and the step size."""
    check_count(n_leapfrog, "n_leapfrog")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must lie in [0, 1), got {jitter!r}.")

    def kernel(energy: Energy, state: ChainState, step_size: float) -> Move:
        v = normal_like(state.x, generator)
        uniform = torch.rand(len(v), generator=generator, dtype=v.dtype, device=v.device)
        eps = step_size * (1 + jitter * (2 * uniform - 1))
        proposal, v_end = leapfrog(energy, state, v, eps, n_leapfrog, scale=scale)
        log_ratio = state.energy - proposal.energy + 0.5 * (square_norm(v) - square_norm(v_end))
        return metropolis(state, proposal, log_ratio, generator=generator, divergent=log_ratio < -DIVERGENCE)

    return kernel


def leapfrog(
    energy: Energy,
    state: ChainState,
    v: torch.Tensor,
    eps: torch.Tensor,
    n_leapfrog: int,
    *,
    scale: torch.Tensor | None = None,
) -> tuple[ChainState, torch.Tensor]:
    """Integrate Hamilton's equations on x / scale (equation 1).

    Parameters
    ----------
    energy : callable
        ``energy(x: (B, *E)) -> (B,)``.
    state : ChainState
        Where to start.
    v : Tensor
        ``(B, *E)``, the momentum at the start.
    eps : Tensor
        ``(B,)``, the step of each row.
    n_leapfrog : int
        Steps.
    scale : Tensor, optional
        Broadcast with ``(*E)``.

    Returns
    -------
    state : ChainState
    v : Tensor
        ``(B, *E)``, the momentum at the end.
    """
    h = expand_as_rows(eps, v) * (1.0 if scale is None else scale)
    for _ in range(n_leapfrog):
        v = v + 0.5 * h * state.score
        state = state_at(energy, state.x + h * v)
        v = v + 0.5 * h * state.score
    return state, v
