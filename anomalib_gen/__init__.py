"""Anomaly detection with generative models behind the scikit-learn API."""

from importlib.metadata import version as _version

from anomalib_gen.calibration import TypicalityResult, typicality_test
from anomalib_gen.detectors import FlowDetector

__version__ = _version("anomalib-gen")

__all__ = ["FlowDetector", "TypicalityResult", "__version__", "typicality_test"]
