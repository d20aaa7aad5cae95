"""DiffusionDetector: its paths, networks, densities and rows in the units of X."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from anomalib_gen import DiffusionDetector
from anomalib_gen.anomaly import ClosedFormResidual, CombinedAnomaly, DiffusionTime, ScoreNorm
from anomalib_gen.models import EnergyModel, ScoreDenoiser
from anomalib_gen.objectives import (
    ContrastiveDivergence,
    DiffusionTimeEstimation,
    FlowMatching,
    MaximumLikelihood,
    NoiseContrastive,
)
from anomalib_gen.paths import EDM, PATHS, CosineBetas, Linear


def make(**parameters):
    small = {"max_iter": 60, "hidden_features": 16, "n_blocks": 1, "random_state": 0, "device": "cpu"}
    return DiffusionDetector(**{**small, **parameters})


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(400, 2)) @ [[30.0, 18.0], [0.0, 4.0]] + [1000.0, -5.0]


@pytest.fixture(scope="module")
def fitted(rows):
    return make(max_iter=600, hidden_features=32, learning_rate=5e-3).fit(rows)


@pytest.mark.parametrize("path", [*PATHS, EDM(sigma_min=0.05, sigma_max=5.0)], ids=str)
def test_every_path_trains_and_samples(rows, path):
    detector = make(path=path, max_iter=150).fit(rows)
    drawn = detector.sample(200, sampler="ddim", n_steps=60, random_state=0)
    np.testing.assert_allclose(drawn.std(axis=0) / rows.std(axis=0), 1, atol=0.5)
    np.testing.assert_allclose(drawn.mean(axis=0), rows.mean(axis=0), atol=0.7 * rows.std(axis=0).max())


def test_the_path_suits_the_objective_unless_it_is_chosen(rows):
    kinds = {"denoising": EDM, "flow-matching": Linear, "improved-ddpm": CosineBetas}
    for objective, kind in kinds.items():
        assert isinstance(make(objective=objective, max_iter=2).fit(rows).model_.path, kind)
    own = EDM(sigma_min=0.03, sigma_max=7.0)
    detector = make(objective="flow-matching", path=own, max_iter=2).fit(rows)
    assert detector.model_.path is not own
    assert repr(detector.model_.path) == repr(own)
    with pytest.raises(
        ValueError, match=r"path__sigma_max cannot be set while path='cosine'.*anomalib_gen\.paths"
    ):
        make(path="cosine").set_params(path__sigma_max=7.0)
    assert make(path=own).set_params(path__sigma_max=8.0).path.sigma_max == 8.0


@pytest.mark.parametrize("network", ["energy", "mlp"])
def test_other_networks(rows, network):
    detector = make(network=network, max_iter=200, learning_rate=5e-3).fit(rows)
    far = rows.mean(axis=0) + np.array([[-6.0, 6.0]]) * rows.std(axis=0)
    assert detector.score_samples(far)[0] < np.quantile(detector.score_samples(rows), 0.02)
    if network == "energy":
        model = detector.model_
        assert isinstance(model, ScoreDenoiser)
        assert isinstance(model.model, EnergyModel)
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        level = torch.full((5,), 0.3, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(model.model.energy(x, level).sum(), x)
        torch.testing.assert_close(model.score(x, level), -gradient)


@pytest.mark.parametrize(
    ("n", "columns", "width"),
    [(34, 4, 16), (66, 4, 32), (66, 16, 64), (300, 2, 64), (400, 2, 128), (34, 999, 128)],
)
def test_few_rows_and_columns_get_a_narrow_network(n, columns, width):
    X = np.random.default_rng(0).normal(size=(n, columns))
    auto = DiffusionDetector(max_iter=1, validation_fraction=2 / n, device="cpu")  # holds out none
    assert auto.fit(X).model_.network.output.in_features == width
    assert auto.set_params(objective="improved-ddpm").fit(X).model_.network.output.in_features == width
    # One that learns all by itself needs the width.
    for alone in ({"objective": "diffusion-time"}, {"objective": "denoising", "denoiser": "network"}):
        assert auto.set_params(**alone).fit(X).model_.network.output.in_features == 128
    # Of a stream it is not known how many rows there will be.
    streamed = DiffusionDetector(device="cpu").partial_fit(X)
    assert streamed.model_.network.output.in_features == 128
    chosen = DiffusionDetector(max_iter=1, hidden_features=24, device="cpu").fit(X)
    assert chosen.model_.network.output.in_features == 24


def test_an_energy_s_residual_grows_far_out(rows):
    detector = make(network="energy", anomaly="reconstruction").fit(rows)
    far = rows.mean(axis=0) + np.logspace(1, 300, 12)[:, None] * rows.std(axis=0)
    assert (np.diff(detector.score_samples(far)) < 0).all()


def test_densities_are_in_the_units_of_the_rows(rows, fitted):
    noised = np.cov((rows - rows.mean(axis=0)).T) + 1e-4 * np.diag(rows.var(axis=0))
    truth = stats.multivariate_normal(rows.mean(axis=0), noised).logpdf(rows[:100])
    exact, bound = fitted.log_prob(rows[:100]), fitted.elbo(rows[:100], n_steps=200)
    # A flat direction, .2 of the other's deviation, and 600 steps: the fit is rough, the units are not.
    assert abs(np.mean(exact - truth)) < 0.3
    assert np.mean(bound) < np.mean(exact) + 0.02
    assert np.mean(exact - bound) < 2
    assert np.mean(fitted.elbo(rows[:100], n_steps=20)) < np.mean(bound)
    np.testing.assert_allclose(fitted.energy(rows[:20]), -fitted.elbo(rows[:20], n_steps=32))
    other = DiffusionDetector(**fitted.get_params()).fit(rows * [1e-3, 1e3])
    np.testing.assert_allclose(other.log_prob(rows[:20] * [1e-3, 1e3]), exact[:20], atol=1e-3)


@pytest.mark.parametrize("columns", [2, 40])
def test_the_error_of_a_density_is_that_of_its_steps(rows, columns):
    X = rows if columns == 2 else np.random.default_rng(0).normal(size=(60, columns)) * 10.0
    detector = make(denoiser="closed-form", validation_fraction=0.0).fit(X)
    few, more, truth = (detector.log_prob(X[:8], n_steps=n) for n in (8, 16, 100))
    error = detector.log_prob_error(X[:8], n_steps=16)
    if columns == 2:
        np.testing.assert_allclose(error, np.abs(more - few), rtol=1e-9, atol=1e-12)
    # In wide rows all have the same random directions, whose standard error comes on top.
    else:
        assert (error > np.abs(more - few)).all()
    assert (np.abs(more - truth) < error).all()
    np.testing.assert_allclose(error[:2], [detector.log_prob_error(x[None], n_steps=16)[0] for x in X[:2]])
    with pytest.raises(ValueError, match="n_steps must be even if the error is estimated, got 7"):
        detector.log_prob_error(X[:8], n_steps=7)


@pytest.mark.slow
def test_the_density_integrates_to_one(fitted, rows):
    axes = [np.linspace(c.mean() - 7 * c.std(), c.mean() + 7 * c.std(), 201) for c in rows.T]
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert np.exp(fitted.log_prob(grid, n_steps=60)).sum() * cell == pytest.approx(1, abs=0.02)


def test_rows_are_denoised_in_their_units(rows, fitted):
    strange = rows.mean(axis=0) + np.array([[2.0, -2.0]]) * rows.std(axis=0)
    normal = rows[:50]
    for clean in (fitted.denoise(strange), fitted.reconstruct(strange)):
        # The columns are correlated by .98: what fits is near the ridge.
        z = (clean - rows.mean(axis=0)) / rows.std(axis=0)
        assert abs(z[0, 0] - z[0, 1]) < 2.5
    moved = (fitted.reconstruct(normal, noise=0.05) - normal) / rows.std(axis=0)
    assert np.abs(moved).mean() < 0.1
    np.testing.assert_array_equal(fitted.reconstruct(strange), fitted.reconstruct(strange))


def test_from_the_smallest_level_a_reconstruction_is_one_step(rows, fitted):
    low = fitted.model_.noise_levels[0]
    np.testing.assert_array_equal(
        fitted.reconstruct(rows[:9], noise=low), fitted.denoise(rows[:9], noise=low)
    )


def test_more_draws_leave_less_chance_in_the_bound(rows):
    # The density is known: of the stored rows, each with a cloud around it.
    detector = make(denoiser="closed-form", validation_fraction=0.0).fit(rows)
    exact = detector.log_prob(rows[:15])
    gaps = {n: [] for n in (1, 16)}
    for n, found in gaps.items():
        for seed in range(6):
            detector._seeds[3] = seed
            found.append(np.mean(exact - detector.elbo(rows[:15], n_steps=50, n_draws=n)))
    assert np.std(gaps[16]) < 0.5 * np.std(gaps[1])
    assert np.mean(gaps[16]) > 0


@pytest.mark.parametrize("sampler", ["heun", "ddim", "ancestral", "euler-maruyama", "predictor-corrector"])
def test_samplers_by_name(rows, fitted, sampler):
    drawn = fitted.sample(300, sampler=sampler, n_steps=60, random_state=0)
    np.testing.assert_allclose(drawn.std(axis=0) / rows.std(axis=0), 1, atol=0.25)
    np.testing.assert_array_equal(drawn, fitted.sample(300, sampler=sampler, n_steps=60, random_state=0))


@pytest.mark.parametrize("path", ["cosine", "vp", "ve", "edm"])
def test_samples_by_default_have_the_moments_of_the_rows(rows, path):
    drawn = make(path=path, denoiser="closed-form").fit(rows).sample(2000, random_state=0)
    scale = rows.std(axis=0)
    np.testing.assert_allclose((drawn.mean(axis=0) - rows.mean(axis=0)) / scale, 0, atol=0.08)
    np.testing.assert_allclose(drawn.std(axis=0) / scale, 1, atol=0.06)


def test_options_reach_the_sampler(fitted):
    def drawn(sampler, **options):
        return fitted.sample(20, sampler=sampler, n_steps=20, sampler_params=options, random_state=0)

    np.testing.assert_array_equal(
        drawn("ddim"), fitted.sample(20, sampler="ddim", n_steps=20, random_state=0)
    )
    different = {
        "adaptive": {"rtol": 1e-2, "atol": 1e-2},
        "ancestral": {"variance": 1.0},
        "annealed-langevin": {"n_steps_per_level": 2, "step_ratio": 0.05},
        "ddim": {"eta": 0.5},
        "heun": {"final_denoise": False},
        "predictor-corrector": {"n_corrections": 2, "predictor": "ancestral", "signal_to_noise": 0.1},
    }
    for sampler, options in different.items():
        for name, value in options.items():
            assert not np.array_equal(drawn(sampler, **{name: value}), drawn(sampler)), (sampler, name)


def test_unknown_options_of_a_sampler_are_named(fitted):
    for sampler, name in [("heun", "eta"), ("heun", "rtol"), ("ddim", "path"), ("adaptive", "method")]:
        with pytest.raises(
            ValueError, match=f"sampler_params has '{name}'.*sampler='{sampler}'.*final_denoise"
        ):
            fitted.sample(3, sampler=sampler, sampler_params={name: 1})
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        fitted.sample(3, sampler="ddim", sampler_params={"eta": 2})


def test_learned_variances_are_drawn_with(rows, monkeypatch):
    detector = make(objective="improved-ddpm").fit(rows)
    asked = []
    denoise = type(detector.model_).denoise_and_variance
    monkeypatch.setattr(
        type(detector.model_), "denoise_and_variance", lambda *a: asked.append(denoise(*a)[1]) or denoise(*a)
    )
    assert detector.sample(5, sampler="ancestral", n_steps=10).shape == (5, 2)
    assert asked[0] is not None


def test_a_model_that_is_kept_gets_the_anomaly_that_suits_it(rows):
    kinds = {"network": ScoreNorm, "closed-form": ClosedFormResidual, "hybrid": CombinedAnomaly}
    for denoiser, kind in kinds.items():
        detector = make(denoiser=denoiser, warm_start=True, max_iter=2).fit(rows)
        for other in kinds:
            detector.set_params(denoiser=other).fit(rows)
            assert isinstance(detector.anomaly_, kind)
            assert isinstance(detector.partial_fit(rows).anomaly_, kind)
            assert isinstance(detector.with_anomaly(None, rows).anomaly_, kind)
    clock = make(objective="diffusion-time", max_iter=2).fit(rows).set_params(objective="denoising")
    assert isinstance(clock.with_anomaly(None, rows).anomaly_, DiffusionTime)


@pytest.mark.parametrize("objectives", [("diffusion-time", "denoising"), ("denoising", "diffusion-time")])
def test_a_model_that_is_kept_refuses_an_objective_of_another_kind(rows, objectives):
    first, second = objectives
    detector = make(objective=first, denoiser="network", warm_start=True, max_iter=2).fit(rows)
    scores = detector.score_samples(rows[:9])
    detector.set_params(objective=second)
    for method in ("fit", "partial_fit"):
        with pytest.raises(TypeError, match=r"objective=.* does not work with .*warm_start=False"):
            getattr(detector, method)(rows)
    np.testing.assert_array_equal(detector.score_samples(rows[:9]), scores)
    detector.set_params(warm_start=False).fit(rows)


def test_the_constant_warns_of_no_names(rows, recwarn):
    named = make(denoiser="closed-form").fit(pd.DataFrame(rows, columns=["a", "b"]))
    bare = make(denoiser="closed-form").fit(rows)
    named.normalize(n_samples=4, random_state=0)
    assert not recwarn
    bare.normalize(n_samples=4, random_state=0)
    assert named.log_normalizer_ == pytest.approx(bare.log_normalizer_, rel=1e-9)


def test_wrong_arguments_are_named(rows, fitted):
    with pytest.raises(ValueError, match=r"path='vpp' is unknown\. Known names: 'cosine'"):
        make(path="vpp").fit(rows)
    with pytest.raises(ValueError, match="sampler='euclid' is unknown"):
        fitted.sample(3, sampler="euclid")
    with pytest.raises(ValueError, match="n_steps must be a positive integer"):
        fitted.sample(3, n_steps=0)
    for method in (fitted.reconstruct, fitted.log_prob, fitted.log_prob_error, fitted.elbo):
        for n_steps in (0, 1.5):
            with pytest.raises(ValueError, match=rf"n_steps must be a positive integer, got {n_steps}"):
                method(rows, n_steps=n_steps)
    with pytest.raises(ValueError, match="n_draws must be a positive integer, got 0"):
        fitted.elbo(rows, n_draws=0)
    for method in (fitted.denoise, fitted.reconstruct):
        with pytest.raises(ValueError, match=r"noise must lie between 0\.01 and 20"):
            method(rows, noise=50.0)
    with pytest.raises(ValueError, match=r"n_bins of .* must be a positive integer, got 0"):
        make(objective=DiffusionTimeEstimation(n_bins=0)).fit(rows)
    # Objectives that meet the rows first say what they lack as others do.
    with pytest.raises(TypeError, match=r"objective=NoiseContrastive\(\) does not work with NetworkDenoiser"):
        make(denoiser="network", objective=NoiseContrastive()).fit(rows)
    with pytest.raises(
        TypeError, match=r"ContrastiveDivergence\(\) does not work with NetworkDenoiser: .*'level'"
    ):
        make(denoiser="network", objective=ContrastiveDivergence()).fit(rows)
    with pytest.raises(
        TypeError, match=r"MaximumLikelihood\(\) does not work with NetworkDenoiser: its loss has no"
    ):
        make(denoiser="network", objective=MaximumLikelihood()).fit(rows)
    with pytest.raises(ValueError, match="denoiser='closed-form' has no network that could learn variances"):
        make(denoiser="closed-form", objective="improved-ddpm").fit(rows)
    with pytest.raises(ValueError, match="cannot learn variances"):
        make(network="energy", objective="improved-ddpm").fit(rows)


def test_matched_noise_and_the_default_anomaly_are_warned_of():
    X = np.random.default_rng(0).normal(size=(60, 2))
    settings = {"hidden_features": 8, "max_iter": 3, "random_state": 0, "device": "cpu"}
    matched = FlowMatching(pairing="optimal-transport")
    with pytest.warns(UserWarning, match=r"matches rows with noise.*anomaly='reconstruction'"):
        DiffusionDetector(objective=matched, **settings).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionDetector(objective=matched, anomaly="reconstruction", **settings).fit(X)
        DiffusionDetector(objective="flow-matching", **settings).fit(X)
