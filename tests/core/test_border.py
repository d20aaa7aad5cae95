"""The scikit-learn border: what a detector promises to whoever knows scikit-learn."""

import io
import os
import pickle
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen._base import GenerativeDetector, outlier_threshold
from anomalib_gen._component import Component
from anomalib_gen._training import TrainingOptions
from anomalib_gen.anomaly import Likelihood, Typicality
from anomalib_gen.explain import feature_contributions
from anomalib_gen.objectives import MaximumLikelihood, NoiseContrastive


def same_scaling(a, b):
    return np.array_equal(a._scaler.shift, b._scaler.shift) and np.array_equal(
        a._scaler.scale, b._scaler.scale
    )


# Scores and labels ----------------------------------------------------------------------------------------


def test_scores_labels_and_threshold_fit_together(fitted, X):
    scores = fitted.score_samples(X)
    assert scores.shape == (200,)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(fitted.decision_function(X), scores - fitted.offset_)
    np.testing.assert_array_equal(fitted.predict(X), np.where(scores >= fitted.offset_, 1, -1))
    assert fitted.score(X) == pytest.approx(scores.mean())
    assert fitted.score(X, np.ones(200)) == fitted.score(X)


@pytest.mark.parametrize("contamination", [0.01, 0.1, 0.25, 0.5])
def test_share_of_training_outliers_is_the_contamination(tiny, X, contamination):
    labels = tiny(contamination=contamination).fit_predict(X)
    assert set(np.unique(labels)) == {-1, 1}
    assert (labels == -1).mean() == pytest.approx(contamination, abs=1 / 200)


def test_auto_takes_the_quantile_of_held_out_rows(tiny, X):
    detector = tiny(contamination="auto", validation_fraction=0.5).fit(X)
    _, held_out = detector._split(200, np.random.RandomState(np.random.RandomState(0).randint(2**31 - 1)))
    assert len(held_out) == 100
    assert (detector.predict(X[held_out]) == -1).mean() == 0.05
    # None held out: the training rows, then.
    detector = tiny(contamination="auto", validation_fraction=0.0).fit(X)
    assert (detector.predict(X) == -1).mean() == 0.05


@pytest.mark.parametrize(
    ("n", "rate"), [(5, 1 / 6), (18, 1 / 19), (19, 0.05), (25, 0.05), (99, 0.05), (210, 0.05)]
)
def test_auto_flags_new_rows_of_the_same_kind_at_its_rate(n, rate):
    # Of uniform scores a new one falls below t with probability t.
    scores = np.random.RandomState(0).uniform(size=(20_000, n))
    rates = [outlier_threshold(held_out, "auto") for held_out in scores]
    assert np.mean(rates) == pytest.approx(rate, abs=4 * np.std(rates) / np.sqrt(len(rates)))


def test_fit_predict_is_fit_then_predict(tiny, X):
    np.testing.assert_array_equal(tiny().fit_predict(X), tiny().fit(X).predict(X))


def test_far_rows_are_outliers(fitted, X):
    far = X[:5] + 100 * X.std(axis=0)
    assert (fitted.predict(far) == -1).all()
    assert fitted.score_samples(far).max() < fitted.score_samples(X).min()


def test_log_prob_is_the_score_of_the_likelihood(fitted, X):
    np.testing.assert_array_equal(fitted.log_prob(X), fitted.score_samples(X))


def test_log_prob_does_not_depend_on_the_anomaly(tiny, fitted, X):
    detector = tiny(anomaly="typicality").fit(X)
    np.testing.assert_array_equal(detector.log_prob(X), fitted.log_prob(X))
    # |log p + H| in standardised units.
    expected = -np.abs(fitted.log_prob(X) - fitted._scaler.log_det + detector.anomaly_.entropy_)
    np.testing.assert_allclose(detector.score_samples(X), expected, rtol=1e-10)


def test_sample_is_in_the_units_of_the_columns(tiny, X):
    drawn = tiny(max_iter=60).fit(X).sample(2000, random_state=0)
    assert drawn.shape == (2000, 3)
    assert drawn.dtype == np.float64
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), atol=0.5 * X.std(axis=0).max())
    np.testing.assert_allclose(drawn.std(axis=0) / X.std(axis=0), 1, atol=0.4)


def test_sample_is_repeatable_only_with_a_seed(fitted):
    np.testing.assert_array_equal(fitted.sample(5, random_state=3), fitted.sample(5, random_state=3))
    assert not np.array_equal(fitted.sample(5, random_state=3), fitted.sample(5, random_state=4))
    assert not np.array_equal(fitted.sample(5), fitted.sample(5))


