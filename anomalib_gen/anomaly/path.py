r"""Statistics of the diffusion path: what happens to a row on its deterministic way to noise.

In rows that are not scaled, the probability-flow equation dy / ds = e(y, s), with e(y, s) = (y - D(y, s)) / s the noise
that the denoiser finds, leads every row to noise. Along geometric levels s_1 < ... < s_n the steps of DDIM are

    y_1 = x,     e_k = e(y_k, s_k),     y_{k+1} = y_k + (s_{k+1} - s_k) e_k,                                 (1)

and e_k' = (e_{k+1} - e_k) / log(s_{k+1} / s_k) says how the path bends. Rows of another kind find another way to the
same noise, along which the two have other sizes. DiffPath (Heng et al. 2024) scores by moments of both, over all steps
and columns,

    z(x) = ( (mean |e_k,j|^p)^(1/p), (mean |e'_k,j|^p)^(1/p) : p = 1, 2, 3 ),                                (2)

or by the one number (mean |e'_k,j|^2)^(1/2), and by how unusual these are among those of normal rows
(_feature_density).

Three things differ from the published code (github.com/clear-nus/diffpath). Its odd powers keep their sign, which
means something for pixels, but the signs of a table's columns are arbitrary. It takes no roots of the six numbers,
whose tails are longer then. And it derives with respect to the time of DDPM; here the clock is log s, so that models on
different paths give the same statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count
from anomalib_gen.anomaly._feature_density import check_density, fit_density, keep_rows
from anomalib_gen.anomaly._levels import DATA_LEVELS, denoise_at, deterministic_step, level_ladder

POWERS = (1, 2, 3)


class DiffusionPath(Component):
    """How unusual the statistics of a row's path to noise are (equation 2).

    Parameters
    ----------
    n_steps : int, default=10
        Levels n at which the denoiser is evaluated; at least 2.
    n_statistics : {6, 1}, default=6
        All of equation 2, or the root mean square of e' alone.
    density : {"gaussian-mixture", "mahalanobis", "neighbors"}, default="gaussian-mixture"
        How statistics are compared with those of the normal rows given to `prepare`. The paper takes a mixture for six
        numbers and a kernel density for one.
    n_components : int, default=4
        Components of the mixture, at most; fewer where there are fewer than two rows for each of a component's
        statistics.
    n_neighbors : int, default=5
        Neighbours for "neighbors", whose mean distance counts.
    noise_levels : tuple of float, default=(0.02, 5.0)
        Range of the ladder, in standard deviations of the data; the part of it that the model knows is used. See
        `_levels.DATA_LEVELS` for the reason.

    Attributes
    ----------
    density_ : FeatureDensity
        What `prepare` learned.

    Raises
    ------
    ValueError
        When called, if a parameter has none of the values above.

    References
    ----------
    Heng, A., Thiery, A. H., Soh, H. (2024). Out-of-distribution detection with a single unconditional diffusion model.
    NeurIPS. arXiv:2405.11881.
    """

    in_nats = False

    def __init__(
        self,
        *,
        n_steps: int = 10,
        n_statistics: int = 6,
        density: str = "gaussian-mixture",
        n_components: int = 4,
        n_neighbors: int = 5,
        noise_levels: tuple[float, float] = DATA_LEVELS,
    ) -> None:
        self.n_steps = n_steps
        self.n_statistics = n_statistics
        self.density = density
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.noise_levels = noise_levels

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Learn what statistics are usual from blocks of normal rows, each ``(B, *E)``."""
        check_density(self.density, "density")
        self.density_ = fit_density(
            self.density,
            keep_rows(self.statistics(model, x) for x in blocks),
            generator,
            n_components=self.n_components,
            n_neighbors=self.n_neighbors,
        )

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return self.density_(self.statistics(model, x))

    def statistics(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Statistics of the paths of rows ``(B, *E)``, ``(B, n_statistics)``."""
        check_count(self.n_steps, "n_steps", least=2)
        if self.n_statistics not in (1, 6):
            raise ValueError(f"n_statistics must be 6 or 1, got {self.n_statistics!r}.")
        levels = level_ladder(model, self.noise_levels, self.n_steps)
        # Rising levels: a model with a single one has no path.
        if not levels[-1] > levels[0]:
            raise ValueError(
                f"The model knows a single level in noise_levels={self.noise_levels!r}; a path has two."
            )
        y, last = x, None
        noise, bends = [], []
        for k, level in enumerate(levels):
            clean = denoise_at(model, y, level)
            e = (y - clean) / level
            noise.append(_moments(e))
            if last is not None:
                bends.append(_moments((e - last) / math.log(level / levels[k - 1])))
            if k + 1 < self.n_steps:
                y = deterministic_step(y, clean, level, levels[k + 1])
            last = e
        powers = torch.tensor(POWERS).to(x)
        roots = torch.cat([torch.stack(part).mean(0) ** (1 / powers) for part in (noise, bends)], 1)
        return roots if self.n_statistics == 6 else roots[:, len(POWERS) + POWERS.index(2), None]


def _moments(e: torch.Tensor) -> torch.Tensor:
    """Means of powers of the size of events ``(B, *E)`` over all columns, ``(B, len(POWERS))``."""
    size = e.flatten(1).abs()
    return torch.stack([size.pow(p).mean(1) for p in POWERS], 1)
