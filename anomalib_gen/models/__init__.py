"""Models: what a network means. Each gives a `torch.nn.Module` its density, score or energy."""

from anomalib_gen.models.closed_form import (
    BinaryRBM,
    GaussianBernoulliRBM,
    GaussianEnergy,
    GaussianMixtureEnergy,
    QuadraticEnergy,
)
from anomalib_gen.models.denoiser import Denoiser, NetworkDenoiser, ScoreDenoiser
from anomalib_gen.models.diffusion_time import InverseGammaTime, TimeClassifier
from anomalib_gen.models.empirical import KernelDenoiser, LocalLinearDenoiser
from anomalib_gen.models.energy import EnergyModel, TailedNormal
from anomalib_gen.models.flow import FLOW_TRANSFORMS, FlowModel, FlowTransform, make_flow_transform
from anomalib_gen.models.hybrid import ClosedFormDenoiser, HybridDenoiser
from anomalib_gen.models.likelihood import (
    ELBOTerms,
    ODELogProb,
    balanced_elbo_terms,
    elbo_terms,
    ode_log_prob,
)
from anomalib_gen.models.memory import ImageMemory, Memory
from anomalib_gen.models.neighbors import Neighbors, nearest_rows, neighbor_scale
from anomalib_gen.models.noise import NOISES, GaussianNoise, MarginalNoise, NoiseBase, fit_noise
from anomalib_gen.models.observation import OBSERVATIONS, Observation
from anomalib_gen.models.vae import NetworkFactory, Posterior, VAEModel

__all__ = [
    "FLOW_TRANSFORMS",
    "NOISES",
    "OBSERVATIONS",
    "BinaryRBM",
    "ClosedFormDenoiser",
    "Denoiser",
    "ELBOTerms",
    "EnergyModel",
    "FlowModel",
    "FlowTransform",
    "GaussianBernoulliRBM",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "GaussianNoise",
    "HybridDenoiser",
    "ImageMemory",
    "InverseGammaTime",
    "KernelDenoiser",
    "LocalLinearDenoiser",
    "MarginalNoise",
    "Memory",
    "Neighbors",
    "NetworkDenoiser",
    "NetworkFactory",
    "NoiseBase",
    "ODELogProb",
    "Observation",
    "Posterior",
    "QuadraticEnergy",
    "ScoreDenoiser",
    "TailedNormal",
    "TimeClassifier",
    "VAEModel",
    "balanced_elbo_terms",
    "elbo_terms",
    "fit_noise",
    "make_flow_transform",
    "nearest_rows",
    "neighbor_scale",
    "ode_log_prob",
]