@pytest.mark.parametrize(
    "method", ["score_samples", "decision_function", "predict", "score", "log_prob", "sample"]
)
def test_unfitted_detectors_say_so(tiny, X, method):
    with pytest.raises(NotFittedError, match="FlowDetector instance is not fitted yet"):
        getattr(tiny(), method)(*([] if method == "sample" else [X]))


# What fit leaves behind -----------------------------------------------------------------------------------


def test_fitted_attributes_with_held_out_rows(tiny, X):
    detector = tiny(max_iter=60).fit(X)
    assert detector.n_iter_ == 60
    assert detector.event_shape_ == (3,)
    assert detector.n_features_in_ == 3
    assert not hasattr(detector, "feature_names_in_")
    # At steps 25 and 50 and at the end.
    assert len(detector.loss_curve_) == len(detector.validation_curve_) == 3
    assert np.isfinite(detector.loss_curve_ + detector.validation_curve_).all()


def test_without_held_out_rows_there_is_no_validation_curve(tiny, X):
    detector = tiny(max_iter=60, validation_fraction=0.0).fit(X)
    assert detector.validation_curve_ == []
    assert len(detector.loss_curve_) == 3
    # A tenth of 40 rows is too few to judge by.
    assert tiny().fit(X[:40]).validation_curve_ == []
    assert len(tiny().fit(X[:60]).validation_curve_) == 1


def test_training_learns(tiny, X):
    short, long = tiny(max_iter=2).fit(X), tiny(max_iter=150).fit(X)
    assert long.loss_curve_[-1] < long.loss_curve_[0]
    assert long.validation_curve_[-1] < long.validation_curve_[0]
    assert long.score(X) > short.score(X) + 0.1


def test_column_names_are_kept(tiny, X):
    detector = tiny().fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    assert list(detector.feature_names_in_) == ["a", "b", "c"]


def test_refit_forgets_names_and_width(tiny, X):
    detector = tiny().fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    detector.fit(X[:, :2])
    assert detector.n_features_in_ == 2
    assert detector.event_shape_ == (2,)
    assert not hasattr(detector, "feature_names_in_")


# Randomness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"])
def test_an_int_gives_the_same_detector_every_time(tiny, X, transform):
    first = tiny(transform=transform).fit(X)
    second = tiny(transform=transform).fit(X)
    np.testing.assert_array_equal(first.score_samples(X), second.score_samples(X))
    assert first.offset_ == second.offset_
    np.testing.assert_array_equal(first.score_samples(X), first.fit(X).score_samples(X))


def test_seeds_differ(tiny, X):
    assert not np.array_equal(
        tiny(random_state=0).fit(X).score_samples(X), tiny(random_state=1).fit(X).score_samples(X)
    )


def test_a_random_state_instance_is_consumed(tiny, X):
    instance = np.random.RandomState(0)
    detector = tiny(random_state=instance)
    first = detector.fit(X).score_samples(X)
    second = detector.fit(X).score_samples(X)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, tiny(random_state=0).fit(X).score_samples(X))


@pytest.fixture
def in_double():
    """Torch's default type as a user may have set it."""
    torch.set_default_dtype(torch.float64)
    yield
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert kept == torch.float64


def families_and_objectives():
    for family in (FlowDetector, VAEDetector, EnergyDetector, DiffusionDetector):
        yield pytest.param(family, {}, id=family.__name__)
        for name in family._objectives if "objective" in family().get_params() else ():
            yield pytest.param(family, {"objective": name}, id=f"{family.__name__}-{name}")
    for transform in ("maf", "realnvp", "nsf-coupling"):
        yield pytest.param(FlowDetector, {"transform": transform}, id=transform)
    for noise in ("product-of-marginals", "flow"):
        yield pytest.param(EnergyDetector, {"objective": NoiseContrastive(noise=noise)}, id=noise)
    yield pytest.param(EnergyDetector, {"spectral_norm": 1.0}, id="spectral")


def fit_small(family, parts, X):
    options = {"max_iter": 4, "hidden_features": 8, "random_state": 0, "device": "cpu"} | parts
    detector = family(**options).fit(X)
    return detector.loss_curve_, detector.score_samples(X), detector.partial_fit(X).score_samples(X)


