"""Distances against truths in closed form; p-values that keep their level, and find what is there."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from anomalib_gen.monitoring import Distribution
from anomalib_gen.monitoring.statistics import (
    categories_test,
    energy_test,
    ks_test,
    psi,
    psi_of,
    shares_test,
    spread,
    unseen_test,
    wasserstein,
)

NORMAL = Distribution.of(stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000))


def normal(shift=0.0, scale=1.0, n=100_000):
    return Distribution.of(shift + scale * stats.norm.ppf((np.arange(n) + 0.5) / n), n + 1)


# Distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 1000, 1024, 1025, 5000, 100_001])
@pytest.mark.parametrize("kind", ["normal", "rounded", "heavy", "half zero"])
def test_a_distribution_is_as_close_as_it_says(n, kind):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    x = {"normal": x, "rounded": x.round(1), "heavy": np.exp(5 * x), "half zero": np.maximum(x, 0)}[kind]
    kept = Distribution.of(x)
    assert len(kept.values) <= 1024
    assert kept.n == n
    points = np.concatenate([x, kept.values, x + 1e-9])
    for side in ("left", "right"):
        exact = np.searchsorted(np.sort(x), points, side=side) / n
        assert np.abs(kept.cdf(points, side) - exact).max() <= kept.resolution + 1e-12
    if len(np.unique(x)) <= 1024:
        assert kept.resolution == 0
        np.testing.assert_array_equal(
            kept.quantile([0, 0.3, 1]), np.quantile(x, [0, 0.3, 1], method="inverted_cdf")
        )
        np.testing.assert_array_equal(kept.sample(), np.sort(x))
    assert vars(Distribution.from_dict(kept.to_dict())).keys() == vars(kept).keys()
    np.testing.assert_array_equal(Distribution.from_dict(kept.to_dict()).values, kept.values)


def test_what_is_not_finite_is_no_value():
    kept = Distribution.of([1.0, np.nan, np.inf, -np.inf, 2.0, 1.0])
    assert kept.n == 3
    assert kept.values.tolist() == [1, 2]
    assert kept.counts.tolist() == [2, 1]
    assert Distribution.of([]).cdf([0.0]).tolist() == [0]
    with pytest.raises(ValueError, match="empty"):
        Distribution.of([]).quantile(0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"values": [1.0, 1.0]},
        {"values": [2.0, 1.0]},
        {"counts": [1]},
        {"counts": [0, 3]},
        {"counts": [0.5, 3]},
        {"n": 1},
        {"n": 2.5},
        {"resolution": 2},
    ],
    ids=str,
)
def test_a_malformed_distribution_is_refused(change):
    good = Distribution.of([1.0, 2.0, 2.0]).to_dict()
    with pytest.raises(ValueError, match="malformed"):
        Distribution.from_dict(good | change)


# Distances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1), (-0.25, 1), (0, 1.5), (3, 1), (100, 2)])
def test_distances_of_normal_columns(shift, scale):
    batch = normal(shift, scale)
    x = np.linspace(-8, shift + 8 * scale, 200_001)
    expected = np.abs(stats.norm.cdf(x) - stats.norm.cdf(x, shift, scale)).max()
    assert ks_test(NORMAL, batch)[0] == pytest.approx(expected, abs=2e-3)
    u = 0.01 + 0.98 * (np.arange(10_000) + 0.5) / 10_000
    moved = np.abs(stats.norm.ppf(u, shift, scale) - stats.norm.ppf(u)).mean()
    assert wasserstein(NORMAL, batch) == pytest.approx(moved, rel=5e-3)
    if scale == 1:
        assert wasserstein(NORMAL, batch) == pytest.approx(abs(shift), rel=5e-3)
    edges = stats.norm.ppf(np.arange(1, 10) / 10)
    q = np.diff([0, *stats.norm.cdf(edges, shift, scale), 1])
    assert psi_of(NORMAL, batch) == pytest.approx(psi(np.full(10, 0.1), q, 100_000, 100_000), rel=0.02)


def test_the_units_that_thresholds_are_given_in():
    """Of a normal column, as the module says: half a standard deviation further, or half as wide again."""
    for batch, expected in ((normal(0.5), (0.20, 0.24, 0.50)), (normal(0, 1.5), (0.10, 0.19, 0.38))):
        found = ks_test(NORMAL, batch)[0], psi_of(NORMAL, batch), wasserstein(NORMAL, batch)
        assert found == pytest.approx(expected, abs=0.006)


def test_distances_do_not_depend_on_units():
    rng = np.random.default_rng(0)
    x, y = rng.lognormal(size=3000), 1.3 * rng.lognormal(size=2000)
    base = [f(Distribution.of(x), Distribution.of(y, 9999)) for f in (psi_of, wasserstein)]
    for a, b in ((1e6, 0), (1e-6, 3)):
        there = [
            f(Distribution.of(a * x + b), Distribution.of(a * y + b, 9999)) for f in (psi_of, wasserstein)
        ]
        assert there == pytest.approx(base, rel=1e-6)


def test_a_few_wild_values_do_not_move_a_column():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=5000), rng.normal(size=5000)
    y[:20] = 1e12
    assert wasserstein(Distribution.of(x), Distribution.of(y, 9999)) < 0.1


def test_columns_of_one_or_two_values():
    zero, one = Distribution.of(np.zeros(100)), Distribution.of(np.ones(50))
    assert spread(zero) is None
    assert wasserstein(zero, one) is None
    assert psi_of(zero, zero) == pytest.approx(0)
    for other in (one, Distribution.of(-np.ones(50))):
        distance, p = ks_test(zero, other)
        assert distance == 1
        assert p < 1e-10
        assert psi_of(zero, other) > 1
    flag, more = Distribution.of(np.arange(1000) % 10 == 0), Distribution.of(np.arange(1000) % 5 == 0)
    assert ks_test(flag, more)[0] == pytest.approx(0.1)
    assert psi_of(flag, more) == pytest.approx(0.1 * np.log(2) + -0.1 * np.log(8 / 9), rel=0.02)
    assert wasserstein(flag, more) == pytest.approx(0.1 / 0.98 / spread(flag), rel=0.05)


def test_nothing_to_compare():
    empty = Distribution.of([])
    assert ks_test(empty, NORMAL) == (0, 1)
    assert psi_of(NORMAL, empty) == 0
    assert wasserstein(NORMAL, empty) is None
    assert wasserstein(empty, NORMAL) is None
    assert energy_test([], [1.0]) == (0, 1)
    assert energy_test([1.0, 1.0], [1.0]) == (0, 1)
    assert categories_test([], []) == (0, 0, 1)
    assert shares_test(0, 0, 1, 2) == 1
    assert unseen_test(0, 10, 0, 5) == 1


def test_energy_distance_is_what_its_definition_says():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), rng.normal(0.7, 2, size=45)
    pooled = np.concatenate([x, y])
    low, middle, high = np.quantile(pooled, [0.25, 0.5, 0.75])
    x, y = (np.clip((part - middle) / (high - low), -5, 5) for part in (x, y))
    between, within, inside = (np.abs(a[:, None] - b).mean() for a, b in ((x, y), (x, x), (y, y)))
    energy, _ = energy_test(x, y, n_permutations=9)
    assert energy == pytest.approx((2 * between - within - inside) / (2 * between))
    assert energy_test([0.0] * 20, [1.0] * 20)[0] == pytest.approx(1)


def test_one_wild_score_does_not_hide_a_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=500), rng.normal(0.5, 1, size=500)
    y[0] = -1e300
    assert energy_test(x, y)[1] < 0.001


# Level and power -------------------------------------------------------------------------------------------


def p_values(test, draw, n_trials):
    rng = np.random.default_rng(0)
    return np.array([test(*draw(rng)) for _ in range(n_trials)])


def ks(x, y):
    return ks_test(Distribution.of(x, 200), Distribution.of(y, len(y) + 1))[1]


def energy(x, y):
    return energy_test(x, y, n_permutations=99)[1]


def chi_squared(x, y):
    return categories_test(np.bincount(x, minlength=6), np.bincount(y, minlength=6))[2]


def shares(x, y):
    return shares_test(int(x.sum()), len(x), int(y.sum()), len(y))


CASES = {
    "ks": (ks, lambda r, d: (r.normal(size=900), r.normal(d, 1, 400))),
    "ks, ties": (ks, lambda r, d: (r.poisson(3, 900), r.poisson(3 + 2 * d, 400))),
    "ks, few rows": (ks, lambda r, d: (r.normal(size=60), r.normal(3 * d, 1, 40))),
    "energy": (energy, lambda r, d: (r.normal(size=300), r.normal(d, 1, 200))),
    "energy, few rows": (energy, lambda r, d: (r.standard_t(1, 30), r.standard_t(1, 25) + 9 * d)),
    "chi-squared": (
        chi_squared,
        lambda r, d: (
            r.choice(6, 900, p=[0.4, 0.3, 0.2, 0.05, 0.04, 0.01]),
            r.choice(6, 400, p=[0.4 - d / 2, 0.3 + d / 2, 0.2, 0.05, 0.04, 0.01]),
        ),
    ),
    "shares": (shares, lambda r, d: (r.random(900) < 0.05, r.random(400) < 0.05 + d / 3)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_p_values_keep_their_level_and_find_what_is_there(name):
    """Of batches like the reference at most a share alpha is found (with chance), of others nearly all."""
    test, draw = CASES[name]
    null = p_values(test, lambda rng: draw(rng, 0.0), 600)
    for alpha in (0.01, 0.05, 0.2):
        allowed = stats.binom.ppf(1 - 1e-4, len(null), alpha)
        assert (null <= alpha).sum() <= allowed
    there = p_values(test, lambda rng: draw(rng, 0.4), 60)
    assert (there <= 0.01).mean() > 0.9


@pytest.mark.parametrize("name", ["ks", "energy", "chi-squared"])
def test_p_values_are_no_more_cautious_than_need_be(name):
    test, draw = CASES[name]
    null = p_values(test, lambda rng: draw(rng, 0.0), 600)
    assert (null <= 0.2).sum() >= stats.binom.ppf(1e-4, len(null), 0.14)


def test_scipy_agrees():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=700), rng.normal(0.1, 1, size=500)
    expected = stats.ks_2samp(x, y, method="asymp")
    found = ks_test(Distribution.of(x), Distribution.of(y))
    assert found == pytest.approx((expected.statistic, expected.pvalue))
    p = psi_of(Distribution.of(x), Distribution.of(x + 0), 10)
    assert p == pytest.approx(0, abs=1e-12)
    counts = [[50, 30, 20], [30, 30, 40]]
    assert categories_test(*counts)[2] == pytest.approx(stats.chi2_contingency(counts).pvalue)
    assert categories_test(*counts)[0] == pytest.approx(0.2)


def test_few_values_have_the_exact_p_value():
    x, y = np.array([0.0, 1.0, 2.0, 3.0, 4.5]), np.array([4.0, 5.0, 6.0, 7.0])
    pooled = np.concatenate([x, y])
    ways = [np.isin(np.arange(9), chosen) for chosen in combinations(range(9), 5)]
    found = [stats.ks_2samp(pooled[way], pooled[~way]).statistic for way in ways]
    distance, p = ks_test(Distribution.of(x), Distribution.of(y))
    assert distance == pytest.approx(0.8)
    assert p == pytest.approx(np.mean(np.array(found) > 0.8 - 1e-9))
    # As many again on either side: for this distance half of the p-value was too little.
    x, y = np.arange(10.0), np.arange(6.5, 16)
    expected = stats.ks_2samp(x, y, method="exact")
    assert ks_test(Distribution.of(x), Distribution.of(y)) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    assert ks_test(Distribution.of(x), Distribution.of(x)) == (0, 1)


def test_the_stability_index_is_about_chi_squared_by_chance():
    rng = np.random.default_rng(0)
    n, m = 800, 500
    found = [
        psi_of(Distribution.of(rng.normal(size=n)), Distribution.of(rng.normal(size=m))) for _ in range(400)
    ]
    scaled = np.array(found) * n * m / (n + m)
    assert scaled.mean() == pytest.approx(9, rel=0.1)
    assert stats.kstest(scaled, stats.chi2(9).cdf).pvalue > 1e-3


def test_new_categories():
    """By Good and Turing: with 9 singletons in 999 rows one row in a hundred is expected to be new."""
    assert unseen_test(0, 100_000, 1, 1) == pytest.approx(1 / 100_001, rel=1e-4)
    assert unseen_test(9_999, 999_999, 1, 100) == pytest.approx(1 - 0.99**100, rel=1e-3)
    assert unseen_test(0, 999, 8, 1000) < 0.01
    rng = np.random.default_rng(0)
    names = 1 / np.arange(1, 400) ** 1.1
    names /= names.sum()
    found = []
    for _ in range(300):
        x, y = rng.choice(399, 1000, p=names), rng.choice(399, 300, p=names)
        counts = np.bincount(x, minlength=399)
        found.append(unseen_test(int((counts == 1).sum()), 1000, int((counts[y] == 0).sum()), 300))
    # (About its level, no better: the rows with new categories do not come independently.)
    assert np.mean(np.array(found) <= 0.01) <= 0.03
