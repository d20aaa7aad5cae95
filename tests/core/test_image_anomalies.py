"""Anomalies of images: closed forms, and the known failure of likelihoods with its repair on real images."""

import io
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.anomaly import (
    IMAGE_ANOMALIES,
    ClosedFormResidual,
    DiffusionReconstruction,
    Energy,
    InputComplexity,
    Likelihood,
    LikelihoodRegret,
    MultiScaleReconstruction,
    ScoreNorm,
    Typicality,
)
from anomalib_gen.anomaly.multiscale_reconstruction import pyramid_distance
from anomalib_gen.heatmaps import explain_images
from anomalib_gen.images import ChannelsFirst, likelihood_ratio, mutate_pixels

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
FAMILIES = [DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector]


@pytest.fixture(scope="module")
def digits():
    return (load_digits().images[:80, None] * 15).astype(np.uint8)


def small(family, **parameters):
    if family is DiffusionDetector:
        parameters = {"denoiser": "network"} | parameters
    return family(**{"max_iter": 5, "hidden_features": 8, "random_state": 0, "device": "cpu", **parameters})


def patches(picture, side, n, seed):
    rng = np.random.default_rng(seed)
    top, left = (rng.integers(0, picture.shape[axis] - side, n) for axis in (0, 1))
    return np.stack([picture[i : i + side, j : j + side] for i, j in zip(top, left, strict=True)])[:, None]


@pytest.fixture(scope="module")
def nature():
    """Patches of a photograph in grey to train on and to test, and the latter with a tenth of the contrast."""
    grey = load_sample_images().images[0].mean(axis=2).astype(np.uint8)[200:]
    train, normal = patches(grey[:, :400], 16, 500, 0), patches(grey[:, 420:], 16, 60, 1)
    mean = normal.mean(axis=(2, 3), keepdims=True)
    return train, normal, np.rint(mean + 0.1 * (normal - mean)).astype(np.uint8)


@pytest.fixture(scope="module")
def flow(nature):
    return FlowDetector(max_iter=100, hidden_features=64, n_layers=4, random_state=0, device="cpu").fit(
        nature[0]
    )


def anomaly_auroc(detector, normal, anomalous):
    scores = -detector.score_samples(np.concatenate([normal, anomalous]))
    return roc_auc_score(np.arange(len(scores)) >= len(normal), scores)


@pytest.mark.parametrize(
    "what",
    [
        *IMAGE_ANOMALIES.values(),
        ClosedFormResidual,
        DiffusionReconstruction,
        LikelihoodRegret,
        ScoreNorm,
        Typicality,
        likelihood_ratio,
    ],
    ids=lambda what: what.__name__,
)
def test_what_images_are_scored_by_says_when_it_helps_and_when_it_fails(what):
    text = " ".join(what.__doc__.split())
    assert "It helps where " in text
    assert "It fails where " in text


def test_flat_images_are_likelier_than_real_ones_and_complexity_puts_them_right(flow, nature):
    train, normal, flat = nature
    assert anomaly_auroc(flow, normal, flat) < 0.3
    assert anomaly_auroc(flow.with_anomaly("input_complexity", train), normal, flat) > 0.85


def test_a_learned_weight_is_the_slope_over_normal_images(flow, nature):
    train, normal, flat = nature
    learned = flow.with_anomaly(InputComplexity(weight="learned"), train)
    a = learned.anomaly_
    images = torch.from_numpy(learned._scaler.transform(train)).float()
    held_out = images[learned._split(len(train), np.random.RandomState(learned._seeds[0]))[1]]
    generator = torch.Generator().manual_seed(0)
    nats = Energy()(learned.model_, held_out, generator).detach().double().numpy()
    slope, _ = np.polyfit(a.code_lengths(held_out).numpy(), nats, 1)
    assert a.weight_ == pytest.approx(slope, rel=1e-4)
    # What is left does not hang on the length, and flat images are put right, if by less than with a weight of 1.
    left = nats - a.weight_ * a.code_lengths(held_out).numpy()
    assert abs(np.corrcoef(left, a.code_lengths(held_out).numpy())[0, 1]) < 1e-6
    assert anomaly_auroc(learned, normal, flat) > 0.65
    # A weight of 0 is the likelihood.
    np.testing.assert_allclose(
        flow.with_anomaly(InputComplexity(weight=0), train).score_samples(normal[:5]),
        flow.log_prob(normal[:5]),
    )
    with pytest.raises(ValueError, match="weight must be a number of at least 0 or 'learned', got 'most'"):
        flow.with_anomaly(InputComplexity(weight="most"), train)


