"""Anomalies of denoisers: values in closed form for normal data and point masses, and what holds for all of them."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors

from anomalib_gen._runtime import forked_rng, make_generator, normal_noise
from anomalib_gen.anomaly import (
    ANOMALIES,
    DenoisingError,
    DiffusionELBO,
    DiffusionPath,
    DiffusionReconstruction,
    DiffusionTime,
    ODELikelihood,
    ScoreNorm,
    Typicality,
)
from anomalib_gen.anomaly._feature_density import (
    DENSITIES,
    ROWS_PER_CHUNK,
    fit_density,
    fit_gaussians,
    keep_rows,
    nearest_square_distances,
    shrunk_covariance,
)
from anomalib_gen.anomaly._levels import DATA_LEVELS, balanced_noise, level_ladder, way_back
from anomalib_gen.models import (
    EnergyModel,
    GaussianMixtureEnergy,
    GaussianNoise,
    InverseGammaTime,
    NetworkDenoiser,
    ScoreDenoiser,
    TimeClassifier,
)
from anomalib_gen.models.denoiser import LEVEL_FEATURES, Denoiser
from anomalib_gen.networks import MLP, ResidualMLP
from anomalib_gen.objectives import DiffusionTimeEstimation
from anomalib_gen.paths import EDM, PATHS, VarianceExploding, VariancePreserving

CPU = torch.device("cpu")
WIDE = EDM(sigma_min=1e-4, sigma_max=1e4)
LIMIT = 714.0
"""The largest float64, compressed."""


def generator(seed=0):
    return make_generator(seed, CPU)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def full(x, value):
    return x.new_full((len(x),), value)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of N(0, v I), for events of any shape."""

    def __init__(self, v, path=None):
        super().__init__(EDM() if path is None else path)
        self.v = v

    def denoise(self, x, level):
        level = level.reshape(-1, *[1] * (x.ndim - 1))
        return self.v / (self.v + level.square()) * x


def oracle(v=0.3, features=2, path=None):
    """The same by way of a mixture's scores."""
    factor = math.sqrt(v) * torch.eye(features, dtype=torch.float64)
    energy = GaussianMixtureEnergy(
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, features, dtype=torch.float64),
        factor[None],
    )
    return ScoreDenoiser(energy, EDM() if path is None else path)


def two_modes():
    """Two narrow modes at (-1, 0) and (1, 0)."""
    energy = GaussianMixtureEnergy(
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
        0.05 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2).clone(),
    )
    return ScoreDenoiser(energy, EDM())


def untrained(parametrization="edm"):
    with forked_rng(0):
        network = ResidualMLP(
            2, 2, hidden_features=16, context_features=LEVEL_FEATURES, zero_output=False
        ).double()
    return NetworkDenoiser(network, VariancePreserving(), parametrization=parametrization)


def ladder(low, high, n):
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)[:, None, None]


