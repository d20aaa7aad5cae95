"""Anomalies: the number per row, ``anomaly(model, x, generator) -> (B,)``, higher = more anomalous."""

from collections.abc import Mapping

from anomalib_gen._component import Component
from anomalib_gen.anomaly.energy import Energy
from anomalib_gen.anomaly.likelihood import Likelihood
from anomalib_gen.anomaly.score_norm import ScoreNorm
from anomalib_gen.anomaly.typicality import Typicality

ANOMALIES: Mapping[str, type[Component]] = {
    "energy": Energy,
    "likelihood": Likelihood,
    "score_norm": ScoreNorm,
    "typicality": Typicality,
}

__all__ = ["ANOMALIES", "Energy", "Likelihood", "ScoreNorm", "Typicality"]
