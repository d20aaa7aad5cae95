"""The energy detector: units, copies, samples, the constant, and what it refuses."""

import io
import math
import pickle
import warnings

import joblib
import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from anomalib_gen import EnergyDetector
from anomalib_gen._component import Component
from anomalib_gen.anomaly import Energy, ScoreNorm
from anomalib_gen.networks import MLP
from anomalib_gen.objectives import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    GradientPenalty,
    NoiseContrastive,
    PersistentContrastiveDivergence,
    ScoreMatching,
    SlicedScoreMatching,
    Telescoping,
)

OBJECTIVES = [
    "contrastive-divergence",
    "denoising-score-matching",
    "noise-contrastive",
    "persistent-contrastive-divergence",
    "score-matching",
    "sliced-score-matching",
    "telescoping",
]


def make(**parameters):
    settings = {
        "anomaly": "energy",
        "hidden_features": 8,
        "n_layers": 1,
        "max_iter": 20,
        "contamination": 0.1,
        "random_state": 0,
        "device": "cpu",
    }
    return EnergyDetector(**{**settings, **parameters})


@pytest.fixture(scope="module")
def energetic(X):
    """A fitted detector that no test may change."""
    return make().fit(X)


@pytest.mark.parametrize(
    ("parameters", "anomaly"),
    [
        ({}, ScoreNorm),
        ({"max_noise": None}, Energy),
        ({"objective": "telescoping"}, Energy),
        ({"objective": "sliced-score-matching"}, ScoreNorm),
    ],
    ids=str,
)
def test_the_anomaly_suits_the_objective_unless_it_is_chosen(X, parameters, anomaly):
    detector = make(anomaly=None, max_iter=2, **parameters).fit(X)
    assert isinstance(detector.anomaly_, anomaly)


def test_scores_are_minus_the_energy_in_the_units_of_the_rows(energetic, X):
    np.testing.assert_array_equal(energetic.energy(X), -energetic.score_samples(X))
    scaled = make().fit(1e3 * X)
    np.testing.assert_allclose(scaled.energy(1e3 * X), energetic.energy(X) + 3 * np.log(1e3), rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_count_alone_and_calls_repeat(X, objective):
    detector = make(objective=objective).fit(X)
    scores = detector.score_samples(X)
    np.testing.assert_array_equal(detector.score_samples(X), scores)
    np.testing.assert_array_equal(make(objective=objective).fit(X).score_samples(X), scores)
    np.testing.assert_allclose(detector.score_samples(X[::-1])[::-1], scores, rtol=1e-10)
    np.testing.assert_allclose(
        np.concatenate([detector.score_samples(row[None]) for row in X[:9]]), scores[:9]
    )
    assert (detector.predict(X[:5] + 100 * X.std(axis=0)) == -1).all()


@pytest.mark.parametrize("parameters", [{}, {"max_noise": None}], ids=str)
def test_the_score_norm_is_free_of_units(X, parameters):
    detector = make(anomaly="score_norm", **parameters).fit(X)
    scores = detector.score_samples(X)
    assert (scores <= 0).all()
    np.testing.assert_allclose(detector.score_samples(X[::-1])[::-1], scores, rtol=1e-10)
    scaled = make(anomaly="score_norm", **parameters).fit(1e3 * X)
    np.testing.assert_allclose(scaled.score_samples(1e3 * X), scores, rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("spectral_norm", [None, 1.5])
def test_round_trips_change_no_bit(X, objective, spectral_norm):
    detector = make(objective=objective, spectral_norm=spectral_norm).fit(X)
    file = io.BytesIO()
    joblib.dump(detector, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(detector)), joblib.load(file)):
        np.testing.assert_array_equal(copied.score_samples(X), detector.score_samples(X))


def test_names_take_the_detector_s_noise_and_objects_keep_their_own(X):
    named = make(noise=0.3, max_noise=None).fit(X)
    given = make(noise=0.9, max_noise=None, objective=DenoisingScoreMatching(data_noise=0.3)).fit(X)
    silent = make(noise=0.3, max_noise=None, objective=None).fit(X)
    np.testing.assert_array_equal(named.score_samples(X), given.score_samples(X))
    np.testing.assert_array_equal(named.score_samples(X), silent.score_samples(X))


@pytest.mark.parametrize(
    ("objective", "max_noise", "levels", "n_heads"),
    [
        ("denoising-score-matching", 2.0, (0.1, 2.0), 1),
        ("score-matching", None, None, 1),
        ("contrastive-divergence", 2.0, None, 1),
        ("telescoping", 2.0, None, 3),
        (GradientPenalty(ContrastiveDivergence(n_steps=1)), 2.0, None, 1),
        (GradientPenalty(DenoisingScoreMatching()), 2.0, (0.1, 2.0), 1),
    ],
    ids=str,
)
def test_the_model_suits_the_objective(X, objective, max_noise, levels, n_heads):
    model = make(objective=objective, max_noise=max_noise, n_heads=3).fit(X).model_
    assert model.noise_levels == levels
    assert model.n_heads == n_heads


def test_a_network_of_one_s_own(X):
    asked = []

    def factory(n_inputs, n_outputs, context_features):
        asked.append((n_inputs, n_outputs, context_features))
        return MLP(n_inputs, n_outputs, hidden_features=4, context_features=context_features)

    assert np.isfinite(make(network=factory).fit(X).score_samples(X)).all()
    make(network=factory, objective="telescoping").fit(X)
    assert asked == [(3, 1, 1), (3, 4, 0)]


@pytest.mark.parametrize("parameters", [{}, {"objective": "noise-contrastive"}], ids=str)
def test_training_can_go_on(X, parameters):
    detector = make(warm_start=True, **parameters).fit(X)
    detector.fit(X)
    detector.partial_fit(X[:50])
    assert detector.n_iter_ == 41
    assert np.isfinite(detector.score_samples(X)).all()


def test_weights_are_taken(X):
    weights = np.repeat([1.0, 0.0], 100)
    np.testing.assert_allclose(
        make().fit(X, sample_weight=weights)._scaler.shift, X[:100].mean(0), rtol=1e-12
    )


# Samples and the constant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"max_noise": None}], ids=str)
def test_samples_are_in_the_units_of_the_columns(X, parameters):
    detector = make(max_iter=100, hidden_features=16, **parameters).fit(X)
    drawn = detector.sample(100, random_state=0)
    assert drawn.shape == (100, 3)
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), atol=0.6 * X.std(axis=0).max())
    np.testing.assert_allclose(drawn.std(axis=0) / X.std(axis=0), 1, atol=0.5)
    np.testing.assert_array_equal(drawn, detector.sample(100, random_state=0))