@pytest.mark.parametrize(("family", "parts"), list(families_and_objectives()))
def test_torch_s_default_type_changes_nothing(family, parts, X, request):
    expected = fit_small(family, parts, X)
    request.getfixturevalue("in_double")
    for one, other in zip(fit_small(family, parts, X), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", [FlowDetector, VAEDetector, EnergyDetector, DiffusionDetector])
def test_torch_s_default_type_changes_nothing_of_images(family, request):
    images = np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    parts = {"batch_size": 8} | ({} if family is EnergyDetector else {"n_blocks": 1})
    parts |= {"denoiser": "network"} if family is DiffusionDetector else {}
    expected = fit_small(family, parts, images)
    request.getfixturevalue("in_double")
    for one, other in zip(fit_small(family, parts, images), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_networks_of_any_type_are_taken(dtype, X, in_double):
    def network(features, n_heads, context_features):
        shift = torch.tensor([0.5], dtype=dtype)  # by its values
        layer = nn.Bilinear(features, context_features, n_heads, dtype=dtype)
        layer.bias.data += shift
        return layer

    detector = EnergyDetector(network=network, max_iter=3, random_state=0, device="cpu").fit(X)
    assert np.isfinite(detector.score_samples(X)).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", [FlowDetector, VAEDetector, EnergyDetector, DiffusionDetector])
def test_fit_takes_gradients_where_the_caller_takes_none(X, family, mode):
    detector = family(max_iter=3, hidden_features=8, random_state=0, device="cpu")
    expected = clone(detector).fit(X).partial_fit(X).score_samples(X)
    with mode():
        detector.fit(X).partial_fit(X)
        np.testing.assert_array_equal(detector.score_samples(X), expected)
    np.testing.assert_array_equal(detector.score_samples(X), expected)
    np.testing.assert_array_equal(clone(detector).fit(X).partial_fit(X).score_samples(X), expected)


@pytest.mark.filterwarnings("ignore:The weights of 8 chains")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_follows_gradients_works_where_the_caller_takes_none(X, mode):
    options = {"max_iter": 3, "random_state": 0, "device": "cpu"}
    flow = FlowDetector(transform="nsf-autoregressive", n_layers=1, **options).fit(X)
    vae, energy = VAEDetector(**options).fit(X), EnergyDetector(**options).fit(X)
    diffusion = DiffusionDetector(**options).fit(X)
    product = ComposedDetector([("flow", flow), ("energy", energy)], n_steps=4).fit(X)

    def explained(detector, method):
        return feature_contributions(detector, X[:2], method=method, background=X).values

    calls = [
        lambda: explained(flow, "integrated-gradients"),
        lambda: explained(product, "integrated-gradients"),
        lambda: explained(flow, "conditional"),
        lambda: explained(energy, "score"),
        lambda: clone(energy).fit(X).normalize(n_chains=8, n_levels=4, random_state=0).log_normalizer_,
        lambda: product.sample(3, random_state=0),
        # Their detectors are copies made there.
        lambda: vae.with_anomaly("likelihood_regret", X).score_samples(X[:2]),
        lambda: energy.with_anomaly("score_norm", X).score_samples(X[:2]),
        lambda: diffusion.with_anomaly("likelihood", X).score_samples(X[:2]),
    ]
    for call in calls:
        expected = call()
        with mode():
            found = call()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", [FlowDetector, VAEDetector, EnergyDetector, DiffusionDetector])
def test_a_detector_unpickled_in_inference_mode_is_as_any_other(X, family):
    detector = family(max_iter=3, random_state=0, device="cpu").fit(X)
    expected = detector.score_samples(X)
    with torch.inference_mode():
        copied = pickle.loads(pickle.dumps(detector))
        np.testing.assert_array_equal(copied.score_samples(X), expected)
    np.testing.assert_array_equal(copied.score_samples(X), expected)
    assert not any(weight.is_inference() for weight in copied.model_.parameters())
    # Weights that were shared are shared again.
    assert len(list(copied.model_.parameters())) == len(list(detector.model_.parameters()))
    np.testing.assert_array_equal(
        copied.partial_fit(X).score_samples(X), detector.partial_fit(X).score_samples(X)
    )


# Continuing -----------------------------------------------------------------------------------------------


def test_warm_start_continues(tiny, X):
    cold = tiny(max_iter=100).fit(X)
    warm = tiny(max_iter=100, warm_start=True).fit(X)
    first_loss = warm.validation_curve_[0]
    scaler = warm._scaler
    # Rows with another mean: the scaling must stay.
    warm.fit(X + 0.1)
    assert warm.n_iter_ == 200
    assert len(warm.loss_curve_) == len(warm.validation_curve_) == 2 * len(cold.loss_curve_)
    assert warm._scaler is scaler
    # The second call starts where the first one ended.
    assert warm.validation_curve_[4] < (first_loss + warm.validation_curve_[3]) / 2


def test_warm_start_off_starts_again(tiny, X):
    detector = tiny().fit(X)
    scores = detector.score_samples(X)
    assert detector.fit(X).n_iter_ == 20
    np.testing.assert_array_equal(detector.score_samples(X), scores)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_another_width_is_refused_and_the_detector_kept(tiny, X, method):
    detector = tiny(warm_start=True).fit(X)
    scores, n_iter = detector.score_samples(X), detector.n_iter_
    with pytest.raises(ValueError, match="X has 2 features, but FlowDetector is expecting 3 features"):
        getattr(detector, method)(X[:, :2])
    assert detector.n_iter_ == n_iter
    np.testing.assert_array_equal(detector.score_samples(X), scores)


def test_partial_fit_is_one_pass_in_the_first_scaling(tiny, X):
    detector = tiny(batch_size=30, validation_fraction=0.0)
    detector.partial_fit(X)
    assert detector.n_iter_ == 7  # 200 rows in batches of 30
    scaler = detector._scaler
    detector.partial_fit(5 * X[:65])
    assert detector.n_iter_ == 7 + 3
    assert detector._scaler is scaler


def test_partial_fit_scales_as_fit_does(tiny, X):
    assert same_scaling(tiny().partial_fit(X), tiny().fit(X))


def test_partial_fit_learns_new_rows(tiny, X):
    new = X[:, ::-1] + [0.0, 3.0, 0.0]
    detector = tiny(max_iter=100, batch_size=25).fit(X)
    before = detector.score(new[100:])
    offset = detector.offset_
    for _ in range(5):
        detector.partial_fit(new[:100])
    assert detector.score(new[100:]) > before + 1
    assert detector.offset_ != offset
    assert (detector.predict(new[:100]) == -1).mean() == pytest.approx(0.1, abs=0.01)


# Sample weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_rows_of_weight_zero_are_left_out(tiny, X, method):
    weights = np.ones(200)
    weights[50:90] = 0
    spoilt = X.copy()
    spoilt[50:90] += 1e6
    weighted = getattr(tiny(), method)(spoilt, sample_weight=weights)
    removed = getattr(tiny(), method)(np.delete(X, np.s_[50:90], axis=0))
    np.testing.assert_allclose(weighted._scaler.shift, removed._scaler.shift, rtol=1e-12)
    np.testing.assert_allclose(weighted._scaler.scale, removed._scaler.scale, rtol=1e-12)
    assert weighted.offset_ == pytest.approx(removed.offset_, rel=1e-6)
    np.testing.assert_allclose(weighted.score_samples(X), removed.score_samples(X), rtol=1e-4)


def test_only_the_ratio_of_weights_counts(tiny, X):
    weights = np.random.default_rng(0).uniform(0.5, 2, size=200)
    one = tiny().fit(X, sample_weight=weights)
    other = tiny().fit(X, sample_weight=1024 * weights)
    np.testing.assert_allclose(one.score_samples(X), other.score_samples(X), rtol=1e-5)


@pytest.mark.parametrize("size", [2.0**-1074, 2.0**-1000, 2.0**1000, 2.0**1023])
def test_the_size_of_weights_does_not_matter(tiny, X, size):
    weighted = tiny().fit(X, sample_weight=np.full(200, size))
    np.testing.assert_array_equal(weighted.score_samples(X), tiny().fit(X).score_samples(X))


def test_weights_that_are_nothing_beside_others_leave_rows_out(tiny, X):
    weights = np.repeat([1e300, 1e-300], 100)
    expected = tiny().fit(X, sample_weight=np.repeat([1.0, 0.0], 100))
    np.testing.assert_array_equal(tiny().fit(X, sample_weight=weights).loss_curve_, expected.loss_curve_)
    with pytest.raises(ValueError, match="sample_weight leaves 1 rows with a positive weight"):
        tiny().fit(X, sample_weight=np.where(np.arange(200) == 3, 1e300, 1e-300))
    # Light ones are left in, and may be all that is held out.
    light = tiny().fit(X, sample_weight=np.where(np.arange(200) < 20, 1.0, 1e-250))
    assert np.isfinite(light.validation_curve_ + light.loss_curve_).all()


def test_heavy_rows_get_more_density(tiny):
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(-2, 1, size=(150, 2)), rng.normal(2, 1, size=(150, 2))])
    heavy_right = np.repeat([1.0, 20.0], 150)
    plain = tiny(max_iter=100).fit(X)
    weighted = tiny(max_iter=100).fit(X, sample_weight=heavy_right)
    gain = weighted.score_samples(X) - plain.score_samples(X)
    assert gain[150:].mean() > 0.2
    assert gain[:150].mean() < -0.2
    # The scaling is weighted too: its centre moves to the heavy rows.
    assert (weighted._scaler.shift > 1.2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: np.where(np.arange(200) == 3, -1.0, w),
            "Negative values in data passed to `sample_weight`",
        ),
        (lambda w: np.where(np.arange(200) == 3, np.nan, w), "Input sample_weight contains NaN"),
        (lambda w: w[:-1], r"sample_weight.shape == \(199,\), expected \(200,\)"),
        (lambda w: 0 * w, "(?i)sample.weight"),
        (lambda w: np.where(np.arange(200) == 3, w, 0), "sample_weight leaves 1 rows with a positive weight"),
    ],
)
def test_bad_weights_are_refused(tiny, X, change, message):
    with pytest.raises(ValueError, match=message):
        tiny().fit(X, sample_weight=change(np.ones(200)))


