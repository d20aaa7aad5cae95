"""Networks: plain functions of tensors that know nothing of noise, densities or detectors."""

from anomalib_gen.networks.convolution import ConvDecoder, ConvNet
from anomalib_gen.networks.factory import (
    NETWORKS,
    Reshaped,
    Shape,
    build_network,
    make_network,
)
from anomalib_gen.networks.mlp import MLP
from anomalib_gen.networks.resnet import ResidualMLP
from anomalib_gen.networks.spectral import SpectralConv, SpectralLinear
from anomalib_gen.networks.tails import TAIL_START, compress_tails, compress_values, expand_tails
from anomalib_gen.networks.unet import UNet

__all__ = [
    "MLP",
    "NETWORKS",
    "TAIL_START",
    "ConvDecoder",
    "ConvNet",
    "Reshaped",
    "ResidualMLP",
    "Shape",
    "SpectralConv",
    "SpectralLinear",
    "UNet",
    "build_network",
    "compress_tails",
    "compress_values",
    "expand_tails",
    "make_network",
]
