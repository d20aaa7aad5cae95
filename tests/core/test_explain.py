"""Contributions add up to what they say, name the column that is odd, and return to the columns of the input."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
)

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.anomaly import ScoreNorm
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.explain import feature_contributions, nearest_normal_rows
from anomalib_gen.explain._columns import invert, names_of, sources

SMALL = {"max_iter": 150, "hidden_features": 32, "random_state": 0, "device": "cpu"}
FAMILIES = {
    "flow": FlowDetector(**SMALL),
    "vae": VAEDetector(**SMALL),
    "energy": EnergyDetector(**SMALL),
    "diffusion": DiffusionDetector(**SMALL),
}


@pytest.fixture(scope="module")
def rows():
    """Columns 0 and 1 go together, column 2 is for itself; of unlike scales."""
    random = np.random.default_rng(0)
    a = random.normal(size=500)
    return np.column_stack([10 * a, a + 0.1 * random.normal(size=500), 100 + 5 * random.normal(size=500)])


@pytest.fixture(scope="module")
def fitted(rows):
    return {name: detector.fit(rows[:400]) for name, detector in FAMILIES.items()}


class Quadratic(BaseEstimator):
    """E = x A x / 2: contributions from zero are x_j (A x)_j / 2 in closed form."""

    def __init__(self, matrix=None):
        self.matrix = matrix

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def _torch_energy(self, device):
        A = torch.as_tensor(self.matrix, dtype=torch.float64)
        return lambda x: ((x @ A) * x).sum(1) / 2


def test_integrated_gradients_of_a_quadratic_energy_in_closed_form():
    A = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    detector = Quadratic(A).fit(None)
    # A background whose one row is zero, in units of one deviation.
    X = np.random.default_rng(0).normal(size=(20, 3))
    found = feature_contributions(detector, X, background=np.zeros((1, 3)))
    np.testing.assert_allclose(found.values, X * (X @ A) / 2)
    np.testing.assert_allclose(found.anomaly, np.einsum("ij,jk,ik->i", X, A, X) / 2)
    np.testing.assert_array_equal(found.baseline, 0)
    with pytest.raises(ValueError, match="keeps no mean row: give background rows"):
        feature_contributions(detector, X)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("with_background", [False, True])
def test_integrated_gradients_add_up(fitted, rows, name, with_background):
    detector = fitted[name]
    X = rows[400:410] + np.random.default_rng(1).normal(size=(10, 3)) * [20.0, 1.0, 10.0]
    background = rows[:200] if with_background else None
    found = feature_contributions(detector, X, method="integrated-gradients", background=background)
    np.testing.assert_allclose(found.anomaly, detector.energy(X), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.baseline + found.values.sum(1), found.anomaly, rtol=1e-6, atol=1e-8)
    assert np.isfinite(found.values).all()
    if not with_background:
        mean = rows[:400].mean(axis=0)
        np.testing.assert_allclose(found.baseline, np.repeat(detector.energy(mean[None]), 10), rtol=1e-4)


def test_rows_far_out_still_add_up(fitted, rows):
    X = rows[:3].copy()
    X[0, 0] = 1e8
    X[1, 2] = -1e5
    found = feature_contributions(fitted["flow"], X, background=rows[100:200])
    np.testing.assert_allclose(found.baseline + found.values.sum(1), fitted["flow"].energy(X), rtol=1e-6)
    assert found.values[0].argmax() == 0
    assert found.values[1].argmax() == 2


@pytest.mark.parametrize("family", [FlowDetector, VAEDetector, EnergyDetector])
@pytest.mark.filterwarnings("error:The path integrals")
def test_columns_of_subnormal_numbers_are_explained(family):
    """In their units the energy falls by more than the largest number for each unit."""
    random = np.random.default_rng(0)
    X = np.column_stack([random.normal(size=80), random.integers(1, 40, 80) * 5e-324])
    detector = family(max_iter=5, random_state=0, device="cpu").fit(X)
    for background in (None, X):
        found = feature_contributions(
            detector, X[:4], method="integrated-gradients", background=background, n_baselines=2
        )
        assert (found.values != 0).any(axis=0).all()
        np.testing.assert_allclose(found.anomaly, detector.energy(X[:4]), rtol=1e-9)
        np.testing.assert_allclose(found.baseline + found.values.sum(1), found.anomaly, rtol=1e-9)


def test_the_path_integral_alone_meets_its_tolerance(rows, monkeypatch):
    """What is shared out afterwards is small: without it the sums hold within a hundredth."""
    from anomalib_gen.explain import contributions as module

    flow = FlowDetector(transform="nsf-autoregressive", **SMALL).fit(rows[:400])
    X = rows[400:420]
    monkeypatch.setattr(module, "TOLERANCE", 1e-9)
    monkeypatch.setattr(module, "MAX_PANELS", 2)
    with pytest.warns(UserWarning, match="path integrals of .* rows miss the difference of energies"):
        coarse = feature_contributions(flow, X, background=rows[:100]).values
    monkeypatch.setattr(module, "MAX_PANELS", 512)
    with pytest.warns(UserWarning, match="path integrals"):
        fine = feature_contributions(flow, X, background=rows[:100]).values
    monkeypatch.undo()
    default = feature_contributions(flow, X, background=rows[:100]).values
    scale = np.abs(fine).sum(1, keepdims=True).clip(min=1)
    assert (np.abs(default - fine) / scale).max() < 0.02
    assert (np.abs(default - fine) / scale).max() <= (np.abs(coarse - fine) / scale).max()


@pytest.mark.parametrize("anomaly", ["score_norm", ScoreNorm(weighting="noise")], ids=["score", "noise"])
@pytest.mark.parametrize("name", ["energy", "diffusion"])
def test_score_components_add_up_to_the_anomaly(fitted, rows, name, anomaly):
    X = rows[400:] * 1.5
    X[0] = 1e4
    detector = fitted[name].with_anomaly(anomaly, rows[:400])
    found = feature_contributions(detector, X)
    assert found.method == "score"
    np.testing.assert_allclose(found.values.sum(1), -detector.score_samples(X), rtol=1e-6)
    assert (found.values >= 0).all()


def test_score_components_of_a_single_level(rows):
    detector = EnergyDetector(
        objective="sliced-score-matching", anomaly="score_norm", max_noise=None, **SMALL
    ).fit(rows)
    found = feature_contributions(detector, rows[:20])
    np.testing.assert_allclose(found.values.sum(1), -detector.score_samples(rows[:20]), rtol=1e-6)


def test_residuals_add_up_to_the_reconstruction_error(fitted, rows):
    detector = fitted["vae"].with_anomaly("reconstruction_error", rows[:400])
    found = feature_contributions(detector, rows[400:])
    assert found.method == "reconstruction"
    np.testing.assert_allclose(found.values.sum(1), -detector.score_samples(rows[400:]), rtol=1e-6)


@pytest.mark.parametrize("anomaly", ["combined", "closed_form", "denoising_error", "reconstruction"])
def test_what_is_led_by_residuals_is_explained_by_them(fitted, rows, anomaly):
    detector = fitted["diffusion"].with_anomaly(anomaly, rows[:400])
    X = rows[400:410].copy()
    X[:, 2] = 118.0  # of 100 +- 5, and for itself
    found = feature_contributions(detector, X)
    assert found.method == "reconstruction"
    residual = (X - detector.reconstruct(X)) / rows[:400].std(axis=0)
    np.testing.assert_allclose(found.values, residual**2 / 3, rtol=1e-4)
    assert (found.values.argmax(1) == 2).all()


@pytest.mark.parametrize("transform", ["maf", "nsf-autoregressive"])
def test_conditional_surprise_is_exact(rows, transform):
    detector = FlowDetector(transform=transform, n_layers=1, **SMALL).fit(rows[:400])
    X = rows[400:] * 1.2
    X[0, 2] = 1e4
    found = feature_contributions(detector, X, method="conditional")
    np.testing.assert_allclose(found.values.sum(1), -detector.log_prob(X), rtol=1e-6)
    # Column j does not feel the columns after it, and integrates to one.
    changed = X.copy()
    changed[:, 2] += 3
    later = feature_contributions(detector, changed, method="conditional").values
    np.testing.assert_allclose(later[:, :2], found.values[:, :2])
    grid = np.linspace(-150, 150, 3001)
    line = np.column_stack([np.full_like(grid, 5.0), grid / 10, np.full_like(grid, 100.0)])
    density = np.exp(-feature_contributions(detector, line, method="conditional").values[:, 1])
    assert np.trapezoid(density, line[:, 1]) == pytest.approx(1, abs=0.01)
    # Close to the truth, N(x_0 / 10, 0.1): surprise of the odd second column.
    odd = [[10.0, 2.0, 100.0]]
    surprise = feature_contributions(detector, odd, method="conditional").values[0]
    assert surprise.argmax() == 1
    assert surprise[1] > -stats.norm(1, 0.1).logpdf(1.0) + 5


def test_conditional_needs_a_triangular_flow(fitted, rows):
    with pytest.raises(TypeError, match="n_layers=1"):
        feature_contributions(fitted["flow"], rows[:5], method="conditional")
    with pytest.raises(TypeError, match="needs a FlowDetector, got VAEDetector"):
        feature_contributions(fitted["vae"], rows[:5], method="conditional")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_odd_column_is_named(fitted, rows, name):
    """Each row has one column moved by six deviations, unseen in training."""
    X = rows[400:460].copy()
    moved = np.arange(60) % 3
    X[np.arange(60), moved] += 6 * rows.std(axis=0)[moved]
    found = feature_contributions(fitted[name], X, background=rows[:400])
    named = found.values.argmax(axis=1)
    assert (named[moved == 2] == 2).mean() > 0.8
    assert (named[moved < 2] < 2).mean() > 0.8
    # Which of two columns that contradict each other is to blame, their values say and the way back to the ridge, along
    # which a score points, does not.
    if found.method != "score":
        assert (named == moved).mean() > 0.8


def test_composed_detectors_are_explained(fitted, rows):
    both = ComposedDetector([("a", fitted["flow"]), ("b", fitted["vae"])]).fit(rows)
    found = feature_contributions(both, rows[:5], background=rows[100:200])
    np.testing.assert_allclose(
        found.baseline + found.values.sum(1), both.energy(rows[:5]), rtol=1e-6, atol=1e-8
    )


# Names, frames, pipelines ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame():
    random = np.random.default_rng(0)
    kind = random.choice(["a", "b_x", "c"], size=400, p=[0.6, 0.3, 0.1])
    size = random.normal(size=400) * 10
    price = 3 * size + random.normal(size=400) + 50.0 * (kind == "a")
    return pd.DataFrame({"size": size, "size_kind": kind, "price": price, "note": "free text"})


@pytest.fixture(scope="module")
def encoder():
    return make_column_transformer(
        (OneHotEncoder(sparse_output=False), ["size_kind"]),
        (make_pipeline(StandardScaler()), ["price", "size"]),
    )


def test_contributions_return_to_the_columns_of_the_input(frame, encoder):
    pipeline = make_pipeline(encoder, FlowDetector(**SMALL)).fit(frame)
    odd = frame.head(20).copy()
    odd.loc[:9, "price"] += 200.0
    found = feature_contributions(pipeline, odd, background=frame)
    assert found.feature_names == ["size", "size_kind", "price", "note"]
    np.testing.assert_allclose(found.baseline + found.values.sum(1), -pipeline.score_samples(odd), rtol=1e-6)
    assert (found.values[:, 3] == 0).all()
    assert (found.values[:10].argmax(axis=1) == 2).mean() > 0.8
    name, value, contribution = found.top(1)[0][0]
    assert (name, value) == ("price", odd["price"].iloc[0])
    assert contribution == found.values[0].max()
    table = found.to_frame()
    assert list(table.columns) == list(frame.columns)
    # With the index of the rows, so that it joins what else is known of them.
    shuffled = feature_contributions(pipeline, odd[::-1], background=frame).to_frame()
    assert shuffled.index.equals(odd.index[::-1])
    np.testing.assert_allclose(shuffled.loc[odd.index], found.values, rtol=1e-6, atol=1e-9)
    # Through meta-estimators and searches as well.
    inner = pipeline[-1]
    conformal = make_pipeline(encoder, SplitConformalDetector(FlowDetector(**SMALL), random_state=0)).fit(
        frame
    )
    assert feature_contributions(conformal, odd, background=frame).values.shape == (20, 4)
    nested = SplitConformalDetector(make_pipeline(encoder, FlowDetector(**SMALL)), random_state=0).fit(frame)
    assert feature_contributions(nested, odd, background=frame).feature_names == list(frame.columns)
    search = GridSearchCV(pipeline, {"flowdetector__max_iter": [20]}, cv=2).fit(frame)
    assert feature_contributions(search, odd, background=frame).values.shape == (20, 4)
    assert inner is pipeline[-1]


def test_a_frozen_pipeline_is_seen_through(frame, encoder):
    pipeline = make_pipeline(encoder, FlowDetector(transform="realnvp", max_iter=20, random_state=0)).fit(
        frame
    )
    calibrated = SplitConformalDetector(FrozenEstimator(pipeline)).fit(frame)
    np.testing.assert_array_equal(
        feature_contributions(calibrated, frame[:5]).values, feature_contributions(pipeline, frame[:5]).values
    )


def test_sources_of_transformed_columns(frame, encoder):
    names = list(frame.columns)
    fitted = encoder.fit(frame)
    assert sources(fitted, range(4), names) == [1, 1, 1, 2, 0]
    dropped = OneHotEncoder(drop="first", sparse_output=False, max_categories=2).fit(
        frame[["size_kind", "note"]]
    )
    assert sources(dropped, [1, 3], ["size_kind", "note"]) == [1]
    mixed = ColumnTransformer(
        [
            (
                "bins",
                KBinsDiscretizer(3, encode="onehot-dense", quantile_method="averaged_inverted_cdf"),
                ["size"],
            )
        ],
        remainder="passthrough",
        verbose_feature_names_out=False,
    ).fit(frame[["size", "price"]])
    assert sources(mixed, range(2), ["size", "price"]) == [0, 0, 0, 1]
    by_position = ColumnTransformer([("a", StandardScaler(), slice(1, 3)), ("b", "passthrough", [0])])
    by_position.fit(np.zeros((5, 3)))
    assert sources(by_position, range(3), ["x0", "x1", "x2"]) == [1, 2, 0]
    by_mask = ColumnTransformer([("a", StandardScaler(), [False, True, True]), ("b", "drop", [0])])
    by_mask.fit(np.zeros((5, 3)))
    assert sources(by_mask, range(3), ["x0", "x1", "x2"]) == [1, 2]
    chain = make_pipeline(mixed, StandardScaler()).fit(frame[["size", "price"]])
    assert sources(chain, range(2), ["size", "price"]) == [0, 0, 0, 1]


def test_mixed_columns_are_refused(rows):
    pipeline = make_pipeline(PCA(2), FlowDetector(**SMALL)).fit(rows)
    with pytest.raises(ValueError, match="'pca0' of PCA was not made from one input column"):
        feature_contributions(pipeline, rows[:5])
    silent = make_pipeline(FunctionTransformer(lambda X: X[:, :2]), FlowDetector(**SMALL)).fit(rows)
    with pytest.raises(ValueError, match="FunctionTransformer does not say which columns"):
        feature_contributions(silent, rows[:5])


def test_names_of_columns(rows, frame):
    assert names_of(rows, None) == ["x0", "x1", "x2"]
    assert names_of(frame, None) == ["size", "size_kind", "price", "note"]


def test_errors(fitted, rows):
    with pytest.raises(NotFittedError):
        feature_contributions(FlowDetector(), rows)
    with pytest.raises(TypeError, match=r"IsolationForest has no energy to explain.*shap"):
        feature_contributions(IsolationForest().fit(rows), rows)
    with pytest.raises(ValueError, match="method must be 'auto' or one of"):
        feature_contributions(fitted["flow"], rows, method="shap")
    with pytest.raises(ValueError, match="n_baselines must be a positive integer, got 0"):
        feature_contributions(fitted["flow"], rows, n_baselines=0)
    with pytest.raises(TypeError, match="FlowDetector has no score"):
        feature_contributions(fitted["flow"], rows, method="score")
    with pytest.raises(TypeError, match="FlowDetector reconstructs no rows"):
        feature_contributions(fitted["flow"], rows, method="reconstruction")
    with pytest.raises(ValueError, match="2 features"):
        feature_contributions(fitted["flow"], rows[:, :2])


# Counterfactuals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "diffusion"])
def test_nearest_normal_rows_repair_what_is_odd(fitted, rows, name):
    X = rows[400:420].copy()
    X[:, 1] += 3
    found = nearest_normal_rows(fitted[name], X)
    np.testing.assert_array_equal(found.rows, fitted[name].reconstruct(X))
    np.testing.assert_array_equal(found.score_before, fitted[name].score_samples(X))
    assert (found.score_after > found.score_before).all()
    # The two columns agree again.
    assert np.abs(found.rows[:, 1] - found.rows[:, 0] / 10).mean() < 1


def test_nearest_normal_rows_through_a_pipeline(frame, encoder):
    pipeline = make_pipeline(encoder, VAEDetector(**SMALL)).fit(frame)
    odd = frame.head(10).copy()
    odd["price"] += 200.0
    found = nearest_normal_rows(pipeline, odd)
    assert list(found.rows.columns) == list(frame.columns)
    assert set(found.rows["size_kind"]) <= set(frame["size_kind"])
    assert (found.rows["note"] == "free text").all()
    assert (found.rows["price"] < odd["price"]).all()
    assert (found.score_after > found.score_before).all()
    assert found.rows.index.equals(odd.index)


@pytest.mark.parametrize("convert", [pl.from_pandas, pa.Table.from_pandas], ids=["polars", "pyarrow"])
def test_nearest_normal_rows_are_of_the_kind_of_the_input(frame, encoder, convert):
    names = ["size", "price"]
    bare = VAEDetector(**SMALL).fit(frame[names])
    for pipeline, X in (
        (bare, frame[names].head(5)),
        (make_pipeline(encoder, VAEDetector(**SMALL)).fit(frame), frame.head(5)),
    ):
        if convert is pa.Table.from_pandas and pipeline is not bare:
            continue  # scikit-learn's ColumnTransformer takes no tables of pyarrow
        expected, found = nearest_normal_rows(pipeline, X), nearest_normal_rows(pipeline, convert(X))
        assert type(found.rows) is type(convert(X))
        assert found.feature_names == list(X.columns)
        back = found.rows.to_pandas()
        pd.testing.assert_frame_equal(back, expected.rows, check_dtype=False)
        np.testing.assert_allclose(found.score_after, expected.score_after)


def test_transformers_are_undone(frame, encoder, rows):
    fitted = encoder.fit(frame)
    back = invert(fitted, fitted.transform(frame), frame)
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    array = ColumnTransformer([("a", StandardScaler(), [2, 0])], remainder="passthrough").fit(rows)
    np.testing.assert_allclose(invert(array, array.transform(rows), rows), rows)
    chain = make_pipeline(StandardScaler(), array).fit(rows)
    np.testing.assert_allclose(invert(chain, chain.transform(rows), rows), rows)
    with pytest.raises(ValueError, match="SelectFew has no inverse_transform"):
        invert(type("SelectFew", (), {})(), rows, rows)


def test_categories_are_those_nearest_to_what_a_model_made():
    X = pd.DataFrame({"kind": list("aaabbbcd"), "level": [1.0, 1, 1, 2, 2, 2, 3, np.nan]})

    def back(encoder, Z):
        return invert(encoder.fit(X), np.array(Z), X[-2:]).tolist()

    # Codes are rounded rather than cut, and reach no farther than the categories do.
    codes = OrdinalEncoder(encoded_missing_value=-1)
    assert back(codes, [[0.9, -0.8], [3.4, 2.7]]) == [["b", 1.0], ["d", 3.0]]
    bins = KBinsDiscretizer(n_bins=2, encode="ordinal", strategy="uniform").fit([[0.0], [4.0]])
    assert invert(bins, np.array([[0.7], [-0.6], [1.6]]), None).tolist() == [[3.0], [1.0], [3.0]]
    # Of flags the largest; a category without one is near where all are small.
    flags = OneHotEncoder(sparse_output=False, drop="first")
    assert back(flags, [[0.3, 0.2, 0.1, 0.1, 0.9, 0.2], [0.2, 0.6, 0.7, 0.2, 0.1, 0.3]]) == [
        ["a", 3.0],
        ["d", 1.0],
    ]
    # Rare categories share a flag or a code: of those the row has its own, if it has one.
    rare = OneHotEncoder(sparse_output=False, min_frequency=2)
    found = back(rare, [[0.1, 0.2, 0.9, 0.7, 0.1, 0.2], [0.1, 0.2, 0.9, 0.2, 0.1, 0.6]])
    assert found[0] == ["c", 1.0]
    assert found[1][0] == "d"
    assert back(OrdinalEncoder(min_frequency=2), [[2.4, 0.1], [7.0, 0.6]])[0] == ["c", 1.0]


@pytest.mark.filterwarnings("ignore:Skipping features without any observed values")
@pytest.mark.parametrize("imputer", [SimpleImputer, KNNImputer])
@pytest.mark.parametrize("add_indicator", [False, True])
def test_imputers_are_seen_through(frame, imputer, add_indicator):
    holed = frame.assign(price=frame["price"].where(frame.index % 4 > 0), empty=np.nan)
    fill = make_pipeline(imputer(add_indicator=add_indicator), StandardScaler())
    encoder = make_column_transformer(
        (fill, ["size", "empty", "price"]), (OneHotEncoder(sparse_output=False), ["size_kind"])
    )
    pipeline = make_pipeline(encoder, VAEDetector(**SMALL)).fit(holed)
    odd = holed.head(8)
    found = feature_contributions(pipeline, odd)
    assert (found.values[:, [0, 1, 2]] != 0).all()
    np.testing.assert_allclose(found.baseline + found.values.sum(1), -pipeline.score_samples(odd), rtol=1e-6)
    # In a normal row nothing is missing but what always is.
    rows = nearest_normal_rows(pipeline, odd).rows
    assert rows["empty"].isna().all()
    normal = pipeline[-1].reconstruct(encoder.transform(odd))
    scaler = encoder.named_transformers_["pipeline"][-1]
    shift, scale = scaler.mean_[[0, 1]], scaler.scale_[[0, 1]]
    np.testing.assert_allclose(rows[["size", "price"]], normal[:, :2] * scale + shift)


def test_only_models_that_reconstruct_have_counterfactuals(fitted, rows):
    with pytest.raises(TypeError, match="FlowDetector reconstructs no rows"):
        nearest_normal_rows(fitted["flow"], rows)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8)).astype(np.uint8)


def test_contributions_of_images_are_refused_with_the_way_out(images):
    detector = VAEDetector(max_iter=2, random_state=0, device="cpu").fit(images)
    for method in ("auto", "reconstruction"):
        with pytest.raises(ValueError, match=r"fitted on images of shape \(1, 8, 8\)\. Use .*explain_images"):
            feature_contributions(detector, images[:2], method=method)


@pytest.mark.parametrize("as_float", [False, True])
def test_nearest_normal_images_are_of_the_kind_that_was_fitted(images, as_float):
    images = images / 255 if as_float else images
    detector = VAEDetector(max_iter=2, random_state=0, device="cpu").fit(images)
    found = nearest_normal_rows(detector, images[:2])
    assert found.rows.dtype == images.dtype
    np.testing.assert_allclose(found.rows, detector.reconstruct(images[:2]), atol=0 if as_float else 0.5)
    np.testing.assert_array_equal(found.score_after, detector.score_samples(found.rows))


def test_residuals_of_named_rows_warn_of_nothing(rows, recwarn):
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    detector = DiffusionDetector(denoiser="closed-form", random_state=0, device="cpu").fit(frame)
    found = feature_contributions(detector, frame[:3], method="reconstruction")
    scaled = [detector._scaler.transform(x) for x in (rows[:3], detector.reconstruct(frame[:3]))]
    np.testing.assert_allclose(found.values, (scaled[0] - scaled[1]) ** 2 / 3)
    assert not recwarn.list
