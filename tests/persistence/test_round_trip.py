"""What is loaded is what was saved, to the last bit; families, objectives and anomalies are found by discovery."""

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest, RandomTreesEmbedding
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, QuantileTransformer, StandardScaler
from sklearn.utils.metadata_routing import MetadataRequest
from torch import nn
from torch.nn import functional as F

import anomalib_gen
from anomalib_gen import (
    ComposedDetector,
    DiffusionDetector,
    EnergyDetector,
    FlowDetector,
    VAEDetector,
    load,
    save,
)
from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen.anomaly import Energy
from anomalib_gen.calibration import (
    BootstrapConformalDetector,
    CrossConformalDetector,
    ExpectedCost,
    FalsePositiveRate,
    SplitConformalDetector,
    TailProbability,
    ThresholdDetector,
)
from anomalib_gen.features import FeatureExtractor
from anomalib_gen.images import ChannelsFirst, ImageReader
from anomalib_gen.models import KernelDenoiser
from anomalib_gen.paths import EDM
from anomalib_gen.persistence import ModelFolderError, _tree

# What is saved here is all that can be saved: of each class the attributes are those of the folders' format.
pytestmark = pytest.mark.usefixtures("no_attribute_is_new")

FAMILIES = sorted(
    (
        value
        for name in anomalib_gen.__all__
        if inspect.isclass(value := getattr(anomalib_gen, name)) and issubclass(value, GenerativeDetector)
    ),
    key=lambda family: family.__name__,
)
IMAGES_ONLY = {"convolutional", "glow"}
SMALL = {
    "max_iter": 10,
    "hidden_features": 8,
    "n_blocks": 1,
    "contamination": 0.1,
    "random_state": 0,
    "device": "cpu",
}


def small(family, **parameters):
    known = family().get_params()
    return family(**{name: value for name, value in SMALL.items() if name in known} | parameters)


def combinations():
    """The default, and every value that an argument takes by its name."""
    for family in FAMILIES:
        yield pytest.param(family, {}, id=family.__name__)
        for argument, known in (("objective", family._objectives), ("anomaly", family._anomalies)):
            if argument in family().get_params():
                for name in known:
                    yield pytest.param(family, {argument: name}, id=f"{family.__name__}-{name}")
        for argument, constraints in family._parameter_constraints.items():
            if argument in ("max_iter", "contamination"):
                continue
            names = {name for option in constraints for name in getattr(option, "options", ())}
            # In order: processes that share the tests must agree on it.
            for name in sorted(name for name in names if isinstance(name, str)):
                yield pytest.param(family, {argument: name}, id=f"{family.__name__}-{argument}-{name}")


def assert_same(one, other, X):
    np.testing.assert_array_equal(one.score_samples(X), other.score_samples(X))
    np.testing.assert_array_equal(one.predict(X), other.predict(X))
    # (That objective learns to tell noise from rows, and makes no rows.)
    if hasattr(one, "sample") and getattr(one, "objective", None) != "diffusion-time":
        np.testing.assert_array_equal(one.sample(4, random_state=3), other.sample(4, random_state=3))


@pytest.mark.parametrize(("family", "parts"), list(combinations()))
def test_a_loaded_detector_is_the_saved_one(family, parts, X, tmp_path):
    # Zeros and ones suit every model of observations.
    rows = (np.median(X, axis=0) < X).astype(float) if "bernoulli" in parts.values() else X
    if not IMAGES_ONLY.isdisjoint(parts.values()):
        rows = np.random.default_rng(0).normal(size=(40, 1, 8, 8))
    detector = small(family, **parts).fit(rows)
    content = detector.save(tmp_path / "model", X=rows)
    before = rows.copy()
    loaded = load(tmp_path / "model")
    assert type(loaded) is family
    assert repr(loaded) == repr(detector)
    assert_same(loaded, detector, rows)
    np.testing.assert_array_equal(rows, before)
    assert loaded.offset_ == detector.offset_
    assert loaded.loss_curve_ == detector.loss_curve_
    assert vars(loaded).keys() == vars(detector).keys()
    assert loaded.save(tmp_path / "again", X=rows) == content


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_loaded_detector_can_go_on(family, X, tmp_path):
    detector = small(family).fit(X)
    detector.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    for one in (loaded, detector):
        one.partial_fit(X)
    np.testing.assert_array_equal(loaded.score_samples(X), detector.score_samples(X))


