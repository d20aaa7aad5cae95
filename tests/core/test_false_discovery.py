"""Adjusted p-values agree with the definitions of the procedures, and keep the rate."""

import numpy as np
import pytest
from scipy import stats

from anomalib_gen.calibration import adjust_p_values


def flagged_by_definition(p, alpha, factor=1.0):
    """Benjamini and Hochberg's step-up procedure as written."""
    m = len(p)
    below = np.flatnonzero(np.sort(p) <= alpha * np.arange(1, m + 1) / (m * factor))
    return p <= (np.sort(p)[below[-1]] if len(below) else -1)


@pytest.mark.parametrize("seed", range(20))
def test_procedures_by_definition(seed):
    random = np.random.default_rng(seed)
    p = np.concatenate([random.uniform(size=30), random.beta(0.1, 5, size=10)])
    alpha = random.uniform(0.02, 0.3)
    np.testing.assert_array_equal(adjust_p_values(p) <= alpha, flagged_by_definition(p, alpha))
    harmonic = (1 / np.arange(1, 41)).sum()
    np.testing.assert_array_equal(
        adjust_p_values(p, method="by") <= alpha, flagged_by_definition(p, alpha, harmonic)
    )
    share = (1 + (p > 0.5).sum()) / (40 * 0.5)
    np.testing.assert_array_equal(
        adjust_p_values(p, method="storey") <= alpha, flagged_by_definition(p, alpha, share) & (p <= 0.5)
    )


def simulate(method, draw, repetitions=2000, m=50, m_normal=40, alpha=0.2):
    """Mean share of false flags, its standard error, and mean share of anomalies found."""
    proportions, found = [], []
    for seed in range(repetitions):
        p = draw(np.random.default_rng(seed), m, m_normal)
        flagged = adjust_p_values(p, method=method) <= alpha
        proportions.append(flagged[:m_normal].sum() / max(flagged.sum(), 1))
        found.append(flagged[m_normal:].mean())
    return np.mean(proportions), np.std(proportions) / np.sqrt(repetitions), np.mean(found)


def independent(random, m, m_normal):
    z = random.normal(size=m)
    z[m_normal:] += 3
    return stats.norm.sf(z)


def dependent(random, m, m_normal):
    """One-sided p-values with negative and positive dependence, each uniform."""
    z = random.normal() * np.resize([1, -1], m)
    z[m_normal:] += 3
    return stats.norm.sf(z)


def test_rates_where_they_are_known():
    rate, error, _ = simulate("bh", independent)
    assert rate == pytest.approx(0.8 * 0.2, abs=3 * error)  # exact under independence
    rate, error, found = simulate("storey", independent)
    assert 0.17 < rate <= 0.2 + 3 * error
    assert found > simulate("bh", independent)[2]
    rate, error, _ = simulate("by", dependent)
    assert rate <= 0.8 * 0.2 + 3 * error


def test_weights_move_discoveries_and_keep_the_rate():
    random = np.random.default_rng(0)
    p = random.uniform(size=20)
    np.testing.assert_allclose(adjust_p_values(p, weights=np.full(20, 3.0)), adjust_p_values(p))
    weights = np.array([4.0] + [1.0] * 19)
    expected = adjust_p_values(np.minimum(p * weights.mean() / weights, 1))
    np.testing.assert_allclose(adjust_p_values(p, weights=weights), expected)
    proportions = []
    for seed in range(2000):
        p = independent(np.random.default_rng(seed), 50, 40)
        flagged = adjust_p_values(p, weights=np.r_[np.full(25, 0.5), np.full(25, 1.5)]) <= 0.2
        proportions.append(flagged[:40].sum() / max(flagged.sum(), 1))
    assert np.mean(proportions) <= 0.2 + 3 * np.std(proportions) / np.sqrt(2000)


def test_edges_and_errors():
    assert len(adjust_p_values([])) == 0
    for method in ("bh", "by", "storey"):
        adjusted = adjust_p_values([1.0, 0.0], method=method)
        assert adjusted[0] == 1
        assert adjusted[1] == 0
    for wrong in ([1.1], [-0.1], [np.nan], [[0.1]]):
        with pytest.raises(
            ValueError, match=r"p_values must (be one-dimensional, got shape|lie in \[0, 1\], got)"
        ):
            adjust_p_values(wrong)
    with pytest.raises(ValueError, match="method must be one of 'bh', 'by', 'storey', got 'bonferroni'"):
        adjust_p_values([0.5], method="bonferroni")
    for wrong in (1, "x"):
        with pytest.raises(ValueError, match=f"lambda_ must lie between 0 and 1, got {wrong!r}"):
            adjust_p_values([0.5], method="storey", lambda_=wrong)
    with pytest.raises(ValueError, match="weights must be 1 positive"):
        adjust_p_values([0.5], weights=[0.0])
