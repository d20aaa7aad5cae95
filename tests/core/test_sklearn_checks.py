import warnings

from sklearn.ensemble import IsolationForest
from sklearn.utils.estimator_checks import parametrize_with_checks

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.calibration import (
    BootstrapConformalDetector,
    Contamination,
    CrossConformalDetector,
    FalsePositiveRate,
    SplitConformalDetector,
    ThresholdDetector,
)

SMALL = {"max_iter": 10, "hidden_features": 16, "random_state": 0, "device": "cpu"}
FLOW = FlowDetector(**SMALL)
DETECTORS = [
    FLOW,
    VAEDetector(**SMALL),
    ComposedDetector([("a", FLOW), ("b", FLOW)], prefit=False),
    EnergyDetector(**SMALL),
    EnergyDetector(objective="sliced-score-matching", anomaly="score_norm", network="mlp", **SMALL),
    EnergyDetector(objective="contrastive-divergence", spectral_norm=2.0, **SMALL),
    EnergyDetector(objective="noise-contrastive", **SMALL),
    DiffusionDetector(**SMALL),
    DiffusionDetector(objective="improved-ddpm", anomaly="reconstruction", **SMALL),
]

# Training draws batches and noise, so a row of weight two is not the same as two rows of weight one;
# scikit-learn excuses its own isolation forest for the same reason.
STOCHASTIC = {"check_sample_weight_equivalence_on_dense_data": "stochastic training"}


@parametrize_with_checks(DETECTORS, expected_failed_checks=lambda detector: STOCHASTIC)
def test_scikit_learn_check(estimator, check):
    check(estimator)


FOREST = IsolationForest(n_estimators=5)
DECISIONS = [
    SplitConformalDetector(FOREST),
    CrossConformalDetector(FOREST, cv=3),
    BootstrapConformalDetector(FOREST, n_estimators=5),
    ThresholdDetector(FOREST, threshold=Contamination(0.1)),
    # Some checks fit to a handful of rows, which can judge a large rate only.
    ThresholdDetector(FOREST, threshold=FalsePositiveRate(0.5)),
]


@parametrize_with_checks(DECISIONS)
def test_scikit_learn_check_of_decisions(estimator, check):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="alpha=0.05 is below")
        check(estimator)
