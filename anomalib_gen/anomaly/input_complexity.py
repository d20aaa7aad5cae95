r"""Input complexity: a likelihood, less what the image costs a general-purpose codec,

    a(x) = -log p(x) - L(x),     L(x) = 8 log(2) * bytes of x under a lossless codec.                        (1)

With L(x) as -log p_0(x) of a universal model p_0 this is -log [p(x) / p_0(x)], a likelihood ratio (Serra et al. 2020,
equation 2). Likelihoods of images follow their complexity above all: flat ones have a higher density than any that a
model has learned from, whatever they show (Nalisnick et al. 2019, arXiv:1810.09136). The codec finds them simple, too,
and (1) keeps what the model knows beyond that.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.anomaly.diffusion_elbo import DiffusionELBO
from anomalib_gen.anomaly.elbo import NegativeELBO
from anomalib_gen.anomaly.energy import Energy

CODECS: Mapping[str, Mapping[str, Any]] = {
    "png": {"format": "PNG", "optimize": True, "compress_level": 9},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 4},
}
"""Pillow's arguments for the smallest lossless files."""
GREY_LEVELS = 256


class InputComplexity(Component):
    """Minus the log-density of an image less its code length, in nats (equation 1).

    It helps where anomalies are simpler, or more complex, than normal images as a whole: pictures from another source,
    flat or blurred ones. It does not where they are alike in complexity and differ in what they show, such as one
    digit among others: there code lengths are noise that is added to the likelihood.

    Parameters
    ----------
    codec : {"png", "webp"}, default="png"
        PNG, or WebP's lossless form, whose files are smaller; of Pillow.
    likelihood : component or None, default=None
        The anomaly that estimates -log p(x) in nats. None takes what suits the model: the exact likelihood of a flow,
        the variational bounds of autoencoders and diffusion models, the energy of an energy model (whose constant
        shifts all scores alike).

    Attributes
    ----------
    low_, width_ : float
        Value of the darkest grey level and distance between levels, in the units of the model's input: 256 levels
        between the least and the largest value of normal images, to which other values are clamped.
    eight_bit_ : bool
        Whether images have 8 bits. Then levels are their own, and those darker than in any normal image count modulo
        256, as the differences between pixels do that a codec looks at.

    Raises
    ------
    ValueError
        When called, if the codec is unknown, or the rows are no images.
    ModuleNotFoundError
        Without Pillow.

    References
    ----------
    Serra, J., Alvarez, D., Gomez, V., Slizovskaia, O., Nunez, J. F., Luque, J. (2020). Input complexity and
    out-of-distribution detection with likelihood-based generative models. ICLR. arXiv:1909.11480.
    """

    in_nats = True

    def __init__(self, *, codec: str = "png", likelihood: Any = None) -> None:
        self.codec = codec
        self.likelihood = likelihood

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Learn what the grey levels are from blocks of normal images, each ``(B, C, H, W)``."""
        low, high = math.inf, -math.inf
        for x in blocks:
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        cell = float(getattr(model, "cell", 0.0))
        self.low_ = low
        self.eight_bit_ = cell > 0
        self.width_ = cell if cell > 0 else max(high - low, 1e-12) / (GREY_LEVELS - 1)

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each image of ``(B, C, H, W)``, as ``(B,)``."""
        likelihood = density_anomaly(model) if self.likelihood is None else self.likelihood
        values: torch.Tensor = likelihood(model, x, generator)
        return values - self.code_lengths(x).to(values)

    def code_lengths(self, x: torch.Tensor) -> torch.Tensor:
        """Nats that the codec takes for each image of ``(B, C, H, W)``, ``(B,)``."""
        if self.codec not in CODECS:
            known = ", ".join(map(repr, sorted(CODECS)))
            raise ValueError(f"codec={self.codec!r} is unknown. Known codecs: {known}.")
        if x.ndim != 4:
            raise ValueError(
                "Input complexity is the code length of images; rows of shape "
                f"{tuple(x.shape[1:])} are none. Choose another anomaly."
            )
        levels = ((x - self.low_) / self.width_).round()
        levels = levels.remainder(GREY_LEVELS) if self.eight_bit_ else levels.clamp(0, GREY_LEVELS - 1)
        levels = levels.to(torch.uint8).cpu()
        bits = [8.0 * self._count_bytes(image) for image in levels]
        return math.log(2) * torch.tensor(bits, dtype=torch.float64)

    def _count_bytes(self, levels: torch.Tensor) -> int:
        """Size of the file of an image ``(C, H, W)``; channels that are no colours lie below one another."""
        try:
            from PIL import Image
        except ImportError as error:  # pragma: no cover
            raise ModuleNotFoundError(
                "Input complexity needs Pillow: pip install 'anomalib_gen[images]'."
            ) from error

        channels, height, width = levels.shape
        if channels == 3:
            mode, size, values = "RGB", (width, height), levels.permute(1, 2, 0)
        else:
            mode, size, values = "L", (width, channels * height), levels
        file = io.BytesIO()
        Image.frombytes(mode, size, bytes(values.flatten().tolist())).save(file, **CODECS[self.codec])
        return file.tell()


def density_anomaly(model: Any) -> Any:
    """The component that estimates minus the log-density of a model in the cheapest sound way."""
    if hasattr(model, "elbo_terms"):
        return DiffusionELBO(n_steps=32)
    if hasattr(model, "draw_balanced_noise"):
        return NegativeELBO()
    return Energy()
