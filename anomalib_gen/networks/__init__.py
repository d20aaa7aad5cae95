"""Networks: plain functions of tensors that know nothing of noise, densities or detectors."""

from anomalib_gen.networks.resnet import ResidualMLP

__all__ = ["ResidualMLP"]
