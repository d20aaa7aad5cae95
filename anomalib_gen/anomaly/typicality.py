r"""Typicality: a row is anomalous if its log-density is unlike that of the data, on either side.

In many dimensions almost all of a distribution's mass lies where -log p is close to the entropy H, not where the
density is highest: the mode of a Gaussian in 1,000 dimensions is a place where no sample ever falls. So

    a(x) = | -log p(x) - H |,   H estimated by the mean of -log p over normal rows,          (1)

which is the single-row case of Nalisnick et al. (2019), "Detecting out-of-distribution inputs to deep generative
models using typicality", arXiv:1906.02994, equation 3. The test for a batch is
`anomalib_gen.calibration.typicality_test`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anomalib_gen._component import Component
from anomalib_gen.anomaly._density import density_anomaly
from anomalib_gen.anomaly.ode_likelihood import ODELikelihood


class Typicality(Component):
    """Distance of a row's log-density from the model's entropy, in nats (equation 1).

    Of a model that has a bound on the log-density and not itself (an autoencoder), both are taken of the bound.

    It helps where anomalies get *higher* densities than normal rows do (simple images, rows at a mode). It fails
    where densities of both are alike, as of most digits held out among others. On tables, where anomalies lie in empty
    regions, it is weaker than the likelihood, because half of what it measures is how ordinary a row is.

    Attributes
    ----------
    entropy_ : float
        Mean of -log p over the normal rows given to `prepare`, in the units of the model's input.

    References
    ----------
    Nalisnick, E., Matsukawa, A., Teh, Y. W., Lakshminarayanan, B. (2019). Detecting out-of-distribution inputs to
    deep generative models using typicality. arXiv:1906.02994.
    """

    in_nats = False

    def prepare(self, model: Any, blocks: Iterable[torch.Tensor], generator: torch.Generator) -> None:
        """Estimate the entropy from blocks of normal rows, each ``(B, *E)``."""
        state = generator.get_state()
        total, count = 0.0, 0
        for x in blocks:
            generator.set_state(state)  # what is drawn is the same for all rows, as in scoring
            total += float(self._nats(model, x, generator).double().sum())
            count += len(x)
        self.entropy_ = total / count

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Anomaly of each row of ``(B, *E)``, as ``(B,)``."""
        return (self._nats(model, x, generator) - self.entropy_).abs()

    @staticmethod
    def _nats(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """-log p of each row, ``(B,)``, or its bound."""
        if hasattr(model, "denoise"):
            # (With probes, where rows are wide.)
            return ODELikelihood()(model, x, generator)
        if hasattr(model, "log_prob"):
            return -model.log_prob(x)
        values: torch.Tensor = density_anomaly(model)(model, x, generator)
        return values
