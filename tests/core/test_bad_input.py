"""Bad input is refused with a message that names the argument or column, what was found, and what to do."""

from functools import partial

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from scipy import sparse

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.anomaly import Energy
from anomalib_gen.objectives import DenoisingScoreMatching

NAMES = ["age", "height", "weight"]


def with_value(X, value, *columns):
    X = X.copy()
    X[7, list(columns)] = value
    return X


@pytest.fixture(scope="module")
def named(tiny, X):
    return tiny().fit(pd.DataFrame(X, columns=NAMES))


# Values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_float32", [False, True])
@pytest.mark.parametrize(
    ("value", "word", "advice"),
    [(np.nan, "NaN", "SimpleImputer"), (np.inf, "infinity", "Replace"), (-np.inf, "infinity", "Replace")],
)
def test_non_finite_values_name_their_columns_by_position(tiny, fitted, X, value, word, advice, as_float32):
    bad = with_value(X, value, 0, 2)
    bad = bad.astype(np.float32) if as_float32 else bad
    for call in (tiny().fit, tiny().partial_fit, fitted.score_samples, fitted.predict, fitted.log_prob):
        with pytest.raises(ValueError, match=rf"Input X contains {word} in columns 0, 2\. .*{advice}"):
            call(bad)


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_non_finite_values_name_their_columns_by_name(tiny, named, X, make):
    bad = with_value(X, np.nan, 1)
    bad = make({name: bad[:, j] for j, name in enumerate(NAMES)})
    for call in (tiny().fit, named.score_samples):
        with pytest.raises(ValueError, match=r"Input X contains NaN in column 'height'\."):
            call(bad)


