"""Objectives: the training loss of each row, ``objective(model, x, generator) -> (B,)``, not reduced."""

from collections.abc import Mapping

from anomalib_gen._component import Component
from anomalib_gen.objectives.denoising_score_matching import DenoisingScoreMatching
from anomalib_gen.objectives.gradient_penalty import GradientPenalty
from anomalib_gen.objectives.likelihood import MaximumLikelihood
from anomalib_gen.objectives.score_matching import ScoreMatching
from anomalib_gen.objectives.sliced_score_matching import SlicedScoreMatching

OBJECTIVES: Mapping[str, type[Component]] = {
    "denoising-score-matching": DenoisingScoreMatching,
    "likelihood": MaximumLikelihood,
    "score-matching": ScoreMatching,
    "sliced-score-matching": SlicedScoreMatching,
}

__all__ = [
    "OBJECTIVES",
    "DenoisingScoreMatching",
    "GradientPenalty",
    "MaximumLikelihood",
    "ScoreMatching",
    "SlicedScoreMatching",
]