def clusters(n=400):
    z = 0.1 * draw(n, 2)
    z[: n // 4] += torch.tensor([2.0, 0.0])
    return z


# The ladder and the noise ---------------------------------------------------------------------------------


def test_the_ladder_is_the_common_part_of_both_ranges():
    assert DATA_LEVELS == (0.02, 5.0)
    torch.testing.assert_close(
        level_ladder(GaussianDenoiser(1.0), DATA_LEVELS, 6), ladder(0.02, 5, 6).flatten().tolist()
    )
    narrow = GaussianDenoiser(1.0, VarianceExploding(sigma_min=0.1, sigma_max=2.0))
    assert level_ladder(narrow, DATA_LEVELS, 3) == pytest.approx([0.1, math.sqrt(0.2), 2.0])
    assert level_ladder(narrow, (0.5, 0.5), 2) == pytest.approx([0.5, 0.5])
    assert level_ladder(narrow, (3.0, 9.0), 2) == pytest.approx([2.0, 2.0])
    assert level_ladder(narrow, (0.01, 0.02), 2) == pytest.approx([0.1, 0.1])
    assert level_ladder(narrow, DATA_LEVELS, 1) == pytest.approx([0.1])


def test_noise_comes_in_pairs_that_rows_share():
    x = draw(7, 3, 2)
    noise = balanced_noise(x, 5, generator())
    assert [e.shape for e in noise] == [(3, 2)] * 5
    assert torch.equal(noise[0], -noise[1])
    assert torch.equal(noise[2], -noise[3])
    assert not torch.equal(noise[0], noise[2])
    assert torch.equal(noise[0], normal_noise((3, 2), x, generator()))


# Denoising error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [GaussianDenoiser(0.3), oracle(0.3)], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("weighting", "power"), [("x0", 0), ("eps", 2), ("score", 4)])
def test_denoising_errors_of_normal_data(model, weighting, power):
    v, x, s = 0.3, draw(20, 2), ladder(0.02, 5, 10)
    residual = s**2 * x / (v + s**2)
    expected = (residual.square() / s**power).mean((0, 2))
    a = DenoisingError(weighting=weighting, add_noise=False)(model, x, generator())
    torch.testing.assert_close(a, expected)
    # Two draws are a pair: what is odd in the noise is gone.
    e = normal_noise((2,), x, generator())
    noise = v * s * e / (v + s**2)
    a = DenoisingError(weighting=weighting, n_draws=2)(model, x, generator())
    torch.testing.assert_close(a, expected + (noise.square() / s**power).mean((0, 2)))


def test_one_draw_leaves_what_is_odd_in_the_noise():
    x, e = draw(9, 2), normal_noise((2,), draw(1, 2), generator())
    part = DenoisingError(n_draws=1, n_levels=1, noise_levels=(0.7, 0.7))(oracle(0.3), x, generator())
    share = 0.3 / (0.3 + 0.49)
    expected = ((share * (x + 0.7 * e) - x) / 0.7).square().mean(1)
    torch.testing.assert_close(part, expected)


def test_the_expected_denoising_error_of_normal_data():
    x, s = draw(5, 400), ladder(0.02, 5, 10)
    expected = ((s * x / (0.3 + s**2)).square() + (0.3 / (0.3 + s**2)) ** 2).mean((0, 2))
    a = DenoisingError(n_draws=100)(GaussianDenoiser(0.3), x, generator())
    torch.testing.assert_close(a, expected, rtol=0.02, atol=0.0)


def test_integrated_over_log_levels_the_error_in_the_noise_is_mahalanobis_distance():
    low, high, n = 1e-4, 1e4, 400
    x = draw(10, 2)
    part = DenoisingError(n_levels=n, noise_levels=(low, high), add_noise=False)
    for v in (0.1, 2.0):
        a = part(GaussianDenoiser(v, WIDE), x, generator())
        # (The mean over levels counts the ends fully, where there is nothing.)
        integral = a * 2 * math.log(high / low) * n / (n - 1)
        torch.testing.assert_close(integral, x.square().sum(1) / (2 * v), rtol=1e-3, atol=0.0)


# Reconstruction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [GaussianDenoiser(0.3), oracle(0.3)], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("norm", "power"), [("squared", 2), ("absolute", 1)])
def test_reconstructions_in_one_step_of_normal_data(model, norm, power):
    x, s = draw(20, 2), ladder(0.02, 5, 5)
    expected = (s * x / (0.3 + s**2)).abs().pow(power).mean((0, 2))
    part = DiffusionReconstruction(n_steps=1, norm=norm)
    torch.testing.assert_close(part(model, x, generator()), expected)


def test_in_one_step_it_is_the_denoising_error_in_the_noise():
    x, model = draw(20, 2), two_modes()
    for noise in (True, False):
        a = DiffusionReconstruction(n_steps=1, add_noise=noise)(model, x, generator())
        b = DenoisingError(n_levels=5, add_noise=noise)(model, x, generator())
        torch.testing.assert_close(a, b)


def test_many_steps_follow_the_probability_flow_at_first_order():
    """For N(0, v) its solution from s to l is y sqrt((v + l^2) / (v + s^2)); the denoiser takes the last step."""
    v, s, low, x = 0.3, 2.0, 0.02, draw(6, 2)
    model = GaussianDenoiser(v)
    exact = x * math.sqrt((v + low**2) / (v + s**2)) * v / (v + low**2)
    errors = []
    for n in (25, 50, 100, 200):
        end = way_back(model, x, s, low, n)
        errors.append(float((end - exact).abs().max()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert ratios == pytest.approx([2, 2, 2], abs=0.2)
    a = DiffusionReconstruction(noise_levels=(s, s), n_levels=1, n_steps=1)(model, x, generator())
    torch.testing.assert_close(a, ((x * v / (v + s**2) - x) / s).square().mean(1))


def test_one_step_ends_between_the_modes_and_many_in_one_of_them():
    x = torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    with torch.inference_mode():
        ends = [float(way_back(two_modes(), x, 1.0, 0.02, n)[0, 0]) for n in (1, 50)]
    assert ends[0] == pytest.approx(math.tanh(0.3), abs=0.01)
    # It keeps its place among the rows of its half, of which it is one of the inner ones.
    assert ends[1] == pytest.approx(1 - 0.05, abs=0.03)


@pytest.mark.parametrize("n_levels", [1, 3])
def test_the_way_back_from_a_single_level_has_its_steps(n_levels):
    """Many of them end where the probability flow does, and one where the denoiser does, much farther off."""
    v, s, low, x = 0.3, 2.0, 0.02, draw(6, 2)
    part = DiffusionReconstruction(noise_levels=(s, s), n_levels=n_levels, n_steps=400)
    exact = x * math.sqrt((v + low**2) / (v + s**2)) * v / (v + low**2)
    a = part(GaussianDenoiser(v), x, generator())
    torch.testing.assert_close(a, ((exact - x) / s).square().mean(1), rtol=0.02, atol=0)
    assert (a < 0.7 * ((v / (v + s**2) - 1) * x / s).square().mean(1)).all()


def test_from_the_lowest_level_of_a_ladder_there_is_one_step():
    model, asked = GaussianDenoiser(0.3), []
    denoise = model.denoise
    model.denoise = lambda x, level: asked.append(float(level[0])) or denoise(x, level)
    DiffusionReconstruction(n_levels=3, n_steps=4)(model, draw(2, 2), generator())
    assert len(asked) == 1 + 4 + 4
    assert min(asked) == asked[0] == pytest.approx(0.02)


def test_noise_before_the_way_back():
    """With one step and a pair of draws, what noise adds to normal data does not depend on the row."""
    x, s = draw(20, 2), ladder(0.02, 5, 5)
    part = DiffusionReconstruction(n_steps=1, n_draws=2)
    bare = part(oracle(0.3), x, generator())
    noised = part.set_params(add_noise=True)(oracle(0.3), x, generator())
    e = normal_noise((2,), x, generator())
    added = (0.3 * e / (0.3 + s**2)).square().mean()
    torch.testing.assert_close(noised - bare, added.expand(20))


# Score norms ----------------------------------------------------------------------------------------------


def test_score_norms_of_normal_data():
    x, s = draw(20, 2), ladder(0.02, 5, 10)
    expected = (x.norm(dim=1, keepdim=True) / (0.3 + s.squeeze(2) ** 2).T).mean(1)
    for model in (GaussianDenoiser(0.3), oracle(0.3)):
        torch.testing.assert_close(ScoreNorm()(model, x, generator()), expected)


def test_norms_of_the_noise_in_normal_data():
    x, s = draw(20, 2), ladder(0.02, 5, 10)
    level = s.squeeze(2).T
    expected = (level * x.norm(dim=1, keepdim=True) / (0.3 + level**2)).mean(1)
    part = ScoreNorm(weighting="noise")
    torch.testing.assert_close(part(GaussianDenoiser(0.3), x, generator()), expected)
    # A row that is all noise has as much of it at every level as noise has: sqrt(D), where data are a point.
    e = draw(1, 2000)
    norms = ScoreNorm(weighting="noise", n_levels=1, noise_levels=(0.5, 0.5))
    found = norms(GaussianDenoiser(1e-12), 0.5 * e, generator())
    torch.testing.assert_close(found, e.norm(dim=1))


def test_denoisers_see_compressed_rows_and_energies_compress_them():
    far = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    level = ladder(0.02, 5, 10).flatten()
    torch.testing.assert_close(
        ScoreNorm()(oracle(0.3), far, generator()), (100 / (0.3 + level**2)).mean()[None]
    )
    with forked_rng(0):
        network = MLP(2, 1, hidden_features=8, context_features=1, zero_output=False)
    energy = EnergyModel(network, 2, noise_levels=(0.1, 2.0)).double()
    x = torch.cat([draw(5, 2), far])
    stretch = 1 + (x.abs() - 5).clamp(min=0)
    expected = sum(
        (stretch * energy.score(x, full(x, 0.1 * 20 ** (k / 9)))).norm(dim=1).detach() for k in range(10)
    )
    torch.testing.assert_close(ScoreNorm()(energy, x, generator()).detach(), expected / 10)


@torch.no_grad()
def test_where_slopes_of_energies_rise_along_a_ray():
    x = torch.cat([torch.linspace(0.1, 200, 2000), torch.logspace(2.4, 12, 100)]).double()[:, None]
    plain = EnergyModel(MLP(1, 1, hidden_features=8), 1).double()  # starts at the base, a normal
    assert (ScoreNorm().norms(plain, x).diff(dim=0) > 0).all()
    noised = EnergyModel(
        MLP(1, 1, hidden_features=8, context_features=1), 1, noise_levels=(0.1, 2.0)
    ).double()
    peak, beyond = ScoreNorm(noise_levels=(2.0, 2.0), n_levels=1)(
        noised, torch.tensor([[11.2], [30.0]]).double(), generator()
    )
    # With c^2 = 1 + s^2 the slope is (y + 1) / (c u), u = 1 + |x| / c - 5 and y = 5 + log u; its factor, |x| - 4.
    c = math.sqrt(5)
    for found, r in ((peak, 11.2), (beyond, 30.0)):
        u = 1 + r / c - 5
        assert float(found) == pytest.approx((6 + math.log(u)) / (c * u) * (r - 4))
    assert peak > 1.8 * beyond


def test_norms_of_normal_data_are_one_number_to_their_neighbours():
    """All norms are multiples of |x|, so that in standardised units each is (|x| - mean) / deviation."""
    x, normal = draw(10, 2), draw(50, 2, seed=1)
    part = ScoreNorm(summary="neighbors", n_neighbors=3, n_levels=4)
    part.prepare(oracle(0.3), normal.split(20), generator())
    radius, radii = x.norm(dim=1), normal.norm(dim=1)
    gaps = (radius[:, None] - radii).abs().sort(1).values[:, :3].mean(1)
    expected = 2 * gaps / radii.std(correction=0)
    torch.testing.assert_close(part(oracle(0.3), x, generator()), expected)


@pytest.mark.parametrize("summary", DENSITIES)
def test_norms_are_odd_on_either_side(summary):
    """In 200 columns the mode of a normal is a place where no row ever is."""
    part = ScoreNorm(summary=summary)
    model = GaussianDenoiser(1.0)
    part.prepare(model, draw(400, 200).split(150), generator())
    a = part(model, torch.cat([draw(50, 200, seed=1), torch.zeros(1, 200)]), generator())
    assert a.argmax() == 50
    b = ScoreNorm()(model, torch.cat([draw(50, 200, seed=1), torch.zeros(1, 200)]), generator())
    assert b.argmin() == 50


def test_a_model_without_levels_has_a_vector_of_one():
    with forked_rng(0):
        energy = EnergyModel(MLP(2, 1, hidden_features=8, zero_output=False), 2).double()
    x = draw(30, 2)
    assert ScoreNorm().norms(energy, x).shape == (30, 1)
    part = ScoreNorm(summary="mahalanobis")
    with torch.no_grad():
        part.prepare(energy, [x], generator())
    norms = ScoreNorm()(energy, x, generator())
    expected = (norms - norms.mean()).abs() / norms.std(correction=0)
    torch.testing.assert_close(part(energy, x, generator()), expected, rtol=1e-5, atol=0.0)


# The density of features ----------------------------------------------------------------------------------


def test_covariances_are_shrunk_as_those_of_noise_distributions():
    z = 0.8 * draw(30, 4)
    z[:, 1] = z[:, 0] + 0.01 * z[:, 2]
    noise = GaussianNoise.fit(z)
    mean, covariance = shrunk_covariance(z, full(z, 1.0))
    torch.testing.assert_close(mean, noise.mean)
    torch.testing.assert_close(covariance, noise.factor @ noise.factor.T)


def test_weights_of_zero_leave_rows_out_and_a_common_factor_does_not_count():
    z = draw(30, 3)
    weights = torch.cat([full(z[:20], 0.25), full(z[20:], 0.0)])
    for a, b in zip(shrunk_covariance(z, weights), shrunk_covariance(z[:20], full(z[:20], 1.0)), strict=True):
        torch.testing.assert_close(a, b)


def test_one_component_is_a_normal_and_its_distance_mahalanobis_s():
    z, new = draw(300, 3), 2 * draw(20, 3, seed=1)
    options = {"n_components": 1, "n_neighbors": 1}
    a = fit_density("gaussian-mixture", z, generator(), **options)(new)
    b = fit_density("mahalanobis", z, generator(), **options)(new)
    scale = z.std(0, correction=0)
    mean, covariance = shrunk_covariance((z - z.mean(0)) / scale, full(z, 1.0))
    truth = stats.multivariate_normal(mean.numpy(), covariance.numpy())
    u = ((new - z.mean(0)) / scale).numpy()
    np.testing.assert_allclose(a.numpy(), -truth.logpdf(u), rtol=1e-8)
    expected = np.sqrt(np.einsum("bi,ij,bj->b", u, np.linalg.inv(covariance.numpy()), u))
    np.testing.assert_allclose(b.numpy(), expected, rtol=1e-8)


def test_a_mixture_finds_clusters_and_is_normalised():
    gaussians = fit_gaussians(clusters(), 2, generator())
    order = gaussians.means[:, 0].argsort()
    torch.testing.assert_close(gaussians.log_weights[order].exp(), torch.tensor([0.75, 0.25]).double())
    expected = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gaussians.means[order], expected, atol=0.03, rtol=0.0)
    axis = torch.linspace(-3, 5, 801, dtype=torch.float64)
    density = gaussians.log_joint(torch.cartesian_prod(axis, axis)).logsumexp(1).exp()
    assert float(density.sum()) * 0.01**2 == pytest.approx(1, abs=1e-4)


def test_a_mixture_depends_on_the_generator_alone_and_wants_rows_for_its_components():
    z = draw(100, 2)
    first = fit_gaussians(z, 4, generator())
    assert torch.equal(first.means, fit_gaussians(z, 4, generator()).means)
    assert [len(fit_gaussians(z[:n], 4, generator()).means) for n in (1, 2, 8, 16, 100)] == [1, 1, 2, 4, 4]


def test_neighbours_are_those_of_an_exact_search_in_any_chunks():
    x, rows = draw(20, 3), draw(2 * ROWS_PER_CHUNK + 300, 3, seed=1)
    distances, _ = NearestNeighbors(n_neighbors=4).fit(rows.numpy()).kneighbors(x.numpy())
    np.testing.assert_allclose(nearest_square_distances(x, rows, 4).sqrt().numpy(), distances, rtol=1e-12)
    assert nearest_square_distances(x, rows[:2], 4).shape == (20, 2)


@pytest.mark.parametrize("n", [5, 40, 41, 100, 1000])
def test_rows_are_thinned_evenly_whatever_the_blocks(n):
    x = torch.arange(n)
    kept = [keep_rows(x.split(size), 40) for size in (1, 7, 30, 64, 1000)]
    assert all(torch.equal(kept[0], other) for other in kept)
    assert 20 < len(kept[0]) <= 40 if n > 40 else torch.equal(kept[0], x)
    assert len(set(kept[0].diff().tolist())) == 1


@pytest.mark.parametrize("name", DENSITIES)
def test_features_that_never_vary_and_rows_that_are_all_equal(name):
    options = {"n_components": 3, "n_neighbors": 2}
    z = draw(40, 3)
    z[:, 1] = 0.1
    for normal in (z, z[:2], z[:1], z[:1].expand(30, 3)):
        density = fit_density(name, normal, generator(), **options)
        a = density(torch.stack([normal[0], normal[0] + 1, normal[0] + 10]))
        assert a.isfinite().all()
        assert (a.diff() > 0).all()


# Diffusion time -------------------------------------------------------------------------------------------


def test_the_time_from_a_single_row_is_the_mode_of_the_inverse_gamma():
    point, x = draw(1, 6), draw(5, 6, seed=1)
    part = DiffusionTime()
    part.prepare(None, [point], generator())
    a = part(None, x, generator())
    square = (x - point).square().sum(1)
    torch.testing.assert_close(a, (square / 6).sqrt())
    s = np.linspace(0.01, 5, 20_001)
    for level, r2 in zip(a.tolist(), square.tolist(), strict=True):
        # Over log s with a prior that is uniform there, and over s^2 with one that is uniform there (the paper's).
        ours = stats.invgamma(3, scale=r2 / 2).pdf(s**2) * s**2
        theirs = stats.invgamma(3 - 1, scale=r2 / 2).pdf(s**2)
        assert s[ours.argmax()] == pytest.approx(level, abs=1e-3)
        assert s[theirs.argmax()] == pytest.approx(level, abs=1e-3)
        # Both are the likelihood of the row, times the prior.
        likelihood = stats.norm(0, s).pdf(0) ** 6 * np.exp(-r2 / (2 * s**2))
        for posterior in (ours, theirs):
            np.testing.assert_allclose(posterior / posterior.max(), likelihood / likelihood.max(), atol=1e-12)


def test_the_time_from_neighbours():
    x, rows = draw(20, 2, 3), draw(200, 2, 3, seed=1)
    part = DiffusionTime(n_neighbors=4)
    part.prepare(None, rows.split(70), generator())
    distances, _ = NearestNeighbors(n_neighbors=4).fit(rows.flatten(1)).kneighbors(x.flatten(1))
    expected = np.sqrt((distances**2).mean(1) / 6)
    np.testing.assert_allclose(part(None, x, generator()).numpy(), expected, rtol=1e-12)


def test_the_time_of_noised_rows_is_their_level():
    rows, features = 0.01 * draw(100, 400), 400
    part = DiffusionTime()
    part.prepare(None, [rows], generator())
    for level in (0.1, 1.0, 4.0):
        a = part(None, rows[:10] + level * draw(10, features, seed=2), generator())
        torch.testing.assert_close(a, torch.full_like(a, level), rtol=0.15, atol=0.0)


def test_an_inverse_gamma_s_log_density():
    model = InverseGammaTime(MLP(4, 1, hidden_features=8, zero_output=False).double())
    x, level = draw(10, 4), torch.linspace(0.1, 3, 10, dtype=torch.float64)
    scale = (2 * model.estimate_level(x).square()).detach()
    expected = stats.invgamma(2, scale=scale).logpdf(level.square())
    np.testing.assert_allclose(model.log_prob_level(x, level).detach(), expected, rtol=1e-10)


class Posterior(torch.nn.Module):
    """For N(0, v) data: logits of the exact posterior of bins of s, or of the time of E[1 / s^2]^(-1/2); and a bias."""

    def __init__(self, v, n_bins=None, low=0.01, high=0.93):
        super().__init__()
        self.v, self.n_bins, self.low, self.high = v, n_bins, low, high
        edge = torch.linspace(low, high, 7 * 40 + 1, dtype=torch.float64)
        self.s = (edge[1:] + edge[:-1]) / 2
        self.bias = torch.nn.Parameter(torch.zeros(n_bins or 1, dtype=torch.float64))

    def forward(self, y):
        x = y.sinh()
        variance = self.v + self.s.square()
        log_p = -0.5 * (x.square().sum(1, keepdim=True) / variance + x.shape[1] * variance.log())
        if self.n_bins is None:
            mean = (log_p.softmax(1) / self.s.square()).sum(1, keepdim=True)
            time = (mean.rsqrt() - self.low) / (self.high - self.low)
            return time.logit() + self.bias
        return log_p.unflatten(1, (self.n_bins, -1)).logsumexp(2) + self.bias


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (TimeClassifier(Posterior(0.3, 7)), 0.01),
        (InverseGammaTime(Posterior(0.3, low=0.3, high=3.0), noise_levels=(0.3, 3.0)), 0.03),
    ],
    ids=["classifier", "inverse-gamma"],
)
def test_the_posterior_of_the_level_is_where_the_objective_is_flat(model, error):
    x = math.sqrt(0.3) * draw(20_000, 3)
    bias = model.network.bias
    losses = DiffusionTimeEstimation()(model, x, generator(1))
    assert losses.shape == (20_000,)
    (gradient,) = torch.autograd.grad(losses.mean(), bias)
    assert float(gradient.abs().max()) < error  # four standard errors
    for shift in (-0.3, 0.3):
        with torch.no_grad():
            bias[0] += shift
            assert DiffusionTimeEstimation()(model, x, generator(1)).mean() > losses.mean()
            bias[0] -= shift
    judged = DiffusionTimeEstimation().validate(model, x[:40], generator())
    assert judged.shape == (40,)