def test_stored_images_come_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 9, 8), dtype=np.uint8)
    detector = small(DiffusionDetector, denoiser="closed-form", warm_start=True).fit(images[:30])
    detector.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.score_samples(images), detector.score_samples(images))
    np.testing.assert_array_equal(
        loaded.partial_fit(images[30:]).score_samples(images),
        detector.partial_fit(images[30:]).score_samples(images),
    )


def test_nothing_is_said_of_the_columns_of_images(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 1, 8, 8))
    detector = small(VAEDetector).fit(images)
    for X, n_rows in ((None, None), (images, 40)):
        detector.save(tmp_path / "model", X=X, overwrite=True)
        schema = anomalib_gen.persistence.inspect(tmp_path / "model")["schema"]
        assert schema == {"named": False, "n_rows": n_rows, "columns": None}
    with pytest.raises(ValueError, match=r"shape \(40, 1, 4, 4\).*\(1, 8, 8\)"):
        detector.save(tmp_path / "model", X=images[:, :, ::2, ::2], overwrite=True)
    with pytest.raises(ValueError, match="must be a table"):
        small(VAEDetector).fit(images[:, 0, 0]).save(tmp_path / "model", X=images, overwrite=True)


def test_images_are_described_as_the_pipeline_takes_them(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    files = tmp_path / "images"
    files.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(files / f"{k:02}.png")
    paths = [str(path) for path in sorted(files.iterdir())]
    reading = make_pipeline(ImageReader(mode="L"), small(VAEDetector)).fit(files)
    turning = make_pipeline(ChannelsFirst(), small(VAEDetector)).fit(pixels)
    for model, X, n_rows in (
        (reading, files, None),
        (reading, str(files), None),
        (reading, paths, 30),
        (turning, pixels, 30),
    ):
        save(model, tmp_path / "model", X=X, overwrite=True)
        schema = anomalib_gen.persistence.inspect(tmp_path / "model")["schema"]
        assert schema == {"named": False, "n_rows": n_rows, "columns": None}
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    assert "They are images." in card
    with pytest.raises(ValueError, match="is no folder"):
        save(reading, tmp_path / "model", X=tmp_path / "none", overwrite=True)


def test_the_card_of_a_detector_of_images_speaks_of_images(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 1, 8, 9))
    small(VAEDetector).fit(images).save(tmp_path / "model")
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    assert "| Images (channels, height, width) | [1, 8, 9] |" in card
    assert "olumns" not in card


def test_a_network_of_the_user_s_is_named(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 1, 8, 8))
    extractor = FeatureExtractor(torch.nn.Conv2d(1, 2, 3), device="cpu")
    pipeline = make_pipeline(extractor, small(VAEDetector)).fit(images)
    with pytest.raises(
        ModelFolderError, match=r"FeatureExtractor\): its network is a network of yours, .* alone"
    ):
        save(pipeline, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_images_in_another_layout(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, size=(40, 8, 8), dtype=np.uint8)
    pipeline = make_pipeline(ChannelsFirst(), small(VAEDetector)).fit(images)
    save(pipeline, tmp_path / "model")
    assert_same(load(tmp_path / "model"), pipeline, images)


def test_parameters_that_were_changed_after_fitting_change_nothing(X, tmp_path):
    detector = small(FlowDetector).fit(X).set_params(noise=0.5, hidden_features=99)
    detector.save(tmp_path / "model")
    assert_same(load(tmp_path / "model"), detector, X)


def test_a_normalised_energy_keeps_its_constant(X, tmp_path):
    detector = small(EnergyDetector, objective="score-matching").fit(X)
    detector.normalize(n_chains=16, n_levels=5, random_state=0).save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.log_prob(X), detector.log_prob(X))
    assert loaded.log_normalizer_interval_ == detector.log_normalizer_interval_


