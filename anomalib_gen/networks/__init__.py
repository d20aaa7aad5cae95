"""Networks: plain functions of tensors that know nothing of noise, densities or detectors."""

from anomalib_gen.networks.resnet import ResidualMLP
from anomalib_gen.networks.tails import TAIL_START, compress_tails, expand_tails

__all__ = ["TAIL_START", "ResidualMLP", "compress_tails", "expand_tails"]
