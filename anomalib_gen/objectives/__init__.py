"""Objectives: the training loss of each row, ``objective(model, x, generator) -> (B,)``, not reduced."""

from collections.abc import Mapping

from anomalib_gen._component import Component
from anomalib_gen.objectives.contrastive_divergence import ContrastiveDivergence
from anomalib_gen.objectives.denoising import Denoising
from anomalib_gen.objectives.denoising_score_matching import DenoisingScoreMatching
from anomalib_gen.objectives.diffusion_time import DiffusionTimeEstimation
from anomalib_gen.objectives.elbo import EvidenceLowerBound
from anomalib_gen.objectives.flow_matching import FlowMatching
from anomalib_gen.objectives.gradient_penalty import GradientPenalty
from anomalib_gen.objectives.improved_ddpm import ImprovedDDPM
from anomalib_gen.objectives.likelihood import MaximumLikelihood
from anomalib_gen.objectives.noise_contrastive import NoiseContrastive
from anomalib_gen.objectives.persistent_contrastive_divergence import PersistentContrastiveDivergence
from anomalib_gen.objectives.score_matching import ScoreMatching
from anomalib_gen.objectives.sliced_score_matching import SlicedScoreMatching
from anomalib_gen.objectives.telescoping import Telescoping

OBJECTIVES: Mapping[str, type[Component]] = {
    "contrastive-divergence": ContrastiveDivergence,
    "denoising": Denoising,
    "denoising-score-matching": DenoisingScoreMatching,
    "diffusion-time": DiffusionTimeEstimation,
    "elbo": EvidenceLowerBound,
    "flow-matching": FlowMatching,
    "improved-ddpm": ImprovedDDPM,
    "likelihood": MaximumLikelihood,
    "noise-contrastive": NoiseContrastive,
    "persistent-contrastive-divergence": PersistentContrastiveDivergence,
    "score-matching": ScoreMatching,
    "sliced-score-matching": SlicedScoreMatching,
    "telescoping": Telescoping,
}

__all__ = [
    "OBJECTIVES",
    "ContrastiveDivergence",
    "Denoising",
    "DenoisingScoreMatching",
    "DiffusionTimeEstimation",
    "EvidenceLowerBound",
    "FlowMatching",
    "GradientPenalty",
    "ImprovedDDPM",
    "MaximumLikelihood",
    "NoiseContrastive",
    "PersistentContrastiveDivergence",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Telescoping",
]