def test_components_and_other_parameters(X, tmp_path):
    detector = small(
        EnergyDetector, anomaly=Energy(), objective="noise-contrastive", random_state=np.random.RandomState(1)
    )
    detector.set_params(noise=np.float64(0.1), device=torch.device("cpu")).fit(X)
    detector.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(loaded, detector, X)
    assert isinstance(loaded.anomaly, Energy)
    assert type(loaded.noise) is np.float64
    assert loaded.random_state.rand() == detector.random_state.rand()


def test_composed_detectors(X, tmp_path):
    left, right = small(FlowDetector).fit(X[:, :2]), small(VAEDetector).fit(X)
    both = ComposedDetector(
        [("left", left), ("right", right)],
        columns=[range(2), [0, 1, 2]],
        weights=np.array([1.0, 2.0]),
        n_steps=4,
    ).fit(X)
    nested = ComposedDetector([("both", both), ("right", FrozenEstimator(right))], n_steps=4).fit(X)
    nested.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(loaded, nested, X)
    np.testing.assert_array_equal(loaded.member_energies(X), nested.member_energies(X))
    assert loaded.detectors_[0].columns[0] == range(2)
    # A member that is there several times is so again.
    assert loaded.detectors_[0].detectors_[1] is loaded.detectors_[1]


@pytest.fixture(scope="module")
def trips():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "distance": rng.gamma(2.0, size=60),
            "fare": np.where(np.arange(60) % 9, rng.gamma(3.0, size=60), np.nan),
            "payment": ["card", "cash", "voucher"] * 20,
        }
    )


def encoder():
    numbers = make_pipeline(SimpleImputer(), QuantileTransformer(n_quantiles=10), PCA(2))
    return make_column_transformer(
        (numbers, ["distance", "fare"]),
        (OneHotEncoder(sparse_output=False, handle_unknown="ignore"), ["payment"]),
    )


def test_pipelines(trips, tmp_path):
    pipeline = make_pipeline(encoder(), small(VAEDetector)).fit(trips)
    content = save(pipeline, tmp_path / "model", X=trips)
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.score_samples(trips), pipeline.score_samples(trips))
    assert repr(loaded) == repr(pipeline)
    # Places in memory and the time of day leave no trace.
    assert (
        save(make_pipeline(encoder(), small(VAEDetector)).fit(trips), tmp_path / "again", X=trips) == content
    )


def test_a_detector_as_a_transformer(X, tmp_path):
    union = make_union(small(VAEDetector), StandardScaler())
    columns = make_column_transformer((small(VAEDetector), [0, 1]), (StandardScaler(), [2]))
    for k, transformer in enumerate((union, columns)):
        pipeline = make_pipeline(
            transformer, FrozenEstimator(PCA(2).fit(transformer.fit_transform(X))), small(FlowDetector)
        )
        pipeline.fit(X)
        save(pipeline, tmp_path / str(k))
        np.testing.assert_array_equal(load(tmp_path / str(k)).score_samples(X), pipeline.score_samples(X))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: SplitConformalDetector(inner, random_state=0),
        lambda inner: CrossConformalDetector(inner, cv=2, random_state=0),
        lambda inner: BootstrapConformalDetector(inner, n_estimators=5, random_state=0),
        lambda inner: ThresholdDetector(inner, threshold=FalsePositiveRate(0.1), random_state=0),
        lambda inner: ThresholdDetector(inner, threshold=TailProbability(0.01), random_state=0),
        lambda inner: ThresholdDetector(inner, threshold="contamination", random_state=0),
        lambda inner: ThresholdDetector(inner, threshold=ExpectedCost(), random_state=0),
    ],
    ids=["split", "cross", "bootstrap", "rate", "tail", "contamination", "cost"],
)
def test_calibrated_detectors(wrap, X, tmp_path):
    y = np.where(np.arange(len(X)) % 10 == 0, -1, 1)
    detector = wrap(small(FlowDetector, transform="realnvp", n_layers=2)).fit(X, y)
    content = save(detector, tmp_path / "model", X=X)
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.score_samples(X), detector.score_samples(X))
    assert loaded.offset_ == detector.offset_
    if hasattr(detector, "p_values"):
        np.testing.assert_array_equal(loaded.p_values(X), detector.p_values(X))
    assert save(loaded, tmp_path / "again", X=X) == content


