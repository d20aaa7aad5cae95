"""Networks: plain functions of tensors that know nothing of noise, densities or detectors."""

from anomalib_gen.networks.mlp import MLP
from anomalib_gen.networks.resnet import ResidualMLP
from anomalib_gen.networks.spectral import SpectralLinear
from anomalib_gen.networks.tails import TAIL_START, compress_tails, expand_tails

__all__ = ["MLP", "TAIL_START", "ResidualMLP", "SpectralLinear", "compress_tails", "expand_tails"]