# Parameters -----------------------------------------------------------------------------------------------


def test_clone_copies_parameters_and_nothing_fitted(fitted):
    copied = clone(fitted)
    assert copied.get_params() == fitted.get_params()
    assert not [name for name in vars(copied) if name.endswith("_")]


def test_set_params_reaches_every_parameter(tiny):
    values = {name: object() for name in tiny().get_params()}
    detector = tiny().set_params(**values)
    assert detector.get_params(deep=False) == values


def test_unknown_parameters_are_refused(tiny):
    with pytest.raises(ValueError, match="Invalid parameter 'depth' for estimator FlowDetector"):
        tiny().set_params(depth=3)


class Scaled(Component):
    """Minus the log-density, times a factor."""

    in_nats = False

    def __init__(self, *, factor=1.0):
        self.factor = factor

    def __call__(self, model, x, generator):
        return -self.factor * model.log_prob(x)


def test_parameters_of_the_anomaly_are_nested(tiny, X):
    anomaly = Scaled()
    detector = tiny(anomaly=anomaly)
    assert detector.get_params()["anomaly__factor"] == 1.0
    assert "anomaly__factor" not in detector.get_params(deep=False)
    one = detector.fit(X).score_samples(X)
    detector.set_params(anomaly__factor=3.0)
    np.testing.assert_allclose(detector.fit(X).score_samples(X), 3 * one, rtol=1e-12)
    copied = clone(detector)
    assert copied.anomaly is not anomaly
    assert copied.anomaly.factor == 3.0