def requests_of(estimator):
    return estimator._get_metadata_request()._serialize()


@pytest.mark.parametrize("alias", [True, False, None, "weight"])
def test_requests_of_metadata_are_kept(alias, X, tmp_path):
    with config_context(enable_metadata_routing=True):
        detector = small(FlowDetector).set_fit_request(sample_weight=alias).fit(X)
        content = detector.save(tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert_same(loaded, detector, X)
        for one in (loaded, clone(loaded)):
            assert requests_of(one) == requests_of(detector)
        assert requests_of(loaded)["fit"] == {"sample_weight": alias}
        assert loaded.save(tmp_path / "again") == clone(detector).fit(X).save(tmp_path / "other") == content
        # They go on being those of one estimator.
        loaded.set_fit_request(sample_weight=False)
        assert requests_of(detector)["fit"] == {"sample_weight": alias}


def test_a_pipeline_that_was_loaded_routes_metadata_as_before(X, tmp_path):
    weights = np.repeat([1.0, 0.0], [len(X) - 20, 20])
    with config_context(enable_metadata_routing=True):
        # Requests within a part that is saved as a whole, and of a clone, which keep the original.
        numbers = make_pipeline(clone(StandardScaler().set_fit_request(sample_weight="weight")), PCA(2))
        detector = SplitConformalDetector(
            small(FlowDetector).set_fit_request(sample_weight=True), random_state=0
        )
        pipeline = make_pipeline(make_column_transformer((numbers, [0, 1])), clone(detector)).fit(X)
        content = save(pipeline, tmp_path / "model")
        loaded = load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.score_samples(X), pipeline.score_samples(X))
        assert save(clone(pipeline).fit(X), tmp_path / "again") == content
        scalers = [one[0].transformers[0][1][0] for one in (loaded, pipeline)]
        assert requests_of(scalers[0]) == requests_of(scalers[1])
        assert requests_of(scalers[0])["fit"] == {"sample_weight": "weight"}
        assert requests_of(loaded[-1].estimator)["fit"] == {"sample_weight": True}
        # What is saved is not what was changed for it.
        assert scalers[1]._metadata_request.owner is not None
        one, other = (
            make_pipeline(clone(model[0].transformers[0][1][0]), clone(model[-1].estimator)).fit(
                X, weight=weights, sample_weight=weights
            )
            for model in (loaded, pipeline)
        )
        np.testing.assert_array_equal(one.score_samples(X), other.score_samples(X))
        with pytest.raises(UnsetMetadataPassedError, match=r"FlowDetector\.set_fit_request"):
            make_pipeline(clone(loaded[-1].estimator).set_fit_request(sample_weight=None)).fit(
                X, sample_weight=weights
            )


def test_a_request_that_a_folder_would_not_read_is_not_saved(X, tmp_path):
    detector = small(FlowDetector).fit(X)
    detector._metadata_request = MetadataRequest(owner=detector)
    detector._metadata_request.fit.requests["sample_weight"] = 1
    with pytest.raises(ModelFolderError, match=r"FlowDetector\._metadata_request has a request"):
        detector.save(tmp_path / "model")


