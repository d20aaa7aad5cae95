r"""Multi-scale reconstruction: an image is anomalous if its reconstruction differs from it, at any scale.

With r = x - xhat the residual and A_k r its average over squares of 2^k x 2^k pixels,

    a(x) = 1/K sum_{k=0}^{K-1} 4^k mean_j (A_k r)_j^2.                                                       (1)

Residuals of single pixels that have nothing to do with one another count alike at all scales: averaging divides their
variance by 4^k. Those that hang together (a stroke too many, a part that is missing) survive averaging and count 4^k
times, so that (1) is led by structure rather than by texture, as the distances of Laplacian pyramids are (Ling and
Okada 2006, doi:10.1109/CVPR.2006.99) that stand in for learned perceptual ones here.

xhat is what the model makes of x: of an autoencoder the decoded mean, of a diffusion model the end of a deterministic
way from each of a ladder of noise levels, over which the mean of (1) is taken, in units of the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count
from anomalib_gen.anomaly._levels import level_ladder, way_back

IMAGE_LEVELS = (0.2, 2.0)
"""Noise levels from which images are reconstructed: at less, nothing but texture is made anew; at more, all of it."""


class MultiScaleReconstruction(Component):
    """Squared distance of an image from its reconstruction over a pyramid of scales (equation 1).

    It helps where an anomaly is a part of the image, of a few pixels or many. It fails where the model reconstructs
    anomalies as well as normal images, as autoencoders with many latent dimensions do, and on anomalies of texture,
    which it weighs less than `DiffusionReconstruction` and `ReconstructionError` do.

    Parameters
    ----------
    n_scales : int, default=4
        Scales K; no more than the image can be halved. Where a side is odd, the last row or column is left out of the
        coarser scales.
    n_levels : int, default=3
        Noise levels of a diffusion model to start from. This and the next two are not used with an autoencoder.
    n_steps : int, default=3
        Denoiser evaluations of each way back.
    noise_levels : tuple of float, default=(0.2, 2.0)
        Range of the levels, in standard deviations of the data; the part of it that the model knows is used.

    Raises
    ------
    ValueError
        When called, if the rows are no images.

    References
    ----------
    Ling, H., Okada, K. (2006). Diffusion distance for histogram comparison. CVPR. doi:10.1109/CVPR.2006.99.

    Wyatt, J., Leach, A., Schmon, S. M., Willcocks, C. G. (2022). AnoDDPM: Anomaly detection with denoising diffusion
    probabilistic models using simplex noise. CVPR Workshops.
    """

    in_nats = False

    def __init__(
        self,
        *,
        n_scales: int = 4,
        n_levels: int = 3,
        n_steps: int = 3,
        noise_levels: tuple[float, float] = IMAGE_LEVELS,
    ) -> None:
        self.n_scales = n_scales
        self.n_levels = n_levels
        self.n_steps = n_steps
        self.noise_levels = noise_levels

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each image of ``(B, C, H, W)``, as ``(B,)``."""
        if x.ndim != 4:
            raise ValueError(
                f"A multi-scale distance is one of images; rows of shape {tuple(x.shape[1:])} are none. "
                "Choose another reconstruction."
            )
        check_count(self.n_scales, "n_scales")
        distances = [pyramid_distance(r, self.n_scales) for r in self.residuals(model, x)]
        return torch.stack(distances).mean(0)

    def residuals(self, model: Any, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """What reconstruction changes in images ``(B, C, H, W)``, from each level in units of it."""
        if not (hasattr(model, "denoise") or hasattr(model, "reconstruct")):
            raise AttributeError(
                "it has no reconstruction of images, as autoencoders (reconstruct) and diffusion models (denoise) have"
            )
        if not hasattr(model, "denoise"):
            coordinates = model.observation.coordinates
            yield coordinates(x) - coordinates(model.reconstruct(x))
            return
        check_count(self.n_steps, "n_steps")
        levels = level_ladder(model, self.noise_levels, self.n_levels)
        for level in levels:
            yield (x - way_back(model, x, level, min(levels[0], 0.1 * level), self.n_steps)) / level


def pyramid_distance(residual: torch.Tensor, n_scales: int) -> torch.Tensor:
    """Equation 1 of residuals ``(B, C, H, W)``, ``(B,)``."""
    parts = []
    for k in range(n_scales):
        if k:
            if min(residual.shape[2:]) < 2:
                break
            residual = F.avg_pool2d(residual, 2)
        parts.append(4**k * residual.square().flatten(1).mean(1))
    return torch.stack(parts).mean(0)
