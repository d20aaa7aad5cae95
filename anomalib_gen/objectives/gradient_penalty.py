r"""A penalty on the energy's slope, added to any objective,

    L(x) + lambda |grad E(x)|^2 / 2,                                                    (1)

at the rows (the R1 penalty of Mescheder et al. 2018, arXiv:1801.04406, equation 9). Contrastive objectives only compare
energies: nothing but this, or layers of bounded norm, keeps their energies from growing steep. Score matching contains
the slope already.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen._recording import is_recordable
from anomalib_gen.objectives._checks import require


class GradientPenalty(Component):
    """Another objective with a penalty on the slope of the energy (equation 1).

    Parameters
    ----------
    objective : Component
        What is penalised; it still judges the held-out rows, alone.
    weight : float, default=0.01
        lambda.

    References
    ----------
    Mescheder, L., Geiger, A., Nowozin, S. (2018). Which training methods for GANs do actually converge? ICML.
    arXiv:1801.04406.
    """

    def __init__(self, objective: Any, *, weight: float = 0.01) -> None:
        self.objective = objective
        self.weight = weight

    @property
    def recordable(self) -> bool:
        """Whether steps are alike: the penalty is, so those of the penalised objective decide."""
        return is_recordable(self.objective)

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        require(self, not_negative=["weight"])
        if not callable(self.objective):
            raise TypeError(
                f"objective must be a component of anomalib_gen.objectives, got {self.objective!r}."
            )
        penalty = 0.5 * model.score(x).square().flatten(1).sum(1)
        loss: torch.Tensor = self.objective(model, x, generator) + self.weight * penalty
        return loss

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``: that of the penalised objective."""
        judge = getattr(self.objective, "validate", self.objective)
        loss: torch.Tensor = judge(model, x, generator)
        return loss

    def __getattr__(self, name: str) -> Any:
        # What an objective may have beside these (prepare, set_progress, diverged, ...) is the penalised one's.
        if name.startswith("__") or "objective" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.objective, name)
