"""Maximum likelihood adds the noise it states, at the levels it states, and nothing else."""

import math

import pytest
import torch
from scipy import stats
from sklearn.base import clone

from anomalib_gen._runtime import make_generator
from anomalib_gen.objectives import OBJECTIVES, MaximumLikelihood

CPU = torch.device("cpu")
LEVELS = (0.02, 1.5)


class Recorder:
    """A standard normal density of events of any shape, which remembers what it was asked."""

    def __init__(self, noise_levels=None, grain=None):
        self.noise_levels, self.grain = noise_levels, grain

    def log_prob(self, x, noise=None):
        self.x, self.noise = x, noise
        return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def zeros(n, *event_shape):
    return torch.zeros(n, *event_shape, dtype=torch.float64)


def rows(n, features):
    return torch.randn(n, features, dtype=torch.float64, generator=make_generator(5, CPU))


def is_normal(values):
    return stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3


def test_without_noise_it_is_minus_the_log_density():
    model, x, generator = Recorder(), rows(20, 3), make_generator(0, CPU)
    before = generator.get_state()
    torch.testing.assert_close(MaximumLikelihood()(model, x, generator), -model.log_prob(x), rtol=0, atol=0)
    assert torch.equal(model.x, x)
    assert torch.equal(generator.get_state(), before)


def test_fixed_noise():
    model, x = Recorder(), rows(4000, 3)
    loss = MaximumLikelihood(noise=0.3)(model, x, make_generator(0, CPU))
    assert is_normal((model.x - x) / 0.3)
    assert model.noise is None
    # E[-log N(x + s e)] = -log N(x) + D s^2 / 2 for a standard normal.
    excess = float((loss + Recorder().log_prob(x)).mean())
    assert excess == pytest.approx(3 * 0.3**2 / 2, abs=5 * 0.3 * math.sqrt(3 / 4000))


@pytest.mark.parametrize("event_shape", [(1,), (4,), (1, 3, 2)])
def test_noise_levels_are_log_uniform_and_known_to_the_model(event_shape):
    model = Recorder(LEVELS)
    loss = MaximumLikelihood(noise=123.0)(model, zeros(4000, *event_shape), make_generator(0, CPU))
    assert loss.shape == model.noise.shape == (4000,)
    low, high = (math.log(level) for level in LEVELS)
    assert model.noise.min() >= LEVELS[0]
    assert model.noise.max() <= LEVELS[1]
    share = (model.noise.log() - low) / (high - low)
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    # Each row has the noise of its own level, in all of its places.
    e = model.x / model.noise.reshape(-1, *([1] * len(event_shape)))
    assert is_normal(e)
    assert float((e.square().mean(0) - 1).abs().max()) < 5 * math.sqrt(2 / 4000)
    # ... and independent of that level.
    assert abs(stats.spearmanr(model.noise.numpy(), e.flatten(1)[:, 0].abs().numpy()).statistic) < 0.08


def test_grain_adds_to_each_column_noise_of_its_own_width():
    grain = torch.tensor([0.0, 0.5], dtype=torch.float64)
    model = Recorder(grain=grain)
    MaximumLikelihood()(model, zeros(4000, 2), make_generator(0, CPU))
    assert torch.equal(model.x[:, 0], zeros(4000))
    assert is_normal(model.x[:, 1] / 0.5)
    model = Recorder((0.1, 0.1000001), grain)
    MaximumLikelihood()(model, zeros(4000, 2), make_generator(0, CPU))
    assert is_normal(model.x[:, 0] / 0.1)
    assert is_normal(model.x[:, 1] / math.hypot(0.1, 0.5))


@pytest.mark.parametrize("levels", [None, LEVELS])
def test_validation_is_without_noise_and_at_the_level_of_scoring(levels):
    model, x = Recorder(levels), rows(20, 3)
    loss = MaximumLikelihood(noise=0.5).validate(model, x, make_generator(0, CPU))
    assert torch.equal(model.x, x)
    assert model.noise is None
    torch.testing.assert_close(loss, -Recorder().log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [None, LEVELS])
def test_the_generator_determines_the_noise(levels):
    objective, x = MaximumLikelihood(noise=0.5), rows(20, 3)
    state = torch.get_rng_state()
    first, again, other = (objective(Recorder(levels), x, make_generator(seed, CPU)) for seed in (0, 0, 1))
    assert first.shape == (20,)
    assert torch.equal(first, again)
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_is_a_component():
    assert OBJECTIVES["likelihood"] is MaximumLikelihood
    assert clone(MaximumLikelihood(noise=0.5)).get_params() == {"noise": 0.5}
    assert repr(MaximumLikelihood(noise=0.5)) == "MaximumLikelihood(noise=0.5)"
