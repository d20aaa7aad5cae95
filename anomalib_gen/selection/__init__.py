"""Choosing among detectors without labels: scorers for scikit-learn's searches, and what they can and cannot say.

Each is a value for ``scoring=`` of `GridSearchCV` or `cross_validate`, and judges a fitted detector by normal rows that
it has not seen:

- *Is it the better density of the same rows?* `LogLikelihood`, for densities only.
- *Does it leave less room around the normal rows?* `MassVolume` and `ExcessMass`, for any score in few columns: the
  volume of a conformal prediction set. `mass_volume_curve` and `excess_mass_curve` work from scores.
- *Does it notice a replaced value?* `ColumnReplacement`, for any score and any number of columns.
- *Would it have ranked rows so, had it seen others?* `RankStability`; a reason to reject.
- *Do the other candidates agree with it?* `model_centrality`, from the scores of all.

None of them sees an anomaly. A criterion can tell a broken model from a sound one; which of two sound ones finds *your*
anomalies depends on these. Ma et al. (2023, arXiv:2104.01422) found no such criterion better than a sound detector at
its defaults, and so it is in this project's figures (``benchmarks/results/label-free-selection.md``). A few labelled
anomalies, kept for validation, are the better judge.
"""

from anomalib_gen.selection.likelihood import LogLikelihood
from anomalib_gen.selection.replacement import ColumnReplacement
from anomalib_gen.selection.stability import RankStability, model_centrality
from anomalib_gen.selection.volume import ExcessMass, MassVolume, excess_mass_curve, mass_volume_curve

__all__ = [
    "ColumnReplacement",
    "ExcessMass",
    "LogLikelihood",
    "MassVolume",
    "RankStability",
    "excess_mass_curve",
    "mass_volume_curve",
    "model_centrality",
]