def test_a_learned_weight_looks_at_some_images_and_at_no_empty_blocks():
    """Not all models take no rows at all."""
    images = torch.rand(900, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def likelihood(model, x, generator):
        seen.append(len(x))
        return x.flatten(1).sum(1)

    anomaly = InputComplexity(weight="learned", likelihood=likelihood)
    anomaly.prepare(None, images.split(300), torch.Generator())
    assert seen == [300, 212]


def test_complexity_is_the_likelihood_less_the_code(flow, nature):
    train, normal, _ = nature
    corrected = flow.with_anomaly(InputComplexity(likelihood=Likelihood()), train)
    bits = []
    for image in normal:
        file = io.BytesIO()
        Image.fromarray(image[0]).save(file, format="PNG", optimize=True, compress_level=9)
        bits.append(8 * file.tell())
    expected = flow.log_prob(normal) + math.log(2) * np.array(bits)
    # A file of levels that are counted from another darkest one may be a byte longer.
    np.testing.assert_allclose(corrected.score_samples(normal), expected, atol=8 * math.log(2) * 4)


@pytest.mark.parametrize("observation", ["gaussian", "discretised-logistic"])
def test_images_darker_than_any_in_training_keep_their_detail(digits, observation):
    bright = digits // 2 + 100  # from 100 to 207: what is darker has never been seen
    detector = small(VAEDetector, observation=observation, anomaly="input_complexity").fit(bright)
    complexity, z = detector.anomaly_, detector._scaler.transform
    lengths = [complexity.code_lengths(torch.from_numpy(z(images))) for images in (bright, bright - 90)]
    flat = complexity.code_lengths(torch.from_numpy(z(np.full_like(bright[:1], 10))))
    np.testing.assert_allclose(lengths[1], lengths[0], atol=8 * math.log(2) * 15)
    assert float(lengths[1].min()) > float(flat[0]) + 8 * math.log(2) * 10


@pytest.mark.parametrize("codec", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_code_lengths(codec, channels):
    rng = np.random.default_rng(0)
    levels = torch.from_numpy(rng.integers(0, 256, (3, channels, 16, 16))).double()
    levels[0] = 7
    levels[1] = torch.arange(16)
    anomaly = InputComplexity(codec=codec)
    anomaly.prepare(None, [levels], None)
    lengths = anomaly.code_lengths(levels)
    assert lengths[0] < lengths[2]
    assert lengths[1] < lengths[2]
    # Noise cannot be compressed.
    assert float(lengths[2]) >= 0.95 * channels * 256 * math.log(256)
    np.testing.assert_array_equal(anomaly.code_lengths(levels[2:]), lengths[2:])


def test_real_numbers_off_any_grid_have_256_levels_under_a_discretised_observation(digits):
    images = np.random.default_rng(0).random((40, 1, 8, 8))
    parameters = {"observation": "discretised-logistic", "anomaly": "input_complexity"}
    complexity = small(VAEDetector, **parameters).fit(images).anomaly_
    assert not complexity.eight_bit_
    whole, scaled = (small(VAEDetector, **parameters).fit(X).anomaly_ for X in (digits, digits / 255))
    assert whole.eight_bit_
    assert scaled.eight_bit_


def test_levels_of_real_numbers_are_256():
    x = torch.linspace(-1, 2, 256).reshape(1, 1, 16, 16).double()
    anomaly = InputComplexity()
    anomaly.prepare(object(), [x], None)
    assert (anomaly.low_, anomaly.width_) == (pytest.approx(-1), pytest.approx(3 / 255))


def test_a_bad_codec_and_tables_are_refused(digits):
    with pytest.raises(ValueError, match="codec='zip' is unknown"):
        small(FlowDetector, anomaly=InputComplexity(codec="zip")).fit(digits)
    rows = np.random.default_rng(0).normal(size=(50, 3))
    for name in IMAGE_ANOMALIES:
        with pytest.raises(ValueError, match="is unknown"):
            small(VAEDetector, anomaly=name).fit(rows)
        with pytest.raises(ValueError, match="image"):
            small(VAEDetector, anomaly=IMAGE_ANOMALIES[name]()).fit(rows)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_family_has_input_complexity(family, digits):
    detector = small(family, anomaly="input_complexity").fit(digits)
    scores = detector.score_samples(digits)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(detector.score_samples(digits[5:6]), scores[5:6], rtol=1e-4)


# Multi-scale distances -----------------------------------------------------------------------------------------


def test_a_constant_residual_counts_at_every_scale():
    residual = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    torch.testing.assert_close(pyramid_distance(residual, 3), torch.full((2,), 0.25 * 21 / 3).double())


def test_independent_residuals_count_alike_at_all_scales():
    residual = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n_scales in (1, 2, 4):
        assert float(pyramid_distance(residual, n_scales).mean()) == pytest.approx(1, rel=0.06)


def test_a_checkerboard_has_one_scale():
    board = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8)).double().expand(1, 1, 8, 8)
    assert float(pyramid_distance(board, 4)) == pytest.approx(1 / 4)
    # An image of 8 x 8 has four scales and no more.
    assert float(pyramid_distance(board, 9)) == pytest.approx(1 / 4)


