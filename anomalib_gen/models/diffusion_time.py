r"""Models of the diffusion time of a row: how much noise is in it?

A row x = x_0 + s e with s unknown. Were x_0 the only clean row, at a distance r = |x - x_0| and in D columns, then with
no level preferred, p(s) ~ 1 / s, the squared level would have an inverse-gamma distribution,

    p(s^2 | x) ~ (s^2)^(-D/2 - 1) exp(-r^2 / 2 s^2) = InvGamma(s^2; a, b),     a = D / 2,   b = r^2 / 2,     (1)

whose density over log s is highest at s = sqrt(b / a) = r / sqrt(D). Many clean rows give a mixture of these
(Livernoche et al. 2024, arXiv:2305.18593, who let p(s^2) be constant, which makes a = D / 2 - 1 and needs three
columns; the estimate r / sqrt(D), the mode of s^2, is the same). Two models learn p(s | x) from rows with noise of
levels drawn uniformly from a range, which is about what the reference's 400 steps are:

- `InverseGammaTime`: (1) with b(x) from a network. Whatever the distribution of levels and whatever a, the likelihood
  is highest at a / b(x) = E[1 / s^2 | x], so a only says how much a row counts;
- `TimeClassifier`: probabilities of bins of s.

Time is the place of a level in the range, from 0 to 1. An anomaly looks like a row with much noise.

The range ends at s_max, so no estimate inside would tell far rows apart. A network therefore sees rows clipped to the
box of half-side c = 4 sqrt(1 + s_max^2) that noised data hardly leave, scaled by arsinh so that clean and noisy data
are both of order one. What sticks out of the box, d, is at least as much noise as it is long: it adds |d|^2 / D to the
squared level, and |d|^2 / 2 to b, as in (1).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import nn

from anomalib_gen._runtime import check_levels, check_shape

BOX = 4.0
"""Half-side c, in deviations of rows with the largest noise."""


class _TimeModel(nn.Module):
    """What both models share: the range of levels, what the network sees, and what lies beyond."""

    def __init__(self, network: nn.Module, noise_levels: tuple[float, float]) -> None:
        super().__init__()
        check_levels(noise_levels)
        low, high = noise_levels
        self.network = network
        self.noise_levels = (float(low), float(high))

    def _see(self, x: torch.Tensor, n_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of the network ``(B, n_outputs)``, and the squared length of what sticks out of the box ``(B,)``."""
        half_side = BOX * math.sqrt(1 + self.noise_levels[1] ** 2)
        inside = x.clamp(-half_side, half_side)
        out = check_shape(self.network(inside.asinh()), (len(x), n_outputs), "The network")
        return out, (x - inside).square().flatten(1).sum(1)

    def _beyond(self, time: torch.Tensor, square_excess: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Levels ``(B,)`` of rows `x` whose time inside the box is known."""
        return (self.level(time).square() + square_excess / x[0].numel()).sqrt()

    def time(self, level: torch.Tensor) -> torch.Tensor:
        """Place of levels in the range: 0 at its start and 1 at its end."""
        low, high = self.noise_levels
        return (level - low) / (high - low)

    def level(self, time: torch.Tensor) -> torch.Tensor:
        """Levels at given places, the inverse of `time`."""
        low, high = self.noise_levels
        return low + (high - low) * time

    @abstractmethod
    def log_prob_level(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log-probability ``(B,)`` that the model gives levels ``(B,)`` of rows ``(B, *E)``, in nats."""

    @abstractmethod
    def estimate_level(self, x: torch.Tensor) -> torch.Tensor:
        """Estimate of the noise level of rows ``(B, *E)``, ``(B,)``, without an upper bound."""

    def expected_time(self, x: torch.Tensor) -> torch.Tensor:
        """Time of `estimate_level`, ``(B,)``; beyond 1 for rows that have more noise than any in training."""
        return self.time(self.estimate_level(x))


class TimeClassifier(_TimeModel):
    """Probabilities of bins of the noise level, of equal width in s.

    Parameters
    ----------
    network : module
        ``forward(y: (B, *E)) -> (B, n_bins)``, logits: the one softmax is here.
    noise_levels : tuple of float, default=(0.01, 0.93)
        Range of the bins and of the noise in training, in standard deviations of the data. The default is that of the
        reference, where the levels of 400 steps are sqrt(1 - abar_t) with betas from 1e-4 to 1e-2.
    n_bins : int, default=7
        Bins; the network's outputs.

    References
    ----------
    Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection. ICLR.
    arXiv:2305.18593.
    """

    def __init__(
        self, network: nn.Module, *, noise_levels: tuple[float, float] = (0.01, 0.93), n_bins: int = 7
    ) -> None:
        super().__init__(network, noise_levels)
        self.n_bins = n_bins

    def bins(self, level: torch.Tensor) -> torch.Tensor:
        """Bins of levels, integers of the same shape."""
        return (self.time(level) * self.n_bins).floor().clamp(0, self.n_bins - 1).long()

    def log_time_probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the bins for rows ``(B, *E)``, ``(B, n_bins)``."""
        return self._see(x, self.n_bins)[0].log_softmax(1)

    def log_prob_level(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log-probability ``(B,)`` of the bins that levels ``(B,)`` lie in."""
        return self.log_time_probabilities(x).gather(1, self.bins(level).unsqueeze(1)).squeeze(1)

    def estimate_level(self, x: torch.Tensor) -> torch.Tensor:
        """Level at the expected time over the bins' centres, and what sticks out of the box, ``(B,)``."""
        logits, square_excess = self._see(x, self.n_bins)
        centres = (torch.arange(self.n_bins, device=x.device) + 0.5).to(logits) / self.n_bins
        return self._beyond(logits.softmax(1) @ centres, square_excess, x)


class InverseGammaTime(_TimeModel):
    """An inverse-gamma distribution of the squared noise level (equation 1) with a learned scale b(x).

    Parameters
    ----------
    network : module
        ``forward(y: (B, *E)) -> (B, 1)``, the logit of the time of sqrt(b / a): at the optimum b / a is the harmonic
        mean of s^2 given x, which lies in the range of s^2.
    noise_levels : tuple of float, default=(0.01, 0.93)
        Range of the noise in training, in standard deviations of the data; as for `TimeClassifier`.

    References
    ----------
    Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection. ICLR.
    arXiv:2305.18593.
    """

    def __init__(self, network: nn.Module, *, noise_levels: tuple[float, float] = (0.01, 0.93)) -> None:
        super().__init__(network, noise_levels)

    def estimate_level(self, x: torch.Tensor) -> torch.Tensor:
        """Most likely level over log s, ``sqrt(b / a)``, ``(B,)``."""
        logit, square_excess = self._see(x, 1)
        return self._beyond(logit.squeeze(1).sigmoid(), square_excess, x)

    def log_prob_level(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log-density ``(B,)`` of squared levels, given levels ``(B,)``."""
        a = 0.5 * x[0].numel()
        b = a * self.estimate_level(x).square()
        return a * b.log() - math.lgamma(a) - 2 * (a + 1) * level.log() - b / level.square()
