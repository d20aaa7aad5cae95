r"""Diffusion time: a row is as anomalous as the noise level at which it looks like a noised normal row.

For one clean row at a distance r in D columns the squared level has an inverse-gamma distribution, most likely at
s = r / sqrt(D) (models.diffusion_time). With many clean rows it is a mixture of these, in which near rows have by far
the most weight. So the level is estimated

- without a model, from the k nearest of normal rows x_i ("non-parametric" in Livernoche et al. 2024),

    a(x) = sqrt(1 / (k D) sum_{i <= k} |x - x_(i)|^2),                                                       (1)

- or by a model that was trained to tell the level of noised rows ("learned"): by bins, or by an inverse-gamma
  distribution, whichever the model is.

(1) is the published estimate without its rounding to 300 steps, and ranks rows as the mean squared distance to the
nearest neighbours does. It is no better than the rows that it is given, see `DiffusionTime`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count
from anomalib_gen.anomaly._feature_density import keep_rows, nearest_square_distances

ESTIMATORS = ("learned", "non-parametric")


class DiffusionTime(Component):
    """Estimated noise level of a row, in standard deviations of the data.

    Parameters
    ----------
    estimator : {"non-parametric", "learned"}, default="non-parametric"
        "non-parametric" is equation 1. Its neighbours are the rows that the model stores, if it stores any
        (`models.Memory`). Else it keeps 16,384 rows at most of those given to `prepare`; a detector gives its held-out
        rows, often a tenth of the data, and distances to them are larger and rougher than to the training rows.
        "learned" asks the model, a `models.TimeClassifier` or `models.InverseGammaTime`.
    n_neighbors : int, default=5
        k of equation 1.

    Attributes
    ----------
    rows_ : Tensor of shape (n, *E)
        The rows to be neighbours, for "non-parametric" and a model that stores none.

    Raises
    ------
    ValueError
        When called, if `estimator` is unknown.

    References
    ----------
    Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection. ICLR.
    arXiv:2305.18593.
    """

    in_nats = False

    def __init__(self, *, estimator: str = "non-parametric", n_neighbors: int = 5) -> None:
        self.estimator = estimator
        self.n_neighbors = n_neighbors

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Keep normal rows from blocks, each ``(B, *E)``."""
        if self.estimator == "non-parametric" and not hasattr(model, "memory"):
            self.rows_ = keep_rows(blocks).cpu()  # so that a pickle opens on any machine

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        if self.estimator not in ESTIMATORS:
            known = ", ".join(map(repr, ESTIMATORS))
            raise ValueError(f"estimator={self.estimator!r} is unknown. Known estimators: {known}.")
        check_count(self.n_neighbors, "n_neighbors")
        if self.estimator == "learned":
            level: torch.Tensor = model.estimate_level(x)
            return level
        flat, memory = x.flatten(1), getattr(model, "memory", None)
        if memory is not None:
            squares = memory.nearest(flat, self.n_neighbors).square().to(x)
        else:
            squares = nearest_square_distances(flat, self.rows_.to(x).flatten(1), self.n_neighbors)
        return squares.mean(1).sqrt() / math.sqrt(x[0].numel())
