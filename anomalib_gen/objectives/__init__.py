"""Objectives: the training loss of each row, ``objective(model, x, generator) -> (B,)``, not reduced."""

from collections.abc import Mapping

from anomalib_gen._component import Component
from anomalib_gen.objectives.elbo import EvidenceLowerBound
from anomalib_gen.objectives.likelihood import MaximumLikelihood

OBJECTIVES: Mapping[str, type[Component]] = {"elbo": EvidenceLowerBound, "likelihood": MaximumLikelihood}

__all__ = ["OBJECTIVES", "EvidenceLowerBound", "MaximumLikelihood"]
