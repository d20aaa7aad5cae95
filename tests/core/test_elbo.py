"""The evidence lower bound as a loss: what it weighs, what it charges, and that nothing is left without a gradient."""

import math

import pytest
import torch
from sklearn.base import clone
from torch import nn

from anomalib_gen._runtime import make_generator
from anomalib_gen.models import OBSERVATIONS, VAEModel
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import OBJECTIVES, EvidenceLowerBound

CPU = torch.device("cpu")


def perceptron(n_inputs, n_outputs):
    return ResidualMLP(n_inputs, n_outputs, hidden_features=8, n_blocks=1, zero_output=False)


def make_model(observation="gaussian", factory=perceptron, features=4, n_components=3, seed=0):
    settings = {} if observation == "bernoulli" else {"noise": 0.02}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VAEModel(
            factory,
            factory,
            OBSERVATIONS[observation](features, **settings),
            features=features,
            n_components=n_components,
        )


def draw(n, features=4, seed=0):
    return torch.randn(n, features, generator=make_generator(seed, CPU))


def parts(model, x):
    """Loss without divergence, and the divergence of each dimension, with the noise of the objective's first draw."""
    likelihood = EvidenceLowerBound(beta=0.0)(model, x, make_generator(0, CPU))
    return likelihood, model.encode(x).kl()


def test_the_loss_is_minus_the_bound():
    model, x = make_model(), draw(20)
    loss = EvidenceLowerBound()(model, x, make_generator(0, CPU))
    noise = draw(20, 3)  # the same draws: one generator, one shape
    torch.testing.assert_close(loss, -model.elbo(x, noise))


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_weighs_the_divergence(beta):
    model, x = make_model(), draw(20)
    likelihood, kl = parts(model, x)
    loss = EvidenceLowerBound(beta=beta)(model, x, make_generator(0, CPU))
    torch.testing.assert_close(loss, likelihood + beta * kl.sum(1))


def test_warm_up_is_a_straight_line_to_beta():
    objective = EvidenceLowerBound(beta=2.0, warmup=0.4)
    assert objective.weight == 2.0  # nobody tells the time: no warm-up
    weights = []
    for fraction in (0.0, 0.1, 0.2, 0.4, 0.9):
        objective.set_progress(fraction)
        weights.append(objective.weight)
    assert weights == pytest.approx([0.0, 0.5, 1.0, 2.0, 2.0])
    without = EvidenceLowerBound(warmup=0.0)
    without.set_progress(0.0)
    assert without.weight == 1.0


@pytest.mark.parametrize("n_draws", [1, 3])
def test_warm_up_scales_the_divergence_alone(n_draws):
    model, x = make_model(), draw(20)
    objective = EvidenceLowerBound(warmup=0.5, n_draws=n_draws)
    objective.set_progress(0.25)
    expected = EvidenceLowerBound(beta=0.5, n_draws=n_draws)
    torch.testing.assert_close(
        objective(model, x, make_generator(0, CPU)), expected(model, x, make_generator(0, CPU))
    )


@pytest.mark.parametrize("free_bits", [0.01, 0.1, 100.0])
def test_free_bits_cost_nothing(free_bits):
    """Kingma et al. (2016), equation 15: the mean loss charges max(lambda, mean KL_j) for each dimension."""
    model, x = make_model(), draw(200)
    likelihood, kl = parts(model, x)
    loss = EvidenceLowerBound(free_bits=free_bits)(model, x, make_generator(0, CPU))
    expected = likelihood.mean() + kl.mean(0).clamp(min=free_bits).sum()
    torch.testing.assert_close(loss.mean(), expected)


def test_free_bits_keep_dimensions_open():
    """On rows of noise, whose columns have nothing to share, the divergence settles at the free bits, not at zero."""

    def divergence(free_bits):
        model, x = make_model(features=3, n_components=2), draw(256, 3, seed=1)
        objective, generator = EvidenceLowerBound(free_bits=free_bits, beta=4.0), make_generator(0, CPU)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            objective(model, x, generator).mean().backward()
            optimiser.step()
        return model.encode(x).kl().mean(0)

    assert float(divergence(0.0).detach().max()) < 0.03
    torch.testing.assert_close(divergence(0.3).detach(), torch.full((2,), 0.3), atol=0.03, rtol=0)


