r"""Combined: what stored rows say of a row and what a network says, on one scale.

    a(x) = (1 - w) a_c(x) + w u(a_n(x)),     w = N / (2 (N + 1000)),                                 (1)

with a_c the residuals of the closed form (anomaly.closed_form) on N stored rows, a_n another anomaly of the model, by
default the noise that it finds in the row (anomaly.score_norm, equation 3), and u the surprise at it among normal rows
(models.tail). Both sides are means of surprises, so neither drowns the other.

A network learns from many rows what lies between them, and from few next to nothing: its share w is 1/22 for a hundred
rows, 1/4 for a thousand, and goes to 1/2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anomalib_gen._component import Component, resolve_component
from anomalib_gen.anomaly._feature_density import keep_rows
from anomalib_gen.anomaly.closed_form import ClosedFormResidual
from anomalib_gen.anomaly.score_norm import ScoreNorm
from anomalib_gen.models.tail import tail_surprise

EVEN_ROWS = 1000
"""Stored rows at which a network gets half of its largest share."""
BLOCK_ROWS = 1024


class CombinedAnomaly(Component):
    """Mean of the surprise at the closed form's residuals and at another anomaly (equation 1).

    Parameters
    ----------
    learned : Component, optional
        a_n. None takes ``ScoreNorm(weighting="noise")``.

    Attributes
    ----------
    learned_ : Component
        a_n, with what it learned.
    reference_ : Tensor of shape (n,)
        Its sorted values of normal rows, those that a detector held out.
    """

    in_nats = False

    def __init__(self, *, learned: Any = None) -> None:
        self.learned = learned

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Learn what values of the other anomaly are usual from blocks of normal rows, each ``(B, *E)``."""
        rows = keep_rows(blocks)
        self.learned_ = resolve_component(
            self.learned, known={}, argument="learned", default=lambda: ScoreNorm(weighting="noise")
        )
        state = generator.get_state()
        if hasattr(self.learned_, "prepare"):
            self.learned_.prepare(model, rows.split(BLOCK_ROWS), generator)
        values = []
        for block in rows.split(BLOCK_ROWS):
            # The noise that rows will be scored with, where the anomaly draws any.
            generator.set_state(state)
            values.append(self.learned_(model, block, generator))
        self.reference_ = torch.cat(values).sort().values.cpu()

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        n = len(model.memory)
        share = 0.5 * n / (n + EVEN_ROWS)
        learned = tail_surprise(self.learned_(model, x, generator), self.reference_)
        return (1 - share) * ClosedFormResidual()(model, x, generator) + share * learned
