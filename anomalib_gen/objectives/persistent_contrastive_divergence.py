r"""Persistent contrastive divergence: chains that go on where the last batch left them.

Chains that start at the data (objectives.contrastive_divergence) never see what the model believes far from it: a
false mode there stays. Tieleman (2008, doi:10.1145/1390156.1390290) lets one set of chains run on through the training.
As the weights move little at a time the chains stay near the model's density and

    grad L = E_data[dE(x)] - E_chains[dE(x)]                                         (1)

is nearly that of the likelihood. The chains live in a buffer larger than a batch (Du and Mordatch 2019,
arXiv:1903.08689, section 3.2); each step picks some at random, runs them k steps and puts them back. A small share
starts anew from noise, so that no mode keeps a chain for ever, and a part that has gone astray is replaced in time.
The first steps of a new chain are still noise, and teach the model to avoid it more than the data do: the 5 % of Du and
Mordatch go with 60 long steps, and with 10 short ones the energy comes out too steep. Hence 1 %.

Persistent chains must keep up with the weights, so they take larger steps than those that start at the data, and a
Metropolis correction in return for the bias that these would have. Chains that lag behind are the way in which training
goes wrong. Where the energy is steep the step h s overshoots and is refused again and again; the energy is pushed up
under the chain that cannot leave, to the 1 / (2 alpha) at which alpha holds it, and the peak there is steeper still.
So the scores in a step are truncated, by equation 3 of samplers.langevin, at the norm sqrt(2 D / h), where they move
the chain as far as the noise does: under the smoothed data they seldom are that long. And a chain that is picked takes
much shorter steps now and then, which help where the energy is curved. A mixture of kernels that all leave the density
as it is leaves it too.

The noise is the product of the data's marginals: values of each column, from independent rows. It is as wide as the
data in every column, and discrete where they are.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._smoothing import some_rows
from anomalib_gen.objectives.contrastive_divergence import ContrastiveDivergence, Transition

POOL = 20_000
"""Training rows kept to draw new chains from."""


class PersistentContrastiveDivergence(ContrastiveDivergence):
    """PCD-k: contrastive divergence with persistent chains.

    Parameters
    ----------
    n_steps : int, default=10
        Steps of a chain each time it is picked.
    step_size : float or None, default=None
        h of Langevin's step, the largest of those taken; None is ``data_noise**2``.
    data_noise : float, default=0.1
        Deviation of the noise on the data, in standard deviations of the training data.
    alpha : float, default=0.001
        Weight of the squared energies.
    transition : {"auto", "langevin", "mala", "gibbs"} or callable, default="auto"
        The chain, as for `ContrastiveDivergence`; but "auto" takes "mala" where the model offers no Gibbs sampling.
    buffer_size : int, default=1024
        Chains kept; a batch must not be larger. Of too many, each moves too seldom to follow the model.
    p_restart : float, default=0.01
        Probability that a chain starts anew from noise when it is picked. A chain lives for ``n_steps / p_restart``
        steps on average; times the step size, that must be several squared widths of the data.

    Notes
    -----
    Do not take the weights of modes from it that chains do not cross between. Where the chains are shared out among
    such modes as the data are, (1) vanishes whatever the energy says of one against the other; and how they are shared
    out is up to where the new ones start. Of a mixture with .3 of its mass in one of two normal clusters in the plane,
    16 deviations apart, the energy had .01 there after 300 steps by default, .13 with ``p_restart=0.1`` and .41 with
    ``p_restart=1``, short runs from noise, which also left a quarter of the mass outside the clusters; 6 deviations
    apart it had .20, .27 and .40 (one seed each). Restarts do not mend it. `NoiseContrastive` and `Telescoping` compare
    densities: they had .25 and .22, and .29 and .28 of the closer ones. A `data_noise` at which the modes overlap
    helps too, if the smoothed density will do: .28 of the closer ones with 0.3.

    Stop early. In 20,000 steps on a real table, 2,000 passes over it, the energies stay bounded, but held-out rows are
    judged worse and worse (`benchmarks/results/ebm-stability.md`).

    References
    ----------
    Tieleman, T. (2008). Training restricted Boltzmann machines using approximations to the likelihood gradient. ICML.

    Du, Y., Mordatch, I. (2019). Implicit generation and modeling with energy-based models. NeurIPS. arXiv:1903.08689.
    """

    _auto_transition = "mala"
    _auto_step = 1.0

    def __init__(
        self,
        *,
        n_steps: int = 10,
        step_size: float | None = None,
        data_noise: float = 0.1,
        alpha: float = 1e-3,
        transition: str | Transition = "auto",
        buffer_size: int = 1024,
        p_restart: float = 0.01,
    ) -> None:
        super().__init__(
            n_steps=n_steps,
            step_size=step_size,
            data_noise=data_noise,
            alpha=alpha,
            transition=transition,
        )
        self.buffer_size = buffer_size
        self.p_restart = p_restart

    def prepare(self, model: Any, rows: Any, generator: torch.Generator) -> None:
        """Start all the chains, from noise."""
        super().prepare(model, rows, generator)
        require(self, counts=("buffer_size",))
        self.pool_ = some_rows(rows, POOL, generator)
        self.buffer_ = self._from_noise(self.buffer_size, generator)

    def _negatives(self, model: Any, positive: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if not 0 <= self.p_restart <= 1:
            raise ValueError(f"p_restart must lie in [0, 1], got {self.p_restart!r}.")
        size, batch = len(self.buffer_), len(positive)
        if batch > size:
            raise ValueError(f"buffer_size={size} must not be below the {batch} rows of a batch.")
        place: dict[str, Any] = {"generator": generator, "device": self.buffer_.device}
        picked = torch.randperm(size, **place)[:batch]
        start = self.buffer_[picked]
        anew = (torch.rand(batch, **place, dtype=torch.float32) < self.p_restart).nonzero().squeeze(1)
        start[anew] = self._from_noise(len(anew), generator)
        end = self._transit(model, start, generator)
        self.buffer_[picked] = end
        return end

    def _from_noise(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """New chains ``(n, *E)``: each value from the same place of a row of its own."""
        pool = self.pool_.flatten(1)
        row = torch.randint(len(pool), (n, pool.shape[1]), generator=generator, device=pool.device)
        return pool.gather(0, row).reshape(n, *self.pool_.shape[1:])