def test_more_draws_are_the_importance_weighted_bound():
    model, x = make_model(), draw(20)
    loss = EvidenceLowerBound(n_draws=5)(model, x, make_generator(0, CPU))
    generator = make_generator(0, CPU)
    noise = torch.stack([torch.randn(20, 3, generator=generator) for _ in range(5)])
    torch.testing.assert_close(loss, -model.iwae(x, noise))


@pytest.mark.parametrize("settings", [{}, {"n_draws": 3}, {"free_bits": 100.0}, {"free_bits": 0.05}], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("observation", sorted(OBSERVATIONS))
def test_every_parameter_gets_a_gradient_at_every_stage(observation, fraction, settings):
    model, x = make_model(observation), draw(50)
    if observation == "bernoulli":
        x = (x > 0).float()
    objective = EvidenceLowerBound(warmup=0.5, **settings)
    objective.set_progress(fraction)
    objective(model, x, make_generator(0, CPU)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # Row by row of each matrix: no unit is dead either.
        assert (
            (parameter.grad.flatten(1).abs().sum(1) > 0).all()
            if parameter.ndim > 1
            else (parameter.grad != 0).all()
        ), name


@pytest.mark.parametrize("settings", [{}, {"beta": 7.0}, {"warmup": 0.5}, {"free_bits": 1.0}], ids=str)
def test_held_out_rows_are_judged_by_the_plain_bound(settings):
    model, x = make_model(), draw(50)
    objective = EvidenceLowerBound(**settings)
    objective.set_progress(0.1)
    value = objective.validate(model, x, make_generator(0, CPU))
    assert torch.equal(value, objective.validate(model, x, make_generator(0, CPU)))
    generator = make_generator(0, CPU)
    draws = [torch.randn(50, 3, generator=generator) for _ in range(4)]
    torch.testing.assert_close(value, -torch.stack([model.elbo(x, e) for e in draws]).mean(0))


def test_importance_weighted_training_is_judged_by_its_own_bound():
    model, x = make_model(), draw(50)
    value = EvidenceLowerBound(n_draws=6).validate(model, x, make_generator(0, CPU))
    generator = make_generator(0, CPU)
    noise = torch.stack([torch.randn(50, 3, generator=generator) for _ in range(6)])
    torch.testing.assert_close(value, -model.iwae(x, noise))


@pytest.mark.parametrize("settings", [{}, {"n_draws": 3}], ids=str)
def test_the_generator_determines_the_noise(settings):
    model, x, objective = make_model(), draw(20), EvidenceLowerBound(**settings)
    state = torch.get_rng_state()
    first, again, other = (objective(model, x, make_generator(seed, CPU)) for seed in (0, 0, 1))
    assert first.shape == (20,)
    assert torch.equal(first, again)
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "beta of .* must be finite and not negative, got -1.0"),
        ({"beta": float("inf")}, "beta of .* must be finite and not negative, got inf"),
        ({"free_bits": "0.1"}, "free_bits of .* must be finite and not negative, got '0.1'"),
        ({"warmup": 1.5}, "warmup of .* at most 1, got 1.5"),
        ({"n_draws": 0}, "n_draws of .* must be a positive integer, got 0"),
        ({"n_draws": 2.0}, "n_draws of .* must be a positive integer, got 2.0"),
        ({"free_bits": 0.1, "n_draws": 2}, r"free bits need the divergence in closed form.*Set n_draws=1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EvidenceLowerBound(**settings)(make_model(), draw(2), make_generator(0, CPU))


def test_is_a_component():
    assert OBJECTIVES["elbo"] is EvidenceLowerBound
    objective = EvidenceLowerBound(beta=2.0, warmup=0.1)
    objective.set_progress(0.0)
    assert clone(objective).get_params() == {"beta": 2.0, "warmup": 0.1, "free_bits": 0.0, "n_draws": 1}
    assert not hasattr(clone(objective), "progress_")
    assert repr(objective) == "EvidenceLowerBound(beta=2.0, warmup=0.1)"


def test_the_constant_of_the_closed_form():
    """A linear decoder of weight zero says nothing of x: the loss is the Gaussian's, and the divergence on top."""
    model, x = make_model(factory=nn.Linear), draw(20)
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
            parameter.zero_()
        model.observation.log_deviation.fill_(0.0)
    s2 = 1 + 0.02**2
    expected = 0.5 * (x.square() / s2 + math.log(2 * math.pi * s2)).sum(1)
    torch.testing.assert_close(EvidenceLowerBound()(model, x, make_generator(0, CPU)), expected)