@pytest.mark.parametrize("anomaly", ["typicality", None])
def test_a_name_has_no_parameters_to_set(tiny, X, anomaly):
    detector = tiny(anomaly=anomaly)
    message = (
        rf"anomaly__factor cannot be set while anomaly={anomaly!r}.*an object of anomalib_gen\.anomaly first"
    )
    with pytest.raises(ValueError, match=message):
        detector.set_params(anomaly__factor=2.0)
    with pytest.raises(ValueError, match=message):
        GridSearchCV(detector, {"anomaly__factor": [1.0, 2.0]}, cv=2, error_score="raise").fit(X)
    assert detector.set_params(anomaly=Scaled(), anomaly__factor=2.0).anomaly.factor == 2.0
    with pytest.raises(ValueError, match="Invalid parameter 'objective'"):
        detector.set_params(objective__beta=1.0)


def test_what_an_anomaly_learns_stays_off_the_users_object(tiny, X):
    mine = Typicality()
    detector = tiny(anomaly=mine).fit(X)
    assert detector.anomaly is mine
    assert vars(mine) == {}
    assert np.isfinite(detector.anomaly_.entropy_)


def test_the_parameter_transform_is_no_attribute(tiny, X):
    detector = tiny(transform="maf")
    assert not hasattr(detector, "transform")
    assert not hasattr(FlowDetector, "transform")
    assert detector.get_params()["transform"] == "maf"
    assert "transform='maf'" in repr(detector)
    assert clone(detector).get_params()["transform"] == "maf"
    detector.set_params(transform="realnvp")
    assert detector.get_params()["transform"] == "realnvp"
    with pytest.raises(AttributeError, match=r"get_params\(\)\['transform'\]"):
        _ = detector.transform


