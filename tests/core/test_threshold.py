"""Each threshold rule keeps what it promises on new rows of a known distribution."""

import pickle

import numpy as np
import pytest
from scipy import stats
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KernelDensity

from anomalib_gen.anomaly import Likelihood
from anomalib_gen.calibration import (
    Contamination,
    ExpectedCost,
    FalsePositiveRate,
    TailProbability,
    ThresholdDetector,
)


class Value(OutlierMixin, BaseEstimator):
    """The score is the first column."""

    def fit(self, X, y=None):
        self.n_rows_ = len(X)
        return self

    def score_samples(self, X):
        return np.asarray(X, dtype=float)[:, 0]


def false_positive_rates(rule, n, repetitions=2000):
    """Exact rates at the thresholds from n standard normal scores each."""
    draws = np.random.default_rng(0).normal(size=(repetitions, n))
    return np.array([stats.norm.cdf(rule(scores)) for scores in draws])


def test_false_positive_rate_is_beta_distributed():
    rule = FalsePositiveRate(0.1)
    rates = false_positive_rates(rule, 59)
    assert rule.rank_ == 6
    assert stats.kstest(rates, stats.beta(6, 54).cdf).pvalue > 1e-3
    assert rates.mean() == pytest.approx(0.1, abs=3 * rates.std() / np.sqrt(len(rates)))


@pytest.mark.parametrize("n", [29, 100, 400])
def test_false_positive_rate_with_confidence(n):
    rule = FalsePositiveRate(0.1, confidence=0.9)
    rates = false_positive_rates(rule, n)
    kept = (rates <= 0.1).mean()
    assert kept >= 0.9 - 3 * np.sqrt(0.09 / len(rates))
    # And one rank more would not keep it.
    assert stats.beta.cdf(0.1, rule.rank_ + 1, n - rule.rank_) < 0.9


def test_too_few_rows_for_a_rate():
    scores = np.arange(10.0)
    with pytest.raises(ValueError, match=r"0\.01 cannot be judged by 10 held-out rows: at least 99"):
        FalsePositiveRate(0.01)(scores)
    assert FalsePositiveRate(0.01)(np.arange(99.0)) == 0
    with pytest.raises(ValueError, match="at least 22 are needed"):
        FalsePositiveRate(0.1, confidence=0.9)(scores)
    assert FalsePositiveRate(0.1, confidence=0.9)(np.arange(22.0)) == 0


def test_tail_reaches_beyond_the_rows():
    rule = TailProbability(1e-4, tail_fraction=0.2)
    rates = []
    for seed in range(100):
        scores = -np.random.default_rng(seed).exponential(size=1000)
        rates.append(np.exp(rule(scores)))
    assert rule.tail_.n_values == 1000
    assert np.median(rates) == pytest.approx(1e-4, rel=0.6)
    with pytest.raises(ValueError, match=r"must be positive and at most 0\.1"):
        TailProbability(0.2)(scores)


def test_cost_by_hand():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    y = np.array([-1, 1, -1, 1, 1])
    # Flagging 0: cost .4 * 10 * 1/2 = 2. Flagging up to 2: .6 * 1 * 1/3 = .2.
    rule = ExpectedCost()
    assert rule(scores, y) == 2.5
    assert rule.cost_ == pytest.approx(0.2)
    # Dear false alarms: one miss is cheaper.
    rule = ExpectedCost(false_alarm=100.0)
    assert rule(scores, y) == 0.5
    assert rule.cost_ == pytest.approx(2.0)
    # Anomalies so rare, or so common, that nothing, or everything, is flagged.
    assert (scores < ExpectedCost(prevalence=1e-6)(-scores, y)).sum() == 0
    assert (-scores < ExpectedCost(prevalence=1e-6)(-scores, y)).sum() == 0
    assert (scores < ExpectedCost(prevalence=1 - 1e-6)(scores, y)).sum() == 3
    assert (-scores < ExpectedCost(miss=1e9)(-scores, y)).sum() == 5


def test_cost_agrees_with_the_theory():
    """N(0, 1) against N(-3, 1): the ratio of densities at the threshold is that of costs."""
    random = np.random.default_rng(0)
    y = np.repeat([1, -1], 100_000)
    scores = random.normal(size=len(y)) - 3 * (y == -1)
    threshold = ExpectedCost(1.0, 20.0, prevalence=0.01)(scores, y)
    # Flag where .01 * 20 phi(s + 3) > .99 phi(s): s < -1.5 - log(.99 / .2) / 3.
    assert threshold == pytest.approx(-1.5 - np.log(0.99 / 0.2) / 3, abs=0.1)


def test_ties_are_cut_together():
    scores = np.array([1.0, 1.0, 1.0, 2.0])
    threshold = ExpectedCost()(scores, np.array([-1, 1, 1, 1]))
    assert (scores < threshold).sum() == 3


