"""Models: what a network means. Each gives a `torch.nn.Module` its density, score or energy."""

from anomalib_gen.models.flow import FLOW_TRANSFORMS, FlowModel, FlowTransform, make_flow_transform
from anomalib_gen.models.observation import OBSERVATIONS, Observation
from anomalib_gen.models.vae import NetworkFactory, Posterior, VAEModel

__all__ = [
    "FLOW_TRANSFORMS",
    "OBSERVATIONS",
    "FlowModel",
    "FlowTransform",
    "NetworkFactory",
    "Observation",
    "Posterior",
    "VAEModel",
    "make_flow_transform",
]