def test_bins_cut_the_range_evenly():
    model = TimeClassifier(Posterior(0.3, 7))
    level = torch.tensor([0.001, 0.01, 0.0101, 0.47, 0.92, 0.93, 70.0], dtype=torch.float64)
    assert model.bins(level).tolist() == [0, 0, 0, 3, 6, 6, 6]
    assert float(model.time(level[3])) == pytest.approx(0.5)
    x = draw(30, 3)
    log_p = model.log_time_probabilities(x)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(30, dtype=torch.float64))
    expected = log_p.exp() @ ((torch.arange(7) + 0.5) / 7).double()
    torch.testing.assert_close(model.expected_time(x), expected)
    a = DiffusionTime(estimator="learned")(model, x, generator())
    torch.testing.assert_close(a, 0.01 + 0.92 * expected)


@pytest.mark.parametrize("make", [TimeClassifier, InverseGammaTime])
def test_levels_and_times_are_each_other_s_inverse(make):
    model = make(torch.nn.Identity(), noise_levels=(0.1, 2.0))
    time = torch.linspace(0, 1, 9, dtype=torch.float64)
    level = model.level(time)
    assert level[0] == pytest.approx(0.1)
    assert level[-1] == pytest.approx(2.0)
    torch.testing.assert_close(model.time(level), time)
    torch.testing.assert_close(level.diff(), level.diff()[:1].expand(8))