def test_a_pipeline_can_set_the_output_of_its_transformers(tiny, X):
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    pipe = make_pipeline(StandardScaler(), tiny()).set_output(transform="pandas").fit(frame)
    assert list(pipe[-1].feature_names_in_) == ["a", "b", "c"]
    assert not hasattr(pipe, "transform")
    assert pipe.score_samples(frame).shape == (200,)


def test_html_shows_the_parameters(fitted, tiny):
    for detector in (fitted, tiny()):
        html = detector._repr_html_()
        assert "FlowDetector" in html
        assert "realnvp" in html


# scikit-learn's tools -------------------------------------------------------------------------------------


def test_grid_search_without_labels(tiny, X):
    grid = {"transform": ["realnvp", "maf"], "noise": [0.02, 0.5]}
    search = GridSearchCV(tiny(), grid, cv=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) == 4
    assert search.best_params_["transform"] in grid["transform"]
    assert search.best_estimator_.score(X) == pytest.approx(search.score(X))


def test_grid_search_with_labels(tiny, X):
    outliers = X[:40] + 8 * X.std(axis=0)
    mixed, y = np.concatenate([X, outliers]), np.repeat([1, -1], [200, 40])
    order = np.random.default_rng(0).permutation(240)
    search = GridSearchCV(tiny(max_iter=60), {"noise": [0.02, 0.5]}, scoring="roc_auc", cv=2)
    search.fit(mixed[order], y[order])
    # The labels' direction: a detector upside down would be below a half.
    assert (search.cv_results_["mean_test_score"] > 0.6).all()


def test_mixed_columns_in_a_pipeline(tiny, X):
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(kind=np.tile(["u", "v"], 100))
    columns = make_column_transformer(
        (StandardScaler(), ["a", "b", "c"]),
        (OneHotEncoder(sparse_output=False), ["kind"]),
    )
    pipe = make_pipeline(columns, tiny()).fit(frame)
    assert pipe[-1].n_features_in_ == 5
    assert set(pipe.predict(frame)) == {1, -1}
    assert np.isfinite(pipe.score_samples(frame)).all()


def test_cross_val_predict(tiny, X):
    decisions = cross_val_predict(tiny(), X, method="decision_function", cv=2)
    np.testing.assert_array_equal(decisions[100:], tiny().fit(X[:100]).decision_function(X[100:]))
    labels = cross_val_predict(tiny(), X, cv=2)
    np.testing.assert_array_equal(labels, np.where(decisions >= 0, 1, -1))


def test_metadata_routing_of_weights(tiny, X):
    weights = np.repeat([1.0, 0.0], 100)
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        asked = make_pipeline(scaler, tiny().set_fit_request(sample_weight=True))
        asked.fit(X, sample_weight=weights)
        silent = make_pipeline(scaler, tiny())
        with pytest.raises(ValueError, match="sample_weight"):
            silent.fit(X, sample_weight=weights)
    by_hand = tiny().fit(StandardScaler().fit_transform(X), sample_weight=weights)
    np.testing.assert_array_equal(asked[-1]._scaler.shift, by_hand._scaler.shift)
    np.testing.assert_array_equal(asked[-1].loss_curve_, by_hand.loss_curve_)


# Pickling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"])
def test_round_trips_change_no_bit(tiny, X, transform):
    detector = tiny(transform=transform, anomaly=Typicality()).fit(X)
    file = io.BytesIO()
    joblib.dump(detector, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(detector)), joblib.load(file)):
        np.testing.assert_array_equal(copied.score_samples(X), detector.score_samples(X))
        np.testing.assert_array_equal(copied.predict(X), detector.predict(X))
        np.testing.assert_array_equal(copied.sample(4, random_state=0), detector.sample(4, random_state=0))
        assert copied.get_params()["transform"] == transform


def test_a_pickle_opens_in_another_process(fitted, X, tmp_path):
    path = tmp_path / "detector.joblib"
    joblib.dump((fitted, np.array(X)), path)
    code = f"import joblib; d, X = joblib.load({str(path)!r}); print(d.score_samples(X).tobytes().hex())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed.returncode == 0, printed.stderr
    scores = np.frombuffer(bytes.fromhex(printed.stdout.strip()))
    np.testing.assert_allclose(scores, fitted.score_samples(X), rtol=1e-12)


def test_pickling_leaves_the_detector_alone(tiny, X):
    detector = tiny().fit(X)
    model = detector.model_
    copied = pickle.loads(pickle.dumps(detector))
    assert detector.model_ is model
    assert copied.model_ is not model


