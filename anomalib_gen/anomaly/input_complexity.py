r"""Input complexity: a likelihood, less what the image costs a general-purpose codec,

    a(x) = -log p(x) - w L(x),     L(x) = 8 log(2) * bytes of x under a lossless codec.                      (1)

With w = 1, and L(x) as -log p_0(x) of a universal model p_0, this is -log [p(x) / p_0(x)], a likelihood ratio (Serra
et al. 2020, equation 2). Likelihoods of images follow their complexity above all: flat ones have a higher density than
any that a model has learned from, whatever they show (Nalisnick et al. 2019, arXiv:1810.09136). The codec finds them
simple, too, and (1) keeps what the model knows beyond that.

A code of a few hundred bytes says little about one digit among others, and then L is noise. The weight that makes (1)
vary least over normal images is the slope of a line through them,

    w = Cov(-log p, L) / Var(L),                                                                            (2)

near 1 where both see the same complexity, and near 0 where the code length tells nothing about the likelihood. It is
the cautious choice: images far simpler than normal ones are put right by less than with w = 1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.anomaly._density import density_anomaly

CODECS: Mapping[str, Mapping[str, Any]] = {
    "png": {"format": "PNG", "optimize": True, "compress_level": 9},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 4},
}
"""Pillow's arguments for the smallest lossless files."""
GREY_LEVELS = 256
WEIGHT_IMAGES = 512
"""Normal images from which a weight is learned."""


def _cell(model: Any) -> float:
    """Distance between the levels of discrete images, in the units of the model's input; 0 where there are none."""
    cell = float(getattr(model, "cell", 0.0))
    observation: Any = getattr(model, "observation", None)
    if cell == 0 and hasattr(observation, "cell"):
        # One that gives the mass of a cell by itself: its images are not spread over theirs.
        cell = float((observation.cell * observation.spread).max())
    return cell


class InputComplexity(Component):
    """Minus the log-density of an image less its code length, in nats (equation 1).

    It helps where anomalies are simpler, or more complex, than normal images as a whole: pictures from another source,
    flat or blurred ones. It fails where they are alike in complexity and differ in what they show, such as one
    digit among others: there code lengths are noise that is added to the likelihood.

    Parameters
    ----------
    codec : {"png", "webp"}, default="png"
        PNG, or WebP's lossless form, whose files are smaller; of Pillow.
    weight : float or "learned", default=1.0
        w of equation 1: how much of the code length is taken off. 1 is the published form, a likelihood ratio;
        "learned" takes equation 2, over at most 512 normal images; it is below 0 where normal images with longer codes
        are the likelier ones.
    likelihood : component or None, default=None
        The anomaly that estimates -log p(x) in nats. None takes what suits the model: the exact likelihood of a flow,
        the variational bounds of autoencoders and diffusion models, the energy of an energy model (whose constant
        shifts all scores alike).

    Attributes
    ----------
    weight_ : float
        The weight in use.
    low_, width_ : float
        Value of the darkest grey level and distance between levels, in the units of the model's input: 256 levels
        between the least and the largest value of normal images, to which other values are clamped.
    eight_bit_ : bool
        Whether images have 8 bits, or lie on a grid of at most 256 levels that the model knows. Then levels are their
        own, and those darker than in any normal image count modulo 256, as the differences between pixels do that a
        codec looks at.

    Raises
    ------
    ValueError
        When called, if the codec or the weight is unknown, or the rows are no images.
    ModuleNotFoundError
        Without Pillow.

    References
    ----------
    Serra, J., Alvarez, D., Gomez, V., Slizovskaia, O., Nunez, J. F., Luque, J. (2020). Input complexity and
    out-of-distribution detection with likelihood-based generative models. ICLR. arXiv:1909.11480.
    """

    in_nats = True

    def __init__(self, *, codec: str = "png", weight: float | str = 1.0, likelihood: Any = None) -> None:
        self.codec = codec
        self.weight = weight
        self.likelihood = likelihood

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Learn the grey levels, and a weight that is to be learned, from blocks of normal images ``(B, C, H, W)``."""
        if self.weight != "learned" and not (isinstance(self.weight, Real) and self.weight >= 0):
            raise ValueError(f"weight must be a number of at least 0 or 'learned', got {self.weight!r}.")
        low, high = math.inf, -math.inf
        kept: list[torch.Tensor] = []
        for x in blocks:
            low, high = min(low, float(x.min())), max(high, float(x.max()))
            missing = WEIGHT_IMAGES - sum(map(len, kept))
            if self.weight == "learned" and missing > 0:
                kept.append(x[:missing])
        cell = _cell(model)
        self.low_ = low
        self.eight_bit_ = cell > 0 and high - low < GREY_LEVELS * cell
        self.width_ = cell if self.eight_bit_ else max(high - low, 1e-12) / (GREY_LEVELS - 1)
        self.weight_ = self._slope(model, kept, generator) if kept else float(self.weight)

    def _slope(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> float:
        """Equation 2; 0 where all code lengths are one."""
        likelihood = density_anomaly(model) if self.likelihood is None else self.likelihood
        state = generator.get_state()
        values, lengths = [], []
        for x in blocks:
            generator.set_state(state)  # what is drawn is the same for all images, as in scoring
            values.append(likelihood(model, x, generator).double().cpu())
            lengths.append(self.code_lengths(x))
        a, length = torch.cat(values), torch.cat(lengths)
        spread = length - length.mean()
        return float((spread * a).sum() / spread.square().sum().clamp(min=1e-12))

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each image of ``(B, C, H, W)``, as ``(B,)``."""
        likelihood = density_anomaly(model) if self.likelihood is None else self.likelihood
        values: torch.Tensor = likelihood(model, x, generator)
        return values - self.weight_ * self.code_lengths(x).to(values)

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
                "Input complexity needs Pillow: pip install 'anomalib-gen[images]'."
            ) from error

        channels, height, width = levels.shape
        if channels == 3:
            mode, size, values = "RGB", (width, height), levels.permute(1, 2, 0)
        else:
            mode, size, values = "L", (width, channels * height), levels
        file = io.BytesIO()
        Image.frombytes(mode, size, bytes(values.flatten().tolist())).save(file, **CODECS[self.codec])
        return file.tell()
