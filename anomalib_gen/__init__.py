"""Anomaly detection with generative models behind the scikit-learn API."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from anomalib_gen.calibration import TypicalityResult, typicality_test
from anomalib_gen.detectors import (
    ComposedDetector,
    DiffusionDetector,
    EnergyDetector,
    FlowDetector,
    VAEDetector,
)
from anomalib_gen.persistence import load, save

try:
    __version__ = _version("anomalib-gen")
except _NotInstalled:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "ComposedDetector",
    "DiffusionDetector",
    "EnergyDetector",
    "FlowDetector",
    "TypicalityResult",
    "VAEDetector",
    "__version__",
    "load",
    "save",
    "typicality_test",
]
