"""Observation likelihoods are distributions: they match scipy, sum to one, stay bounded, and are what is sampled."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from anomalib_gen._runtime import make_generator
from anomalib_gen.models import OBSERVATIONS
from anomalib_gen.models.observation import (
    BernoulliObservation,
    DiscretisedLogisticObservation,
    GaussianObservation,
    StudentTObservation,
)
from anomalib_gen.networks import expand_tails

CPU = torch.device("cpu")
CONTINUOUS = sorted(set(OBSERVATIONS) - {"bernoulli"})
LOCATION = 0.7


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def make(name, *, features=1, **settings):
    grain = settings.pop("grain", None)
    if grain is not None:
        grain = torch.full((features,), grain, dtype=torch.float64)
    return OBSERVATIONS[name](features, grain=grain, **settings).double()


def density(observation, location=LOCATION):
    observation.requires_grad_(False)
    return lambda x: float(observation.log_prob(column(x), column(location)).exp())


# Against scipy --------------------------------------------------------------------------------------------


def test_gaussian_matches_scipy_within_the_bulk():
    x = column(-4.0, 0.0, 0.3, 4.9)
    expected = stats.norm(LOCATION, 0.3).logpdf(x[:, 0].numpy())
    log_prob = make("gaussian", variance=0.09).log_prob(x, torch.full_like(x, LOCATION))
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("freedom", [0.5, 3.0, 200.0])
def test_student_t_matches_scipy_everywhere(freedom):
    x = column(-1e200, -40.0, 0.3, LOCATION, 1e6)
    with np.errstate(over="ignore"):
        expected = stats.t(freedom, LOCATION, 0.3).logpdf(x[:-1, 0].numpy())
    observation = make("student-t", variance=0.09, degrees_of_freedom=freedom)
    log_prob = observation.log_prob(x, torch.full_like(x, LOCATION)).detach().numpy()
    finite = np.isfinite(expected)  # scipy squares 1e200
    np.testing.assert_allclose(log_prob[:-1][finite], expected[finite], rtol=1e-6)
    assert np.isfinite(log_prob).all()


@pytest.mark.parametrize("freedom", [99.0, 101.0, 1e6, 1e17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_t_of_many_degrees_of_freedom_goes_to_a_normal(freedom, dtype):
    x = column(0.0, 1.0, 3.0)
    observation = make("student-t", variance=1.0, degrees_of_freedom=freedom).to(dtype)
    log_prob = observation.log_prob(x.to(dtype), torch.zeros_like(x, dtype=dtype)).detach()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(log_prob, stats.t(freedom).logpdf(x[:, 0]), atol=tolerance)


def test_discretised_logistic_matches_scipy():
    grain, deviation = 0.1, 0.4
    x = np.array([-3.0, 0.0, 0.65, 2.0])
    spread, cell = math.sqrt(1 + grain**2), math.sqrt(12) * grain
    # Location and tails are in the units of x / spread; the deviation in those of x.
    logistic = stats.logistic(LOCATION * spread, deviation * math.sqrt(3) / math.pi)
    expected = np.log((logistic.cdf(x + cell / 2) - logistic.cdf(x - cell / 2)) / cell)
    observation = make("discretised-logistic", grain=grain, variance=deviation**2)
    log_prob = observation.log_prob(column(*x), column(*[LOCATION] * 4))
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, rtol=1e-6)


def test_without_a_grid_the_logistic_is_continuous():
    x = column(-4.0, 0.0, 0.65, 2.0)
    expected = stats.logistic(LOCATION, 0.4 * math.sqrt(3) / math.pi).logpdf(x[:, 0].numpy())
    observation = make("discretised-logistic", variance=0.16)
    log_prob = observation.log_prob(x, torch.full_like(x, LOCATION))
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, rtol=1e-6)


def test_bernoulli_matches_scipy_and_sums_to_one():
    log_odds = column(-30.0, -1.0, 0.0, 2.0)
    observation = BernoulliObservation(1)
    p = 1 / (1 + np.exp(-log_odds[:, 0].numpy()))
    total = 0.0
    for value in (0.0, 1.0):
        log_prob = observation.log_prob(torch.full_like(log_odds, value), log_odds)
        np.testing.assert_allclose(log_prob.numpy(), stats.bernoulli(p).logpmf(int(value)), rtol=1e-10)
        total = total + log_prob.exp()
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))


# Normalisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [None, 0.05, 1.5])
@pytest.mark.parametrize("location", [0.7, -4.8, 6.0])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name, location, grain):
    # Deviations are in the units of x, the location in those of x / spread: 0.5 is moderate in both.
    observation = make(name, grain=grain, variance=0.25)
    p = density(observation, location)

    # In y with x = sinh(y), so that the widest tails fit.
    def integrand(y):
        return p(math.sinh(y)) * math.cosh(y)

    total = sum(
        integrate.quad(integrand, a, b, limit=200)[0]
        for a, b in zip([-40, -8, -3, -1, 1, 3, 8], [-8, -3, -1, 1, 3, 8, 40], strict=True)
    )
    assert total == pytest.approx(1, abs=2e-4)


def test_cells_sum_to_one_across_the_start_of_the_tails():
    """Mass is the density times the cell's width, summed over the whole grid, whatever the tails do to it."""
    grain = 0.4
    observation = make("discretised-logistic", grain=grain, variance=1.0)
    cell = math.sqrt(12) * grain
    x = (torch.arange(-4000, 4000, dtype=torch.float64) + 0.3)[:, None] * cell
    mass = observation.log_prob(x, torch.full_like(x, 4.0)).exp().sum() * cell
    assert float(mass) == pytest.approx(1, abs=1e-3)


