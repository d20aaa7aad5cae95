"""Detectors: one file a family."""

from anomalib_gen.detectors.flow import FlowDetector

__all__ = ["FlowDetector"]
