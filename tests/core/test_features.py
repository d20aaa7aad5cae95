"""Detectors on features: what a network of the user's gives, and nothing that depends on the images beside."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.features import FeatureExtractor

FAMILIES = [DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector]


@pytest.fixture(scope="module")
def digits():
    images, digit = load_digits(return_X_y=True)
    return (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8), digit


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Dropout(0.5)
    )


def test_features_are_what_the_network_gives(digits, network):
    images = digits[0][:70]
    features = FeatureExtractor(network, device="cpu").fit_transform(images)
    assert features.dtype == np.float32
    with torch.no_grad():
        maps = network.eval()(torch.from_numpy(images / 255).float())
    np.testing.assert_allclose(features, maps.mean(dim=(2, 3)).numpy(), atol=1e-5)
    # Images of real numbers are passed on as they are, and rows of features as well.
    flat = torch.nn.Flatten()
    np.testing.assert_array_equal(
        FeatureExtractor(flat, device="cpu").fit_transform(images / 3),
        (images / 3).reshape(70, -1).astype("f"),
    )


def test_features_depend_neither_on_batch_nor_on_order(digits, network):
    images = digits[0][:70]
    extractor = FeatureExtractor(network, batch_size=16, device="cpu").fit(images)
    features = extractor.transform(images)
    np.testing.assert_array_equal(extractor.transform(images[33:40]), features[33:40])
    np.testing.assert_array_equal(extractor.transform(images[::-1].copy()), features[::-1])


def test_the_network_is_left_as_it_is(digits, network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    FeatureExtractor(network, device="cpu").fit_transform(digits[0][:10])
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.device.type == "cpu"


def test_names_and_clones(digits, network):
    extractor = FeatureExtractor(network, device="cpu").fit(digits[0][:5])
    assert extractor.get_feature_names_out().tolist() == [f"featureextractor{k}" for k in range(6)]
    again = clone(extractor)
    np.testing.assert_array_equal(again.fit_transform(digits[0][:5]), extractor.transform(digits[0][:5]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_any_detector_becomes_one_on_features(family, digits, network):
    images = digits[0]
    detector = family(max_iter=5, hidden_features=8, random_state=0, device="cpu")
    pipeline = make_pipeline(FeatureExtractor(network, device="cpu"), detector).fit(images[:60])
    assert detector.event_shape_ == (6,)
    scores = pipeline.score_samples(images[60:80])
    np.testing.assert_allclose(pipeline.score_samples(images[70:71]), scores[10:11], rtol=1e-9)


def test_a_transformer_of_scikit_learn_does_as_well(digits):
    images, digit = digits
    flatten = FunctionTransformer(lambda X: X.reshape(len(X), -1) / 255)
    closed = DiffusionDetector(denoiser="closed-form", random_state=0, device="cpu")
    pipeline = make_pipeline(flatten, PCA(16, random_state=0), closed).fit(images[digit == 0][:100])
    test = np.concatenate([images[digit == 0][100:], images[digit == 3]])
    anomalous = np.arange(len(test)) >= (digit == 0).sum() - 100
    assert roc_auc_score(anomalous, -pipeline.score_samples(test)) > 0.95


def test_what_cannot_work_is_said(digits, network):
    images = digits[0][:4]
    with pytest.raises(ValueError, match=r"got an array of shape \(4, 8, 8\)"):
        FeatureExtractor(network).fit(images[:, 0])
    extractor = FeatureExtractor(network, device="cpu").fit(images)
    with pytest.raises(ValueError, match=r"images of shape \(1, 6, 8\), but \(1, 8, 8\)"):
        extractor.transform(images[:, :, :6])
    for bad, found in ((lambda x: x.mean(), r"\(\)"), (lambda x: [x], "list"), (lambda x: x[:, 0], "8, 8")):
        with pytest.raises(TypeError, match=f"for 64 images, got .*{found}"):
            FeatureExtractor(bad, device="cpu").fit(images)
    for kind in (np.int64, bool, object):
        with pytest.raises(ValueError, match=rf"X is {np.dtype(kind)}: images are uint8, .* divided by 255"):
            FeatureExtractor(network, device="cpu").fit(images.astype(kind))
    whole = FeatureExtractor(network, device="cpu").fit(images.astype(np.uint8))
    with pytest.raises(ValueError, match="X is float64, but uint8 images, 0 to 255 were fitted"):
        whole.transform(images.astype(np.float64))
    flaw = images.astype(float)
    flaw[2] = np.nan
    flat = FeatureExtractor(torch.nn.Flatten(), device="cpu").fit(images.astype(float))
    with pytest.raises(ValueError, match="not finite for image 2"):
        flat.transform(flaw)


def test_a_failed_fit_leaves_the_extractor_as_it_was(digits, network):
    images = digits[0][:4]
    extractor = FeatureExtractor(network).fit(images)
    with pytest.raises(RuntimeError, match="channels"):
        extractor.fit(np.repeat(images, 3, axis=1))
    assert extractor.event_shape_ == (1, 8, 8)
    fresh = FeatureExtractor(len)
    with pytest.raises(TypeError, match="must return a tensor"):
        fresh.fit(images)
    with pytest.raises(NotFittedError):
        fresh.transform(images)
