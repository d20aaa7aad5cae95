r"""Contrastive divergence: maximum likelihood of an energy, with short Markov chains for the model's side.

With p(x) = exp(-E(x)) / Z, minus the log-likelihood has the gradient

    E_data[dE(x)] - E_model[dE(x)],   d the derivative by the weights.                               (1)

Rows of the model are out of reach, so k steps of a Markov chain that leaves p invariant stand in for them. CD-k
(Hinton 2002, doi:10.1162/089976602760128018, equation 5) starts the chains at the data: where the model is right
already they stay there in distribution, and (1) vanishes. For an energy on R^D the chain is Langevin's (samplers.ula;
Du and Mordatch 2019, arXiv:1903.08689, equation 1),

    x' = x + h s(x) + sqrt(2 h) e,   s = -grad E,   e ~ N(0, I),                                     (2)

or its Metropolis-adjusted form; for a model with hidden units it is block Gibbs sampling. The loss of a row is

    E(x+) - E(x-) + alpha (E(x+)^2 + E(x-)^2),   x+ = x + sigma e,   x- the end of a chain from x+,  (3)

with no gradient through the chain, as in Hinton's rule. Two things keep it stable:

- *Noise* sigma on the data. The model is then that of the smoothed density, minus whose log is curved by 1 / sigma^2
  at most: rows on a sheet or on a grid would otherwise ask for an infinitely steep energy. The step size follows.
  Under a normal of precision P, the chain (2) has the variance 1 / (P (1 - h P / 2)), which is never less than 2 h. So
  for h < sigma^2 / 2, and for no larger h, there is an energy whose chains are as narrow as the smoothed data; at
  h = sigma^2 / 4, the default, it is 1.17 times as steep as the truth where the data are thinnest, and hardly
  different elsewhere.
- *alpha* (Du and Mordatch 2019, section 3.2). (1) is silent on a constant added to E, which would drift. The price:
  where the derivative of (3) by E(x) vanishes, p_data (1 + 2 alpha E) = p_model (1 - 2 alpha E), which is
  E (1 + 4 alpha) = -log p_data + const to first order: a density flattened to the power 1 / (1 + 4 alpha).

The loss itself says nothing about how good a model is: it compares E at the two ends of a chain, and is near zero for
the truth, for a constant E and for chains that go nowhere, and below zero for an E that the chains cannot follow.
Held-out rows are judged by denoising score matching instead (Vincent 2011, doi:10.1162/NECO_a_00142, equation 9) at the
same sigma, whose minimum is the score of the smoothed density, which is what (1) fits too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._smoothing import noise_width, smooth
from anomalib_gen.samplers import mala, ula

Transition = Callable[[Any, torch.Tensor, torch.Generator], torch.Tensor]
"""A chain of Markov steps, ``(model, x, generator) -> x``, that leaves the model's density invariant."""

TRANSITIONS = ("auto", "langevin", "mala", "gibbs")
SHORT_RUNS = 0.2
"""Share of the runs of Metropolis-adjusted chains that take shorter steps than h."""
MEMORY = 0.99
"""Decay of the running means that tell a divergence; they see about a hundred steps."""
FAR = 5.0
"""Chains whose mean norm is this many times that of the data have left it."""
NATS_PER_VALUE = 20.0
"""Energies of data and chains further apart than this, for each value of a row, are no longer of one density."""


