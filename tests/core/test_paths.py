"""Noise paths: the algebra of alpha and sigma, and that all paths are one family in other clothes."""

import math

import pytest
import torch
from sklearn.base import clone

from anomalib_gen.models import ScoreDenoiser
from anomalib_gen.paths import (
    EDM,
    PATHS,
    CosineBetas,
    GeometricLadder,
    Linear,
    LinearBetas,
    VarianceExploding,
    VariancePreserving,
)

each_path = pytest.mark.parametrize("path", [kind() for kind in PATHS.values()], ids=list(PATHS))


def inner_times(path, n=101):
    low, high = path.time_range
    t = torch.linspace(low, high, n, dtype=torch.float64)
    # Off the steps of discrete paths, where derivatives jump.
    return (t[1:-1] + 0.37 / 1000 * (high - low)).clamp(max=high - 1e-9)


@each_path
def test_derivatives(path):
    t = inner_times(path).requires_grad_()
    for value, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        y = value(t)
        expected = torch.autograd.grad(y.sum(), t)[0] if y.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-8, atol=1e-8)


@each_path
def test_noise_grows_and_its_inverse_is_the_time(path):
    t = inner_times(path)
    levels = path.noise_level(t)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(path.time(levels), t, rtol=1e-7, atol=1e-9)
    low, high = path.noise_levels
    assert 0 < low < levels[0]
    assert levels[-1] < high
    assert (path.diffusion_squared(t) >= 0).all()


@each_path
def test_grids_rise_from_data_to_noise(path):
    for n_steps in (1, 7, 50):
        grid = path.grid(n_steps)
        assert len(grid) == n_steps + 1
        assert (grid.diff() > 0).all()
        torch.testing.assert_close(grid[[0, -1]], torch.tensor(path.time_range, dtype=torch.float64))
    if path.n_steps is None:
        with pytest.raises(ValueError, match="n_steps"):
            path.grid()


@each_path
def test_all_views_of_a_denoiser_say_the_same(path):
    """With the exact denoiser of N(0, v) every view is linear in the row and known in closed form."""
    v = 1.7
    t = inner_times(path, 12)
    x = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(y, level):
        return v / (v + level.square()).unsqueeze(1) * y

    p = path.predict(denoise, x, t)
    alpha, sigma = path.alpha(t).unsqueeze(1), path.sigma(t).unsqueeze(1)
    variance = alpha.square() * v + sigma.square()
    torch.testing.assert_close(p.score, -x / variance)
    torch.testing.assert_close(alpha * p.x0 + sigma * p.eps, x)
    torch.testing.assert_close(p.v, alpha * p.eps - sigma * p.x0)
    # The probability-flow equation keeps x / sqrt(variance) constant.
    rate = (alpha * path.alpha_dot(t).unsqueeze(1) * v + sigma * path.sigma_dot(t).unsqueeze(1)) / variance
    torch.testing.assert_close(p.velocity, rate * x, rtol=1e-6, atol=1e-8)
    drift, g2 = path.drift(t).unsqueeze(1), path.diffusion_squared(t).unsqueeze(1)
    torch.testing.assert_close(drift * x - 0.5 * g2 * p.score, p.velocity, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(path.velocity(denoise)(x, t), p.velocity)


@each_path
def test_added_noise_has_the_path_s_moments(path):
    generator = torch.Generator().manual_seed(0)
    t = torch.full((200_000,), path.grid(4)[2].item(), dtype=torch.float64)
    x = torch.full((len(t), 1), 2.0, dtype=torch.float64)
    e = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    noised = path.add_noise(x, t, e)
    alpha, sigma = path.alpha(t[0]).item(), path.sigma(t[0]).item()
    assert noised.mean().item() == pytest.approx(2 * alpha, abs=5 * sigma / math.sqrt(len(t)))
    assert noised.std().item() == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize("path", [LinearBetas(n_steps=50, beta_max=0.3), CosineBetas(n_steps=50)])
def test_discrete_paths_are_their_products_at_the_steps(path):
    betas = path.betas()
    assert len(betas) == 50
    assert ((betas > 0) & (betas <= 0.999)).all()
    steps = path.grid()
    torch.testing.assert_close(path.alpha(steps).square(), torch.cumprod(1 - betas, 0))
    torch.testing.assert_close(path.sigma(steps).square(), 1 - torch.cumprod(1 - betas, 0))
    # A coarser grid goes through steps only.
    coarse = path.grid(9) * 50
    torch.testing.assert_close(coarse, coarse.round())


def test_the_cosine_schedule_is_the_published_one():
    u = torch.tensor([0.25, 0.5], dtype=torch.float64)
    g = torch.cos(0.5 * math.pi * (u + 0.008) / 1.008).square() / math.cos(0.5 * math.pi * 0.008 / 1.008) ** 2
    torch.testing.assert_close(CosineBetas().alpha(u).square(), g)


def test_the_ladder_is_the_exploding_path_at_its_steps():
    ladder, continuous = GeometricLadder(n_steps=10), VarianceExploding()
    t = ladder.grid()
    torch.testing.assert_close(ladder.sigma(t), continuous.sigma(t))
    ratios = ladder.sigma(t)[1:] / ladder.sigma(t)[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_other_grids_of_the_ladder_go_through_its_steps():
    """A network that was trained on the ladder knows no levels between its steps."""
    ladder = GeometricLadder(n_steps=10)
    for n_steps in (1, 3, 4, 9):
        grid = ladder.grid(n_steps)
        assert len(grid) == n_steps + 1
        assert set(grid.tolist()) <= set(ladder.grid().tolist())
        assert (grid.diff() > 0).all()
    assert torch.equal(ladder.grid(25), ladder.grid())


@each_path
def test_a_path_is_a_component(path):
    assert repr(clone(path)) == repr(path)


@pytest.mark.parametrize(
    "path",
    [
        EDM(sigma_min=0.0),
        EDM(sigma_min=2.0, sigma_max=1.0),
        VarianceExploding(sigma_min=1.0, sigma_max=1.0),
        VarianceExploding(sigma_min=0.0),
        GeometricLadder(sigma_max=-1.0),
        VariancePreserving(time_min=0.0),
        VariancePreserving(beta_min=-1.0),
        Linear(time_min=0.0),
        Linear(time_max=1.0),
        LinearBetas(n_steps=1),
        LinearBetas(beta_max=1.0),
        LinearBetas(beta_max=1.5),
        CosineBetas(offset=-0.1),
    ],
    ids=str,
)
def test_levels_that_are_none_are_refused(path):
    name = type(path).__name__
    for meet in (lambda: path.noise_levels, lambda: ScoreDenoiser(torch.nn.Identity(), path)):
        with pytest.raises(
            ValueError, match=rf"{name}\(.*\) has noise levels from .* must be positive, finite"
        ):
            meet()


def test_grids_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"n_steps must be a positive integer, got LinearBetas\(n_steps=0\)"):
        _ = LinearBetas(n_steps=0).noise_levels
    with pytest.raises(
        ValueError, match=r"n_steps must be a positive integer, got CosineBetas\(n_steps=2.5\)"
    ):
        _ = CosineBetas(n_steps=2.5).noise_levels
    with pytest.raises(ValueError, match=r"parameters of VarianceExploding\(sigma_min='a'\) must be numbers"):
        _ = VarianceExploding(sigma_min="a").noise_levels
    with pytest.raises(ValueError, match="rho must be positive and finite"):
        EDM(rho=0.0).grid(3)
