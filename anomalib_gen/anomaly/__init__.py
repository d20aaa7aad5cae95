"""Anomalies: the number per row, ``anomaly(model, x, generator) -> (B,)``, higher = more anomalous."""

from collections.abc import Mapping

from anomalib_gen._component import Component
from anomalib_gen.anomaly.closed_form import ClosedFormResidual
from anomalib_gen.anomaly.combined import CombinedAnomaly
from anomalib_gen.anomaly.denoising_error import DenoisingError
from anomalib_gen.anomaly.diffusion_elbo import DiffusionELBO
from anomalib_gen.anomaly.diffusion_time import DiffusionTime
from anomalib_gen.anomaly.elbo import NegativeELBO
from anomalib_gen.anomaly.energy import Energy
from anomalib_gen.anomaly.input_complexity import InputComplexity
from anomalib_gen.anomaly.iwae import ImportanceWeighted
from anomalib_gen.anomaly.kl import KLDivergence
from anomalib_gen.anomaly.likelihood import Likelihood
from anomalib_gen.anomaly.likelihood_regret import LikelihoodRegret
from anomalib_gen.anomaly.multiscale_reconstruction import MultiScaleReconstruction
from anomalib_gen.anomaly.ode_likelihood import ODELikelihood
from anomalib_gen.anomaly.path import DiffusionPath
from anomalib_gen.anomaly.reconstruction import DiffusionReconstruction
from anomalib_gen.anomaly.reconstruction_error import ReconstructionError
from anomalib_gen.anomaly.reconstruction_probability import ReconstructionProbability
from anomalib_gen.anomaly.score_norm import ScoreNorm
from anomalib_gen.anomaly.typicality import Typicality

ANOMALIES: Mapping[str, type[Component]] = {
    "closed_form": ClosedFormResidual,
    "combined": CombinedAnomaly,
    "denoising_error": DenoisingError,
    "diffusion_time": DiffusionTime,
    "elbo": NegativeELBO,
    "energy": Energy,
    "iwae": ImportanceWeighted,
    "kl": KLDivergence,
    "likelihood": Likelihood,
    "likelihood_regret": LikelihoodRegret,
    "path": DiffusionPath,
    "reconstruction": DiffusionReconstruction,
    "reconstruction_error": ReconstructionError,
    "reconstruction_probability": ReconstructionProbability,
    "score_norm": ScoreNorm,
    "typicality": Typicality,
}

IMAGE_ANOMALIES: Mapping[str, type[Component]] = {
    "input_complexity": InputComplexity,
    "multiscale_reconstruction": MultiScaleReconstruction,
}
"""Those that detectors of images know by name, beside the others."""

__all__ = [
    "ANOMALIES",
    "IMAGE_ANOMALIES",
    "ClosedFormResidual",
    "CombinedAnomaly",
    "DenoisingError",
    "DiffusionELBO",
    "DiffusionPath",
    "DiffusionReconstruction",
    "DiffusionTime",
    "Energy",
    "ImportanceWeighted",
    "InputComplexity",
    "KLDivergence",
    "Likelihood",
    "LikelihoodRegret",
    "MultiScaleReconstruction",
    "NegativeELBO",
    "ODELikelihood",
    "ReconstructionError",
    "ReconstructionProbability",
    "ScoreNorm",
    "Typicality",
]
