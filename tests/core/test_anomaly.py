"""Anomalies agree with the closed forms of a Gaussian."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from anomalib_gen import EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen._runtime import make_generator
from anomalib_gen.anomaly import ANOMALIES, Likelihood, Typicality

CPU = torch.device("cpu")


class StandardNormal:
    def log_prob(self, x):
        return -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


def draw(n, features, seed=0):
    return torch.randn(n, features, dtype=torch.float64, generator=make_generator(seed, CPU))


def entropy(features):
    return features / 2 * math.log(2 * math.pi * math.e)


def prepared(features):
    anomaly = Typicality()
    anomaly.prepare(StandardNormal(), iter(draw(2000, features).split(300)), make_generator(0, CPU))
    return anomaly


def test_likelihood_is_minus_the_log_density():
    x = draw(50, 3)
    expected = -stats.multivariate_normal(np.zeros(3)).logpdf(x.numpy())
    np.testing.assert_allclose(Likelihood()(StandardNormal(), x, make_generator(0, CPU)).numpy(), expected)


@pytest.mark.parametrize("features", [1, 10, 1000])
def test_typicality_estimates_the_entropy(features):
    # -log p of a standard normal varies by sqrt(D / 2).
    assert prepared(features).entropy_ == pytest.approx(
        entropy(features), abs=4 * math.sqrt(features / 2 / 2000)
    )


def test_entropy_does_not_depend_on_the_blocks():
    x, generator = draw(100, 4), make_generator(0, CPU)
    values = []
    for size in (1, 7, 100):
        anomaly = Typicality()
        anomaly.prepare(StandardNormal(), x.split(size), generator)
        values.append(anomaly.entropy_)
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_typicality_is_the_distance_from_the_entropy_on_either_side():
    anomaly, features = prepared(2), 2
    radius = torch.linspace(0, 4, 41, dtype=torch.float64)
    x = torch.stack([radius, torch.zeros_like(radius)], 1)
    expected = (radius**2 / 2 + math.log(2 * math.pi) - anomaly.entropy_).abs()
    a = anomaly(StandardNormal(), x, make_generator(0, CPU))
    torch.testing.assert_close(a, expected)
    # It vanishes where the density is what it is on average: at |x|^2 = D.
    assert float(radius[a.argmin()]) == pytest.approx(math.sqrt(features), abs=0.1)


def test_the_mode_of_a_gaussian_in_1000_dimensions():
    """Most likely of all places, and one where no sample ever falls."""
    x = torch.cat([torch.zeros(1, 1000, dtype=torch.float64), draw(500, 1000, seed=1)])
    generator = make_generator(0, CPU)
    assert Likelihood()(StandardNormal(), x, generator).argmin() == 0
    a = prepared(1000)(StandardNormal(), x, generator)
    assert a.argmax() == 0
    assert float(a[0]) == pytest.approx(500, rel=0.01)  # H + log p(0) = D / 2
    assert float(a[1:].max()) < 5 * math.sqrt(500)


@pytest.mark.parametrize("anomaly", [Likelihood(), prepared(3)], ids=["likelihood", "typicality"])
def test_a_row_counts_alone(anomaly):
    x, model, generator = draw(20, 3), StandardNormal(), make_generator(0, CPU)
    a = anomaly(model, x, generator)
    assert a.shape == (20,)
    assert torch.equal(anomaly(model, x.flip(0), generator), a.flip(0))
    assert torch.equal(torch.cat([anomaly(model, row, generator) for row in x.split(1)]), a)
    others = x.clone()
    others[1:] = 1e6
    assert anomaly(model, others, generator)[0] == a[0]


def test_only_a_density_has_the_units_of_the_data():
    """Stretching a column by c shifts log-densities by log c; the distance from the entropy stays."""
    X = np.random.default_rng(0).normal(size=(100, 2))
    nats = math.log(1e3)
    shift = {
        **dict.fromkeys(("likelihood", "energy", "elbo", "iwae", "reconstruction_probability"), nats),
        **dict.fromkeys(("typicality", "score_norm", "kl", "likelihood_regret", "reconstruction_error"), 0.0),
    }
    # Those of denoisers have tests of their own: test_diffusion_anomaly, test_hybrid.
    denoising = {"closed_form", "combined", "denoising_error", "diffusion_time", "path", "reconstruction"}
    assert shift.keys() == ANOMALIES.keys() - denoising
    for name, expected in shift.items():
        family = next(f for f in (FlowDetector, EnergyDetector, VAEDetector) if name in f._anomalies)
        detector = family(anomaly=name, hidden_features=8, max_iter=5, random_state=0, device="cpu")
        before = detector.fit(X).score_samples(X)
        after = detector.fit(X * [1, 1e-3]).score_samples(X * [1, 1e-3])
        np.testing.assert_allclose(after - before, expected, atol=1e-4)
