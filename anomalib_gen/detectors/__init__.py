"""Detectors: one file a family."""

from anomalib_gen.detectors.composition import ComposedDetector
from anomalib_gen.detectors.diffusion import DiffusionDetector
from anomalib_gen.detectors.energy import EnergyDetector
from anomalib_gen.detectors.flow import FlowDetector
from anomalib_gen.detectors.vae import VAEDetector

__all__ = ["ComposedDetector", "DiffusionDetector", "EnergyDetector", "FlowDetector", "VAEDetector"]
