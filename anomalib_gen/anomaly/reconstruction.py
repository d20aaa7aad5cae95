r"""Reconstruction: a row is anomalous if it changes on the way to noise and back.

From a level s the deterministic reverse process leads a row y down geometric levels s = u_0 > ... > u_{n-1} > u_n = 0,

    y <- D(y, u_j) + (u_{j+1} / u_j) (y - D(y, u_j)),                                                       (1)

the steps of DDIM, whose last one is the denoiser. What comes out, R_s(y), is a row of the model's that lies behind y,
and with one step just the mean of all such rows. The anomaly is the distance to it, from several levels,

    a(x) = 1/K sum_k mean_j |R_{s_k}(x + s_k e) - x|_j^p / s_k^p.                                            (2)

At level s structure finer than s is made anew and coarser structure is kept: a low level sees only what is odd in
directions along which rows hardly vary, a high one only how far a row is from the middle. So there is no one right
level, and (2) takes a ladder. As a normal row moves by about s (in small directions) from level s, distances are taken
in units of s, which for a single level changes nothing. For one step, p = 2 and no noise this is `DenoisingError`,
counted in the noise.

The row may be given noise first or, as it is, be taken for one that has it. For normal data of variance v in a
direction, one step takes y to v / (v + s^2) y, and many small steps take it to sqrt(v / (v + s^2)) y.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count
from anomalib_gen.anomaly._levels import (
    DATA_LEVELS,
    balanced_noise,
    level_ladder,
    way_back,
)

POWERS = {"absolute": 1, "squared": 2}


class DiffusionReconstruction(Component):
    """Distance of a row from its reconstruction by the reverse process, from a ladder of levels (equation 2).

    It helps where what is odd does not come back, as on most tables, where it is a point of AUROC behind the default.
    It fails where the model restores an anomaly as well as normal rows or better, as it may images simpler than those
    that it was trained on; and it counts pixels one by one, where `MultiScaleReconstruction` sees parts of an image.

    Parameters
    ----------
    n_levels : int, default=5
        Levels K to start from. For a single one, as in the references, give its value twice as `noise_levels`; the
        250th of 1,000 steps from which the code of [2]_ starts is a level of 0.63.
    n_steps : int, default=5
        Denoiser evaluations n of each way back. With one the reconstruction is the mean of clean rows, which between
        the data's modes is none of them; with more it comes to lie in one. Ways end where the ladder starts, so from
        its lowest level there is one step; that from a single level ends at 0.02 deviations, or the model's smallest
        level if that is more.
    n_draws : int, default=4
        Draws of noise at each level, in pairs e and -e, the same for every row. Not used without noise.
    noise_levels : tuple of float, default=(0.02, 5.0)
        Range of the ladder, in standard deviations of the data; the part of it that the model knows is used. It is the
        model's range cut to what says something about standardised rows, see `_levels.DATA_LEVELS`.
    add_noise : bool, default=False
        Whether the row gets noise of the level before the way back. Without, as in the code of [2]_, the
        reconstruction is free of chance and `n_draws` times as cheap, and on tables scores of rows without noise have
        told anomalies apart better: how the noise is missed is no different for an anomaly.
    norm : {"squared", "absolute"}, default="squared"
        Whether p in equation 2 is 2 or 1.

    Raises
    ------
    ValueError
        When called, if `norm` is unknown.

    References
    ----------
    .. [1] Wyatt, J., Leach, A., Schmon, S. M., Willcocks, C. G. (2022). AnoDDPM: Anomaly detection with denoising
       diffusion probabilistic models using simplex noise. CVPR Workshops.
    .. [2] Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection.
       ICLR. arXiv:2305.18593.
    """

    in_nats = False

    def __init__(
        self,
        *,
        n_levels: int = 5,
        n_steps: int = 5,
        n_draws: int = 4,
        noise_levels: tuple[float, float] = DATA_LEVELS,
        add_noise: bool = False,
        norm: str = "squared",
    ) -> None:
        self.n_levels = n_levels
        self.n_steps = n_steps
        self.n_draws = n_draws
        self.noise_levels = noise_levels
        self.add_noise = add_noise
        self.norm = norm

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        if self.norm not in POWERS:
            raise ValueError(
                f"norm={self.norm!r} is unknown. Known norms: {', '.join(map(repr, sorted(POWERS)))}."
            )
        check_count(self.n_steps, "n_steps")
        power = POWERS[self.norm]
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        noise = balanced_noise(x, self.n_draws, generator) if self.add_noise else [torch.zeros_like(x[0])]
        levels = level_ladder(model, self.noise_levels, self.n_levels)
        # A single level is not the end of its own way.
        lowest = levels[0] if levels[0] < levels[-1] else max(DATA_LEVELS[0], model.noise_levels[0])
        for level in levels:
            for e in noise:
                moved = way_back(model, x + level * e, level, lowest, self.n_steps) - x
                total += (moved.abs() / level).pow(power).flatten(1).mean(1)
        return total / (self.n_levels * len(noise))
