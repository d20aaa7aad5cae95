"""Models: what a network means. Each gives a `torch.nn.Module` its density, score or energy."""

from anomalib_gen.models.energy import EnergyModel, TailedNormal, energy_score
from anomalib_gen.models.flow import FLOW_TRANSFORMS, FlowModel, FlowTransform, make_flow_transform

__all__ = [
    "FLOW_TRANSFORMS",
    "EnergyModel",
    "FlowModel",
    "FlowTransform",
    "TailedNormal",
    "energy_score",
    "make_flow_transform",
]
