r"""Closed form: a row is as anomalous as it is far from what its neighbours make of it,

    a(x) = 1/6 sum_k u_k(r_k(x)),                                                                    (1)

where r_k are the residuals of the kernel and of the local-linear denoiser, each in three coordinates (models.memory),
and u_k is the surprise at r_k among the residuals that stored rows have when they are left out (models.tail). Nothing
is trained. Of images the coordinates are pixels, gradients, and gradients without contrast, and half of the
weight has how well the stored ones that are most like them match, when their parts may move (models.matching): itself,
and relative to how far apart stored images are there.

The residual of a denoiser is less than the distance to the nearest row by what the rows around explain: structure that
normal rows have in common does not count. That is what makes (1) better than nearest neighbours, and averages over
coordinates and over the two denoisers make it better than its parts: where one of them is blind, others see.
"""

from __future__ import annotations

from typing import Any

import torch

from anomalib_gen._component import Component


class ClosedFormResidual(Component):
    """Surprise at the residuals of closed-form denoisers (equation 1), for models with stored rows.

    In nats of a tail probability: each residual is at 1 or more for one normal row in three, and at 2.3 for one in ten.
    Their mean reaches large values less often, as most of them have to. A row that is stored, as the rows that a
    detector was fitted to are, finds itself among its neighbours and looks too normal.

    It helps where anomalies differ from the stored rows in what they show, as a digit or a thing of another kind among
    images does: there it has told most so far, and on tables no anomaly here is ahead of it. It fails where an anomaly
    is made of what normal images are made of, as a one is of strokes that other digits have; and where an image shows
    what normal ones show, but darker or softer: that looks no odder to it (AUROC .29 to .54; `ScoreNorm` with
    ``summary="mahalanobis"`` sees it). It is less sure than a code length (`InputComplexity`) where anomalies are of
    another kind altogether, and simpler, as digits among photographs.
    """

    in_nats = False
    in_float64 = True
    """Rows are compared in float64, where the device has it, whatever they are given in."""

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        anomaly: torch.Tensor = model.memory.anomaly(x.flatten(1))
        return anomaly.to(x.dtype)
