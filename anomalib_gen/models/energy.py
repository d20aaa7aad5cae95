r"""Energy-based models: a density known up to a constant,

    p(x) = exp(-E(x)) / Z,   E(x) = E_base(x) + sum_k f_k(t(x)),                        (1)

with f a network and t the elementwise compression of far values (networks.tails). The base is a density of its own,
by default a standard normal whose tails are stretched by t,

    E_base(x) = |t(x)|^2 / 2 - sum log t'(x)   (+ D/2 log 2 pi for its log Z),            (2)

so E = E_base + f(t(x)) is the energy of x = t^-1(y), y with density ~ exp(-|y|^2/2 - f(y)). A network grows at most
linearly, the base quadratically in y, hence exp(-E) can always be normalised; no finite row overflows; and as f sees
its inputs clipped to a box, the base alone decides far outside, where it rises along every ray.

The score is the exact gradient, s(x) = -dE/dx: a conservative field, unlike that of a network with D outputs.

A model may be conditional on the standard deviation s of Gaussian noise added to the rows (Song and Ermon 2019,
arXiv:1907.05600, with an energy in place of the score). Then rows, and the network's output, are scaled by

    E(x, s) = E_base(x / c) + D log c + (c / s) f(t(x / c), s),   c^2 = 1 + s^2,          (3)

so that f sees unit variances at every level and -s dE/dx = -(s / c^2) x - grad f: at every level the network's gradient
is what is left of the noise, e = -s score, of unit size (the reasoning of Karras et al. 2022, arXiv:2206.00364,
section 5, for an energy).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from anomalib_gen._runtime import check_levels, check_rows, check_shape
from anomalib_gen._warnings import warn_user
from anomalib_gen.networks import TAIL_START, compress_tails, expand_tails
from anomalib_gen.samplers import annealed_langevin, mala, score_of
from anomalib_gen.samplers.ais import anneal

NETWORK_BOUND = 12.0
"""Networks see their inputs clipped to this box in compressed units: 1,100 standard deviations."""

LEVEL_RATIO = 1.3
"""Ratio of the neighbouring noise levels through which `EnergyModel.sample` anneals."""
STEPS_PER_LEVEL, LAST_STEPS = 20, 50
"""Langevin steps at each of them, and Metropolis-adjusted ones at the end."""
SAMPLE_LEVELS, MIN_CHAINS = 50, 64
"""Temperatures, and chains at least, through which a model without noise levels is sampled."""


def noised_spread(spread: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Deviation ``(B, *E)`` of data of deviation `spread` ``E`` with noise of levels ``(B,)``."""
    return (spread.square() + noise.reshape(-1, *[1] * spread.ndim).square()).sqrt()


