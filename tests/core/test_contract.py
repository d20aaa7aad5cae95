"""What every family, objective and anomaly promises; found by walking the package, so a new one is tested too."""

import hashlib
import pickle
import random

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import anomalib_gen
from anomalib_gen import _training
from anomalib_gen._base import GenerativeDetector
from anomalib_gen.explain import feature_contributions

FAMILIES = sorted(
    (
        value
        for name in anomalib_gen.__all__
        if isinstance(value := getattr(anomalib_gen, name), type) and issubclass(value, GenerativeDetector)
    ),
    key=lambda family: family.__name__,
)

# Sizes at which any family trains in a fraction of a second; a family takes those that it has.
SMALL = {
    "max_iter": 20,
    "hidden_features": 8,
    "n_blocks": 1,
    "contamination": 0.1,
    "random_state": 0,
    "device": "cpu",
}


def small(family, **parameters):
    known = family().get_params()
    return family(**{name: value for name, value in SMALL.items() if name in known}, **parameters)


def combinations():
    """The default, and every objective and every anomaly by its name."""
    for family in FAMILIES:
        yield pytest.param(family, {}, id=family.__name__)
        for argument, known in (("objective", family._objectives), ("anomaly", family._anomalies)):
            if argument in family().get_params():
                for name in known:
                    yield pytest.param(family, {argument: name}, id=f"{family.__name__}-{name}")


def global_state():
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        (name, hashlib.sha1(keys.tobytes()).hexdigest(), *rest),
        hashlib.sha1(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
each_combination = pytest.mark.parametrize(("family", "parts"), list(combinations()))


@pytest.fixture(scope="module")
def trained(X):
    """Fit a combination once, however many tests ask for it."""
    fitted = {}

    def get(family, parts):
        key = (family, *parts.items())
        if key not in fitted:
            fitted[key] = small(family, **parts).fit(X)
        return fitted[key]

    return get


def test_the_families_are_found():
    assert {"EnergyDetector", "FlowDetector", "VAEDetector"} <= {family.__name__ for family in FAMILIES}


@each_combination
def test_scores_are_finite_numbers_a_row(trained, family, parts, X):
    detector = trained(family, parts)
    scores = detector.score_samples(X)
    assert scores.shape == (len(X),)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert np.ptp(scores) > 0
    assert (detector.predict(X) == -1).mean() == pytest.approx(0.1, abs=0.01)


@each_combination
def test_a_score_depends_on_its_row_alone(trained, family, parts, X, monkeypatch):
    detector = trained(family, parts)
    scores = detector.score_samples(X)
    order = np.random.default_rng(0).permutation(len(X))
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(detector.score_samples(X[order]), scores[order], **tolerance)
    np.testing.assert_allclose(detector.score_samples(X[7:8]), scores[7:8], **tolerance)
    monkeypatch.setattr("anomalib_gen._runtime.scoring_block_rows", lambda size, device: 13)
    np.testing.assert_allclose(detector.score_samples(X), scores, **tolerance)


@each_combination
def test_the_same_seed_gives_the_same_detector_and_touches_nothing(trained, family, parts, X):
    before = global_state()
    again = small(family, **parts).fit(X)
    np.testing.assert_array_equal(again.score_samples(X), trained(family, parts).score_samples(X))
    assert global_state() == before


@each_combination
def test_a_clone_and_a_pickle_are_the_same_detector(trained, family, parts, X):
    detector = trained(family, parts)
    assert repr(clone(detector)) == repr(small(family, **parts))
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(detector)).score_samples(X), detector.score_samples(X)
    )


def anomalies():
    for family in FAMILIES:
        for name in family._anomalies:
            yield pytest.param(family, name, id=f"{family.__name__}-{name}")


@pytest.mark.parametrize(("family", "name"), list(anomalies()))
def test_a_score_does_not_depend_on_the_threads(trained, family, name, X, monkeypatch):
    detector = trained(family, {}).with_anomaly(name, X)
    scores = detector.score_samples(X)
    monkeypatch.setattr("anomalib_gen._runtime.scoring_threads", lambda: 4)
    monkeypatch.setattr("anomalib_gen._scoring.LEAST_ROWS", 5)
    monkeypatch.setattr("anomalib_gen._scoring.ROWS_PER_BLOCK", 11)
    np.testing.assert_allclose(detector.score_samples(X), scores, rtol=1e-9, atol=1e-9)


