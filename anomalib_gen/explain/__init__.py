"""Why a row is anomalous: contributions of its columns, and the normal row nearest to it."""

from anomalib_gen.explain.contributions import FeatureContributions, feature_contributions
from anomalib_gen.explain.counterfactual import NormalRows, nearest_normal_rows

__all__ = ["FeatureContributions", "NormalRows", "feature_contributions", "nearest_normal_rows"]
