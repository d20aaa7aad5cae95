"""Compare detectors on labelled tables under fixed protocols; see `run_benchmark`."""

from .detectors import (
    DEEP_PEERS,
    IMAGE_PEERS,
    PEERS,
    Detector,
    KNNDistance,
    OnPrincipalComponents,
    library_detectors,
    parse_detector,
    parse_detectors,
    score_rows,
)
from .evaluation import Evaluation, anomaly_metrics, evaluate
from .protocols import (
    IMAGE_SUITES,
    PROTOCOLS,
    Split,
    SplitError,
    clean,
    clean_unsupervised,
    images,
    published,
)
from .runner import BenchmarkInterrupted, run_benchmark
from .sources import DataError
from .store import load_results

__all__ = [
    "DEEP_PEERS",
    "IMAGE_PEERS",
    "IMAGE_SUITES",
    "PEERS",
    "PROTOCOLS",
    "BenchmarkInterrupted",
    "DataError",
    "Detector",
    "Evaluation",
    "KNNDistance",
    "OnPrincipalComponents",
    "Split",
    "SplitError",
    "anomaly_metrics",
    "clean",
    "clean_unsupervised",
    "evaluate",
    "images",
    "library_detectors",
    "load_results",
    "parse_detector",
    "parse_detectors",
    "published",
    "run_benchmark",
    "score_rows",
]
