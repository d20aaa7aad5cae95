"""Generalised Pareto tails: parameters recovered, quantiles exact, intervals that cover, a test that rejects."""

import numpy as np
import pytest
from scipy import optimize, stats

from anomalib_gen.calibration import fit_tail, tail_stability
from anomalib_gen.calibration.extremes import _covariance, _fit


@pytest.mark.parametrize("shape", [-0.7, -0.3, 0.0, 0.3, 1.0])
def test_parameters_are_recovered(shape):
    """Mean and spread of 60 fits to 500 excesses agree with the truth and with the asymptotic errors."""
    fits = np.array(
        [_fit(np.sort(stats.genpareto.rvs(shape, scale=3.0, size=500, random_state=k))) for k in range(60)]
    )
    error = np.sqrt(np.diag(_covariance(max(shape, -0.49), 3.0, 500)))
    assert fits[:, 0].mean() == pytest.approx(shape, abs=4 * error[0] / np.sqrt(60) + 0.01)
    assert fits[:, 1].mean() == pytest.approx(3.0, abs=4 * error[1] / np.sqrt(60) + 0.05)
    if shape > -0.5:
        np.testing.assert_allclose(fits.std(axis=0), error, rtol=0.35)


def test_the_fit_is_the_maximum_of_the_likelihood():
    y = np.sort(stats.genpareto.rvs(0.2, scale=1e-4, size=300, random_state=0))
    shape, scale = _fit(y)

    def loss(parameters):
        return -stats.genpareto.logpdf(y, parameters[0], scale=1e-4 * parameters[1]).sum()

    best = optimize.minimize(loss, [0.1, 1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    np.testing.assert_allclose([shape, scale / 1e-4], best.x, rtol=1e-3, atol=1e-4)
    shape_2, scale_2 = _fit(1e9 * y)
    np.testing.assert_allclose([shape_2, scale_2], [shape, 1e9 * scale], rtol=1e-6)


def test_a_tail_that_ends_like_a_wall_has_a_fit():
    y = np.sort(1 - np.random.default_rng(0).uniform(size=200) ** 3)  # ever denser towards its end
    shape, scale = _fit(y)
    assert -1 <= shape < -0.5
    assert -scale / shape >= y.max() - 1e-12


def test_quantiles_by_hand_and_back():
    values = np.concatenate(
        [np.zeros(900) - np.arange(900), np.random.default_rng(0).exponential(2.0, size=100)]
    )
    fit = fit_tail(values, tail_fraction=0.1)
    assert fit.threshold == 0
    assert fit.tail_fraction == 0.1
    xi, sigma = fit.shape, fit.scale
    expected = sigma / xi * ((1e-3 * 1000 / 100) ** -xi - 1)
    assert fit.quantile(1e-3) == pytest.approx(expected)
    for rate in (0.1, 0.01, 1e-5):
        assert fit.sf(fit.quantile(rate)) == pytest.approx(rate)
    assert np.isnan(fit.sf(-1.0))
    assert fit.interval(0.1) == (0, 0)


def test_intervals_cover_the_truth():
    """Quantile of probability 1/10,000 from 1,000 values: nominal 95 %."""
    covered = 0
    for seed in range(80):
        random = np.random.default_rng(seed)
        low, high = fit_tail(random.exponential(size=1000), tail_fraction=0.2).interval(1e-4)
        covered += low < -np.log(1e-4) < high
    assert covered / 80 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 80))


def test_goodness_of_fit_is_uniform_where_it_fits_and_rejects_where_not():
    p = [
        fit_tail(stats.genpareto.rvs(0.1, size=60, random_state=seed), tail_fraction=1.0)
        .goodness_of_fit(n_resamples=19, random_state=seed)
        .pvalue
        for seed in range(40)
    ]
    assert np.mean(np.array(p) <= 0.2) == pytest.approx(0.2, abs=3 * np.sqrt(0.16 / 40))
    mixed = np.concatenate([np.random.default_rng(0).exponential(size=300), np.full(100, 3.0)])
    assert fit_tail(mixed, tail_fraction=1.0).goodness_of_fit(n_resamples=39, random_state=0).pvalue == 1 / 40


def test_stability_is_level_where_the_tail_is_pareto():
    values = stats.genpareto.rvs(0.2, scale=2.0, size=5000, random_state=0)
    table = tail_stability(values)
    assert len(table) == 12
    assert table["tail_fraction"].iloc[0] == pytest.approx(0.4)
    assert table["n_excesses"].iloc[-1] == 30
    assert (((table["shape"] - 0.2) / table["shape_error"]).abs() < 3.5).all()
    # Excesses over u of a generalised Pareto distribution have scale sigma + xi u: the modified scale stays sigma.
    assert (((table["modified_scale"] - 2.0) / table["modified_scale_error"]).abs() < 3.5).all()
    # The mean excess grows along (sigma + xi u) / (1 - xi).
    expected = (2.0 + 0.2 * table["threshold"]) / 0.8
    np.testing.assert_allclose(table["mean_excess"][:6], expected[:6], rtol=0.2)


def test_errors():
    values = np.random.default_rng(0).normal(size=100)
    with pytest.raises(ValueError, match="5 of 100 values make the tail; at least 10"):
        fit_tail(values, tail_fraction=0.05)
    with pytest.raises(ValueError, match="0 of 100 values make the tail"):
        fit_tail(np.ones(100))
    with pytest.raises(ValueError, match=r"^0 of 0 values make the tail; at least 10 are needed"):
        fit_tail([])
    with pytest.raises(ValueError, match="values must be finite"):
        fit_tail([np.inf] * 100)
    for wrong in (0, "x", None):
        with pytest.raises(ValueError, match=rf"tail_fraction must lie in \(0, 1\], got {wrong!r}"):
            fit_tail(values, tail_fraction=wrong)
    fit = fit_tail(values, tail_fraction=0.2)
    for wrong in (0, 0.3, "x"):
        with pytest.raises(ValueError, match=rf"rate={wrong!r} must be positive and at most 0.2"):
            fit.quantile(wrong)
    for wrong in (1, "x"):
        with pytest.raises(ValueError, match=f"confidence must lie between 0 and 1, got {wrong!r}"):
            fit.interval(0.01, confidence=wrong)
    with pytest.raises(ValueError, match="n_resamples must be a positive integer, got 0"):
        fit.goodness_of_fit(n_resamples=0)