def test_missing_values_of_a_nullable_column_count_as_nan(tiny):
    frame = pd.DataFrame({"x": pd.array([1, None, 3], dtype="Int64"), "y": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="NaN in column 'x'"):
        tiny().fit(frame)


def test_many_columns_are_counted_after_the_tenth(tiny):
    X = np.zeros((5, 30))
    X[0, 5:] = np.nan
    with pytest.raises(ValueError, match="columns 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 15 more"):
        tiny().fit(X)


def test_a_non_finite_value_in_the_last_block_is_found(tiny, fitted, X, monkeypatch):
    monkeypatch.setattr("anomalib_gen._scaling.BLOCK_BYTES", 24 * 16)
    bad = X.copy()
    bad[-1, 1] = np.inf
    with pytest.raises(ValueError, match="infinity in column 1"):
        fitted.score_samples(bad)


TEXT = {
    "pandas": pd.DataFrame({"age": [1.0, 2.0, 3.0], "city": ["Rome", "Oslo", "Lima"]}),
    "pandas, objects": pd.DataFrame({"age": [1.0, 2.0, 3.0], "city": ["Rome", "Oslo", "Lima"]}, dtype=object),
    "pandas, categories": pd.DataFrame({"age": [1.0, 2.0], "city": pd.Categorical(["Rome", "Oslo"])}),
    "polars": pl.DataFrame({"age": [1.0, 2.0, 3.0], "city": ["Rome", "Oslo", "Lima"]}),
    "pyarrow": pa.table({"age": [1.0, 2.0, 3.0], "city": ["Rome", "Oslo", "Lima"]}),
}


@pytest.mark.parametrize("kind", TEXT)
def test_text_columns_are_named_with_an_example_and_a_way_out(tiny, kind):
    with pytest.raises(
        ValueError, match=r"not real numbers in column 'city' \(e\.g\. 'Rome'\).*OneHotEncoder"
    ):
        tiny().fit(TEXT[kind])


def test_text_is_refused_at_scoring_too(named, X):
    frame = pd.DataFrame(X, columns=NAMES).astype(object)
    frame.loc[3, "weight"] = "heavy"
    with pytest.raises(ValueError, match=r"column 'weight' \(e\.g\. 'heavy'\)"):
        named.score_samples(frame)


@pytest.mark.parametrize("dtype", [str, object])
def test_text_in_arrays_is_named_by_position(tiny, dtype):
    X = np.array([["1.5", "a"], ["2", "b"], ["3", "c"]], dtype=dtype)
    with pytest.raises(ValueError, match=r"not real numbers in column 1 \(e\.g\. 'a'\)"):
        tiny().fit(X)


def test_text_in_lists_is_named_by_position(tiny):
    with pytest.raises(ValueError, match=r"not real numbers in column 0 \(e\.g\. 'one'\)"):
        tiny().fit([["one", 1], ["two", 2]])


def test_missing_objects_are_not_taken_for_text(tiny):
    X = np.array([[None, "a"], [2.0, "b"], [3.0, "c"]], dtype=object)
    with pytest.raises(ValueError, match=r"not real numbers in column 1 "):
        tiny().fit(X)


def test_dates_are_named(tiny):
    frame = pd.DataFrame({"age": [1.0, 2.0, 3.0], "when": pd.date_range("2020-01-01", periods=3)})
    with pytest.raises(TypeError, match=r"not real numbers in column 'when' \(dates or times\)"):
        tiny().fit(frame)


def test_columns_of_one_name_are_both_shown(tiny):
    frame = pd.DataFrame([["a", "b"], ["c", "d"]], columns=["x", "x"])
    with pytest.raises(ValueError, match=r"columns 'x' \(e\.g\. 'a'\), 'x' \(e\.g\. 'b'\)"):
        tiny().fit(frame)


def test_complex_numbers_are_refused(tiny, fitted, X):
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(ValueError, match=r"columns 0 \(complex\).*Complex data not supported"):
            call(X + 1j)


# Shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_sparse_rows_are_refused_with_the_way_out(tiny, fitted, X, make):
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(TypeError, match=r"dense data is required\. Use.*toarray"):
            call(make(X))


def test_one_dimension_is_refused(tiny, fitted, X):
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(
            ValueError, match=r"Expected 2D array, got 1D array instead(.|\n)*reshape\(1, -1\)"
        ):
            call(X[0])


def test_three_dimensions_are_refused(tiny, fitted, X):
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(ValueError, match=r"Found array with dim 3.*by FlowDetector"):
            call(X[None])


def test_no_rows_are_refused(tiny, fitted):
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(ValueError, match=r"Found array with 0 sample\(s\) \(shape=\(0, 3\)\)"):
            call(np.empty((0, 3)))


def test_no_columns_are_refused(tiny):
    with pytest.raises(ValueError, match=r"0 feature\(s\) \(shape=\(5, 0\)\) while a minimum of 1"):
        tiny().fit(np.empty((5, 0)))


def test_one_row_is_too_few_to_fit_and_enough_to_score(tiny, fitted, X):
    with pytest.raises(ValueError, match=r"1 sample\(s\).*minimum of 2 is required by FlowDetector"):
        tiny().fit(X[:1])
    assert fitted.score_samples(X[:1]).shape == (1,)


@pytest.mark.parametrize("width", [2, 4])
def test_another_number_of_columns_is_refused_at_scoring(fitted, X, width):
    message = rf"X has {width} features, but FlowDetector is expecting 3 features as input"
    for method in (fitted.score_samples, fitted.decision_function, fitted.predict, fitted.log_prob):
        with pytest.raises(ValueError, match=message):
            method(np.ones((5, width)))


def test_other_names_are_shown(named, X):
    with pytest.raises(
        ValueError, match=r"Feature names unseen at fit time:\n- size(.|\n)*now missing:\n- height"
    ):
        named.score_samples(pd.DataFrame(X, columns=["age", "size", "weight"]))


def test_another_order_of_names_is_refused(named, X):
    with pytest.raises(ValueError, match="must be in the same order"):
        named.score_samples(pd.DataFrame(X, columns=NAMES)[NAMES[::-1]])


# Constant columns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"])
def test_a_new_value_in_a_constant_column_is_abnormal(tiny, X, transform):
    rows = np.column_stack([X, np.full(len(X), 5.0)])
    detector = tiny(transform=transform, max_iter=200, hidden_features=16).fit(rows)
    worst = detector.score_samples(rows).min()
    assert np.isfinite(worst)
    for change in (1.0, 10.0, 1e6, 1e300, -1.0, -1e300):
        new = rows[:50].copy()
        new[:, 3] += change
        scores = detector.score_samples(new)
        assert np.isfinite(scores).all()
        assert scores.max() < worst, change


@pytest.mark.parametrize("constant", [0.0, -1e6, 1e-300])
def test_the_constant_itself_does_not_matter(tiny, X, constant):
    at_five = tiny().fit(np.column_stack([X, np.full(len(X), 5.0)]))
    rows = np.column_stack([X, np.full(len(X), constant)])
    expected = at_five.score_samples(np.column_stack([X, np.full(len(X), 6.0)]))
    rows_beside = np.column_stack([X, np.full(len(X), constant + 1)])
    np.testing.assert_allclose(tiny().fit(rows).score_samples(rows_beside), expected, rtol=1e-8)


def test_rows_that_are_all_the_same_work(tiny):
    detector = tiny().fit(np.full((20, 2), 3.0))
    assert np.isfinite(detector.score_samples([[3.0, 3.0]])).all()
    assert detector.score_samples([[4.0, 3.0]]) < detector.score_samples([[3.0, 3.0]])


def test_rounding_error_is_no_spread(tiny, X):
    rows = np.column_stack([X, 0.1 + np.arange(len(X)) % 2 * 1.4e-17])
    assert tiny().fit(rows)._scaler.scale[3] == 1.0


# Parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"contamination": 0}, r"'contamination' parameter of FlowDetector .*\(0.0, 0.5\].* Got 0 instead"),
        ({"contamination": 0.6}, r"'contamination' .*\(0.0, 0.5\].* Got 0.6"),
        ({"contamination": "much"}, r"'contamination' .*\(0.0, 0.5\] or .*'auto'.* Got 'much'"),
        (
            {"transform": "iaf"},
            "'transform' (?=.*'maf')(?=.*'nsf-autoregressive')(?=.*'nsf-coupling')(?=.*'realnvp').*'iaf'",
        ),
        ({"transform": "glow"}, "transform='glow' is for images"),
        ({"transform": None}, "'transform' .*callable. Got None"),
        ({"noise": 1.0}, r"noise=1.0 must be positive and below max_noise=1.0\. .*set max_noise=None"),
        ({"noise": 0.0}, r"noise=0.0 must be positive and below max_noise=1.0"),
        ({"noise": 0.5, "max_noise": 0.1}, r"noise=0.5 must be positive and below max_noise=0.1"),
        ({"noise": -0.1}, "'noise' .*Got -0.1"),
        ({"max_noise": 0.0}, "'max_noise' .*Got 0.0"),
        ({"learning_rate": -1e-3}, r"'learning_rate' .*Got -0.001"),
        ({"learning_rate": 0.0}, "'learning_rate' .*Got 0.0"),
        ({"weight_decay": -1.0}, "'weight_decay' .*Got -1.0"),
        ({"batch_size": 0}, "'batch_size' .*Got 0"),
        ({"batch_size": 2.5}, "'batch_size' .*Got 2.5"),
        ({"max_iter": 0}, "'max_iter' .*Got 0"),
        ({"max_iter": "forever"}, "'max_iter' .*'auto'.*Got 'forever'"),
        ({"validation_fraction": 1.0}, "'validation_fraction' .*Got 1.0"),
        ({"n_iter_no_change": 0}, "'n_iter_no_change' .*Got 0"),
        ({"max_grad_norm": 0.0}, "'max_grad_norm' .*Got 0.0"),
        ({"ema_decay": 1.0}, "'ema_decay' .*Got 1.0"),
        ({"n_layers": 0}, "'n_layers' .*Got 0"),
        ({"hidden_features": 0}, "'hidden_features' .*Got 0"),
        ({"n_blocks": -1}, "'n_blocks' .*Got -1"),
        ({"n_bins": 1}, "'n_bins' .*Got 1"),
        ({"warm_start": "yes"}, "'warm_start' .*Got 'yes'"),
        ({"random_state": "seed"}, "'random_state' .*Got 'seed'"),
        ({"device": "gpu"}, r"device='gpu' is not a torch device\. Use 'auto', 'cpu', 'cuda'"),
        ({"device": 3.5}, "'device' .*Got 3.5"),
        ({"verbose": "loud"}, "'verbose' .*Got 'loud'"),
    ],
)
def test_bad_parameters_name_what_was_given_and_what_is_allowed(tiny, X, parameters, message):
    detector = tiny(**parameters)  # no check before fit
    with pytest.raises(ValueError, match=f"(?s){message}"):
        detector.fit(X)


