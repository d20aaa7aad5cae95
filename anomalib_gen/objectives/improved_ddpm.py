r"""The hybrid loss of Improved DDPM: learn the mean and the variance of every reverse step.

On a path of discrete steps, with levels 0 = s_0 < s_1 < ... < s_N and alpha_0 = 1, noisy rows are y_k = x + s_k e.
The step back from y_k to y_{k-1} has the variance b_k^- if the row x is known; b_k^+, that of the step forward, is
the right one for standard normal rows on a variance-preserving path:

    b_k^- = s_{k-1}^2 (s_k^2 - s_{k-1}^2) / s_k^2,     b_k^+ = (alpha_k / alpha_{k-1})^2 (s_k^2 - s_{k-1}^2)      (1)

(times alpha_{k-1}^2: the beta~ and beta of DDPM). The model puts its own between them, v being the second output of
its network (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 15):

    log b_k = v log b_k^+ + (1 - v) log b_k^-.                                                       (2)

The bound on -log p(x) is a sum of terms L_k, divergences between normals with means that differ by c_k (D - x), where
c_k = 1 - s_{k-1}^2 / s_k^2 (Ho et al. 2020, arXiv:2006.11239, equation 5). Summed over the values of the row,

    L_k = [log b_k / b_k^- + b_k^- / b_k - 1 + c_k^2 (D(y_k, s_k) - x)^2 / b_k] / 2,     k > 1,
    L_1 = [log 2 pi b_1 + (D(y_1, s_1) - x)^2 / b_1] / 2,                                            (3)

the last being a normal density of the row, for data that are continuous (b_1^- would be 0; that of the second step
takes its place). The loss adds their sum to DDPM's, with a small weight and without a gradient to D (there, equation
16):

    |e - e_theta|^2 + lambda N L_k,     k uniform on 1..N,     e - e_theta = (D - x) / s_k.          (4)

Where the terms differ much in size, steps are better drawn with p_k ~ sqrt(E[loss_k^2]), the mean over the last ten
losses of the step, and the loss divided by N p_k, which leaves its expectation as it is (there, section 3.3).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._levels import clean_rows, judged_draws, places, unseen
from anomalib_gen.paths import Path

HISTORY = 10
"""Losses of each step that are remembered."""
UNIFORM_SHARE = 1e-3
"""Share of the steps that is drawn uniformly whatever their losses: none is ever forgotten."""


class ImprovedDDPM(Component):
    """DDPM's loss with learned variances (equation 4).

    The model needs ``denoise_and_variance(x, level)`` that gives v, such as ``NetworkDenoiser(...,
    learned_variance=True)``, and a `path` of discrete steps. Where it has a `grain`, rows get the noise of the grain
    first.

    Parameters
    ----------
    vlb_weight : float, default=0.001
        lambda. It only sets how fast the variances learn beside the means.
    importance_sampling : bool, default=True
        Whether steps are drawn by their losses, once each has been seen ten times, instead of uniformly. Nichol and
        Dhariwal needed it for the variational bound alone and not for the loss of equation 4, on images. On rows the
        losses at small noise are the largest, and drawing them more often brings the score closer there.

    References
    ----------
    Nichol, A., Dhariwal, P. (2021). Improved denoising diffusion probabilistic models. ICML. arXiv:2102.09672.
    """

    learns_variance = True
    """Asks for a model that has learned variances."""

    def __init__(self, *, vlb_weight: float = 1e-3, importance_sampling: bool = True) -> None:
        self.vlb_weight = vlb_weight
        self.importance_sampling = importance_sampling

    def prepare(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Forget the losses of an earlier training."""
        n = len(step_tables(model.path).level)
        self.history_ = torch.zeros((n, HISTORY), dtype=torch.float32, device=generator.device)
        self.counts_ = torch.zeros(n, dtype=torch.long, device=generator.device)

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, not_negative=["vlb_weight"])
        tables = step_tables(model.path)
        n = len(tables.level)
        u = places(len(x), x, generator)
        if not self.importance_sampling:
            return self._loss(model, tables, x, _uniform_steps(u, n), generator)
        if not hasattr(self, "history_"):
            self.prepare(model, None, generator)
        p = self.probabilities().to(x)
        steps = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=n - 1)
        loss = self._loss(model, tables, x, steps, generator)
        self._remember(steps, loss.detach())
        return loss / (n * p[steps])

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``.

        The same at uniform steps, over noise in pairs e and -e and, for few rows, over more draws, each row at steps
        spread evenly. `train` gives the same noise at every evaluation.
        """
        tables, draws = step_tables(model.path), judged_draws(x)
        u = places(len(x), x, generator, draws=draws)
        steps = _uniform_steps(u, len(tables.level)).reshape(draws, len(x))
        return torch.stack([self._loss(model, tables, x, k, generator, pairs=True) for k in steps]).mean(0)

    def probabilities(self) -> torch.Tensor:
        """Probabilities of the steps ``(N,)``: uniform until each has its ten losses."""
        n = len(self.counts_)
        size = self.history_.square().mean(1).sqrt()
        by_loss = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE / n
        return torch.where((self.counts_ >= HISTORY).all(), by_loss, 1 / n)

    @torch.no_grad()
    def _remember(self, steps: torch.Tensor, loss: torch.Tensor) -> None:
        """Enter the losses ``(B,)`` of a batch: each step keeps its last ones, in a ring."""
        order = torch.argsort(steps, stable=True)
        steps, loss = steps[order], loss[order].to(self.history_)
        in_batch = torch.bincount(steps, minlength=len(self.counts_))
        first = in_batch.cumsum(0) - in_batch
        rank = torch.arange(len(steps), device=steps.device) - first[steps]
        # Of more than fit, the last: no entry is written twice.
        kept = rank >= in_batch[steps] - HISTORY
        slot = (self.counts_[steps] + rank) % HISTORY
        self.history_[steps[kept], slot[kept]] = loss[kept]
        self.counts_ += in_batch

    def _loss(
        self,
        model: Any,
        tables: StepTables,
        x: torch.Tensor,
        steps: torch.Tensor,
        generator: torch.Generator,
        *,
        pairs: bool = False,
    ) -> torch.Tensor:
        """Loss ``(B,)`` at steps of positions ``(B,)``, with noise e, or the mean over e and -e."""
        model, clean, e = unseen(model, x), clean_rows(model, x, generator), normal_like(x, generator)
        losses = []
        for noise in (e, -e) if pairs else (e,):
            simple, vlb = hybrid_terms(model, clean, steps, noise, tables)
            losses.append(simple + self.vlb_weight * len(tables.level) * vlb)
        return torch.stack(losses).mean(0)


class StepTables(NamedTuple):
    """Of each step, ``(N,)`` in float64: s_k, log b_k^-, log b_k^+ and c_k of equations 1 and 3."""

    level: torch.Tensor
    log_lower: torch.Tensor
    log_upper: torch.Tensor
    share: torch.Tensor


def step_tables(path: Path) -> StepTables:
    """Levels and variances of the steps of a discrete path.

    Raises
    ------
    ValueError
        If the path is continuous, or has a single step.
    """
    if path.n_steps is None or path.n_steps < 2:
        raise ValueError(
            f"ImprovedDDPM needs a path of at least two discrete steps, such as CosineBetas(), got {path!r}."
        )
    t = path.grid()
    sigma, alpha = path.sigma(t), path.alpha(t)
    s = sigma / alpha
    before = torch.cat([s.new_zeros(1), s[:-1]])
    shrink = alpha / torch.cat([alpha.new_ones(1), alpha[:-1]])
    share = (s - before) * (s + before) / s.square()
    lower = before.square() * share
    # At the scale of the clean row, where the first step ends.
    lower[0] = alpha[0].square() * lower[1]
    upper = shrink.square() * share * s.square()
    return StepTables(s, lower.log(), upper.log(), share)


def hybrid_terms(
    model: Any, x: torch.Tensor, steps: torch.Tensor, e: torch.Tensor, tables: StepTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both terms of the hybrid loss (equation 4).

    Parameters
    ----------
    model : Denoiser
        With learned variances.
    x : Tensor of shape (B, *E)
        Clean rows.
    steps : Tensor of shape (B,)
        Positions in the tables: k - 1.
    e : Tensor of shape (B, *E)
        Noise.
    tables : StepTables
        Those of the model's path.

    Returns
    -------
    simple : Tensor of shape (B,)
        ``|e - e_theta|^2``, with a gradient to the denoiser.
    vlb : Tensor of shape (B,)
        L_k in nats (equation 3), with a gradient to the variances alone.

    Raises
    ------
    ValueError
        If the model has no learned variances.
    """
    level, lower, upper, share = (expand_as_rows(table.to(x)[steps], x) for table in tables)
    clean, v = model.denoise_and_variance(x + level * e, level.flatten())
    if v is None:
        raise ValueError(
            "The model learns no variances: ImprovedDDPM is for NetworkDenoiser(..., learned_variance=True)."
        )
    error = (clean - x).square()
    simple = error / level.square()
    log_variance = lower + v * (upper - lower)
    quadratic = share.square() * error.detach() / log_variance.exp()
    divergence = log_variance - lower + (lower - log_variance).exp() - 1 + quadratic
    density = math.log(2 * math.pi) + log_variance + quadratic
    vlb = 0.5 * torch.where(expand_as_rows(steps == 0, x), density, divergence)
    return simple.flatten(1).sum(1), vlb.flatten(1).sum(1)


def _uniform_steps(u: torch.Tensor, n: int) -> torch.Tensor:
    return (u * n).long().clamp(max=n - 1)
