r"""Maximum likelihood with Gaussian noise on the inputs.

Plain maximum likelihood on a finite sample drives a flow towards spikes on the rows. Adding noise,

    L(x) = -log p(x + s e | s),   e ~ N(0, I),                                       (1)

fits the data's density smoothed by a Gaussian kernel of width s instead. With one fixed s that is the noise
regularisation of Rothfuss et al. (2019, arXiv:1907.08982, section 4). Drawing s per row and telling the model
about it (Kim et al. 2020, "SoftFlow", arXiv:2006.04604, equation 5) keeps a small s for scoring while the large
ones teach the shape. The levels are log-uniform, because what matters is their ratio to the data's scales.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like
from anomalib_gen.objectives._checks import require
from anomalib_gen.objectives._scores import draw_levels
from anomalib_gen.objectives._smoothing import dequantise


class MaximumLikelihood(Component):
    """Minus the log-density of noised rows (equation 1).

    A model with a `grain` first gets noise of that width on each column (dequantisation), and one of discrete rows, of
    `cell` > 0, uniform noise over the cells and no other. A model that is
    conditional on noise levels gets a level of its own for each row, log-uniform over the range
    the model was built for; any other model gets rows with `noise`.

    Parameters
    ----------
    noise : float, default=0.0
        Standard deviation of the noise for a model that is not conditional on it, in the units of the model's
        input (one standard deviation of the training data).

    References
    ----------
    Kim, H., Lee, H., Kang, W. H., Lee, J. Y., Kim, N. S. (2020). SoftFlow: Probabilistic framework for
    normalizing flow on manifolds. NeurIPS. arXiv:2006.04604.
    """

    recordable = True

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = noise

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, D)``, as ``(B,)``."""
        require(self, not_negative=["noise"])
        if getattr(model, "cell", 0.0):
            x = dequantise(model, x, generator)
        elif getattr(model, "grain", None) is not None:
            x = x + model.grain * normal_like(x, generator)
        noise = draw_levels(model, x, generator)
        if noise is not None:
            return -model.log_prob(x + expand_as_rows(noise, x) * normal_like(x, generator), noise)
        # (Uniform noise over cells is all that discrete rows need.)
        if self.noise == 0 or getattr(model, "cell", 0.0) > 0:
            return -model.log_prob(x)
        return -model.log_prob(x + self.noise * normal_like(x, generator))

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged: minus the log-density of the rows as they are, ``(B,)``."""
        return -model.log_prob(dequantise(model, x, generator))
