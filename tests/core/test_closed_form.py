"""Energies in closed form agree with enumeration, integration and each other."""

import itertools
import math

import numpy as np
import pytest
import torch

from anomalib_gen._runtime import make_generator
from anomalib_gen.models import (
    BinaryRBM,
    GaussianBernoulliRBM,
    GaussianEnergy,
    GaussianMixtureEnergy,
    QuadraticEnergy,
)
from anomalib_gen.samplers import score_of

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed, CPU), dtype=torch.float64)


def make_mixture(dtype=torch.float64):
    return GaussianMixtureEnergy(
        torch.tensor([0.3, 0.7], dtype=dtype).log(),
        torch.tensor([[-1.0, 0.3], [0.8, -0.2]], dtype=dtype),
        torch.tensor([[[0.6, 0.0], [0.2, 0.5]], [[0.5, 0.0], [-0.3, 0.6]]], dtype=dtype),
    )


def make_gaussian():
    return GaussianEnergy(draw(2), torch.tensor([[1.3, 0.0], [0.4, 0.8]], dtype=torch.float64))


def make_quadratic():
    return QuadraticEnergy(torch.tensor([[2.0, 0.3], [0.5, 1.0]], dtype=torch.float64), draw(2, seed=1))


def make_gb_rbm():
    return GaussianBernoulliRBM(0.5 * draw(2, 3), draw(2, seed=1), draw(3, seed=2), 0.3 * draw(2, seed=3))


def make_rbm(n_visible=4, n_hidden=3):
    return BinaryRBM(draw(n_visible, n_hidden), draw(n_visible, seed=1), draw(n_hidden, seed=2))


CONTINUOUS = [make_mixture, make_gaussian, make_quadratic, make_gb_rbm]


def grid(half_width=12.0, n=801):
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@torch.no_grad()
@pytest.mark.parametrize("make", CONTINUOUS)
def test_the_partition_function_is_the_integral(make):
    model = make()
    x, cell = grid()
    assert float((-model.energy(x)).logsumexp(0)) + math.log(cell) == pytest.approx(
        float(model.log_partition()), abs=1e-6
    )


@pytest.mark.parametrize("make", CONTINUOUS)
def test_the_score_is_minus_the_gradient(make):
    model, x = make(), draw(6, 2)
    h = 1e-6
    for j in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[j]
        slope = (model.energy(x + step) - model.energy(x - step)) / (2 * h)
        torch.testing.assert_close(model.score(x)[:, j], -slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [*CONTINUOUS, make_rbm])
def test_every_parameter_learns(make):
    model = make()
    x = torch.ones(3, 4, dtype=torch.float64) if make is make_rbm else draw(3, 2)
    (model(x).sum() + model.log_partition()).backward()
    # A mixture's log-weights enter through log Z alone: only their differences count.
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_an_indefinite_quadratic_has_no_constant():
    model = QuadraticEnergy(torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2))
    assert float(model.log_partition()) == math.inf


@torch.no_grad()
def test_the_gaussian_samples_have_its_moments():
    model = make_gaussian()
    x = model.sample(40_000, make_generator(0, CPU))
    factor = model.precision_factor.tril()
    torch.testing.assert_close(x.mean(0), model.mean.data, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), torch.linalg.inv(factor @ factor.T), atol=0.05, rtol=0)


@torch.no_grad()
def test_the_noised_mixture_is_the_convolution():
    model, s = make_mixture(), 0.4
    x, cell = grid(6.0, 241)
    point = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((x - point) / s).square().sum(1)) / (2 * math.pi * s**2)
    expected = float((kernel * torch.exp(-model.energy(x))).sum() * cell)
    noise = torch.full((1,), s, dtype=torch.float64)
    assert float(torch.exp(-model.energy(point, noise))) == pytest.approx(expected, rel=1e-6)
    exact = score_of(model.energy)(point, noise)
    torch.testing.assert_close(model.score(point, noise), exact)