@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for machines without CUDA")
def test_a_detector_from_a_gpu_works_on_a_cpu_and_says_so(tiny, X):
    detector = tiny().fit(X).set_params(device="cuda")
    copied = pickle.loads(pickle.dumps(detector))
    with pytest.warns(
        UserWarning, match=r"device='cuda' is not available here.*set_params\(device='auto'\)"
    ) as caught:
        scores = copied.score_samples(X)
    assert [warning.filename for warning in caught] == [__file__]
    np.testing.assert_array_equal(scores, tiny().fit(X).score_samples(X))
    with pytest.warns(UserWarning, match="scoring on the CPU"):
        assert copied.sample(3, random_state=0).shape == (3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied.set_params(device="auto").score_samples(X)


def test_a_detector_from_the_second_gpu_works_on_a_machine_with_fewer(tiny, X, monkeypatch):
    detector = tiny().fit(X).set_params(device="cuda:1")
    expected = tiny().fit(X).score_samples(X)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.warns(UserWarning, match="device='cuda:1' is not available here; scoring on the CPU"):
        np.testing.assert_array_equal(detector.score_samples(X), expected)


# Failures -------------------------------------------------------------------------------------------------


def _not_finite(features, context_features):
    """Return a factory's transform whose log-determinant is NaN while it trains."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(features))

        def forward(self, x, context):
            return x + self.shift, x.sum(1) * (torch.nan if self.training else 0)

    return Broken()


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(lambda d, X: d.fit(np.where(X > 10, np.nan, X)[:, :2]), id="NaN in fewer columns"),
        pytest.param(lambda d, X: d.fit(pd.DataFrame(X, columns=list("abc")).assign(a=np.inf)), id="names"),
        pytest.param(lambda d, X: d.fit(X[:, :2], sample_weight=-np.ones(200)), id="weights"),
        pytest.param(lambda d, X: d.partial_fit(np.where(X > 10, np.nan, X)), id="partial_fit"),
        pytest.param(lambda d, X: d.set_params(noise=2.0, warm_start=False).fit(X[:, :2]), id="noise"),
        pytest.param(
            lambda d, X: d.set_params(transform=_not_finite, warm_start=False).fit(X[:, :2]), id="loss"
        ),
        pytest.param(lambda d, X: d.set_params(anomaly="depth").fit(X[:, :2]), id="anomaly"),
    ],
)
def test_a_failed_refit_keeps_the_fitted_detector(tiny, X, failure, warm_start):
    detector = tiny(warm_start=warm_start).fit(X)
    scores = detector.score_samples(X)
    fitted_state = {name: value for name, value in vars(detector).items() if name.endswith("_")}
    with pytest.raises((ValueError, FloatingPointError)):
        failure(detector, X)
    np.testing.assert_array_equal(detector.score_samples(X), scores)
    assert {name: value for name, value in vars(detector).items() if name.endswith("_")} == fitted_state


def test_a_failed_first_fit_leaves_nothing(tiny, X):
    detector = tiny(transform=_not_finite)
    with pytest.raises(FloatingPointError):
        detector.fit(X)
    with pytest.raises(NotFittedError):
        detector.score_samples(X)
    assert not hasattr(detector, "n_features_in_")


def test_a_failing_threshold_restores_too(tiny, X, monkeypatch):
    detector = tiny().fit(X)
    scores = detector.score_samples(X)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("anomalib_gen._base.np.quantile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.fit(X[:, :2])
    np.testing.assert_array_equal(detector.score_samples(X), scores)


def test_a_damaged_model_names_the_row(tiny, X):
    def undefined_below_zero(features, context_features):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.zeros(features))

            def forward(self, x, context):
                return x + self.shift, torch.where((x < -6).any(1), torch.nan, 0.0)

        return Root()

    detector = tiny(transform=undefined_below_zero).fit(X)
    far = X[:10].copy()
    far[6] -= 1e6
    with pytest.raises(FloatingPointError, match="NaN for row 6"):
        detector.score_samples(far)


# Parts that do not fit together ---------------------------------------------------------------------------


class Centre(nn.Module):
    """A model with an energy and without a density."""

    def __init__(self, features):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(features))

    def energy(self, x):
        return (x - self.centre).square().sum(1)


class Loss(Component):
    def __call__(self, model, x, generator):
        return model.energy(x)


class Energy(Loss):
    in_nats = False


class Toy(GenerativeDetector):
    """The distance from a trained centre."""

    _objectives = {"energy": Loss, "likelihood": MaximumLikelihood}  # noqa: RUF012
    _anomalies = {"energy": Energy, "likelihood": Likelihood}  # noqa: RUF012
    _parameter_constraints = {  # noqa: RUF012
        **{
            name: GenerativeDetector._parameter_constraints[name]
            for name in ("anomaly", "contamination", "warm_start", "random_state", "device")
        },
        "objective": [str, Component, None],
    }

    def __init__(self, *, objective=None, anomaly=None):
        self.objective = objective
        self.anomaly = anomaly

    validation_fraction = 0.1
    contamination = 0.1
    warm_start = False
    random_state = 0
    device = "cpu"

    def _make_model(self, event_shape, *_):
        return Centre(*event_shape)

    def _default_objective(self):
        return Loss()

    def _default_anomaly(self, model):
        return Energy()

    def _auto_max_iter(self, steps_per_pass):
        raise AssertionError("the options below say how many")

    def _training_options(self, n_rows, *, one_pass):
        return TrainingOptions(max_iter=5, batch_size=32, learning_rate=0.1)


def get_toy(**parameters):
    toy = Toy(**parameters)
    # Class attributes stand in for parameters that this test does not vary.
    toy._validate_params = lambda: None
    return toy


def test_a_family_takes_names_objects_and_none(X):
    expected = get_toy().fit(X).score_samples(X)
    for objective, anomaly in [("energy", "energy"), (Loss(), Energy()), (None, "energy")]:
        detector = get_toy(objective=objective, anomaly=anomaly).fit(X)
        np.testing.assert_array_equal(detector.score_samples(X), expected)
    assert not hasattr(detector, "log_prob")


def test_an_objective_may_learn_from_the_training_rows_first(X):
    class Prepared(Loss):
        def prepare(self, model, rows, generator):
            self.n_ = len(rows)

        def __call__(self, model, x, generator):
            assert self.n_ == 180
            return super().__call__(model, x, generator)

    get_toy(objective=Prepared()).fit(X)


@pytest.mark.parametrize("argument", ["objective", "anomaly"])
def test_an_impossible_pair_fails_before_training_and_names_what_is_missing(X, argument, monkeypatch):
    monkeypatch.setattr("anomalib_gen._base.train", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(TypeError, match=rf"{argument}=.*does not work with Centre.*'log_prob'"):
        get_toy(**{argument: "likelihood"}).fit(X)


@pytest.mark.parametrize(
    ("argument", "known"), [("objective", "'energy', 'likelihood'"), ("anomaly", "'energy', 'likelihood'")]
)
def test_unknown_names_list_the_known(X, argument, known):
    with pytest.raises(ValueError, match=rf"{argument}='depth' is unknown\. Known names: {known}"):
        get_toy(**{argument: "depth"}).fit(X)


@pytest.mark.parametrize("value", [3, Energy, Component()])
def test_other_types_are_refused(X, value):
    message = f"objective must be a name or a component, got {type(value).__name__!r}"
    with pytest.raises(TypeError, match=message):
        get_toy(objective=value).fit(X)


def test_the_flow_lists_its_anomalies(tiny, X):
    with pytest.raises(ValueError, match=r"anomaly='depth' is unknown.*'likelihood', 'typicality'"):
        tiny(anomaly="depth").fit(X)


class Whole(Component):
    in_nats = False

    def __call__(self, model, x, generator):
        return model.log_prob(x).sum()


class Unitless(Component):
    def __call__(self, model, x, generator):
        return -model.log_prob(x)


def test_one_number_a_row_is_needed(tiny, X):
    with pytest.raises(
        TypeError, match=r"Whole\(\) returned a tensor of shape \(\) for 2 rows; one number per row"
    ):
        tiny(anomaly=Whole()).fit(X)


def test_an_anomaly_that_hides_its_units_fails_before_training(tiny, X, monkeypatch):
    monkeypatch.setattr("anomalib_gen._base.train", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(TypeError, match="has no attribute in_nats"):
        tiny(anomaly=Unitless()).fit(X)


def test_a_model_from_a_machine_of_another_precision_scores(fitted, X):
    moved = pickle.loads(pickle.dumps(fitted))
    moved.model_.float()
    np.testing.assert_array_equal(moved.score_samples(X), fitted.score_samples(X))
    assert moved.sample(2, random_state=0).shape == (2, 3)


def test_the_best_step_is_told(tiny, X):
    detector = tiny(max_iter=75).fit(X)
    assert detector.best_iter_ == 25 * (1 + int(np.argmin(detector.validation_curve_)))