# Floors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("grain", [0.0, 0.5])
def test_learned_deviations_have_a_floor(name, grain):
    """A perfect decoder and a deviation that runs to zero: the density of a value on a grid stays bounded."""
    observation = make(name, grain=grain, noise=0.02)
    with torch.no_grad():
        observation.log_deviation.fill_(-50)
    peak = density(observation, 0.0)(0.0)
    floor = math.hypot(0.02, grain)
    if name == "discretised-logistic" and grain:
        assert peak == pytest.approx(1 / (math.sqrt(12) * grain), rel=1e-6)  # all mass in one cell
    else:
        factor = {
            "gaussian": stats.norm.pdf(0),
            "student-t": stats.t(6.0).pdf(0),
            "discretised-logistic": math.pi / math.sqrt(3) / 4,
        }[name]
        assert peak == pytest.approx(factor / floor, rel=1e-4)


@pytest.mark.parametrize(("variance", "size"), [("per-feature", 4), ("shared", 1), (0.3, 0)])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_is_learned(name, variance, size):
    observation = make(name, features=4, variance=variance, noise=0.1)
    settings = {n: p.numel() for n, p in observation.named_parameters()}
    assert settings.pop("log_freedom", 4) == 4
    assert settings == ({"log_deviation": size} if size else {})
    assert observation.deviation.numel() in (1, 4)
    if not size:
        np.testing.assert_allclose(observation.deviation.numpy(), math.sqrt(0.3), rtol=1e-6)


def test_given_degrees_of_freedom_are_not_learned():
    assert [n for n, _ in StudentTObservation(3, degrees_of_freedom=4.0).named_parameters()] == [
        "log_deviation"
    ]
    assert (StudentTObservation(3).freedom > 1).all()


def test_unknown_variance():
    with pytest.raises(ValueError, match=r"variance='each' is unknown\. Use 'per-feature', 'shared'"):
        GaussianObservation(3, variance="each")


# Sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [None, 1.5])
@pytest.mark.parametrize("location", [0.7, 5.5])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_samples_follow_the_density(name, location, grain):
    """The share of draws below a point is the integral of the density up to it."""
    observation = make(name, grain=grain, variance=0.25)
    n = 20_000
    drawn = observation.sample(column(*[location] * n), make_generator(0, CPU))[:, 0].detach().numpy()
    assert np.isfinite(drawn).all()
    points = np.quantile(drawn, [0.1, 0.5, 0.9])
    for low, high in pairwise(points):
        mass = integrate.quad(density(observation, location), low, high, limit=200)[0]
        assert mass == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / n))


def test_bernoulli_samples_have_the_probability_of_the_log_odds():
    drawn = BernoulliObservation(1).sample(column(*[1.0] * 20_000), make_generator(0, CPU))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)


@pytest.mark.parametrize(("location", "grain"), [(0.3, 0.5), (5.5, None)])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_centre_is_the_median(name, location, grain):
    observation = make(name, grain=grain, variance=0.25)
    drawn = observation.sample(column(*[location] * 20_000), make_generator(0, CPU))
    assert float((drawn < observation.centre(column(location))).double().mean()) == pytest.approx(
        0.5, abs=0.02
    )


# Far rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grain", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_far_rows_are_finite_and_fall(name, grain, dtype):
    observation = make(name, grain=grain, noise=0.02).to(dtype)
    top = math.log10(torch.finfo(dtype).max)
    x = 10.0 ** torch.linspace(1, math.floor(top), 100, dtype=dtype)[:, None]
    for sign in (-1, 1):
        x = x.detach().requires_grad_()
        location = torch.full_like(x, 0.3).detach().requires_grad_()
        log_prob = observation.log_prob(sign * x, location)
        assert torch.isfinite(log_prob).all()
        assert (log_prob.diff() < 0).all()
        (gradient,) = torch.autograd.grad(log_prob.sum(), location)
        assert torch.isfinite(gradient).all()
    largest = torch.full((1, 1), torch.finfo(dtype).max, dtype=dtype)
    assert torch.isfinite(observation.log_prob(largest, torch.zeros_like(largest))).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_gradients_agree_with_differences(name):
    """Also where the logistic changes from one of its forms to another, and at the start of the tails."""
    observation = make(name, features=3, grain=0.3, noise=0.02)
    x = expand_tails(torch.linspace(-7, 7, 36, dtype=torch.float64).reshape(12, 3))[0]
    location = (x * 0.5).clamp(-5, 5)
    assert torch.autograd.gradcheck(lambda m: observation.log_prob(x, m), location.requires_grad_())


def test_the_cell_is_the_one_that_the_grain_stands_for():
    observation = DiscretisedLogisticObservation(2, grain=torch.tensor([0.0, 1.0]))
    # In the units of x / spread; a uniform over a cell deviates by the cell over sqrt(12).
    np.testing.assert_allclose(observation.cell.numpy(), [1e-6, math.sqrt(12 / 2)], rtol=1e-6)