@pytest.mark.parametrize("model", [TimeClassifier, InverseGammaTime])
def test_a_trained_model_tells_the_level(model):
    """Data are a point: the level of x is |x| / sqrt(D), as well as |x| says."""
    features = 50
    n_outputs = 7 if model is TimeClassifier else 1
    with forked_rng(0):
        model = model(MLP(features, n_outputs, hidden_features=32))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    objective, rng, x = DiffusionTimeEstimation(), generator(), torch.zeros(256, features)
    for _ in range(300):
        optimiser.zero_grad()
        objective(model, x, rng).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
    levels = torch.linspace(0.25, 0.8, 8)
    noised = levels[:, None, None] * torch.randn(8, 64, features, generator=rng)
    with torch.inference_mode():
        a = DiffusionTime(estimator="learned")(model, noised.flatten(0, 1), rng).reshape(8, 64)
    ratio = (a.log().mean(1) - levels.log()).exp()
    assert float((ratio.log().abs()).max()) < 0.3
    assert (a.mean(1).diff() > 0).all()


def test_levels_must_be_a_range():
    with pytest.raises(ValueError, match="two positive numbers, the smaller one first"):
        TimeClassifier(torch.nn.Identity(), noise_levels=(1.0, 0.5))


# The path -------------------------------------------------------------------------------------------------


