"""The typicality test has uniform p-values under the null, and rejects a batch at the mode."""

import numpy as np
import pytest
from scipy import stats

from anomalib_gen import TypicalityResult, typicality_test
from anomalib_gen.calibration import typicality


class StandardNormal:
    """A detector that knows the density."""

    def log_prob(self, X):
        return stats.norm.logpdf(np.asarray(X)).sum(axis=1)


def draw(n, features, seed):
    return np.random.default_rng(seed).normal(size=(n, features))


@pytest.mark.parametrize("n_batch", [1, 20])
def test_pvalues_are_uniform_under_the_null(n_batch):
    reference = draw(20_000, 5, seed=0)
    batches = draw(300 * n_batch, 5, seed=1).reshape(300, n_batch, 5)
    pvalues = [
        typicality_test(StandardNormal(), batch, reference, n_resamples=199, random_state=seed).pvalue
        for seed, batch in enumerate(batches)
    ]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("place", [0.0, 1.5])
def test_a_batch_nearer_to_the_mode_or_farther_away_is_rejected(place):
    batch = place * np.ones((30, 20))
    result = typicality_test(StandardNormal(), batch, draw(1000, 20, seed=0), n_resamples=499, random_state=0)
    assert isinstance(result, TypicalityResult)
    assert result.pvalue == 1 / 500
    entropy = 10 * np.log(2 * np.pi * np.e)
    assert result.entropy == pytest.approx(entropy, abs=4 * np.sqrt(10 / 1000))
    # -log p is 10 log(2 pi) + 10 place^2 in the batch, and 10 more than the former on average.
    assert result.statistic == pytest.approx(abs(10 * place**2 - 10), abs=4 * np.sqrt(10 / 1000))


def test_no_single_row_need_be_unusual_for_the_batch_to_be():
    reference = draw(2000, 20, seed=0)
    batch = 0.85 * draw(100, 20, seed=1)
    detector = StandardNormal()
    singles = [
        typicality_test(detector, row[None], reference, n_resamples=199, random_state=0).pvalue
        for row in batch
    ]
    assert np.median(singles) > 0.2
    assert typicality_test(detector, batch, reference, n_resamples=199, random_state=0).pvalue == 1 / 200


def test_pvalue_by_hand():
    """With many reference rows of -log p = 0 or 1, the mean of a batch of two is 0, 1/2 or 1.

    The entropy drawn beside it is above or below 1/2 equally often, so of the halves of batches at 0 and at 1 one
    half is as far away.
    """

    class Coin:
        def log_prob(self, X):
            return -np.asarray(X, dtype=float)[:, 0]

    reference = [[0], [1]] * 2000
    far = typicality_test(Coin(), [[1], [1]], reference, n_resamples=20_000, random_state=0)
    assert far.statistic == far.entropy == 0.5
    assert far.pvalue == pytest.approx(0.25, abs=0.02)
    assert typicality_test(Coin(), [[0], [1]], reference, n_resamples=50, random_state=0).pvalue == 1


def test_random_state_and_blocks(monkeypatch):
    reference, batch = draw(500, 3, seed=0), draw(10, 3, seed=1)
    arguments = {"n_resamples": 300, "random_state": 0}
    result = typicality_test(StandardNormal(), batch, reference, **arguments)
    assert 2 / 301 < result.pvalue < 1
    assert typicality_test(StandardNormal(), batch, reference, **arguments) == result
    monkeypatch.setattr(typicality, "RESAMPLED_VALUES", 70)
    assert typicality_test(StandardNormal(), batch, reference, **arguments) == result


def test_errors_say_what_is_needed():
    rows = np.zeros((3, 2))
    with pytest.raises(TypeError, match=r"needs a detector with log_prob, and str has none.*FlowDetector"):
        typicality_test("forest", rows, rows)
    for wrong in (0, -1, 2.5, "many"):
        with pytest.raises(ValueError, match=rf"n_resamples must be a positive integer, got {wrong!r}"):
            typicality_test(StandardNormal(), rows, rows, n_resamples=wrong)
    with pytest.raises(ValueError, match="X_reference has 1 row; at least 2"):
        typicality_test(StandardNormal(), rows, rows[:1])


@pytest.mark.parametrize("n_batch", [1, 40])
@pytest.mark.parametrize("n_reference", [2, 5, 60])
def test_few_reference_rows_do_not_reject_too_often(n_reference, n_batch):
    random = np.random.default_rng(n_reference)
    pvalues = [
        typicality_test(
            StandardNormal(),
            random.normal(size=(n_batch, 3)),
            random.normal(size=(n_reference, 3)),
            n_resamples=199,
            random_state=k,
        ).pvalue
        for k in range(400)
    ]
    # 5 % in truth, were log-densities normal. Those of three columns are skewed, which five rows do not show. (Taking
    # the rows for all there is rejects 30 % with two, and 15 % with five.)
    skew = 0 if n_reference == 60 else 0.025
    assert np.mean(np.array(pvalues) <= 0.05) <= 0.05 + skew + 3 * np.sqrt(0.05 * 0.95 / 400)