@pytest.mark.parametrize("family", [DiffusionDetector, VAEDetector], ids=lambda family: family.__name__)
def test_models_that_reconstruct_have_a_multiscale_distance(family, digits):
    detector = small(family, anomaly="multiscale_reconstruction", max_iter=80, hidden_features=64).fit(digits)
    scores = detector.score_samples(digits)
    changed = digits.copy()
    changed[:, :, 1:5, 1:5] = 255 - changed[:, :, 1:5, 1:5]
    assert (detector.score_samples(changed) < scores).mean() > 0.8


@pytest.mark.parametrize("family", [EnergyDetector, FlowDetector], ids=lambda family: family.__name__)
def test_models_that_do_not_are_told_so(digits, family):
    lacks = r"does not work with (Flow|Energy)Model: it has no reconstruction of images, as autoencoders"
    with pytest.raises(TypeError, match=lacks):
        small(family, anomaly=MultiScaleReconstruction()).fit(digits)
    # It is no name of theirs, and not offered as one.
    with pytest.raises(ValueError, match=r"Known names: (?!.*'multiscale).*'input_complexity'"):
        small(family, anomaly="multiscale_reconstruction").fit(digits)
    with pytest.raises(TypeError, match=r"kind='residual' does not work with .*: it has no reconstruction"):
        explain_images(small(family).fit(digits), digits[:2], kind="residual")


# Likelihood ratios ---------------------------------------------------------------------------------------------


def test_mutations(digits):
    mutated = mutate_pixels(digits, rate=0.3, random_state=0)
    assert mutated.dtype == np.uint8
    assert 0.27 < (mutated != digits).mean() < 0.33
    np.testing.assert_array_equal(mutated, mutate_pixels(digits, rate=0.3, random_state=0))
    # Whole numbers of any type reach the largest.
    two = mutate_pixels(np.tile([0, 1], (50, 1, 8, 4)), rate=1.0, random_state=0)
    assert set(np.unique(two)) == {0, 1}
    truths = mutate_pixels(np.tile([False, True], (50, 1, 8, 4)), rate=1.0, random_state=0)
    assert truths.dtype == bool
    assert 0.4 < truths.mean() < 0.6
    real = mutate_pixels(digits / 255.0, rate=1.0, random_state=0)
    assert real.mean() == pytest.approx((digits / 255.0).max() / 2, rel=0.05)
    with pytest.raises(ValueError, match="rate must lie"):
        mutate_pixels(digits, rate=0)


def test_a_likelihood_ratio_is_the_difference_of_two_energies(digits):
    detector = small(FlowDetector).fit(digits)
    ratio = likelihood_ratio(detector, digits, random_state=0)
    normal, background = ratio.member_energies(digits[:9]).T
    np.testing.assert_allclose(ratio.score_samples(digits[:9]), background - normal)
    np.testing.assert_allclose(normal, detector.energy(digits[:9]))
    assert np.abs(background - normal).max() > 1
    assert ratio.event_shape_ == (1, 8, 8)


def test_a_likelihood_ratio_of_zeros_and_ones_keeps_them(digits):
    dark = digits > 100
    ratios = [
        likelihood_ratio(small(VAEDetector, observation="bernoulli").fit(X), X, random_state=0)
        for X in (dark.astype(np.float32), dark.astype(np.uint8))
    ]
    scores = [
        ratio.score_samples(dark[:9].astype(kind)) for ratio, kind in zip(ratios, ("f4", "u1"), strict=True)
    ]
    assert np.isfinite(scores).all()


def test_what_has_no_likelihood_ratio_is_refused_before_training(digits, monkeypatch):
    detector, plain = small(FlowDetector).fit(digits), small(FlowDetector)
    of_table = small(FlowDetector).fit(np.random.default_rng(0).normal(size=(50, 3)))
    monkeypatch.setattr(FlowDetector, "fit", lambda *_: pytest.fail("trained in vain"))
    with pytest.raises(NotFittedError):
        likelihood_ratio(plain, digits)
    with pytest.raises(ValueError, match="uint8 images, 0 to 255, and X is float64"):
        likelihood_ratio(detector, digits / 255)
    table = np.random.default_rng(0).normal(size=(50, 3))
    with pytest.raises(ValueError, match=r"this FlowDetector was fitted on rows of shape \(3,\)"):
        likelihood_ratio(of_table, table)
    with pytest.raises(TypeError, match=r"got Pipeline\. Take the last step"):
        likelihood_ratio(make_pipeline(ChannelsFirst(), detector), digits[:, 0])


def test_compositions_draw_images(digits):
    first, second = (small(FlowDetector, random_state=seed).fit(digits) for seed in (0, 1))
    members = [("first", first), ("second", second)]
    for rule in ("mixture", "product"):
        composed = ComposedDetector(members, rule=rule, n_steps=2).fit(digits)
        drawn = composed.sample(3, random_state=0)
        assert drawn.shape == (3, 1, 8, 8)
        assert np.isfinite(drawn).all()
