"""Heat maps add up to what they explain, and point at what was changed."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen._runtime import scoring_generator
from anomalib_gen.anomaly import NegativeELBO, ReconstructionError
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.heatmaps import _average, explain_images
from anomalib_gen.images import ChannelsFirst

FAMILIES = [DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


@pytest.fixture(scope="module")
def digits():
    return (load_digits().images[:300, None] * 15).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(digits):
    fitted = {}

    def get(family):
        if family not in fitted:
            options = {FlowDetector: {"n_layers": 4}, DiffusionDetector: {"denoiser": "network"}}
            fitted[family] = family(
                max_iter=80,
                hidden_features=48,
                random_state=0,
                device="cpu",
                batch_size=32,
                **options.get(family, {}),
            ).fit(digits[:250])
        return fitted[family]

    return get


@each_family
def test_a_bright_square_in_a_corner_is_pointed_at(trained, digits, family):
    detector = trained(family)
    changed = digits[250:].copy()
    changed[:, :, :3, :2] = 255
    inside = np.zeros((8, 8), dtype=bool)
    inside[:3, :2] = True
    maps = explain_images(detector, changed, smooth=1, subtract=digits[:100])
    assert maps.shape == (50, 8, 8)
    assert maps.dtype == np.float64
    areas = [roc_auc_score(inside.ravel(), one.ravel()) for one in maps]
    assert np.mean(areas) > 0.75


@each_family
def test_a_map_is_that_of_its_image(trained, digits, family):
    detector = trained(family)
    maps = explain_images(detector, digits[:9])
    np.testing.assert_allclose(
        explain_images(detector, digits[4:5]), maps[4:5], rtol=1e-3, atol=1e-3 * maps.max()
    )
    assert np.isfinite(maps).all()
    assert family is FlowDetector or (maps >= 0).all()


def test_residuals_add_up_to_the_reconstruction_error(trained, digits):
    detector = trained(VAEDetector)
    errors = -detector.with_anomaly(ReconstructionError(), digits[:250]).score_samples(digits[:20])
    maps = explain_images(detector, digits[:20], kind="residual", smooth=1)
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), errors, rtol=1e-4)


def test_likelihoods_of_an_autoencoder_add_up_to_its_bound(trained, digits):
    detector = trained(VAEDetector)
    maps = explain_images(detector, digits[:20], kind="likelihood", smooth=1)
    model = detector._model_on(torch.device("cpu"))
    x = torch.from_numpy(detector._scaler.transform(digits[:20])).float()
    with torch.no_grad():
        expected = NegativeELBO()(model, x, scoring_generator(detector._scoring_seed))
        divergence = model.kl(x)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), expected.numpy(), rtol=1e-4, atol=1e-3)
    assert float(divergence.min()) > 1  # it would be missed
    # Alone and among others, whatever the draws.
    alone = explain_images(detector, digits[4:5], kind="likelihood", smooth=1)
    np.testing.assert_allclose(alone, maps[4:5], rtol=1e-4, atol=1e-4)


def test_shares_add_up_to_a_flow_s_likelihood(trained, digits):
    detector = trained(FlowDetector)
    maps = explain_images(detector, digits[:20], smooth=1)
    np.testing.assert_array_equal(maps, explain_images(detector, digits[:20], kind="likelihood", smooth=1))
    x = torch.from_numpy(detector._scaler.transform(digits[:20])).float()
    with torch.no_grad():
        expected = detector._model_on(torch.device("cpu")).energy(x)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), expected.numpy(), rtol=1e-4, atol=1e-3)


def test_a_flow_of_pixels_in_a_row_has_maps_of_its_slope(digits):
    detector = FlowDetector(
        transform="realnvp", n_layers=2, hidden_features=8, max_iter=3, random_state=0, device="cpu"
    ).fit(digits[:60])
    maps = explain_images(detector, digits[:3])
    np.testing.assert_array_equal(maps, explain_images(detector, digits[:3], kind="score"))
    with pytest.raises(TypeError, match="kind='likelihood' does not work with FlowModel"):
        explain_images(detector, digits[:3], kind="likelihood")


def test_scores_are_the_energy_s_slope(trained, digits):
    detector = trained(FlowDetector)
    maps = explain_images(detector, digits[:3], kind="score", smooth=1)
    model = detector._model_on(torch.device("cpu"))
    x = torch.from_numpy(detector._scaler.transform(digits[:3])).float().requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(x).sum(), x)
    np.testing.assert_allclose(maps, slope[:, 0].square().numpy(), rtol=1e-3, atol=1e-3)


def test_windows_keep_constants_and_means():
    maps = torch.rand(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_average(torch.ones_like(maps), 3), torch.ones_like(maps))
    torch.testing.assert_close(_average(maps, 3)[:, 4, 4], maps[:, 3:6, 3:6].mean((1, 2)))
    assert _average(maps, 4).shape == maps.shape
    torch.testing.assert_close(_average(maps, 1), maps)


def test_what_there_is_no_map_of_is_refused(trained, digits):
    with pytest.raises(ValueError, match="kind='heat' is unknown"):
        explain_images(trained(VAEDetector), digits, kind="heat")
    with pytest.raises(ValueError, match="smooth must be"):
        explain_images(trained(VAEDetector), digits, smooth=0)
    with pytest.raises(TypeError, match="kind='residual' does not work with FlowModel"):
        explain_images(trained(FlowDetector), digits[:2], kind="residual")
    table = VAEDetector(max_iter=2, device="cpu").fit(np.random.default_rng(0).normal(size=(50, 3)))
    with pytest.raises(ValueError, match="Heat maps are for detectors of images"):
        explain_images(table, digits[:2])
    pipeline = make_pipeline(ChannelsFirst(), trained(VAEDetector))
    with pytest.raises(TypeError, match=r"got Pipeline\. Explain the last step"):
        explain_images(pipeline, digits[:2, 0])
    calibrated = SplitConformalDetector(FrozenEstimator(trained(VAEDetector))).fit(digits)
    with pytest.raises(
        TypeError, match=r"got SplitConformalDetector\. .* explain_images\(detector\.estimator_, X"
    ):
        explain_images(calibrated, digits[:2])
    composed = ComposedDetector([("flow", trained(FlowDetector))]).fit(digits)
    with pytest.raises(TypeError, match=r"got ComposedDetector\. Explain its members"):
        explain_images(composed, digits[:2])


@pytest.mark.parametrize("scale", [1, 1 / 255], ids=["uint8", "float"])
@pytest.mark.parametrize("denoiser", ["network", "closed-form", "hybrid"])
def test_every_denoiser_has_maps_of_images(digits, denoiser, scale):
    images = digits[:60] if scale == 1 else digits[:60] * scale
    detector = DiffusionDetector(
        denoiser=denoiser, max_iter=3, hidden_features=8, n_blocks=1, random_state=0, device="cpu"
    ).fit(images)
    kinds = ["residual", "score"]
    if denoiser == "network":
        with pytest.raises(TypeError, match="kind='matching' does not work with NetworkDenoiser"):
            explain_images(detector, images[:2], kind="matching")
    else:
        kinds.append("matching")
        maps = explain_images(detector, images[:2])
        np.testing.assert_array_equal(maps, explain_images(detector, images[:2], kind="matching"))
    for kind in kinds:
        maps = explain_images(detector, images[:2] // 2, kind=kind, smooth=np.int64(3))
        assert maps.shape == (2, 8, 8)
        assert np.isfinite(maps).all()
        assert np.ptp(maps) > 0
    if denoiser != "network":
        # The stored rows' own anomaly does not depend on units.
        changed = 255 * scale - images[:2]
        changed = changed.astype(images.dtype)
        other = detector.with_anomaly("closed_form", images)
        assert other.score_samples(changed).max() < other.score_samples(images).min()


def test_a_model_that_tells_noise_levels_has_no_maps(digits):
    detector = DiffusionDetector(
        objective="diffusion-time", max_iter=2, hidden_features=8, n_blocks=1, random_state=0, device="cpu"
    ).fit(digits[:40])
    with pytest.raises(TypeError, match="nothing of its pixels"):
        explain_images(detector, digits[:2])