@each_family
def test_what_is_computed_of_rows_does_not_depend_on_the_threads(trained, family, X, monkeypatch):
    detector = trained(family, {})
    ways = {name: getattr(detector, name) for name in ("transform", "reconstruct") if hasattr(detector, name)}
    if hasattr(detector.model_, "score"):
        ways["score"] = lambda X: (
            feature_contributions(detector.with_anomaly("score_norm", X), X, method="score").values
        )
    ways["score_samples"] = detector.score_samples
    found = {name: way(X) for name, way in ways.items()}
    monkeypatch.setattr("anomalib_gen._runtime.scoring_threads", lambda: 4)
    monkeypatch.setattr("anomalib_gen._scoring.LEAST_ROWS", 5)
    monkeypatch.setattr("anomalib_gen._scoring.ROWS_PER_BLOCK", 11)
    for name, way in ways.items():
        np.testing.assert_allclose(way(X), found[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("contamination", ["auto", 0.1])
@pytest.mark.parametrize(("family", "name"), list(anomalies()))
def test_another_anomaly_is_as_if_fitted_with_it(trained, family, name, contamination, X):
    weights = np.arange(len(X)) % 3
    first = small(family).set_params(contamination=contamination).fit(X, sample_weight=weights)
    before = first.score_samples(X)
    other = first.with_anomaly(name, X, sample_weight=weights)
    refitted = small(family, anomaly=name).set_params(contamination=contamination)
    refitted.fit(X, sample_weight=weights)
    np.testing.assert_array_equal(other.score_samples(X), refitted.score_samples(X))
    assert other.offset_ == refitted.offset_
    assert other.anomaly == name
    np.testing.assert_array_equal(first.score_samples(X), before)
    assert first.anomaly != name or name == family().anomaly


@each_family
def test_another_anomaly_must_be_known(trained, family, X):
    with pytest.raises(ValueError, match="anomaly='no such' is unknown"):
        trained(family, {}).with_anomaly("no such", X)
    with pytest.raises(NotFittedError):
        small(family).with_anomaly(None, X)


@each_combination
def test_every_weight_learns(family, parts, X, monkeypatch):
    """No parameter may be without a gradient through the whole of training."""
    moved = set()
    clip = _training._FlatWeights.clip

    def watch(flat, max_norm):
        moved.update(parameter for group in flat.groups for parameter in group if parameter.grad.any())
        clip(flat, max_norm)

    monkeypatch.setattr(_training._FlatWeights, "clip", watch)
    detector = small(family, **parts).fit(X)
    still = {name for name, p in detector.model_.named_parameters() if p.requires_grad and p not in moved}
    # An energy is known up to a constant, which only some objectives learn.
    assert still <= ({"log_z", "network.output.bias"} if hasattr(detector.model_, "log_z") else set())


@each_combination
def test_far_rows_are_finite_and_the_furthest_is_the_worst(trained, family, parts, X):
    detector = trained(family, parts)
    with np.errstate(over="ignore"):
        far = X.mean(axis=0) + np.array([1e2, 1e6, 1e30, 1e200, 1e300])[:, None] * X.std(axis=0)
    scores = detector.score_samples(np.concatenate([far, -far]))
    assert np.isfinite(scores).all()


@each_family
def test_continuing(trained, family, X):
    detector = small(family).fit(X)
    first = detector.n_iter_
    detector.partial_fit(X)
    assert detector.n_iter_ == first + 1
    warm = small(family, warm_start=True).fit(X).fit(X)
    assert warm.n_iter_ == 2 * first
    assert np.isfinite(warm.score_samples(X)).all()


@each_family
def test_weights_of_rows(family, X):
    weights = np.ones(len(X))
    weights[50:] = 0
    part = small(family).fit(X, sample_weight=weights)
    np.testing.assert_allclose(part._scaler.shift, X[:50].mean(axis=0))
    assert np.isfinite(part.score_samples(X)).all()


@each_family
def test_samples_are_rows(trained, family, X):
    detector = trained(family, {})
    drawn = detector.sample(30, random_state=0)
    assert drawn.shape == (30, X.shape[1])
    assert np.isfinite(drawn).all()
    np.testing.assert_array_equal(drawn, detector.sample(30, random_state=0))


@each_family
def test_bad_input_is_named(trained, family, X):
    frame = pd.DataFrame(X, columns=["age", "height", "weight"])
    detector = small(family).fit(frame)
    with pytest.raises(ValueError, match=r"NaN in column 'height'"):
        detector.score_samples(frame.assign(height=np.nan))
    with pytest.raises(ValueError, match="feature names"):
        detector.score_samples(frame.rename(columns={"age": "years"}))
    with pytest.raises(ValueError, match="features"):
        trained(family, {}).score_samples(X[:, :2])
    with pytest.raises(NotFittedError):
        small(family).score_samples(X)
    with pytest.raises(ValueError, match="2"):
        small(family).fit(X[:1])
    with pytest.raises(ValueError, match="contamination"):
        small(family).set_params(contamination=0.7).fit(X)


@each_family
@pytest.mark.parametrize("n_rows", [2, 3, 6])
@pytest.mark.parametrize("n_features", [1, 4])
def test_a_few_rows_train(family, n_rows, n_features):
    rows = np.random.default_rng(0).normal(size=(n_rows, n_features))
    detector = small(family).fit(rows)
    assert detector.n_iter_ == 20
    assert np.isfinite(detector.score_samples(rows)).all()


@each_family
def test_a_constant_column(family, X):
    rows = np.column_stack([X, np.full(len(X), 7.0)])
    detector = small(family).fit(rows)
    changed = rows[:20].copy()
    changed[:, -1] = 1e4
    assert np.isfinite(detector.score_samples(changed)).all()
    assert (detector.score_samples(changed) < detector.score_samples(rows[:20])).all()
