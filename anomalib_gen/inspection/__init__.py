"""Displays, as scikit-learn has them: made by `from_estimator` or from numbers at hand, drawn again by `plot(ax=...)`.

matplotlib is imported when something is drawn; ``pip install 'anomalib-gen[benchmark]'`` brings it.
"""

from anomalib_gen.inspection.contributions import FeatureContributionsDisplay
from anomalib_gen.inspection.images import ImageHeatmapDisplay
from anomalib_gen.inspection.models import (
    LandscapeDisplay,
    LatentSpaceDisplay,
    LossCurveDisplay,
    SamplesDisplay,
)
from anomalib_gen.inspection.scores import DetectionCurveDisplay, PValueDisplay, ScoreHistogramDisplay
from anomalib_gen.inspection.table import TopAnomaliesDisplay

__all__ = [
    "DetectionCurveDisplay",
    "FeatureContributionsDisplay",
    "ImageHeatmapDisplay",
    "LandscapeDisplay",
    "LatentSpaceDisplay",
    "LossCurveDisplay",
    "PValueDisplay",
    "SamplesDisplay",
    "ScoreHistogramDisplay",
    "TopAnomaliesDisplay",
]