def gaussian_path(v, s):
    """Factors of x that e and e' are along the steps, for N(0, v)."""
    y, e = 1.0, []
    for k, level in enumerate(s):
        e.append(y * level / (v + level**2))
        if k + 1 < len(s):
            y += (s[k + 1] - level) * e[-1]
    e = np.array(e)
    return e, np.diff(e) / np.diff(np.log(s))


@pytest.mark.parametrize("model", [GaussianDenoiser(0.3), oracle(0.3)], ids=["gaussian", "mixture"])
def test_statistics_of_the_path_of_normal_data(model):
    x, s = draw(20, 2), np.geomspace(0.02, 5, 10)
    expected = [
        [
            (np.abs(factors[:, None] * row) ** p).mean() ** (1 / p)
            for factors in gaussian_path(0.3, s)
            for p in (1, 2, 3)
        ]
        for row in x.numpy()
    ]
    with torch.no_grad():
        six, one = (DiffusionPath(n_statistics=n).statistics(model, x) for n in (6, 1))
    np.testing.assert_allclose(six.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(one.numpy(), np.array(expected)[:, 4:5], rtol=1e-10)


def test_with_many_steps_the_path_is_the_probability_flow():
    """Its solution for N(0, v) from l to s is x sqrt((v + s^2) / (v + l^2)), and e = s y / (v + s^2)."""
    v, x = 0.3, torch.ones(1, 1, dtype=torch.float64)
    s = np.geomspace(0.02, 5, 100_001)
    e = s / np.sqrt((v + s**2) * (v + 0.02**2))
    # Means over log s.
    exact = np.sqrt([np.mean(e**2), np.mean(np.gradient(e, np.log(s)) ** 2)])
    errors = []
    for n in (100, 200, 400):
        found = DiffusionPath(n_steps=n).statistics(GaussianDenoiser(v), x)[0, [1, 4]].numpy()
        errors.append(np.abs(found - exact).max())
    assert errors[0] < 0.05
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, atol=0.3)