def test_a_device_that_is_not_there_is_refused_at_fitting(tiny, X, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(
            ValueError, match=rf"device='{device}' was asked for, but torch finds no .*device='auto'"
        ):
            tiny(device=device).fit(X)


@pytest.mark.parametrize("n_samples", [0, -3, 2.5, "many", None])
def test_a_number_of_samples_is_a_positive_integer(fitted, n_samples):
    with pytest.raises(ValueError, match=f"n_samples must be a positive integer, got {n_samples!r}"):
        fitted.sample(n_samples)


def test_a_series_is_refused_with_the_way_out(tiny):
    with pytest.raises(ValueError, match="2-dimensional container"):
        tiny().fit(pd.Series([1.0, 2.0, 3.0]))


# Values that numpy would read as others -------------------------------------------------------------------


DATES = pd.DataFrame({"from": pd.date_range("2020-01-01", periods=3), "to": pd.date_range("2021", periods=3)})


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        pytest.param(DATES, "columns 'from'", id="pandas"),
        pytest.param(DATES - DATES.iloc[0], "columns 'from'", id="durations"),
        pytest.param(DATES.to_numpy(), "columns 0", id="array"),
        pytest.param(pl.from_pandas(DATES), "columns 'from'", id="polars"),
        pytest.param(
            pl.from_pandas(DATES).select(pl.col("to").cast(pl.Date), one=1.0), "column 'to'", id="days"
        ),
        pytest.param(pa.Table.from_pandas(DATES), "columns 'from'", id="pyarrow"),
        pytest.param(
            DATES.assign(to=DATES["to"].dt.tz_localize("UTC"))[["to"]], "column 'to'", id="time zone"
        ),
        pytest.param(DATES.assign(to=DATES["to"].dt.to_period("D"))[["to"]], "column 'to'", id="periods"),
        pytest.param(DATES.assign(to=DATES["to"].dt.date)[["to"]], "column 'to'", id="objects"),
    ],
)
def test_dates_are_refused_also_where_all_columns_are_dates(tiny, rows, named):
    with pytest.raises(TypeError, match=rf"not real numbers in {named} \(dates or times\).*weekday"):
        tiny().fit(rows)