class TailedNormal(nn.Module):
    """The base of equation 2: a normal within five deviations and one of ``log |x|`` beyond.

    Parameters
    ----------
    spread : Tensor of shape E
        Standard deviation of each column, or pixel.
    tail_start : float, default=5.0
        Where the tails of ``|x| / spread`` begin; infinity for a plain normal.
    """

    spread: torch.Tensor

    def __init__(self, spread: torch.Tensor, *, tail_start: float = TAIL_START) -> None:
        super().__init__()
        self.register_buffer("spread", spread)
        self.tail_start = tail_start

    def log_partition(self) -> float:
        """Exact log-normaliser of `energy`: D/2 log 2 pi."""
        return 0.5 * self.spread.numel() * math.log(2 * math.pi)

    def scale(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Deviation of rows with noise of deviation `noise` ``(B,)`` added: ``E``, or ``(B, *E)`` with noise."""
        return self.spread if noise is None else noised_spread(self.spread, noise)

    def energy(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Energy ``(B,)`` of rows ``(B, *E)``."""
        scale = self.scale(noise)
        y, log_det = compress_tails(x / scale, self.tail_start)
        log_scale = scale.log().sum(tuple(range(-self.spread.ndim, 0)))
        return 0.5 * y.flatten(1).square().sum(1) - log_det + log_scale

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density ``(B,)`` of rows ``(B, *E)``."""
        return -self.energy(x) - self.log_partition()

    def sample(self, n: int, generator: torch.Generator, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Draw ``(n, *E)`` rows exactly."""
        y = torch.randn(
            (n, *self.spread.shape),
            generator=generator,
            dtype=self.spread.dtype,
            device=self.spread.device,
        )
        return expand_tails(y, self.tail_start)[0] * self.scale(noise)


class EnergyModel(nn.Module):
    """The energy of equation 1, optionally conditional on a noise level (equation 3).

    Parameters
    ----------
    network : module
        ``forward(x, context) -> (B, n_heads)`` with x ``(B, *E)`` and context ``(B, 1)`` or None.
    features : int or tuple of int
        Columns D, or the shape E of images.
    noise_levels : tuple of float, optional
        Smallest and largest noise level s that the model is conditional on; None for an unconditional model.
        The context is log s, scaled to [-1, 1] over that range.
    grain : Tensor of shape E, optional
        Deviation of the dequantisation noise of each column: the model is that of x + grain * e. The training
        objective adds it; here it only sets the scale that the network works in.
    n_heads : int, default=1
        Outputs f_k of the network. Telescoping density-ratio estimation has one for each ratio.
    tail_start : float, default=5.0
        Where t begins to compress, in deviations; infinity for rows whose tails are compressed already.

    Attributes
    ----------
    log_z : Parameter, scalar
        A learned estimate of log Z; only the objectives that say so train it, and `energy` does not contain it.
    base : Module
        The base of equation 1; see `set_base`.
    """

    grain: torch.Tensor
    spread: torch.Tensor
    base: Any

    def __init__(
        self,
        network: nn.Module,
        features: int | tuple[int, ...],
        *,
        noise_levels: tuple[float, float] | None = None,
        grain: torch.Tensor | None = None,
        n_heads: int = 1,
        tail_start: float = TAIL_START,
    ) -> None:
        super().__init__()
        check_levels(noise_levels)
        self.tail_start = tail_start
        self.network = network
        self.features = features
        self.noise_levels = noise_levels
        self.n_heads = n_heads
        self.log_z = nn.Parameter(torch.zeros(()))
        if grain is None:
            grain = torch.zeros(features)
        self.register_buffer("grain", grain)
        self.register_buffer("spread", (1 + self.grain.square()).sqrt())
        self.base = TailedNormal(self.spread.clone(), tail_start=tail_start)

    @property
    def smallest_noise(self) -> float | None:
        """The noise level of `energy` unless told otherwise; None if unconditional."""
        return None if self.noise_levels is None else self.noise_levels[0]

    def set_base(self, base: nn.Module) -> None:
        """Replace the base E_base of equation 1.

        An objective that compares the data with a noise distribution does this in its `prepare`, so that f is the
        log-ratio of the two and E = f + E_noise.

        Parameters
        ----------
        base : Module
            With ``energy(x) -> (B,)`` for x ``(B, *E)``, finite and rising far outside for every finite row; with
            ``energy(x, noise)`` for a model that is conditional on noise. What it holds should be buffers, not
            parameters: training would change those.
        """
        reference = self.log_z
        self.base = base.to(device=reference.device, dtype=reference.dtype)

    def _levels(self, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor | None:
        """Noise level of each row ``(B,)``, or None for an unconditional model."""
        if self.noise_levels is None:
            return None
        return x.new_full((len(x),), self.noise_levels[0]) if noise is None else noise

    def head_energies(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Energies f_k ``(B, n_heads)`` of rows ``(B, *E)``: what the network adds to the base."""
        noise = self._levels(x, noise)
        if noise is None or self.noise_levels is None:
            y, _ = compress_tails(x / self.spread, self.tail_start)
            return self._see(y, None)
        low, high = (math.log(level) for level in self.noise_levels)
        context = ((2 * noise.log() - low - high) / (high - low)).unsqueeze(1)
        scale = noised_spread(self.spread, noise)
        y, _ = compress_tails(x / scale, self.tail_start)
        amplitude = (1 + noise.square()).sqrt() / noise
        return amplitude.unsqueeze(1) * self._see(y, context)

    def _see(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Output ``(B, n_heads)`` of the network for rows ``(B, *E)`` in compressed units."""
        inside = y.clamp(-NETWORK_BOUND, NETWORK_BOUND)
        return check_shape(self.network(inside, context), (len(y), self.n_heads), "The network")

    def energy(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Energy of rows, in nats up to a constant.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
        noise : Tensor of shape (B,), optional
            Noise level of each row; the smallest one if None. Ignored by an unconditional model.

        Returns
        -------
        Tensor of shape (B,)
        """
        check_rows(x, self.spread.shape)
        levels = self._levels(x, noise)
        base = self.base.energy(x) if levels is None else self.base.energy(x, levels)
        return base + self.head_energies(x, levels).sum(1)

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Energy; the same as `energy`."""
        return self.energy(x, noise)

    def score(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of log p, -dE/dx, ``(B, *E)``.

        While gradients are recorded the result can be differentiated further, with respect to the weights and, if
        `x` requires a gradient, to `x`. Without (under ``torch.no_grad``) it is computed all the same.
        """
        return score_of(self.energy, create_graph=torch.is_grad_enabled())(x, noise)

    def reference(self) -> TailedNormal:
        """A normalised density like that of standardised rows with the noise of `energy`: where chains start."""
        if self.noise_levels is None:
            return TailedNormal(self.spread, tail_start=self.tail_start)
        width = (self.spread.square() + self.noise_levels[0] ** 2).sqrt()
        return TailedNormal(width, tail_start=self.tail_start)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)`` rows by Markov chains, from the density at the smallest noise level.

        A model that is conditional on noise anneals from its largest level to its smallest by Langevin dynamics. Any
        other is reached from `reference` by annealed importance sampling, whose chains are then drawn by their
        weights. Metropolis-adjusted steps at the end mend what either has left.

        Warns
        -----
        UserWarning
            If the weights of the chains are worth few draws: then many rows are of a few chains.
        """
        if self.noise_levels is None:
            result = anneal(
                self.energy,
                base=self.reference(),
                n_chains=max(n, MIN_CHAINS),
                n_levels=SAMPLE_LEVELS,
                generator=generator,
            )
            if not result.reliable:
                warn_user(
                    f"Rows are drawn from {len(result.log_weights)} chains by weights that are worth "
                    f"{result.effective_sample_size:.1f} independent draws: many rows come from the same few chains, "
                    "and modes may be missed. Draw more rows than are needed, and take some of them.",
                )
            weights = (result.log_weights - result.log_weights.max()).exp()
            chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
            x, step_size = result.x[chosen], 0.01
        else:
            low, high = self.noise_levels
            n_levels = 1 + math.ceil(math.log(high / low) / math.log(LEVEL_RATIO))
            sigmas = [high * (low / high) ** (k / max(1, n_levels - 1)) for k in range(n_levels)]
            start = TailedNormal(self.spread, tail_start=self.tail_start).sample(
                n, generator, self.log_z.new_full((n,), high)
            )
            x, _ = annealed_langevin(
                self.score,
                start,
                sigmas,
                n_steps_per_level=STEPS_PER_LEVEL,
                denoise=False,
                generator=generator,
            )
            step_size = 0.1 * low**2
        x, _ = mala(self.energy, x, LAST_STEPS, step_size=step_size, n_warmup=LAST_STEPS, generator=generator)
        return x
