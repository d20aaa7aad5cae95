r"""Likelihoods of denoisers: the log-density by the probability-flow equation, and a variational bound.

**Log-density.** Rows with noise of level s move, as s grows, by dy/ds = (y - D(y, s)) / s without changing the family
of their densities (Karras et al. 2022, arXiv:2206.00364, equation 1). In z = y / sqrt(1 + s^2), of unit variance at
every level, and u = log s this is

    dz/du = (y / (1 + s^2) - D(y, s)) / sqrt(1 + s^2),     d log q(z) / du = -(n / (1 + s^2) - tr dD/dy)          (1)

for n coordinates; the second is the change of variables of a flow (Song et al. 2021, arXiv:2011.13456, equation 39).
For unit normal data (1) is zero, so that the solver spends its steps on what the data are beyond that; and steps in
log s are as fine at every scale. From the smallest level to the largest, where z ~ N(0, I),

    log p(y) = log N(z_max; 0, I) + int (n / (1 + s^2) - tr dD/dy) du - n / 2 log(1 + s_min^2).                   (2)

It knows nothing of a path: all paths have the same log-density. The trace is exact, from one backward pass a
coordinate, or Hutchinson's estimate E[v^T (dD/dy) v] with random signs v (Hutchinson 1990,
doi:10.1080/03610919008812866; Grathwohl et al. 2019, arXiv:1810.01367), the same for all rows and all levels.

**Bound.** With levels s_0 < ... < s_N and z_i = x + s_i e (Kingma et al. 2021, arXiv:2107.00630, with the
signal-to-noise ratio 1 / s^2),

    log p(x) >= E log p(x | z_0) - KL(q(z_N | x) || p(z_N)) - sum_i E KL(q(z_{i-1} | z_i, x) || p(z_{i-1} | z_i)),

    step:            (1 / s_{i-1}^2 - 1 / s_i^2) |x - D(x + s_i e, s_i)|^2 / 2,                                   (3)
    prior:           KL(N(x, s_N^2) || N(0, 1 + s_N^2)),                                                          (4)
    reconstruction:  E log N(x; z_0, s_0^2) = -n / 2 (1 + log(2 pi s_0^2)).                                       (5)

(3) has the variance of the true reverse step. (5) is the decoder that is proportional to q(z_0 | x). It adds noise of
level s_0 to z_0, which has it already: what is bounded is the log-density of rows with noise of level sqrt(2) s_0. The
bound is tight in the limit of many steps up to KL(q(z_0 | x) || p(z_0 | x)), and with D exact it goes to
E log p_{s_0}(x + s_0 e). Between clusters narrower than s_0, where log p_{s_0} is convex, that is above log p_{s_0}(x),
which is what (2) gives.

With the same few e for all rows, what is off in them is off for all. `balanced_elbo_terms` draws pairs e and -e, which
takes away what is odd in e, and subtracts from (3) a quantity of mean zero,

    (1 / s_{i-1}^2 - 1 / s_i^2) (s_i / (1 + s_i^2))^2 (|e|^2 - n) / 2,                                            (6)

which is what unit normal data owe to the length of e. The mean over e stays the bound. Of normal data of variances v_j
one pair is left with the variance

    1/2 sum_i (1 / s_{i-1}^2 - 1 / s_i^2)^2 sum_j [(v_j s_i / (v_j + s_i^2))^2 - (s_i / (1 + s_i^2))^2]^2,        (7)

the same shift for all rows: none for v_j = 1, and the more the more directions there are that the data hardly vary in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from anomalib_gen._runtime import check_count, check_shape, expand_as_rows, normal_noise
from anomalib_gen.samplers import solve_ode

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``denoise(y: (B, *E), level: (B,)) -> (B, *E)``, the mean of clean rows given rows with noise of that level."""

KNEE = 10.0
"""Level k from which on steps grow: they are even in log(s / (k + s)). Far above unit variance little happens."""
EXACT_UP_TO = 32
"""Coordinates up to which ``divergence="auto"`` is exact."""
DIVERGENCES = ("auto", "exact", "hutchinson")


class ODELogProb(NamedTuple):
    """A log-density and how far it may be off.

    Attributes
    ----------
    log_prob : Tensor
        ``(B,)``, in nats.
    error : Tensor
        ``(B,)``, in nats: how much the solution differs from that with half the steps, whose error it is. If the
        solver converges, its own error is a fraction of that. With several Hutchinson probes their standard error is
        added. Infinite where the solution is not finite.
    """

    log_prob: torch.Tensor
    error: torch.Tensor