def test_the_path_does_not_depend_on_the_process():
    x = draw(10, 2)
    statistics = [DiffusionPath().statistics(oracle(0.3, path=make()), x) for make in PATHS.values()]
    for other in statistics[1:]:
        torch.testing.assert_close(other, statistics[0])


def test_rows_of_another_kind_are_told_by_their_path():
    model = GaussianDenoiser(1.0)
    for n_statistics in (1, 6):
        part = DiffusionPath(n_statistics=n_statistics)
        part.prepare(model, draw(300, 30).split(100), generator())
        normal = part(model, draw(100, 30, seed=1), generator())
        for scale in (0.2, 3.0):
            assert part(model, scale * draw(100, 30, seed=2), generator()).min() > normal.max()


# Densities ------------------------------------------------------------------------------------------------

with_densities = pytest.mark.skipif(
    not hasattr(Denoiser, "elbo_terms"), reason="denoisers have no densities yet"
)


@with_densities
@pytest.mark.parametrize("features", [2, 40])
def test_the_likelihood_of_normal_data(features):
    """With noise of the smallest level. Hutchinson's estimate, above 32 columns, is exact for a multiple of I."""
    x, model, v = draw(10, features), GaussianDenoiser(0.3), 0.3 + 0.002**2
    expected = 0.5 * (x.square() / v + math.log(2 * math.pi * v)).sum(1)
    with torch.inference_mode():
        a = ODELikelihood()(model, x, generator())
    torch.testing.assert_close(a, expected, rtol=1e-3, atol=1e-3)