def test_a_fitted_search_is_saved_by_its_best(X, tmp_path):
    search = GridSearchCV(
        make_pipeline(StandardScaler(), small(FlowDetector)), {"flowdetector__noise": [0.05]}, cv=2
    )
    search.fit(X)
    with pytest.raises(ModelFolderError, match="save best_estimator_"):
        save(search, tmp_path / "model")
    save(search.best_estimator_, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_process_computes_the_same(X, tmp_path):
    detector = small(FlowDetector, transform="nsf-autoregressive").fit(X)
    detector.save(tmp_path / "model")
    np.save(tmp_path / "rows.npy", X)
    code = (
        "import sys, numpy, torch, anomalib_gen; torch.set_num_threads(1)\n"
        "print(anomalib_gen.load(sys.argv[1]).score_samples(numpy.load(sys.argv[2])).tobytes().hex())"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "rows.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == detector.score_samples(X).tobytes().hex()


def test_a_detector_of_a_better_machine_scores_on_the_cpu(X, tmp_path, monkeypatch):
    detector = small(FlowDetector).fit(X)
    scores = detector.score_samples(X)
    detector.set_params(device="cuda:3").save(tmp_path / "model")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    loaded = load(tmp_path / "model")
    assert {weight.device.type for weight in loaded.model_.parameters()} == {"cpu"}
    with pytest.warns(UserWarning, match="scoring on the CPU"):
        np.testing.assert_array_equal(loaded.score_samples(X), scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_detector_fitted_on_cuda_scores_on_the_cpu(X, tmp_path):
    detector = small(FlowDetector).set_params(device="cuda").fit(X)
    detector.save(tmp_path / "model")
    loaded = load(tmp_path / "model").set_params(device="cpu")
    np.testing.assert_allclose(loaded.score_samples(X), detector.score_samples(X), rtol=1e-9)


# What must not be saved ------------------------------------------------------------------------------------


class MyNetwork(nn.Linear):
    def forward(self, x, levels):
        return super().forward(x)


def my_network(features, n_heads, context_features):
    return MyNetwork(features, n_heads)


class MyEnergy(Energy):
    pass


def test_code_is_not_saved_unless_trusted(X, tmp_path):
    flat = {"objective": "score-matching", "max_noise": None}
    detector = small(EnergyDetector, network=lambda a, b, c: MyNetwork(a, b), **flat).fit(X)
    with pytest.raises(ModelFolderError, match=r"EnergyDetector\.network is the callable .*<lambda>"):
        save(detector, tmp_path / "model", trusted=[f"{__name__}.MyNetwork"])
    detector = small(EnergyDetector, network=my_network, anomaly=MyEnergy(), **flat).fit(X)
    with pytest.raises(ModelFolderError, match=r"trusted=\['.*MyEnergy'\]"):
        detector.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    mine = [f"{__name__}:my_network", f"{__name__}.MyEnergy", f"{__name__}.MyNetwork"]
    save(detector, tmp_path / "model", trusted=mine)
    with pytest.raises(ModelFolderError, match="trusted="):
        load(tmp_path / "model")
    assert_same(load(tmp_path / "model", trusted=mine), detector, X)


def test_a_layer_is_a_factory_that_may_be_saved(X, tmp_path):
    flat = {"objective": "score-matching", "max_noise": None}
    detector = small(EnergyDetector, **flat).fit(X)
    for network in (nn.Bilinear, functools.partial(F.relu, inplace=False)):
        detector.set_params(network=network).save(tmp_path / "model", overwrite=True)
        loaded = load(tmp_path / "model").network
        assert loaded is network if network is nn.Bilinear else loaded.func is network.func


def test_transformers_that_cannot_be_read_safely_are_not_saved(X, tmp_path):
    for transformer, message in (
        (FunctionTransformer(lambda x: x), "lambda"),
        (RandomTreesEmbedding(2, sparse_output=False), "Tree"),
    ):
        pipeline = make_pipeline(transformer, small(FlowDetector)).fit(X)
        with pytest.raises(ModelFolderError, match=message):
            save(pipeline, tmp_path / "model")
    save(make_pipeline(FunctionTransformer(np.arcsinh), small(FlowDetector)).fit(X), tmp_path / "model")


def test_what_is_no_detector_is_refused(X, tmp_path):
    with pytest.raises(TypeError, match="IsolationForest"):
        save(IsolationForest().fit(X), tmp_path / "model")
    with pytest.raises(TypeError, match="int"):
        save(3, tmp_path / "model")
    with pytest.raises(NotFittedError):
        FlowDetector().save(tmp_path / "model")
    with pytest.raises(TypeError, match="trusted must be a list"):
        save(small(FlowDetector).fit(X), tmp_path / "model", trusted="a.b")
    detector = small(FlowDetector).fit(X)
    detector.model_.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ModelFolderError, match="hooks"):
        detector.save(tmp_path / "model")


# The tree of objects ---------------------------------------------------------------------------------------


def there_and_back(value):
    encoder = _tree.Encoder((), lambda estimator: b"")
    node = json.loads(json.dumps(encoder.encode(value, "value"), sort_keys=True))
    arrays = {key: array.copy() for key, array in encoder.arrays.items()}
    return _tree.Decoder(arrays, (), lambda number: None).decode(node)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.builds(range, st.integers(-5, 5), st.integers(-5, 5), st.integers(1, 3))
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int64, st.integers(-9, 9)),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=10,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_plain_values(value):
    back = there_and_back(value)
    assert repr(back) == repr(value)
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        np.array(["a", "bcd"]),
        np.array(["a", None, 1.5], dtype=object),
        np.array([b"a\xff", b"b"]),
        np.array([1 + 2j, 3]),
        np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"),
        np.array([], dtype=np.float32),
        np.array(3.5),
        np.array([1, 2], dtype=">i4"),
        np.array([np.nan, -0.0, np.inf]),
    ],
    ids=repr,
)
def test_arrays(value):
    back = there_and_back(value)
    assert back.dtype == value.dtype.newbyteorder("<")
    np.testing.assert_array_equal(back, value)
    assert [s > t for s, t in zip(back.strides, back.strides[1:], strict=False)] == [
        s > t for s, t in zip(value.strides, value.strides[1:], strict=False)
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8]
)
def test_tensors(dtype):
    tensor = (torch.arange(6).reshape(2, 3) % 2).to(dtype).T
    back, shared = there_and_back([tensor, tensor])
    assert back is shared
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_other_values():
    assert there_and_back({1, 2, "a"}) == {1, 2, "a"}
    assert there_and_back(frozenset([1])) == frozenset([1])
    assert there_and_back(slice(None, 3)) == slice(None, 3)
    assert there_and_back(np.dtype("<f4")) == np.dtype("<f4")
    assert there_and_back(torch.float64) is torch.float64
    assert there_and_back(torch.device("cuda:1")) == torch.device("cuda:1")
    assert there_and_back(F.relu) is F.relu
    generator = np.random.default_rng(3)
    assert there_and_back(generator).random() == generator.random()