def correlated_rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 2)) @ [[30.0, 18.0], [0.0, 4.0]] + [1000.0, -5.0]


def integral(detector, rows, values):
    """Log of the integral of exp(values(x)) over a grid around the rows, in their units."""
    axes = [np.linspace(c.mean() - 8 * c.std(), c.mean() + 8 * c.std(), 301) for c in rows.T]
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    return logsumexp(values(grid)) + np.log(cell)


def test_the_constant_agrees_with_integration_over_a_grid_in_the_units_of_the_rows():
    rows = correlated_rows()
    detector = make(max_iter=150, hidden_features=16, learning_rate=5e-3).fit(rows)
    detector.normalize(n_chains=128, n_levels=40, random_state=0)
    exact = integral(detector, rows, lambda x: -detector.energy(x))
    low, high = detector.log_normalizer_interval_
    assert low < detector.log_normalizer_ < high
    assert detector.log_normalizer_ == pytest.approx(exact, abs=max(0.05, high - low))
    assert integral(detector, rows, detector.log_prob) == pytest.approx(0, abs=0.1)
    np.testing.assert_allclose(detector.log_prob(rows), -detector.energy(rows) - detector.log_normalizer_)


@pytest.mark.parametrize("objective", ["noise-contrastive", "telescoping"])
def test_a_constant_that_was_learned_agrees_with_the_sampled_one(objective):
    rows = correlated_rows()
    detector = make(objective=objective, max_iter=400, hidden_features=16).fit(rows)
    learned = detector.log_normalizer_
    assert learned == detector.model_.log_z.item()
    assert not hasattr(detector, "log_normalizer_interval_")
    assert integral(detector, rows, detector.log_prob) == pytest.approx(0, abs=0.15)
    detector.normalize(n_chains=256, n_levels=60, random_state=0)
    assert detector.model_.log_z.item() == learned
    assert integral(detector, rows, detector.log_prob) == pytest.approx(0, abs=0.1)


def test_a_constant_of_another_objective_is_not_kept(X):
    detector = make(objective="noise-contrastive", n_heads=1, warm_start=True).fit(X)
    assert detector.log_normalizer_ != 0
    detector.set_params(objective="telescoping").fit(X)
    assert detector.log_normalizer_ == 0


@pytest.mark.parametrize("objective", ["noise-contrastive", "telescoping"])
def test_a_model_of_many_noise_levels_is_not_compared_with_noise(X, objective):
    detector = make(warm_start=True).fit(X)
    with pytest.raises(ValueError, match=r"EnergyModel is conditional on noise levels.*warm_start=False"):
        detector.set_params(objective=objective).fit(X)
    assert detector.set_params(warm_start=False).fit(X).model_.noise_levels is None