@with_densities
@pytest.mark.parametrize("features", [3, 40])
def test_typicality_is_of_the_likelihood_of_wide_rows_too(features):
    """Signs probe the Jacobian of normal data exactly, so that nothing is off where the trace is estimated."""
    model, rows, x = GaussianDenoiser(1.0), draw(50, features), draw(5, features, seed=1)
    part = Typicality()
    part.prepare(model, rows.split(20), generator())
    low = model.noise_levels[0]
    typical = rows.square().sum(1).mean()
    expected = (x.square().sum(1) - typical).abs() / (2 * (1 + low**2))
    torch.testing.assert_close(part(model, x, generator()), expected, rtol=1e-3, atol=1e-3)


def test_the_bound_of_normal_data():
    x, model = draw(10, 30), GaussianDenoiser(0.3)
    likelihood = 0.5 * (x.square() / 0.3 + math.log(2 * math.pi * 0.3)).sum(1)
    gaps = []
    for n in (50, 200):
        a = DiffusionELBO(n_steps=n, n_draws=8)(model, x, generator())
        assert (a > likelihood).all()
        gaps.append(float((a - likelihood).mean()))
    assert gaps[1] < 0.5 * gaps[0]


@with_densities
@pytest.mark.parametrize("part", [DiffusionELBO(n_steps=20), ODELikelihood(n_steps=10)], ids=str)
def test_densities_are_in_nats_and_of_each_row_alone(part):
    assert part.in_nats is True
    for model in (oracle(), untrained()):
        x = torch.cat([draw(2, 2), torch.tensor([[LIMIT, -LIMIT]])])
        with torch.inference_mode():
            a = part(model, x, generator())
            assert a.isfinite().all()
            assert a.argmax() == 2
            assert torch.equal(part(model, x, generator()), a)
            alone = torch.cat([part(model, row, generator()) for row in x.split(1)])
        torch.testing.assert_close(alone, a, rtol=1e-10, atol=1e-10)


# All of them ----------------------------------------------------------------------------------------------

ALL = [
    DenoisingError(),
    DenoisingError(add_noise=False),
    DiffusionPath(),
    DiffusionPath(n_statistics=1, density="neighbors"),
    DiffusionPath(density="mahalanobis"),
    DiffusionReconstruction(),
    DiffusionReconstruction(add_noise=True, n_steps=1, norm="absolute"),
    DiffusionTime(),
    ScoreNorm(),
    *(ScoreNorm(summary=summary) for summary in DENSITIES),
]
MODELS = [oracle(0.3), two_modes(), untrained()]


def prepared(part, model, normal):
    part = clone(part)
    if hasattr(part, "prepare"):
        with torch.no_grad():
            part.prepare(model, iter(normal.split(30)), generator())
    return part


@pytest.mark.parametrize("model", MODELS, ids=["normal", "modes", "network"])
@pytest.mark.parametrize("part", ALL, ids=str)
def test_rows_count_alone_and_calls_repeat(part, model):
    x = torch.cat([draw(12, 2), torch.tensor([[LIMIT, -LIMIT], [-LIMIT, 0.0]])])
    part = prepared(part, model, draw(80, 2, seed=1))
    with torch.inference_mode():
        a = part(model, x, generator())
        assert a.shape == (14,)
        assert a.isfinite().all()
        assert torch.equal(part(model, x, generator()), a)
        torch.testing.assert_close(part(model, x.flip(0), generator()).flip(0), a, rtol=1e-10, atol=1e-12)
        alone = torch.cat([part(model, row, generator()) for row in x.split(1)])
        torch.testing.assert_close(alone, a, rtol=1e-10, atol=1e-12)
        copied = pickle.loads(pickle.dumps(part))
        assert torch.equal(copied(model, x, generator()), a)
    again = prepared(part, model, draw(80, 2, seed=1))
    assert torch.equal(again(model, x, generator()), part(model, x, generator()))
    assert part.in_nats is False


@pytest.mark.parametrize("model", MODELS, ids=["normal", "modes", "network"])
@pytest.mark.parametrize("part", ALL, ids=str)
def test_far_rows_are_the_odder_the_farther_they_are(part, model):
    part = prepared(part, model, draw(80, 2, seed=1))
    near = part(model, draw(80, 2, seed=2), generator())
    # The network gives its edge values beyond 12 deviations of noised data, which is 61 at the largest level.
    start = 70 if model is MODELS[2] else 8
    for direction in ([1.0, 0.0], [0.0, -1.0], [0.7, 1.0]):
        radius = torch.logspace(math.log10(start), math.log10(LIMIT), 15, dtype=torch.float64)
        a = part(model, radius[:, None] * torch.tensor(direction, dtype=torch.float64), generator()).detach()
        assert (a.diff() > 0).all()
        assert a[0] > near.quantile(0.9)


