r"""Denoising: the row is to be found behind its noise.

With x a row, s a noise level and e ~ N(0, I),

    E w(s) |D(x + s e, s) - x|^2 / 2                                                                 (1)

is least where D is the mean of the clean rows behind a noisy one (models.denoiser, equation 1), at every level and
whatever the weight w > 0 and the distribution of levels; these two decide where a network of finite size, trained for
a finite time, is good. For the parametrisations of models.denoiser, with F the network's output and d the data's
deviation, (1) is the plain error |F - target|^2 / 2 for

    "x0":  w = 1,                      target x,
    "eps": w = 1 / s^2,                target e       (Ho et al. 2020, arXiv:2006.11239, equation 14),
    "v":   w = (1 + s^2) / s^2,        target v       (Salimans and Ho 2022, arXiv:2202.00512, section 4: SNR + 1),
    "edm": w = (s^2 + d^2) / (s d)^2,  target of unit variance at all levels
                                                      (Karras et al. 2022, arXiv:2206.00364, table 1).

Weight and parametrisation can be chosen apart. "truncated" is w = max(1 / s^2, 1), the truncated signal-to-noise
weight of Salimans and Ho, section 4. For a model with scores, D = x + s^2 score, "eps" is denoising score matching
with its usual weight s^2, level by level (objectives.denoising_score_matching, equation 2).
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._levels import (
    clean_rows,
    data_model,
    judged_draws,
    levels_at,
    places,
    unseen,
)

WEIGHTINGS = ("edm", "eps", "truncated", "v", "x0")


class Denoising(Component):
    """Squared error of a denoiser (equation 1).

    The model is a `Denoiser`: it needs ``denoise(x, level)`` and a `path`. Where it has a `grain`, rows get the noise
    of the grain first.

    Parameters
    ----------
    weighting : {"edm", "eps", "truncated", "v", "x0"}, default="edm"
        Weight of a level. The default gives all levels an error of one size to start from.
    times : {"log-normal", "log-uniform", "uniform"}, default="log-normal"
        How levels are drawn within the path's range: with a normal or a uniform logarithm, or uniform over the path's
        clock (over its steps, where it is discrete), as DDPM and NCSN do. Paths start at noise that hides nothing and
        end at noise that hides everything, and a network learns little at either end; the default spends little
        there.
    log_mean, log_std : float, default=-0.5 and 1.5
        Mean and deviation of the logarithm of the level for "log-normal". Karras et al. chose -1.2 and 1.2 for images
        of deviation 0.5, which is -0.5 for rows of unit deviation. Tables need a wider range than images: a principal
        direction of deviation a is learned at levels between a and 1, and a is anywhere from 0.02 to 5 in
        standardised tables. Nine levels in ten lie between 0.05 and 7.

    References
    ----------
    Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.

    Karras, T., Aittala, M., Aila, T., Laine, S. (2022). Elucidating the design space of diffusion-based generative
    models. NeurIPS. arXiv:2206.00364.

    Salimans, T., Ho, J. (2022). Progressive distillation for fast sampling of diffusion models. ICLR.
    arXiv:2202.00512.
    """

    recordable = True

    def __init__(
        self,
        *,
        weighting: str = "edm",
        times: str = "log-normal",
        log_mean: float = -0.5,
        log_std: float = 1.5,
    ) -> None:
        self.weighting = weighting
        self.times = times
        self.log_mean = log_mean
        self.log_std = log_std

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        level = self._levels(model, places(len(x), x, generator))
        model = unseen(model, x)
        clean = clean_rows(model, x, generator)
        return self.loss_at(model, clean, level, normal_like(x, generator))

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``.

        The same, over noise in pairs e and -e and, for few rows, over more draws, each row at levels spread evenly.
        `train` gives the same noise at every evaluation.
        """
        draws = judged_draws(x)
        levels = self._levels(model, places(len(x), x, generator, draws=draws)).reshape(draws, len(x))
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        model = unseen(model, x)
        for level in levels:
            clean, e = clean_rows(model, x, generator), normal_like(x, generator)
            total += self.loss_at(model, clean, level, e) + self.loss_at(model, clean, level, -e)
        return total / (2 * draws)

    def loss_at(self, model: Any, x: torch.Tensor, level: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Loss ``(B,)`` of clean rows `x` ``(B, *E)`` at levels ``(B,)`` and with noise `e` ``(B, *E)``."""
        s = expand_as_rows(level, x)
        error = model.denoise(x + s * e, level) - x
        return 0.5 * (self._weight(model, s) * error.square()).flatten(1).sum(1)

    def _levels(self, model: Any, u: torch.Tensor) -> torch.Tensor:
        return levels_at(model.path, u, self.times, self.log_mean, self.log_std)

    def _weight(self, model: Any, s: torch.Tensor) -> torch.Tensor:
        """w(s) of equation 1, which broadcasts over ``(B, *E)``."""
        if self.weighting == "edm":
            spread = getattr(data_model(model), "spread", None)
            d = 1.0 if spread is None else spread.to(s)
            return s**-2 + d**-2
        if self.weighting == "eps":
            return s**-2
        if self.weighting == "truncated":
            return (s**-2).clamp(min=1)
        if self.weighting == "v":
            return s**-2 + 1
        if self.weighting == "x0":
            return torch.ones_like(s)
        known = ", ".join(map(repr, WEIGHTINGS))
        raise ValueError(f"weighting={self.weighting!r} is unknown. Known: {known}.")