class ContrastiveDivergence(Component):
    """CD-k (equation 3).

    The model needs `energy` ``(B, *E) -> (B,)`` and `score` ``(B, *E) -> (B, *E)``, minus the energy's gradient; or,
    for block Gibbs sampling, `energy` and ``gibbs(x, generator) -> x``, one sweep. `log_z` is not learnt.

    Parameters
    ----------
    n_steps : int, default=10
        Steps k of each chain.
    step_size : float or None, default=None
        h of equation 2. None takes ``data_noise**2 / 4``, half of what the smoothed density allows. With a
        Metropolis correction it is the largest step, see "mala".
    data_noise : float, default=0.1
        Deviation sigma of the noise on the data, in standard deviations of the training data. A model with a `grain`
        has it added in quadrature. Chains by Gibbs sampling start at rows without noise.
    alpha : float, default=0.001
        Weight of the squared energies; flattens the density by the power ``1 / (1 + 4 alpha)``.
    transition : {"auto", "langevin", "mala", "gibbs"} or callable, default="auto"
        The chain. "auto" takes Gibbs sampling where the model offers it, and Langevin's elsewhere. "mala" adds the
        Metropolis correction; scores longer than sqrt(2 D / h) are then truncated, and one run of k steps in five is of
        steps of h / 10 or h / 100: where the energy is too steep or too curved for h, a corrected chain would stay for
        ever. A callable ``(model, x, generator) -> x`` makes all the steps itself.

    References
    ----------
    Hinton, G. E. (2002). Training products of experts by minimizing contrastive divergence. Neural Computation 14.

    Du, Y., Mordatch, I. (2019). Implicit generation and modeling with energy-based models. NeurIPS. arXiv:1903.08689.
    """

    _auto_transition = "langevin"
    _auto_step = 0.25
    means_: torch.Tensor | None
    values_: int

    def __init__(
        self,
        *,
        n_steps: int = 10,
        step_size: float | None = None,
        data_noise: float = 0.1,
        alpha: float = 1e-3,
        transition: str | Transition = "auto",
    ) -> None:
        self.n_steps = n_steps
        self.step_size = step_size
        self.data_noise = data_noise
        self.alpha = alpha
        self.transition = transition

    def prepare(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Forget the running means of an earlier training."""
        self.means_ = None

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, counts=["n_steps"], not_negative=["data_noise", "alpha"])
        positive = x if self._by_gibbs(model) else smooth(model, x, self.data_noise, generator)
        with torch.no_grad():
            negative = self._negatives(model, positive, generator).detach()
        energies = model.energy(torch.cat([positive, negative]))
        e_positive, e_negative = energies[: len(positive)], energies[len(positive) :]
        self._observe(positive, negative, e_positive, e_negative)
        penalty = e_positive.square() + e_negative.square()
        return e_positive - e_negative + self.alpha * penalty

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``.

        Denoising score matching, ``1/2 |sigma s(x + sigma e) + e|^2`` summed over the columns and averaged over e
        and -e.
        Where chains are by Gibbs sampling, rows may be discrete and have no score: a model that offers
        ``pseudo_log_likelihood(x) -> (B,)`` (Besag 1975, doi:10.2307/2987782) is then judged by minus that.
        """
        if self._by_gibbs(model) and hasattr(model, "pseudo_log_likelihood"):
            return -model.pseudo_log_likelihood(x)
        width = noise_width(model, x, self.data_noise)
        e = normal_like(x, generator)
        both = [0.5 * (width * model.score(x + width * n) + n).square().flatten(1).sum(1) for n in (e, -e)]
        return (both[0] + both[1]) / 2

    def diverged(self) -> str | None:
        """Say why training has gone astray, from running means over about a hundred steps; None if it has not."""
        means = getattr(self, "means_", None)
        if means is None:
            return None
        norm, norm_chains, gap, size = means.tolist()
        values = self.values_
        if not math.isfinite(norm_chains + gap + size):
            return "the energies of the Markov chains are not finite: lower step_size or the learning rate"
        if norm_chains > FAR * (norm + math.sqrt(values)):
            return (
                f"the Markov chains left the data (mean norm {norm_chains:.3g} against {norm:.3g} of the rows): "
                "lower step_size or the learning rate, or raise data_noise"
            )
        if abs(gap) > NATS_PER_VALUE * values:
            where = "below" if gap > 0 else "above"
            return (
                f"the energy of the Markov chains is {abs(gap):.3g} nats {where} that of the rows: lower step_size or "
                "the learning rate, or raise n_steps or data_noise"
            )
        if size > 100 * NATS_PER_VALUE * values:
            return f"the energies have grown to {size:.3g} nats: lower the learning rate, or raise alpha"
        return None

    def _negatives(self, model: Any, positive: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Ends of chains, ``(B, *E)``; here from the data."""
        return self._transit(model, positive, generator)

    def _by_gibbs(self, model: Any) -> bool:
        return self.transition == "gibbs" or (self.transition == "auto" and hasattr(model, "gibbs"))

    def _transit(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Run the chains k steps from `x` ``(B, *E)``."""
        if callable(self.transition):
            return self.transition(model, x, generator)
        if self.transition not in TRANSITIONS:
            known = ", ".join(repr(name) for name in TRANSITIONS)
            raise ValueError(
                f"transition={self.transition!r} is unknown. Known: {known}; or pass a callable."
            )
        if self._by_gibbs(model):
            for _ in range(self.n_steps):
                x = model.gibbs(x, generator)
            return x
        if self.step_size is None and self.data_noise == 0:
            raise ValueError(
                f"step_size=None follows data_noise, which is 0 in {self!r}: give one of the two."
            )
        h = self._auto_step * self.data_noise**2 if self.step_size is None else self.step_size
        if not 0 < h < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {self.step_size!r}.")
        if "mala" in (self.transition, self._auto_transition if self.transition == "auto" else None):
            # One run in five is of short steps, h / 10 or h / 100: lengths, so the root.
            u = torch.rand(len(x), generator=generator, dtype=torch.float32, device=x.device)
            size = (u < SHORT_RUNS).to(x) + (u < 0.5 * SHORT_RUNS).to(x)
            scale = expand_as_rows(torch.pow(10.0, -0.5 * size), x)
            longest = math.sqrt(2 * x[0].numel() / h)  # its step is as long as that of the noise
            return mala(
                model.energy,
                x,
                self.n_steps,
                step_size=h,
                scale=scale,
                max_score_norm=longest,
                generator=generator,
            )[0]
        return ula(model.score, x, self.n_steps, step_size=h, generator=generator)[0]

    @torch.no_grad()
    def _observe(
        self,
        positive: torch.Tensor,
        negative: torch.Tensor,
        e_positive: torch.Tensor,
        e_negative: torch.Tensor,
    ) -> None:
        """Update the running means; medians of a batch, because one outlying row is no divergence."""
        now = torch.stack(
            [
                positive.flatten(1).norm(dim=1).median(),
                negative.flatten(1).norm(dim=1).median(),
                e_positive.median() - e_negative.median(),
                torch.maximum(e_positive.abs().median(), e_negative.abs().median()),
            ]
        )
        self.values_ = positive[0].numel()
        means = getattr(self, "means_", None)
        self.means_ = now if means is None else torch.lerp(now, means, MEMORY)