@pytest.mark.parametrize("make", [TimeClassifier, InverseGammaTime])
def test_learned_times_grow_without_bound(make):
    with forked_rng(0):
        network = MLP(2, 7 if make is TimeClassifier else 1, hidden_features=16, zero_output=False)
    model, part = make(network.double()), DiffusionTime(estimator="learned")
    radius = torch.linspace(60, LIMIT, 15, dtype=torch.float64)
    with torch.inference_mode():
        a = part(model, radius[:, None] * torch.tensor([1.0, -0.5]), generator())
    assert (a.diff() > 0).all()
    assert model.expected_time(radius[:1, None].expand(1, 2)) > 1
    x = draw(9, 2)
    alone = torch.cat([part(model, row, generator()) for row in x.split(1)])
    torch.testing.assert_close(alone, part(model, x, generator()), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("part", ALL, ids=str)
def test_images_are_rows_too(part):
    model = GaussianDenoiser(0.3)
    x, normal = draw(6, 2, 3, 3), draw(60, 2, 3, 3, seed=1)
    a = prepared(part, model, normal)(model, x, generator())
    flat = prepared(part, model, normal.flatten(1))(model, x.flatten(1), generator())
    torch.testing.assert_close(a, flat)


@pytest.mark.parametrize("part", ALL, ids=str)
def test_two_rows_are_enough_to_try_and_single_precision_will_do(part):
    model, x = untrained().float(), draw(2, 2).float()
    a = prepared(part, model, x)(model, x, generator())
    assert a.dtype == torch.float32
    assert a.isfinite().all()


def test_the_names():
    named = {"denoising_error", "diffusion_time", "path", "reconstruction", "score_norm"}
    assert {name for name, kind in ANOMALIES.items() if kind in {type(part) for part in ALL}} == named


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (DenoisingError(weighting="v"), r"weighting='v' is unknown. Known weightings: 'eps', 'score', 'x0'"),
        (DiffusionReconstruction(norm="l2"), r"norm='l2' is unknown. Known norms: 'absolute', 'squared'"),
        (DiffusionTime(estimator="knn"), r"Known estimators: 'learned', 'non-parametric'"),
        (DiffusionPath(n_steps=1), "n_steps must be an integer of at least 2, got 1"),
        (DiffusionPath(n_statistics=3), "n_statistics must be 6 or 1"),
        (DiffusionPath(density="kde"), r"density='kde' is unknown. Known: 'gaussian-mixture', 'mahala"),
        (DiffusionPath(noise_levels=(0.5, 0.5)), "a path has two"),
        (ScoreNorm(weighting="level"), r"weighting='level' is unknown. Known weightings: 'score', 'noise'"),
        (ScoreNorm(summary="max"), r"summary='max' is unknown"),
        (ScoreNorm(n_levels=0), "n_levels must be a positive integer, got 0"),
        (
            ScoreNorm(noise_levels=(5.0, 0.02)),
            r"noise_levels must be two numbers, the smaller one first, got \(5",
        ),
        (ScoreNorm(noise_levels=0.5), r"noise_levels must be two numbers, .*got 0\.5"),
        (ScoreNorm(summary="neighbors", n_neighbors=0), "n_neighbors must be at least 1, got 4 and 0"),
        (ScoreNorm(summary="gaussian-mixture", n_components=0), "n_components and .* got 0 and 5"),
        (ScoreNorm(summary="gmm"), "summary='gmm' is unknown. Known: 'sum', "),
        (DenoisingError(n_draws=2.5), "n_draws must be a positive integer, got 2.5"),
        (DenoisingError(n_draws=0), "n_draws must be a positive integer, got 0"),
        (DiffusionReconstruction(n_steps=0), "n_steps must be a positive integer, got 0"),
        (DiffusionReconstruction(n_steps=5.0), "n_steps must be a positive integer, got 5.0"),
        (DiffusionReconstruction(add_noise=True, n_draws=-2), "n_draws must be a positive integer, got -2"),
        (DiffusionTime(n_neighbors=0), "n_neighbors must be a positive integer, got 0"),
        (DiffusionTime(n_neighbors=math.inf), "n_neighbors must be a positive integer, got inf"),
        (DiffusionELBO(n_steps=0), "n_steps must be a positive integer, got 0"),
        (DiffusionELBO(n_steps=100.0), "n_steps must be a positive integer, got 100.0"),
        (DiffusionELBO(n_draws=1.5), "n_draws must be a positive integer, got 1.5"),
        (ODELikelihood(n_steps=1.5), "n_steps must be a positive integer, got 1.5"),
        (ODELikelihood(n_probes=math.nan), "n_probes must be a positive integer, got nan"),
    ],
    ids=str,
)
def test_unknown_values_are_refused(part, match):
    with pytest.raises(ValueError, match=match):
        prepared(part, oracle(), draw(9, 2))(oracle(), draw(3, 2), generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("part", ALL, ids=str)
def test_what_is_learned_on_a_gpu_opens_anywhere(part):
    model, x, normal = GaussianDenoiser(0.3), draw(20, 3), draw(80, 3, seed=1)
    trained = prepared(part, model, normal.cuda())
    state = [v for v in vars(trained).values() if isinstance(v, torch.Tensor)]
    if hasattr(trained, "density_"):
        density = trained.density_
        state += [
            density.standard.shift,
            density.rows if density.rows is not None else density.gaussians.means,
        ]
    assert not any(value.is_cuda for value in state)
    a = prepared(part, model, normal)(model, x, generator())
    for other in (trained(model, x, generator()), trained(model, x.cuda(), generator()).cpu()):
        torch.testing.assert_close(other, a, rtol=1e-6, atol=1e-8)
