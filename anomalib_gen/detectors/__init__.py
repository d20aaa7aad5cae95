"""Detectors: one file a family."""

from anomalib_gen.detectors.flow import FlowDetector
from anomalib_gen.detectors.vae import VAEDetector

__all__ = ["FlowDetector", "VAEDetector"]
