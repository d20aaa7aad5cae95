from sklearn.utils.estimator_checks import parametrize_with_checks

from anomalib_gen import FlowDetector, VAEDetector

DETECTORS = [
    FlowDetector(max_iter=10, hidden_features=16, random_state=0, device="cpu"),
    VAEDetector(max_iter=10, hidden_features=16, random_state=0, device="cpu"),
]

# Training draws batches and noise, so a row of weight two is not the same as two rows of weight one;
# scikit-learn excuses its own isolation forest for the same reason.
STOCHASTIC = {"check_sample_weight_equivalence_on_dense_data": "stochastic training"}


@parametrize_with_checks(DETECTORS, expected_failed_checks=lambda detector: STOCHASTIC)
def test_scikit_learn_check(estimator, check):
    check(estimator)
