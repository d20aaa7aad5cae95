"""Does today's data still look like training? A reference in the model folder, and tests of a batch against it.

distribution   a distribution in some hundred values
summaries      what is kept of the columns of rows that come in parts
statistics     distances and their p-values, with the mathematics
reference      what normal rows looked like: made by ``fit`` and ``calibrate``, kept in the model folder
drift          a batch against the reference: what has drifted, and what is an alert
"""

from anomalib_gen.monitoring.distribution import Distribution
from anomalib_gen.monitoring.drift import (
    Alert,
    Batch,
    ColumnDrift,
    DriftReport,
    ScoreDrift,
    Thresholds,
    compare,
)
from anomalib_gen.monitoring.reference import Reference, build_reference, load_reference, reference_of
from anomalib_gen.monitoring.shares import Shares, side_by_side
from anomalib_gen.monitoring.summaries import Column, Summariser

__all__ = [
    "Alert",
    "Batch",
    "Column",
    "ColumnDrift",
    "Distribution",
    "DriftReport",
    "Reference",
    "ScoreDrift",
    "Shares",
    "Summariser",
    "Thresholds",
    "build_reference",
    "compare",
    "load_reference",
    "reference_of",
    "side_by_side",
]