def ode_log_prob(
    denoise: Denoise,
    x: torch.Tensor,
    levels: tuple[float, float],
    *,
    n_steps: int = 50,
    method: str = "rk4",
    divergence: str = "auto",
    n_probes: int = 8,
    generator: torch.Generator | None = None,
    estimate_error: bool = True,
) -> ODELogProb:
    """Log-density of rows by the probability-flow equation (equation 2).

    It is that of rows *with noise of the smallest level*, and reads `x` as such rows. A row's value depends on that row
    alone, up to rounding: all rows take the same steps. Gradients are taken with respect to rows only, in inference
    mode too, and the result is attached to nothing.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``, differentiable by autograd, and with rows that do not mix.
    x : Tensor
        ``(B, *E)``, of about unit variance.
    levels : tuple of float
        Smallest and largest level. At the largest the data must be lost in the noise: what is left of them is an error
        that is not estimated, of about ``|mean| / s_max`` and ``|variance - 1| / s_max^2`` nats.
    n_steps : int, default=50
        Steps, evenly spaced in log s up to the `KNEE`, and longer beyond. An even number if the error is estimated.
    method : {"euler", "heun", "rk4"}, default="rk4"
        See `solve_ode`.
    divergence : {"auto", "exact", "hutchinson"}, default="auto"
        How the trace is found; "auto" is exact up to 32 coordinates.
    n_probes : int, default=8
        Probes of Hutchinson's estimate.
    generator : torch.Generator, optional
        What the probes are drawn from, on any device. Not needed for an exact divergence.
    estimate_error : bool, default=True
        Whether to solve with half the steps as well. Else the error is NaN.

    Returns
    -------
    ODELogProb
        With fields ``log_prob`` and ``error``, ``(B,)`` each.
    """
    low, high = levels
    if not 0 < low < high < math.inf:
        raise ValueError(f"levels must be positive and rise, got {levels}.")
    check_count(n_steps, "n_steps")
    check_count(n_probes, "n_probes")
    if estimate_error and n_steps % 2:
        raise ValueError(f"n_steps must be even if the error is estimated, got {n_steps}.")
    probes = _probes(x, divergence, n_probes, generator)
    fine, finite = _integrate(denoise, x, low, high, n_steps, method, probes)
    log_prob = fine.mean(1)
    if not estimate_error:
        return ODELogProb(log_prob, torch.full_like(log_prob, math.nan))
    coarse, coarse_finite = _integrate(denoise, x, low, high, n_steps // 2, method, probes)
    error = (log_prob - coarse.mean(1)).abs()
    if fine.shape[1] > 1:
        error = error + fine.std(1) / math.sqrt(fine.shape[1])
    return ODELogProb(log_prob, torch.where(finite & coarse_finite, error, math.inf))


def _probes(
    x: torch.Tensor, divergence: str, n_probes: int, generator: torch.Generator | None
) -> torch.Tensor | None:
    """Random signs ``(K, *E)``, or None for an exact divergence."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown. Known: {', '.join(map(repr, DIVERGENCES))}.")
    event_shape = tuple(x.shape[1:])
    if divergence == "exact" or (divergence == "auto" and math.prod(event_shape) <= EXACT_UP_TO):
        return None
    if generator is None:
        raise ValueError(
            f"a generator must be given: the divergence of rows of shape {event_shape} is estimated with random "
            "probes. divergence='exact' needs none."
        )
    noise = normal_noise((n_probes, *event_shape), x, generator)
    return torch.where(noise < 0, -1.0, 1.0).to(x)


def _integrate(
    denoise: Denoise,
    x: torch.Tensor,
    low: float,
    high: float,
    n_steps: int,
    method: str,
    probes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 2 for each probe ``(B, K)``, or ``(B, 1)`` with the exact trace, and which rows are finite ``(B,)``."""
    n, event_shape = x[0].numel(), x.shape[1:]

    def field(state: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        level = u.exp()
        variance = 1 + level.square()
        width = expand_as_rows(variance.sqrt(), x)
        y = width * state[:, :n].unflatten(1, event_shape)
        clean, trace = _denoise_and_trace(denoise, y, level, probes)
        velocity = (y / width.square() - clean) / width
        return torch.cat([velocity.flatten(1), n / variance.unsqueeze(1) - trace], dim=1)

    columns = 1 if probes is None else len(probes)
    start = torch.cat([x.flatten(1) / math.sqrt(1 + low**2), x.new_zeros((len(x), columns))], dim=1)
    tau = torch.linspace(-math.log1p(KNEE / low), -math.log1p(KNEE / high), n_steps + 1, dtype=torch.float64)
    end, info = solve_ode(field, start, math.log(KNEE) - torch.log(torch.expm1(-tau)), method=method)
    log_prior = -0.5 * (end[:, :n].square().sum(1, keepdim=True) + n * math.log(2 * math.pi))
    return log_prior + end[:, n:] - 0.5 * n * math.log1p(low**2), info.divergences == 0


def _denoise_and_trace(
    denoise: Denoise, y: torch.Tensor, level: torch.Tensor, probes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean rows ``(B, *E)``, and v^T (dD/dy) v for each probe ``(B, K)`` or the exact trace ``(B, 1)``."""
    with torch.inference_mode(False), torch.enable_grad():
        # What was made in inference mode cannot be saved for a backward pass.
        y, level = y.clone().detach().requires_grad_(), level.clone()
        clean = check_shape(denoise(y, level), y.shape, "denoise")
        rows = clean.flatten(1)
        forms = []
        for k in range(rows.shape[1] if probes is None else len(probes)):
            # A unit vector picks one entry of the diagonal.
            out = rows[:, k].sum() if probes is None else (rows * probes[k].clone().flatten()).sum()
            # Differentiating with respect to y alone leaves the parameters' .grad untouched.
            (gradient,) = torch.autograd.grad(out, y, retain_graph=True, materialize_grads=True)
            flat = gradient.flatten(1)
            forms.append(flat[:, k] if probes is None else flat @ probes[k].flatten())
    trace = torch.stack(forms, dim=1)
    return clean.detach(), trace.sum(1, keepdim=True) if probes is None else trace


class ELBOTerms(NamedTuple):
    """The variational bound in its parts, all in nats.

    Attributes
    ----------
    steps : Tensor
        ``(n_steps, B)``, divergences of the reverse steps, that of the smallest levels first (equation 3).
    prior : Tensor
        ``(B,)``, divergence at the largest level (equation 4).
    reconstruction : Tensor
        ``(B,)``, expected log-density of the row given its most lightly noised self (equation 5); the same for all
        rows.
    """

    steps: torch.Tensor
    prior: torch.Tensor
    reconstruction: torch.Tensor

    @property
    def elbo(self) -> torch.Tensor:
        """The bound on the log-density of rows with noise of sqrt(2) times the smallest level, ``(B,)``."""
        return self.reconstruction - self.prior - self.steps.sum(0)


def elbo_terms(denoise: Denoise, x: torch.Tensor, levels: torch.Tensor, e: torch.Tensor) -> ELBOTerms:
    """Variational bound on the log-density of rows in its parts (equations 3 to 5).

    It is an estimate of the bound with one draw of noise for each step; its mean over `e` is the bound.

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``.
    levels : Tensor
        ``(n_steps + 1,)``, strictly rising, such as ``path.noise_level(path.grid(n_steps))``. Levels in equal
        ratios waste the least.
    e : Tensor
        ``(n_steps, *E)``, standard normal noise, the same for all rows.

    Returns
    -------
    ELBOTerms
        With fields ``steps``, ``prior`` and ``reconstruction``, and the property ``elbo``.
    """
    s = torch.as_tensor(levels).to(device="cpu", dtype=torch.float64)
    if s.ndim != 1 or len(s) < 2 or float(s[0]) <= 0 or not bool((s.diff() > 0).all()):
        raise ValueError("levels must be positive and rise strictly.")
    if e.shape != (len(s) - 1, *x.shape[1:]):
        raise ValueError(
            f"e must have one event of noise for each step, {(len(s) - 1, *x.shape[1:])}, got {tuple(e.shape)}."
        )
    n = x[0].numel()
    weights = (0.5 * (s[:-1] ** -2 - s[1:] ** -2)).tolist()
    s_min, s_max = float(s[0]), float(s[-1])
    steps = []
    for weight, level, noise in zip(weights, s[1:].tolist(), e, strict=True):
        clean = check_shape(denoise(x + level * noise, x.new_full((len(x),), level)), x.shape, "denoise")
        steps.append(weight * (x - clean).flatten(1).square().sum(1))
    # log((1 + s^2) / s^2), and the two variances' ratio less one, both without cancellation.
    spread = n * (math.log1p(s_max**-2) - 1 / (1 + s_max**2))
    prior = 0.5 * (x.flatten(1).square().sum(1) / (1 + s_max**2) + spread)
    reconstruction = torch.full_like(prior, -0.5 * n * (1 + math.log(2 * math.pi * s_min**2)))
    return ELBOTerms(torch.stack(steps), prior, reconstruction)


def balanced_elbo_terms(
    denoise: Denoise, x: torch.Tensor, levels: torch.Tensor, generator: torch.Generator, *, n_draws: int = 1
) -> ELBOTerms:
    """Mean of `elbo_terms` over pairs of noise e and -e, less what the length of the noise adds (equation 6).

    Parameters
    ----------
    denoise : callable
        ``denoise(y: (B, *E), level: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``.
    levels : Tensor
        ``(n_steps + 1,)``, strictly rising.
    generator : torch.Generator
        On any device. The noise has the event's shape and is the same for all rows.
    n_draws : int, default=1
        Pairs of noise; each costs two evaluations for each step.

    Returns
    -------
    ELBOTerms
        Single steps may come out slightly negative, by equation 6.
    """
    check_count(n_draws, "n_draws")
    s = torch.as_tensor(levels).to(x)
    weights = 0.5 * (s[:-1] ** -2 - s[1:] ** -2) * (s[1:] / (1 + s[1:].square())).square()
    terms = []
    for _ in range(n_draws):
        e = normal_noise((len(s) - 1, *x.shape[1:]), x, generator)
        excess = weights * (e.flatten(1).square().sum(1) - x[0].numel())
        for noise in (e, -e):
            drawn = elbo_terms(denoise, x, levels, noise)
            terms.append(drawn._replace(steps=drawn.steps - excess.unsqueeze(1)))
    return ELBOTerms(*(torch.stack(parts).mean(0) for parts in zip(*terms, strict=True)))