def test_masked_values_are_refused_and_a_mask_that_hides_nothing_is_not(tiny, fitted, X):
    masked = np.ma.masked_array(X, mask=np.zeros(X.shape, dtype=bool))
    np.testing.assert_array_equal(fitted.score_samples(masked), fitted.score_samples(X))
    masked[3, 1] = np.ma.masked
    for call in (tiny().fit, fitted.score_samples):
        with pytest.raises(ValueError, match=r"masked values in column 1\. .*filled\(numpy\.nan\)"):
            call(masked)


def test_masked_pixels_are_refused(tiny):
    images = np.ma.masked_array(np.zeros((4, 1, 8, 8)), mask=False)
    images[2, 0, 3, 3] = np.ma.masked
    with pytest.raises(ValueError, match="masked values in image 2"):
        tiny().fit(images)


def test_missing_objects_of_pandas_come_with_the_way_out(tiny):
    frame = pd.DataFrame({"x": [1, pd.NA, 3], "y": [1.0, 2.0, 3.0]}, dtype=object)
    with pytest.raises(TypeError, match=r"column 'x' \(pandas\.NA among objects\).*convert_dtypes\(\)"):
        tiny().fit(frame)
    with pytest.raises(ValueError, match="NaN in column 'x'"):
        tiny().fit(frame.convert_dtypes())


def test_rows_that_are_not_read_yet_are_refused(tiny):
    with pytest.raises(TypeError, match=r"X is a LazyFrame.*collect\(\)"):
        tiny().fit(pl.LazyFrame({"x": [1.0, 2.0, 3.0]}))


def test_three_dimensions_may_be_grey_images(tiny):
    with pytest.raises(ValueError, match=r"dim 3.*ChannelsFirst\(\)"):
        tiny().fit(np.zeros((5, 8, 8)))