def test_contamination_of_rows_that_a_density_rules_out(recwarn):
    scores = np.r_[np.full(20, -np.inf), np.arange(80.0)]
    # All twenty of them, or none, because they tie.
    assert [float((scores < Contamination(rate)(scores)).sum()) for rate in (0.1, 0.2, 0.3)] == [0, 20, 30]
    assert not recwarn


# The detector ---------------------------------------------------------------------------------------------


def test_rules_see_the_rows_they_want():
    X = np.arange(100.0)[:, None]
    fitted = ThresholdDetector(Value(), threshold=Contamination(0.1)).fit(X)
    assert fitted.estimator_.n_rows_ == 100
    assert fitted.offset_ == pytest.approx(np.quantile(X, 0.1))
    fitted = ThresholdDetector(Value(), calibration_fraction=0.39, random_state=0).fit(X)
    assert fitted.estimator_.n_rows_ == 61
    assert fitted.threshold_.rank_ == 2
    assert (fitted.predict(X) == np.where(X[:, 0] < fitted.offset_, -1, 1)).all()
    frozen = ThresholdDetector(FrozenEstimator(Value().fit(X)), threshold="false-positive-rate").fit(X)
    assert frozen.threshold_.rank_ == 5
    assert frozen.offset_ == 4


def test_contamination_on_training_rows_flags_more_new_rows_than_it_says():
    """A kernel density knows the rows it was fitted to: each lies under a kernel of its own."""
    random = np.random.default_rng(0)
    X, new = random.normal(size=(200, 10)), random.normal(size=(5000, 10))
    density = KernelDensity(bandwidth=0.7)
    share = {
        name: (ThresholdDetector(density, threshold=rule, random_state=0).fit(X).predict(new) == -1).mean()
        for name, rule in (("train", Contamination(0.05)), ("held out", FalsePositiveRate(0.05)))
    }
    assert share["train"] > 0.5
    assert share["held out"] < 0.08


def test_cost_with_labels():
    random = np.random.default_rng(0)
    y = np.repeat([1, -1], [400, 40])
    X = random.normal(size=(440, 1)) - 6 * (y == -1)[:, None]
    fitted = ThresholdDetector(Value(), threshold="cost", random_state=0).fit(X, y)
    assert fitted.estimator_.n_rows_ == 200  # normal rows only
    assert fitted.offset_ == pytest.approx(-3, abs=1.2)
    assert (fitted.predict(X) == y).mean() > 0.99
    assert (
        ThresholdDetector(FrozenEstimator(Value().fit(X)), threshold="cost").fit(X, y).predict(X) == y
    ).all()
    with pytest.raises(ValueError, match="needs labels: give y"):
        fitted.fit(X)
    with pytest.raises(ValueError, match=r"y must hold 440 labels.*values \[0\]\. If 1 marks the anomalies"):
        fitted.fit(X, (y == -1).astype(int))
    with pytest.raises(ValueError, match=r"y must hold 440 labels.*got shape \(3,\)\.$"):
        fitted.fit(X, [1, 1, -1])
    with pytest.raises(ValueError, match=r"Both labels are needed among the held-out rows, got 440 normal"):
        ThresholdDetector(FrozenEstimator(Value().fit(X)), threshold="cost").fit(X, np.ones(440, dtype=int))


def test_parameters_clone_pickle_and_failure():
    detector = ThresholdDetector(Value(), threshold=FalsePositiveRate(0.05), random_state=0)
    detector.set_params(threshold__rate=0.1)
    rule = detector.threshold
    X = np.random.default_rng(0).normal(size=(200, 1))
    fitted = clone(detector).fit(X)
    assert fitted.threshold_.rate == 0.1
    assert not hasattr(rule, "rank_")
    assert pickle.loads(pickle.dumps(fitted)).offset_ == fitted.offset_
    with pytest.raises(ValueError, match=r"threshold='quantile' is unknown\. Known names: 'contamination'"):
        ThresholdDetector(Value(), threshold="quantile").fit(X)
    with pytest.raises(ValueError, match="rate must lie between 0 and 1, got 2"):
        ThresholdDetector(Value(), threshold=FalsePositiveRate(2)).fit(X)
    for cost in (0, np.inf, "10"):
        with pytest.raises(ValueError, match=f"false_alarm must be a positive and finite cost, got {cost!r}"):
            ExpectedCost(false_alarm=cost)(X[:, 0], np.ones(200))
    with pytest.raises(TypeError, match="threshold must be a name or a rule"):
        ThresholdDetector(Value(), threshold=Likelihood()).fit(X)
    offset = fitted.offset_
    with pytest.raises(ValueError, match="cannot be judged"):
        fitted.set_params(threshold__rate=1e-9).fit(X)
    assert fitted.offset_ == offset
