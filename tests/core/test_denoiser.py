"""Denoisers: Tweedie's formula, the parametrisations, and the closed-form mixture against numerical truth."""

import math

import pytest
import torch

from anomalib_gen._runtime import forked_rng
from anomalib_gen.models import GaussianMixtureEnergy, NetworkDenoiser, ScoreDenoiser
from anomalib_gen.models.denoiser import LEVEL_FEATURES, PARAMETRIZATIONS
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.paths import EDM, PATHS, VariancePreserving


def mixture():
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.4]], [[0.3, -0.2], [-0.2, 0.5]]], dtype=torch.float64)
    return GaussianMixtureEnergy(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=torch.float64),
        torch.linalg.cholesky(covariances),
    )


def rows(n=40, d=2, seed=0):
    return 2 * torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mixture_s_denoiser_is_the_posterior_mean_by_integration():
    truth, x = mixture(), rows(6)
    model = ScoreDenoiser(truth, EDM())
    level = torch.full((len(x),), 0.7, dtype=torch.float64)
    axis = torch.linspace(-7, 7, 701, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = (-truth.energy(grid).detach()).exp()
    likelihood = torch.exp(-0.5 * torch.cdist(x, grid).square() / 0.7**2)
    weight = prior * likelihood
    expected = weight @ grid / weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.denoise(x, level).detach(), expected, rtol=1e-6, atol=1e-6)


class Oracle(torch.nn.Module):
    """The network output that makes the denoiser of N(0, v) exact, by solving for F."""

    def __init__(self, parametrization, v, d, low, high):
        super().__init__()
        self.parametrization, self.v, self.d, self.low, self.high = parametrization, v, d, low, high

    def forward(self, y, context):
        log_ratio = math.log(self.high / self.low)
        s = torch.exp((context[:, :1] * log_ratio + math.log(self.low * self.high)) / 2)
        x = y * (s.square() + self.d**2).sqrt()
        clean = self.v / (self.v + s.square()) * x
        return {
            "x0": clean,
            "eps": (x - clean) / s,
            "v": (x - (1 + s.square()) * clean) / (s * (1 + s.square()).sqrt()),
            "edm": (clean - self.d**2 / (s.square() + self.d**2) * x)
            * (s.square() + self.d**2).sqrt()
            / (s * self.d),
        }[self.parametrization]


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", list(PATHS))
def test_neither_parametrization_nor_path_changes_the_denoiser(parametrization, name):
    path, grain = PATHS[name](), 0.5
    d = math.sqrt(1 + grain**2)
    network = Oracle(parametrization, 0.6, d, *path.noise_levels)
    model = NetworkDenoiser(
        network, path, parametrization=parametrization, grain=torch.tensor(grain, dtype=torch.float64)
    )
    x = rows()
    level = torch.logspace(-0.9, 0.6, len(x), dtype=torch.float64)
    expected = 0.6 / (0.6 + level.square()).unsqueeze(1) * x
    torch.testing.assert_close(model.denoise(x, level), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        model.score(x, level), -x / (0.6 + level.square()).unsqueeze(1), rtol=1e-5, atol=1e-5
    )
    # Seen on the path at the time of that level.
    t = path.time(level)
    p = model.predict(path.alpha(t).unsqueeze(1) * x, t)
    torch.testing.assert_close(p.x0, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_far_rows_leave_a_residual_that_grows(parametrization):
    with forked_rng(0):
        network = ResidualMLP(3, 3, context_features=LEVEL_FEATURES, zero_output=False).double()
    model = NetworkDenoiser(network, VariancePreserving(), parametrization=parametrization)
    direction = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    x = torch.logspace(2, 6, 9, dtype=torch.float64).unsqueeze(1) * direction
    for level in (0.01, 1.0, 50.0):
        residual = (x - model.denoise(x, torch.full((9,), level, dtype=torch.float64))).norm(dim=1)
        assert residual.isfinite().all()
        assert (residual.diff() > 0).all()


def test_learned_variances_come_beside_the_denoiser():
    with forked_rng(0):
        network = ResidualMLP(2, 4, context_features=LEVEL_FEATURES)
    model = NetworkDenoiser(network, EDM(), learned_variance=True)
    x, level = rows().float(), torch.ones(40)
    clean, share = model.denoise_and_variance(x, level)
    torch.testing.assert_close(clean, 0.5 * x)  # an untrained network leaves the linear denoiser
    torch.testing.assert_close(share, torch.full_like(x, 0.5))
    torch.testing.assert_close(model.denoise(x, level), clean)


def test_an_unknown_parametrization_is_refused():
    with pytest.raises(ValueError, match=r"'noise' is unknown\. Known: 'edm', 'v', 'eps', 'x0'"):
        NetworkDenoiser(torch.nn.Identity(), EDM(), parametrization="noise")