def test_a_density_needs_its_constant_and_fitting_forgets_it(X):
    detector = make()
    for method in ("energy", "log_prob"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(detector, method)(X)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        detector.normalize()
    detector.fit(X)
    with pytest.raises(NotFittedError, match=r"call normalize\(\) before log_prob\(\)"):
        detector.log_prob(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few levels for a good estimate
        detector.normalize(n_chains=16, n_levels=4, random_state=0)
        again = clone(detector).fit(X).normalize(n_chains=16, n_levels=4, random_state=0)
    np.testing.assert_array_equal(again.log_prob(X), detector.log_prob(X))
    detector.fit(X)
    assert not hasattr(detector, "log_normalizer_")
    assert not hasattr(detector, "log_normalizer_interval_")


# Divergence and refusals ----------------------------------------------------------------------------------


def test_chains_that_leave_the_data_end_training_with_a_diagnosis(X):
    objective = ContrastiveDivergence(step_size=1e4, n_steps=5)
    with pytest.warns(UserWarning, match="Training diverged and was stopped at step .*: the "):
        detector = make(objective=objective, max_iter=200).fit(X)
    assert detector.n_iter_ < 200
    assert np.isfinite(detector.score_samples(X)).all()


def test_unknown_names_list_the_known(X):
    known = ", ".join(repr(name) for name in OBJECTIVES)
    with pytest.raises(ValueError, match=f"objective='likelihood' is unknown. Known names: {known};"):
        make(objective="likelihood").fit(X)
    with pytest.raises(ValueError, match=r"anomaly='depth' is unknown. Known names: 'energy', 'score_norm'"):
        make(anomaly="depth").fit(X)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"noise": 2.0, "max_noise": 1.0}, r"noise=2.0 must be positive and below max_noise=1.0"),
        ({"noise": 0.0}, "set max_noise=None"),
        ({"network": "transformer"}, "The 'network' parameter"),
        ({"spectral_norm": 0.0}, "The 'spectral_norm' parameter"),
        ({"n_heads": 0}, "The 'n_heads' parameter"),
        ({"noise": -1.0}, "The 'noise' parameter"),
        ({"objective": 3}, "The 'objective' parameter"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(X, parameters, match):
    with pytest.raises(ValueError, match=match):
        make(**parameters).fit(X)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (ContrastiveDivergence(n_steps=0), "n_steps of .* must be a positive integer, got 0"),
        (ContrastiveDivergence(alpha=-1.0), "alpha of .* must be finite and not negative"),
        (ContrastiveDivergence(data_noise=0.0), "step_size=None follows data_noise, which is 0"),
        (PersistentContrastiveDivergence(data_noise=0.0), "step_size=None follows data_noise, which is 0"),
        (PersistentContrastiveDivergence(step_size=0.0), r"step_size must be positive and finite, got 0\.0"),
        (PersistentContrastiveDivergence(p_restart=2.0), r"p_restart must lie in \[0, 1\], got 2"),
        (
            DenoisingScoreMatching(data_noise=-0.1),
            r"data_noise of .* must be finite and not negative, got -0",
        ),
        (ScoreMatching(n_probes=0), "n_probes of .* must be a positive integer"),
        (SlicedScoreMatching(n_slices=1.5), r"n_slices of .* must be a positive integer, got 1\.5"),
        (NoiseContrastive(n_noise=0), "n_noise of .* must be a positive integer, got 0"),
        (NoiseContrastive(data_noise=math.nan), "data_noise of .* must be finite"),
        (Telescoping(power=0.0), r"power of .* must be positive and finite, got 0\.0"),
        (GradientPenalty(DenoisingScoreMatching(), weight=-1.0), "weight of .* not negative"),
    ],
    ids=str,
)
def test_bad_parameters_of_objectives_are_refused(X, objective, match):
    with pytest.raises(ValueError, match=match):
        make(objective=objective, max_noise=None).fit(X)


def test_an_objective_without_noise_takes_a_step_of_its_own(X):
    objective = ContrastiveDivergence(data_noise=0.0, step_size=0.01)
    assert np.isfinite(make(objective=objective).fit(X).energy(X)).all()


def test_what_is_penalised_is_an_object(X):
    with pytest.raises(TypeError, match=r"objective must be a component .* got 'score-matching'"):
        make(objective=GradientPenalty("score-matching")).fit(X)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_are_refused(energetic, X, bad):
    spoilt = X.copy()
    spoilt[3, 1] = bad
    with pytest.raises(ValueError, match="contains"):
        make().fit(spoilt)
    with pytest.raises(ValueError, match="contains"):
        energetic.energy(spoilt)
    with pytest.raises(ValueError, match="features"):
        energetic.energy(X[:, :2])


def test_an_impossible_pair_fails_at_once(X):
    class Depth(Component):
        in_nats = False

        def __call__(self, model, x, generator):
            return model.depth(x)

    with pytest.raises(TypeError, match=r"does not work with EnergyModel.*'depth'"):
        make(anomaly=Depth()).fit(X)
