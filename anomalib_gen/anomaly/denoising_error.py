r"""Denoising error: a row is anomalous if it is not what a denoiser makes of it,

    a(x) = 1/K sum_k w(s_k) E_e mean_j (D(x + s_k e, s_k) - x)_j^2,     s_1 < ... < s_K geometric,           (1)

or, without noise on the row, a(x) = 1/K sum_k w(s_k) mean_j (D(x, s_k) - x)_j^2. Weights are powers of the level:

    "x0":    w = 1,        the error of the row,
    "eps":   w = 1 / s^2,  that of the noise, as x = (x + s e) - s e                      (Ho et al. 2020, equation 14),
    "score": w = 1 / s^4,  that of the score, as the score is (D - x) / s^2.

"eps" is the one with a meaning in nats. Over levels that are uniform in log s the mean of |e - e^|^2 is, up to a factor
and to what happens at the two ends, the variational bound on -log p(x) in continuous time (Kingma et al. 2021,
arXiv:2107.00630: half the integral of |e - e^|^2 over log SNR = -2 log s). Without noise on the row the integral is
Mahalanobis' distance where data are normal: a direction of variance v gives D(x, s) - x = -s^2 x / (v + s^2), and

    integral of s^-2 (s^2 x / (v + s^2))^2 ds / s = x^2 / 2 v.                                              (2)

With noise a term v^2 (v + s^2)^-2 e^2 is added to the integrand that is the same for every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.anomaly._levels import DATA_LEVELS, balanced_noise, denoise_at, level_ladder

WEIGHTINGS: Mapping[str, int] = {"x0": 0, "eps": 2, "score": 4}
"""Power of 1 / s that each weighting multiplies the squared error of the row with."""


class DenoisingError(Component):
    """Mean squared error of a denoiser over a ladder of noise levels (equation 1).

    Parameters
    ----------
    n_levels : int, default=10
        Levels K.
    n_draws : int, default=4
        Draws of noise at each level, in pairs e and -e, the same for every row. In a pair the parts of the error that
        are odd in the noise cancel, which for a linear denoiser is all that depends on both row and noise.
    noise_levels : tuple of float, default=(0.02, 5.0)
        Range of the ladder, in standard deviations of the data; the part of it that the model knows is used. See
        `_levels.DATA_LEVELS` for the reason.
    weighting : {"eps", "x0", "score"}, default="eps"
        What the error is counted in.
    add_noise : bool, default=True
        Whether the denoiser sees the row with noise, as it did in training, or as it is. With noise this is what the
        literature calls the denoising error. Without, it is free of chance and costs a single evaluation a level, and
        it has told anomalies apart better on tables: what noise adds is no different for an anomaly.

    Raises
    ------
    ValueError
        When called, if `weighting` is unknown.

    References
    ----------
    Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.

    Kingma, D. P., Salimans, T., Poole, B., Ho, J. (2021). Variational diffusion models. NeurIPS. arXiv:2107.00630.
    """

    in_nats = False

    def __init__(
        self,
        *,
        n_levels: int = 10,
        n_draws: int = 4,
        noise_levels: tuple[float, float] = DATA_LEVELS,
        weighting: str = "eps",
        add_noise: bool = True,
    ) -> None:
        self.n_levels = n_levels
        self.n_draws = n_draws
        self.noise_levels = noise_levels
        self.weighting = weighting
        self.add_noise = add_noise

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        if self.weighting not in WEIGHTINGS:
            known = ", ".join(map(repr, sorted(WEIGHTINGS)))
            raise ValueError(f"weighting={self.weighting!r} is unknown. Known weightings: {known}.")
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        noise = balanced_noise(x, self.n_draws, generator) if self.add_noise else [torch.zeros_like(x[0])]
        for level in level_ladder(model, self.noise_levels, self.n_levels):
            weight = level ** -WEIGHTINGS[self.weighting]
            for e in noise:
                error = denoise_at(model, x + level * e, level) - x
                total += weight * error.square().flatten(1).mean(1)
        return total / (self.n_levels * len(noise))
