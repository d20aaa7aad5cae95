"""From scores to decisions: thresholds, p-values, control of false discoveries.

Which one answers which question:

- *Flag at most 1 % of normal rows*: `ThresholdDetector`, whose rules are `Contamination`, `FalsePositiveRate`,
  `TailProbability` and `ExpectedCost`.
- *How unusual is this row*: a p-value, from `SplitConformalDetector`, `CrossConformalDetector` (CV+, jackknife+),
  `BootstrapConformalDetector` (jackknife+-after-bootstrap) or `conformal_p_values`; `conditional_p_values` makes it
  valid for the calibration rows at hand.
- *At most 10 % of the flags may be false*: `adjust_p_values` for a batch; `LORD`, `SAFFRON` and `ADDIS` for a
  stream; `adaptive_p_values` learn from the batch itself.
- *Does this batch as a whole look normal*: `typicality_test`.
- *What lies beyond the largest value seen*: `fit_tail`, `tail_stability`.

The detectors wrap any outlier detector: of this package, of scikit-learn, of pyod.
"""

from anomalib_gen.calibration.adaptive import adaptive_p_values
from anomalib_gen.calibration.conformal import (
    BootstrapConformalDetector,
    CrossConformalDetector,
    SplitConformalDetector,
)
from anomalib_gen.calibration.extremes import TailFit, TailGoodness, fit_tail, tail_stability
from anomalib_gen.calibration.false_discovery import adjust_p_values
from anomalib_gen.calibration.online import ADDIS, LORD, SAFFRON
from anomalib_gen.calibration.p_values import conditional_p_values, conformal_p_values
from anomalib_gen.calibration.threshold import (
    Contamination,
    ExpectedCost,
    FalsePositiveRate,
    TailProbability,
    ThresholdDetector,
)
from anomalib_gen.calibration.typicality import TypicalityResult, typicality_test

__all__ = [
    "ADDIS",
    "LORD",
    "SAFFRON",
    "BootstrapConformalDetector",
    "Contamination",
    "CrossConformalDetector",
    "ExpectedCost",
    "FalsePositiveRate",
    "SplitConformalDetector",
    "TailFit",
    "TailGoodness",
    "TailProbability",
    "ThresholdDetector",
    "TypicalityResult",
    "adaptive_p_values",
    "adjust_p_values",
    "conditional_p_values",
    "conformal_p_values",
    "fit_tail",
    "tail_stability",
    "typicality_test",
]
