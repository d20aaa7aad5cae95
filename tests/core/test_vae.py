"""The detector: densities in the units of X, latent variables that are used, and a transformer of scikit-learn's."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from anomalib_gen import VAEDetector
from anomalib_gen.anomaly import ImportanceWeighted, LikelihoodRegret
from anomalib_gen.models import OBSERVATIONS
from anomalib_gen.objectives import EvidenceLowerBound

# A few steps are enough to see whether rows know of each other.
ANOMALIES = [
    LikelihoodRegret(n_steps=5) if name == "likelihood_regret" else name
    for name in sorted(VAEDetector._anomalies)
]
SCALED = sorted(set(OBSERVATIONS) - {"bernoulli"})


def make(**parameters):
    settings = {"hidden_features": 8, "max_iter": 20, "random_state": 0, "device": "cpu"}
    return VAEDetector(**{**settings, **parameters})


@pytest.fixture(scope="module")
def vae(X):
    """A fitted detector that no test may change."""
    return make(n_components=2).fit(X)


@pytest.fixture(scope="module")
def flags():
    rng = np.random.default_rng(0)
    cause = rng.random((200, 1)) < 0.5
    return (rng.random((200, 5)) < np.where(cause, 0.9, 0.1)).astype(float)


# Densities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", SCALED)
def test_the_density_integrates_to_one_in_the_units_of_X(observation):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 400)
    scale, shift = np.array([100.0, 0.01]), np.array([5.0, -3.0])
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.2 * rng.normal(size=(400, 2))
    detector = make(
        observation=observation, n_components=2, hidden_features=16, max_iter=200, learning_rate=0.02
    ).fit(ring * scale + shift)
    grid = np.linspace(-4, 4, 41)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2) * scale + shift
    total = np.exp(detector.log_prob(points, n_draws=300)).sum() * (0.2**2 * scale.prod())
    assert total == pytest.approx(
        1, abs=0.05
    )  # the same draws for all points: their error does not average out
    # The bound is one on that density.
    assert np.exp(detector.elbo(points)).sum() * (0.2**2 * scale.prod()) < total


@pytest.mark.parametrize("anomaly", ANOMALIES, ids=str)
def test_only_densities_have_the_units_of_the_data(X, anomaly):
    detector = make(anomaly=anomaly)
    before = detector.fit(X).score_samples(X)
    after = detector.fit(X * [1, 1, 2.0**-10]).score_samples(X * [1, 1, 2.0**-10])
    expected = 10 * np.log(2) if anomaly in ("elbo", "iwae", "reconstruction_probability") else 0.0
    np.testing.assert_allclose(after - before, expected, atol=1e-3)


def test_bounds_do_not_depend_on_the_anomaly(vae, X):
    np.testing.assert_array_equal(vae.elbo(X), vae.score_samples(X))
    other = make(n_components=2, anomaly="kl").fit(X)
    np.testing.assert_array_equal(other.elbo(X), vae.elbo(X))
    iwae = make(n_components=2, anomaly=ImportanceWeighted(n_draws=256)).fit(X)
    np.testing.assert_array_equal(vae.log_prob(X), iwae.score_samples(X))
    assert vae.log_prob(X).mean() > vae.elbo(X).mean()


def test_typicality_is_the_distance_of_the_bound_from_its_mean(vae, X):
    typical = vae.with_anomaly("typicality", X)
    entropy = typical.anomaly_.entropy_
    # In the units of standardised rows, where a bound differs from that on X by one constant.
    bound = -vae.elbo(X) + vae._scaler.log_det
    np.testing.assert_allclose(-typical.score_samples(X), np.abs(bound - entropy), rtol=1e-9, atol=1e-9)
    held_out = vae._split(len(X), np.random.RandomState(vae._seeds[0]))[1]
    assert entropy == pytest.approx(bound[held_out].mean(), rel=1e-6)  # from rows in float32


def test_training_raises_the_bound(X):
    short, long = make(max_iter=2).fit(X), make(max_iter=200).fit(X)
    assert long.score(X) > short.score(X) + 0.5
    assert long.validation_curve_[-1] < long.validation_curve_[0]


def test_bernoulli_scores_are_probabilities_of_all_rows(flags):
    detector = make(observation="bernoulli", n_components=1, max_iter=100).fit(flags)
    every = (np.arange(32)[:, None] >> np.arange(5) & 1).astype(float)
    assert np.exp(detector.log_prob(every, n_draws=500)).sum() == pytest.approx(1, abs=0.02)
    assert set(np.unique(detector.sample(50, random_state=0))) == {0.0, 1.0}
    probabilities = detector.reconstruct(flags)
    assert probabilities.min() > 0
    assert probabilities.max() < 1


@pytest.mark.parametrize("observation", SCALED)
def test_flags_and_constants_have_bounded_densities(flags, observation):
    """Columns that a decoder can name exactly: without a floor their density would be without bound."""
    rows = np.concatenate([flags, np.full((200, 1), 3.0), np.random.default_rng(1).normal(size=(200, 1))], 1)
    detector = make(observation=observation, max_iter=200, learning_rate=0.02, noise=0.02).fit(rows)
    scores = detector.score_samples(rows)
    # At most 1 / cell for a flag (the grid's gap is one) and the peaks of noise .02 for the other two.
    assert scores.max() < 5 * 1.0 + 2 * np.log(1 / 0.02)
    assert np.isfinite(scores).all()


# Latent variables -----------------------------------------------------------------------------------------


def test_digits_do_not_collapse():
    X = load_digits().data
    detector = VAEDetector(max_iter=400, random_state=0, device="cpu").fit(X)
    assert detector.n_components_ == 32
    assert detector.n_active_ >= 10
    active = detector.transform(X).var(axis=0) > 0.01
    assert active.sum() == detector.n_active_
    # What is active is used: the reconstruction explains most of the variance there is.
    error = np.square(X - detector.reconstruct(X)).mean()
    assert error < 0.5 * X.var(axis=0).mean()


def test_columns_with_nothing_in_common_leave_the_latent_variables_idle():
    X = np.random.default_rng(0).normal(size=(500, 4))
    assert make(n_components=2, objective=EvidenceLowerBound(beta=4.0), max_iter=300).fit(X).n_active_ == 0


@pytest.mark.parametrize(("features", "expected"), [(1, 2), (3, 2), (7, 4), (100, 32)])
def test_auto_components(features, expected):
    X = np.random.default_rng(0).normal(size=(40, features))
    detector = make(max_iter=2).fit(X)
    assert detector.n_components_ == expected
    assert detector.transform(X).shape == (40, expected)


# The transformer ------------------------------------------------------------------------------------------


def test_latent_vectors_there_and_back(vae, X):
    Z = vae.transform(X)
    assert Z.shape == (200, 2)
    assert Z.dtype == np.float64
    assert vae.inverse_transform(Z).shape == (200, 3)
    np.testing.assert_array_equal(vae.inverse_transform(Z), vae.reconstruct(X))
    # Latent vectors are data, and nothing that a pipeline could route.
    assert not hasattr(vae, "set_inverse_transform_request")
    np.testing.assert_array_equal(make(n_components=2).fit_transform(X), Z)


def test_a_long_enough_training_reconstructs():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 1)) * [1.0, 200.0, -3.0] + [0.0, 50.0, 1.0]
    detector = make(n_components=1, max_iter=300, learning_rate=0.02).fit(X)
    error = np.square(detector.reconstruct(X) - X).mean(0) / X.var(0)
    assert (error < 0.05).all()


def test_interpolation_starts_and_ends_at_the_reconstructions(vae, X):
    lines = vae.interpolate(X[:4], X[4:8], n_steps=5)
    assert lines.shape == (4, 5, 3)
    np.testing.assert_allclose(lines[:, 0], vae.reconstruct(X[:4]))
    np.testing.assert_allclose(lines[:, -1], vae.reconstruct(X[4:8]))
    middle = (vae.transform(X[:4]) + vae.transform(X[4:8])) / 2
    np.testing.assert_allclose(lines[:, 2], vae.inverse_transform(middle))


def test_bad_lines_and_vectors(vae, X):
    with pytest.raises(ValueError, match="X_a has 3 rows and X_b 2"):
        vae.interpolate(X[:3], X[:2])
    with pytest.raises(ValueError, match="n_steps must be an integer of at least 2, got 1"):
        vae.interpolate(X[:3], X[:3], n_steps=1)
    with pytest.raises(ValueError, match="Z has 3 columns, but there are 2 latent dimensions"):
        vae.inverse_transform(X)
    with pytest.raises(ValueError, match="X has 2 features, but VAEDetector is expecting 3"):
        vae.transform(X[:, :2])


def test_names_and_frames(X):
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(200) * 2)
    detector = make(n_components=2).set_output(transform="pandas").fit(frame)
    assert list(detector.get_feature_names_out()) == ["vaedetector0", "vaedetector1"]
    Z = detector.transform(frame)
    assert list(Z.columns) == ["vaedetector0", "vaedetector1"]
    assert (Z.index == frame.index).all()
    assert detector.reconstruct(frame).shape == (200, 3)
    assert detector.interpolate(frame[:2], frame[2:4]).shape == (2, 10, 3)
    pipe = make_pipeline(StandardScaler(), make(n_components=2), StandardScaler())
    assert pipe.set_output(transform="pandas").fit_transform(frame).shape == (200, 2)


# scikit-learn ---------------------------------------------------------------------------------------------


def test_grid_search_over_the_components(X):
    search = GridSearchCV(make(max_iter=60), {"n_components": [1, 3]}, cv=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    assert search.best_estimator_.score(X) == pytest.approx(search.score(X))


def test_parameters_of_components_are_nested(X):
    detector = make(objective=EvidenceLowerBound(), anomaly=ImportanceWeighted())
    detector.set_params(objective__beta=3.0, anomaly__n_draws=7)
    assert (detector.objective.beta, detector.anomaly.n_draws) == (3.0, 7)
    copied = clone(detector)
    assert copied.objective is not detector.objective
    assert copied.objective.beta == 3.0
    one = detector.fit(X).score_samples(X)
    assert not np.array_equal(detector.set_params(objective__beta=1.0).fit(X).score_samples(X), one)
    # What the objective heard of the time stays off the user's object.
    assert vars(detector.objective).keys() == {"beta", "warmup", "free_bits", "n_draws"}


@pytest.mark.parametrize("anomaly", ANOMALIES, ids=str)
@pytest.mark.parametrize("observation", SCALED)
def test_scores_are_those_of_the_row_alone(X, observation, anomaly):
    detector = make(observation=observation, anomaly=anomaly, max_iter=5).fit(X)
    scores = detector.score_samples(X)
    np.testing.assert_array_equal(scores, detector.score_samples(X))
    np.testing.assert_array_equal(scores, clone(detector).fit(X).score_samples(X))
    np.testing.assert_allclose(detector.score_samples(X[::-1])[::-1], scores, rtol=1e-9, atol=1e-9)
    alone = np.concatenate([detector.score_samples(X[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, scores[:5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("observation", sorted(OBSERVATIONS))
def test_pickles_change_no_bit(X, flags, observation):
    rows = flags if observation == "bernoulli" else X
    detector = make(observation=observation, max_iter=5).fit(rows)
    copied = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(copied.score_samples(rows), detector.score_samples(rows))
    np.testing.assert_array_equal(copied.transform(rows), detector.transform(rows))
    np.testing.assert_array_equal(copied.sample(4, random_state=0), detector.sample(4, random_state=0))
    assert copied.n_active_ == detector.n_active_


def test_global_generators_are_left_alone(X):
    state = torch.get_rng_state()
    make(anomaly=LikelihoodRegret(n_steps=3), max_iter=3).fit(X).sample(3, random_state=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_start_and_passes(X):
    detector = make(warm_start=True).fit(X).fit(X)
    assert detector.n_iter_ == 40
    detector.partial_fit(X)
    assert detector.n_iter_ == 41
    # A stream of passes has no end, so there is no warm-up: the divergence counts in full.
    passing = make(objective=EvidenceLowerBound(warmup=1.0), validation_fraction=0.0)
    plain = make(validation_fraction=0.0)
    np.testing.assert_array_equal(
        passing.partial_fit(X).score_samples(X), plain.partial_fit(X).score_samples(X)
    )


@pytest.mark.parametrize(
    "method", ["score_samples", "elbo", "log_prob", "transform", "inverse_transform", "reconstruct"]
)
def test_unfitted_detectors_say_so(X, method):
    with pytest.raises(NotFittedError, match="VAEDetector instance is not fitted yet"):
        getattr(make(), method)(X)


def test_unfitted_detectors_do_not_interpolate(X):
    with pytest.raises(NotFittedError, match="VAEDetector instance is not fitted yet"):
        make().interpolate(X, X)
    assert not hasattr(make(), "n_components_")


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_components": 0}, "'n_components' parameter"),
        ({"n_components": "many"}, "'n_components' parameter"),
        ({"n_components": 1.5}, "'n_components' parameter"),
        ({"observation": "poisson"}, "'observation' parameter"),
        ({"variance": 0.0}, "'variance' parameter"),
        ({"variance": "each"}, "'variance' parameter"),
        ({"degrees_of_freedom": -1.0}, "'degrees_of_freedom' parameter"),
        ({"encoder": "cnn"}, "'encoder' parameter"),
        ({"objective": "likelihood"}, r"objective='likelihood' is unknown\. Known names: 'elbo';"),
        ({"anomaly": LikelihoodRegret(n_steps=0)}, "n_steps must be a positive integer, got 0"),
        (
            {"anomaly": LikelihoodRegret(n_steps=1, learning_rate=0)},
            "learning_rate must be positive and finite, got 0",
        ),
        ({"anomaly": "energy"}, r"Known names: 'elbo', 'iwae', 'kl', 'likelihood_regret', 'recon"),
        ({"encoder": lambda i, o: nn.Linear(i, o // 2)}, r"encoder returned a tensor of shape \(2, 2\)"),
        ({"decoder": lambda i, o: nn.Linear(i, 1)}, r"decoder returned a tensor of shape \(2, 1\)"),
    ],
)
def test_bad_parameters(X, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(**parameters).fit(X)


def test_bernoulli_names_the_columns_that_are_no_flags(flags):
    frame = pd.DataFrame(flags, columns=list("abcde"))
    odd = frame.assign(b=frame["b"] + 0.5, d=2 * frame["d"])
    message = (
        r"observation='bernoulli' needs zeros and ones.*columns 'b' \(e\.g\. [01]\.5\), 'd' \(e\.g\. 2\)"
    )
    with pytest.raises(ValueError, match=message):
        make(observation="bernoulli").fit(odd)
    detector = make(observation="bernoulli").fit(frame)
    scores = detector.score_samples(frame)
    for method in ("score_samples", "predict", "transform", "elbo", "partial_fit"):
        with pytest.raises(ValueError, match=message):
            getattr(detector, method)(odd)
    np.testing.assert_array_equal(detector.score_samples(frame), scores)
    with pytest.raises(ValueError, match=r"in column 0 \(e\.g\. -1\)"):
        make(observation="bernoulli").fit(flags - [1, 0, 0, 0, 0])


def test_a_fitted_model_judges_rows_by_what_it_was_built_for(vae, X, flags):
    detector = pickle.loads(pickle.dumps(vae)).set_params(observation="bernoulli")
    np.testing.assert_array_equal(detector.score_samples(X), vae.score_samples(X))


def test_flags_as_integers_and_booleans(flags):
    expected = make(observation="bernoulli").fit(flags).score_samples(flags)
    for kind in (int, bool, np.float32):
        rows = flags.astype(kind)
        np.testing.assert_allclose(make(observation="bernoulli").fit(rows).score_samples(rows), expected)