@pytest.mark.parametrize(
    "value",
    [
        lambda: 0,
        open,
        object(),
        "a".upper,
        np.ma.masked_array([1]),
        np.zeros(1, dtype="i4,f4"),
        Path("."),
        torch.eye(2).to_sparse(),
        json.dumps,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_things_are_refused(value):
    with pytest.raises(ModelFolderError):
        there_and_back([value])


def test_modules_of_any_shape():
    """Stored rows, non-persistent buffers, shared and missing parts: nothing is built anew from parameters."""
    rows = torch.randn(7, 3)
    denoiser = KernelDenoiser(rows, EDM())
    module = nn.ModuleDict({"a": denoiser, "b": nn.ModuleList([nn.Linear(2, 2), denoiser])})
    module.register_buffer("gone", None)
    module.register_buffer("transient", torch.ones(2), persistent=False)
    module["b"][0].weight.requires_grad_(False)
    module.eval()
    back = there_and_back(module)
    assert back["b"][1] is back["a"]
    assert torch.equal(back["a"].rows, rows)
    assert back.gone is None
    assert back.state_dict().keys() == module.state_dict().keys()
    assert [w.requires_grad for w in back.parameters()] == [w.requires_grad for w in module.parameters()]
    assert not back.training
    x, level = torch.randn(4, 3), torch.full((4,), 0.5)
    assert torch.equal(back["a"].denoise(x, level), denoiser.denoise(x, level))


def test_every_component_is_saved():
    """Objects of each component with their defaults; what they learn is tested through the detectors."""
    seen = set()

    def walk(cls):
        for sub in cls.__subclasses__():
            if sub.__module__.startswith("anomalib_gen.") and sub not in seen:
                seen.add(sub)
                walk(sub)

    walk(Component)
    assert len(seen) > 30
    for cls in seen:
        if issubclass(cls, BaseEstimator):  # scorers, which belong to no model
            continue
        if inspect.isabstract(cls) or any(
            p.default is p.empty and p.kind is not p.VAR_KEYWORD
            for p in inspect.signature(cls).parameters.values()
        ):
            continue
        assert repr(there_and_back(cls())) == repr(cls())