def test_one_image_without_its_first_axis_is_told_how(tiny):
    images = np.random.default_rng(0).normal(size=(10, 1, 8, 8))
    detector = tiny().fit(images)
    with pytest.raises(ValueError, match=r"Give an array \(n, 1, 8, 8\)\. Of one image that is X\[None\]"):
        detector.score_samples(images[0])
    with pytest.raises(ValueError, match=r"given an array of 2 dimensions\. Give an array \(n, 1, 8, 8\)\.$"):
        detector.score_samples(images[:, 0, 0])


class Own(torch.nn.Module):
    """A linear network whose output is given back as `give` says."""

    def __init__(self, give, n_inputs, n_outputs, context_features=0):
        super().__init__()
        self.give = give
        self.layer = torch.nn.Linear(n_inputs + context_features, n_outputs)

    def forward(self, x, context=None):
        return self.give(self.layer(x if context is None else torch.cat([x, context], 1)))


def _scale(give):
    class Scale(torch.nn.Module):
        def __init__(self, features, context_features):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(features))

        def forward(self, x, context=None):
            return x * self.log_scale.exp(), give(self.log_scale.expand(len(x), -1))

    return Scale


SHAPES = {
    "flat": lambda out: out.sum(1),
    "scalar": lambda out: out.sum(),
    "narrow": lambda out: out[:, :0],
    "wide": lambda out: torch.cat([out, out], 1),
    "mixed": lambda out: out.mean(0, keepdim=True),
    "pair": lambda out: (out, out),
}


@pytest.mark.parametrize("give", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "family",
    [
        EnergyDetector,
        partial(EnergyDetector, objective="noise-contrastive"),
        partial(EnergyDetector, objective="telescoping"),
        partial(DiffusionDetector, denoiser="network"),
        DiffusionDetector,
        partial(DiffusionDetector, objective="improved-ddpm"),
        partial(DiffusionDetector, objective="diffusion-time"),
    ],
)
def test_networks_that_return_another_shape_are_refused(X, family, give):
    # Many would broadcast, and train to something else than was meant.
    detector = family(network=partial(Own, give), max_iter=2, device="cpu", random_state=0)
    with pytest.raises(ValueError, match=r"The network returned a .* rows; shape \(\d+, \d+\) is needed"):
        detector.fit(X)


@pytest.mark.parametrize("give", [lambda a: a.sum(), lambda a: a, lambda a: a.sum(1, keepdim=True)])
def test_transforms_give_one_log_determinant_a_row(tiny, X, give):
    with pytest.raises(
        ValueError, match=r"The transform's log-determinant returned .*; shape \(2,\) is needed"
    ):
        tiny(transform=_scale(give), max_noise=None).fit(X)
    tiny(transform=_scale(lambda a: a.sum(1)), max_noise=None).fit(X)


@pytest.mark.parametrize(
    ("family", "argument"),
    [
        (EnergyDetector, "network"),
        (DiffusionDetector, "network"),
        (FlowDetector, "transform"),
        (VAEDetector, "encoder"),
        (VAEDetector, "decoder"),
    ],
)
def test_networks_come_as_functions_that_make_them(X, family, argument):
    own = Own(torch.clone, 3, 1)
    with pytest.raises(TypeError, match=rf"{argument} must be a function .* got the network Own"):
        family(**{argument: own}, device="cpu").fit(X)
    for made, kind in ((None, "NoneType"), (torch.nn.functional.silu, "function")):
        with pytest.raises(TypeError, match=rf"{argument} must make a torch.nn.Module, and made a {kind}"):
            family(**{argument: lambda *sizes, made=made: made}, device="cpu").fit(X)
    with pytest.raises(
        TypeError, match=rf"{argument} is called with the sizes \(\d+, .* too many positional"
    ):
        family(**{argument: lambda: own}, device="cpu").fit(X)


def test_losses_and_anomalies_are_not_mistaken_for_each_other(X):
    with pytest.raises(TypeError, match=r"objective=Energy\(\) is an anomaly, not a loss.*anomaly="):
        EnergyDetector(objective=Energy(), device="cpu").fit(X)
    with pytest.raises(
        TypeError, match=r"anomaly=DenoisingScoreMatching\(\) has no attribute in_nats.*objective="
    ):
        EnergyDetector(anomaly=DenoisingScoreMatching(), device="cpu").fit(X)