@torch.no_grad()
def test_mixture_samples_have_the_mixture_s_mean():
    model = make_mixture()
    x = model.sample(40_000, make_generator(0, CPU))
    expected = (model.log_weights.softmax(0).unsqueeze(1) * model.means).sum(0)
    torch.testing.assert_close(x.mean(0), expected, atol=0.03, rtol=0)


# Boltzmann machines ---------------------------------------------------------------------------------------


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(("n_visible", "n_hidden"), [(4, 3), (3, 5)])
def test_the_free_energy_sums_out_the_hidden_units(n_visible, n_hidden):
    model = make_rbm(n_visible, n_hidden)
    v, h = states(n_visible), states(n_hidden)
    joint = torch.stack([-model.joint_energy(v, row.expand(len(v), -1)) for row in h])
    torch.testing.assert_close(model.energy(v), -joint.logsumexp(0))
    torch.testing.assert_close(model.log_partition(), joint.flatten().logsumexp(0))


@torch.no_grad()
def test_the_pseudo_likelihood_is_made_of_conditionals():
    model, v = make_rbm(), states(4)
    log_p = -model.energy(v)
    expected = torch.zeros(len(v), dtype=torch.float64)
    for i in range(4):
        flipped = v.clone()
        flipped[:, i] = 1 - flipped[:, i]
        expected += log_p - torch.logaddexp(log_p, -model.energy(flipped))
    torch.testing.assert_close(model.pseudo_log_likelihood(v), expected)


@torch.no_grad()
def test_gibbs_sampling_reaches_the_exact_distribution():
    model, generator = make_rbm(3, 2), make_generator(0, CPU)
    x = torch.zeros(40_000, 3, dtype=torch.float64)
    for _ in range(30):
        x = model.gibbs(x, generator)
    counts = torch.bincount((x @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long(), minlength=8)
    expected = torch.exp(-model.energy(states(3)) - model.log_partition())
    np.testing.assert_allclose(counts / len(x), expected, atol=0.01)


@torch.no_grad()
def test_gibbs_sampling_of_real_units_has_the_mixture_s_mean():
    model, generator = make_gb_rbm(), make_generator(0, CPU)
    x = torch.zeros(40_000, 2, dtype=torch.float64)
    for _ in range(30):
        x = model.gibbs(x, generator)
    points, cell = grid()
    p = torch.exp(-model.energy(points) - model.log_partition()) * cell
    torch.testing.assert_close(x.mean(0), (p.unsqueeze(1) * points).sum(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("kind", "shapes", "match"),
    [
        (GaussianEnergy, [(1,), (3, 3)], r"precision_factor must have the shape \(1, 1\), got \(3, 3\)"),
        (GaussianEnergy, [(3,), (3,)], "precision_factor must"),
        (QuadraticEnergy, [(3, 3), ()], "matrix must"),
        (GaussianMixtureEnergy, [(2,), (2, 3), (3, 3)], r"factors must have the shape \(2, 3, 3\)"),
        (BinaryRBM, [(3, 4), (4,), (3,)], r"weights must have the shape \(4, 3\), got \(3, 4\)"),
        (GaussianBernoulliRBM, [(3, 4), (3,), (4,), ()], r"log_scale must have the shape \(3,\), got \(\)"),
        (GaussianBernoulliRBM, [(3, 4), (3,), (4,), (1,)], "log_scale must"),
        (GaussianBernoulliRBM, [(3, 4), (1,), (4,), (3,)], "weights must"),
    ],
)
def test_parameters_that_would_broadcast_are_refused(kind, shapes, match):
    # The energy would be right, and log Z that of fewer columns.
    with pytest.raises(ValueError, match=match):
        kind(*(torch.ones(shape) for shape in shapes))


def test_enumeration_has_a_limit():
    model = BinaryRBM(torch.zeros(21, 22), torch.zeros(21), torch.zeros(22))
    with pytest.raises(ValueError, match="at most 20 units on one side, got 21"):
        model.log_partition()
