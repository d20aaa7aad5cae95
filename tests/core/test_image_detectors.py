"""The four detectors on images: the same border, the same promises, and what is peculiar to pixels."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen._scaling import ArrayRows, Standardizer, column_grain
from anomalib_gen.anomaly import IMAGE_ANOMALIES, DiffusionELBO, LikelihoodRegret, ODELikelihood
from anomalib_gen.features import FeatureExtractor
from anomalib_gen.images import ChannelsFirst
from anomalib_gen.models import (
    ClosedFormDenoiser,
    HybridDenoiser,
    ImageMemory,
    NetworkDenoiser,
    ScoreDenoiser,
)
from anomalib_gen.objectives import Denoising, GradientPenalty, PersistentContrastiveDivergence
from anomalib_gen.objectives._smoothing import dequantise

FAMILIES = [DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
SMALL = {
    "max_iter": 5,
    "hidden_features": 8,
    "n_blocks": 1,
    "n_layers": 1,
    "random_state": 0,
    "device": "cpu",
}
# Those that take many steps, with few of them.
QUICK = {
    (DiffusionDetector, "likelihood"): ODELikelihood(n_steps=2, n_probes=1),
    (DiffusionDetector, "elbo"): DiffusionELBO(n_steps=4),
    (VAEDetector, "likelihood_regret"): LikelihoodRegret(n_steps=3),
}
SLOW = {"score-matching"}


def small(family, **parameters):
    """A tiny detector with a network, also of the family that would need none."""
    known = family().get_params()
    sizes = {name: value for name, value in SMALL.items() if name in known}
    if family is DiffusionDetector:
        sizes["denoiser"] = "network"
    return family(**{**sizes, **parameters})


@pytest.fixture(scope="module")
def digits():
    """Images (80, 1, 8, 8) of whole numbers from 0 to 255."""
    return (load_digits().images[:80, None] * 15).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(digits):
    fitted = {}

    def get(family, **parameters):
        key = (family, *map(repr, sorted(parameters.items())))
        if key not in fitted:
            fitted[key] = small(family, **parameters).fit(digits)
        return fitted[key]

    return get


def combinations():
    for family in FAMILIES:
        for argument, known in (("objective", family._objectives), ("anomaly", family._anomalies)):
            if argument in family().get_params():
                for name in known:
                    part = QUICK.get((family, name), name)
                    marks = [pytest.mark.slow] if name in SLOW else []
                    # (These ask for stored rows, and `small` for a network alone.)
                    stored = {"denoiser": "hybrid"} if name in ("closed_form", "combined") else {}
                    yield pytest.param(
                        family, {argument: part, **stored}, id=f"{family.__name__}-{name}", marks=marks
                    )
    yield pytest.param(DiffusionDetector, {"network": "energy"}, id="DiffusionDetector-energy")
    for kind in ("mlp", "residual"):
        yield pytest.param(DiffusionDetector, {"network": kind}, id=f"DiffusionDetector-{kind}")
        yield pytest.param(EnergyDetector, {"network": kind}, id=f"EnergyDetector-{kind}")
    yield pytest.param(EnergyDetector, {"spectral_norm": 1.0}, id="EnergyDetector-bounded")
    yield pytest.param(FlowDetector, {"transform": "realnvp"}, id="FlowDetector-realnvp")
    yield pytest.param(VAEDetector, {"encoder": "mlp", "decoder": "mlp"}, id="VAEDetector-mlp")
    for observation in ("student-t", "discretised-logistic"):
        yield pytest.param(VAEDetector, {"observation": observation}, id=f"VAEDetector-{observation}")


@pytest.mark.parametrize(("family", "parts"), list(combinations()))
def test_scores_are_those_of_each_image_alone(trained, digits, family, parts):
    detector = trained(family, **parts)
    scores = detector.score_samples(digits)
    assert scores.shape == (len(digits),)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert np.ptp(scores) > 0
    order = np.random.default_rng(0).permutation(len(digits))
    scale = np.abs(scores).max()
    np.testing.assert_allclose(detector.score_samples(digits[order]), scores[order], atol=1e-5 * scale)
    np.testing.assert_allclose(detector.score_samples(digits[7:8]), scores[7:8], atol=1e-5 * scale)


def test_one_image_is_compared_alone_with_stored_ones(digits, monkeypatch):
    """A block for networks, filled up, would take the time of all its images."""
    detector = DiffusionDetector(random_state=0, device="cpu").fit(digits)
    scores = detector.score_samples(digits)
    sizes, anomaly = [], ImageMemory.anomaly
    monkeypatch.setattr(ImageMemory, "anomaly", lambda self, x: sizes.append(len(x)) or anomaly(self, x))
    for n in (1, 3):
        np.testing.assert_array_equal(detector.score_samples(digits[5 : 5 + n]), scores[5 : 5 + n])
    assert sizes == [1, 3]


@each_family
def test_the_same_seed_gives_the_same_detector_and_touches_nothing(trained, digits, family):
    state = torch.get_rng_state()
    again = clone(trained(family)).fit(digits)
    np.testing.assert_array_equal(again.score_samples(digits), trained(family).score_samples(digits))
    assert torch.equal(torch.get_rng_state(), state)
    opened = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(opened.score_samples(digits[:5]), again.score_samples(digits[:5]))


@each_family
def test_what_a_detector_tells_of_itself(trained, digits, family):
    detector = trained(family)
    assert detector.event_shape_ == (1, 8, 8)
    assert detector.n_features_in_ == 1
    assert set(detector.predict(digits)) <= {-1, 1}
    drawn = detector.sample(3, random_state=0)
    assert drawn.shape == (3, 1, 8, 8)
    assert drawn.dtype == np.uint8
    detector.score_samples(drawn)


@each_family
def test_images_of_real_numbers(digits, family):
    images = digits / 255.0
    detector = small(family).fit(images)
    assert detector.sample(2, random_state=0).dtype == np.float64
    whole = small(family).fit(255 * images)
    if family in (FlowDetector, VAEDetector):
        difference = detector.score_samples(images) - whole.score_samples(255 * images)
        np.testing.assert_allclose(difference, 64 * np.log(255), rtol=1e-3)
    with pytest.raises(ValueError, match="fitted on images of real numbers, and X is uint8"):
        detector.score_samples(digits)


@each_family
def test_grey_levels_in_another_type_are_pointed_out(digits, family):
    detector = small(family, max_iter=1)
    with pytest.warns(
        UserWarning, match=r"from 0 to 240 in int64, .* Give X\.astype\(numpy\.uint8\)"
    ) as found:
        detector.fit(digits[:20].astype(np.int64))
    assert found[0].filename == __file__
    assert not detector._eight_bit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score_samples(digits[:2].astype(np.int64))  # once is enough
        detector.fit(digits[:20].astype(float))
        detector.fit(digits[:20])
        detector.fit((digits[:20] > 100).astype(np.int64))
        detector.fit(digits[:20].astype(np.int64) - 100)
        detector.fit(digits[:20].reshape(20, 64)[:, 20:24].astype(np.int64))


def test_methods_that_give_rows_give_images(trained, digits):
    vae, diffusion = trained(VAEDetector, n_components=2), trained(DiffusionDetector)
    assert vae.transform(digits).shape == (80, 2)
    assert vae.reconstruct(digits[:3]).shape == (3, 1, 8, 8)
    assert vae.interpolate(digits[:2], digits[2:4], n_steps=4).shape == (2, 4, 1, 8, 8)
    assert diffusion.denoise(digits[:3]).shape == (3, 1, 8, 8)
    assert diffusion.reconstruct(digits[:3], n_steps=2).shape == (3, 1, 8, 8)
    assert diffusion.log_prob(digits[:2], n_steps=2).shape == (2,)
    assert diffusion.elbo(digits[:2], n_steps=4).shape == (2,)


@each_family
def test_continued_training_and_weights(digits, family):
    detector = small(family).fit(digits, sample_weight=np.arange(80) % 2)
    first = detector.n_iter_
    detector.partial_fit(digits[:40])
    assert detector.n_iter_ == first + 1
    assert np.isfinite(detector.with_anomaly(None, digits).score_samples(digits[:3])).all()


@pytest.mark.parametrize("shape", [(1, 9, 13), (3, 16, 16), (2, 8, 11)])
@each_family
def test_any_size_and_number_of_channels(family, shape):
    images = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    detector = small(family, max_iter=2).fit(images)
    assert detector.event_shape_ == shape
    assert np.isfinite(detector.score_samples(images[:2])).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector",
    [*(small(family, max_iter=1) for family in FAMILIES), DiffusionDetector(random_state=0, device="cpu")],
    ids=[*(family.__name__ for family in FAMILIES), "stored"],
)
def test_large_images_are_fitted_and_scored(detector):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 256, 256), dtype=np.uint8)
    detector = clone(detector).fit(images)
    assert detector.event_shape_ == (3, 256, 256)
    scores = detector.score_samples(images[:2])
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()


def test_batches_shrink_with_the_size_of_images():
    detector = FlowDetector()
    for shape, rows in (((3,), 256), ((1, 28, 28), 64), ((3, 64, 64), 64), ((3, 256, 256), 4)):
        detector.event_shape_ = detector_shape = shape
        detector.n_features_in_ = detector_shape[0]
        assert detector._training_options(1000, one_pass=True).batch_size == rows


# What is refused ---------------------------------------------------------------------------------------------


@each_family
def test_other_shapes_are_refused(trained, digits, family):
    detector = trained(family)
    with pytest.raises(ValueError, match=r"images of shape \(1, 10, 8\), but .* fitted on \(1, 8, 8\)"):
        detector.score_samples(np.zeros((2, 1, 10, 8), np.uint8))
    with pytest.raises(ValueError, match=r"fitted on images of shape \(1, 8, 8\).* array of 2 dimensions"):
        detector.score_samples(digits.reshape(80, 64))
    with pytest.raises(ValueError, match="uint8 images, 0 to 255, and X is float64"):
        detector.score_samples(digits / 255)


def test_a_table_is_not_an_image(digits):
    detector = small(FlowDetector).fit(np.random.default_rng(0).normal(size=(50, 3)))
    with pytest.raises(ValueError, match=r"fitted on \(3,\), one row"):
        detector.score_samples(np.zeros((2, 3, 8, 8)))


def test_channels_at_the_end_are_pointed_out():
    with pytest.raises(
        ValueError, match=r"channels-last images, 32 x 32 with 3 channels, put .*ChannelsFirst"
    ):
        FlowDetector().fit(np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"at least 8\.$"):
        FlowDetector().fit(np.zeros((4, 1, 4, 32), np.uint8))
    with pytest.raises(ValueError, match="dim 3"):
        FlowDetector().fit(np.zeros((4, 32, 32), np.uint8))


@pytest.mark.parametrize(("channels", "told"), [(1, "1 channel,"), (3, "3 channels,")])
def test_channels_that_were_moved_from_the_front_are_pointed_out(channels, told):
    pipeline = make_pipeline(ChannelsFirst(), FlowDetector())
    with pytest.raises(
        ValueError, match=rf"channels-first images, 32 x 24 with {told} .*ChannelsFirst\(\), leave it out"
    ):
        pipeline.fit(np.zeros((4, channels, 32, 24), np.uint8))


def test_images_of_different_shapes_are_named(trained, digits):
    images = [digits[0], digits[1], np.zeros((1, 9, 8), np.uint8)]
    for refuse in (
        FlowDetector().fit,
        trained(FlowDetector).score_samples,
        FeatureExtractor(torch.nn.Flatten()).fit,
        ChannelsFirst().fit,
    ):
        with pytest.raises(
            ValueError, match=r"different shapes: \(1, 8, 8\), and \(1, 9, 8\) at position 2\. Resize"
        ):
            refuse(images)
    np.testing.assert_array_equal(
        trained(FlowDetector).score_samples(list(digits[:3])), trained(FlowDetector).score_samples(digits[:3])
    )


def test_missing_pixels_are_named():
    images = np.zeros((5, 1, 8, 8))
    images[3, 0, 2, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in image 3"):
        VAEDetector().fit(images)


def test_binary_images_only_under_bernoulli(digits):
    with pytest.raises(ValueError, match=r"needs zeros and ones, but there is .* in an image"):
        small(VAEDetector, observation="bernoulli").fit(digits)
    binary = (digits > 100).astype(np.uint8)
    detector = small(VAEDetector, observation="bernoulli").fit(binary)
    assert set(np.unique(detector.sample(3, random_state=0))) <= {0, 1}
    assert (detector.score_samples(binary) < 0).all()


# Discrete data ------------------------------------------------------------------------------------------------


def test_one_scale_serves_all_pixels(digits):
    scaler = Standardizer.fit(digits)
    assert scaler.shift.shape == scaler.scale.shape == (1, 1, 1)
    z = scaler.transform(digits)
    assert z.mean() == pytest.approx(0, abs=1e-9)
    assert z.std() == pytest.approx(1, rel=0.2)
    assert scaler.cell == 1
    grain = column_grain(digits, np.arange(80), scaler)
    assert grain.shape == (1, 8, 8)
    np.testing.assert_allclose(grain * scaler.scale, 1 / np.sqrt(12))
    np.testing.assert_allclose(
        column_grain(digits / 255, np.arange(80), Standardizer.fit(digits / 255)) * (scaler.scale / 255),
        15 / 255 / np.sqrt(12),
        rtol=0.3,
    )


def test_no_cell_lies_in_the_compressed_tails():
    images = np.zeros((10, 1, 8, 8), np.uint8)
    images[0, 0, 0, 0] = 255
    scaler = Standardizer.fit(images)
    ends = (np.array([-0.5, 255.5]) - scaler.shift.item()) / scaler.scale.item()
    assert np.abs(ends).max() < 5


def test_dequantised_images_fill_their_cells():
    model = torch.nn.Module()
    x = torch.zeros(20_000, 1, 1, 1)
    assert dequantise(model, x, torch.Generator()) is x
    model.cell = 0.5
    u = dequantise(model, x, torch.Generator().manual_seed(0)).flatten()
    assert float(u.min()) >= -0.25
    assert float(u.max()) <= 0.25
    assert float(u.std()) == pytest.approx(0.5 / np.sqrt(12), rel=0.02)


class TwoNormals(torch.nn.Module):
    """Independent pixels with a density known in closed form, to stand in for a fitted model."""

    def __init__(self, deviation):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.deviation = deviation

    def log_prob(self, x):
        d = self.deviation
        return (-0.5 * (x / d).square() - np.log(d * np.sqrt(2 * np.pi))).flatten(1).sum(1)


def test_a_dequantised_likelihood_bounds_the_probability_of_the_whole_numbers(digits):
    """Against the exact mass of each cell under the same density."""
    from scipy.stats import norm

    from anomalib_gen._scoring import score_in_blocks
    from anomalib_gen.anomaly import Likelihood

    scaler = Standardizer.fit(digits)
    width = 1 / scaler.scale.item()
    for cells_per_deviation, gap in ((2.0, 0.05), (20.0, 1e-3)):
        model = TwoNormals(cells_per_deviation * width)
        model.cell = width
        scores = -score_in_blocks(
            model, Likelihood(), digits, scaler=scaler, seed=0, device=torch.device("cpu")
        )
        z = scaler.transform(digits) / model.deviation
        half = width / 2 / model.deviation
        inside = z.reshape(80, -1)
        # log (F(b) - F(a)), from the side on which it does not cancel.
        a, b = np.abs(inside) - half, np.abs(inside) + half
        exact = logsumexp([norm.logsf(a), norm.logsf(b)], b=np.array([1.0, -1.0])[:, None, None], axis=0).sum(
            1
        )
        mean_gap = (exact - scores).mean() / np.abs(exact).mean()
        assert mean_gap > 0
        assert mean_gap < gap


@pytest.mark.parametrize(
    ("family", "parameters", "slack"),
    [
        (FlowDetector, {}, 2),
        (VAEDetector, {}, 4),
        (VAEDetector, {"observation": "discretised-logistic"}, 4),
    ],
)
def test_a_fitted_likelihood_is_below_the_true_log_probability(family, parameters, slack):
    """Pixels that take each of 256 values alike: log P = -64 log 256, which no bound may exceed on average."""
    images = np.random.default_rng(0).integers(0, 256, (800, 1, 8, 8)).astype(np.uint8)
    truth = -64 * np.log(256)
    detector = small(family, max_iter=60, **parameters).fit(images[:500])
    mean = detector.score_samples(images[500:]).mean()
    # A normal in place of a uniform costs log(sqrt(2 pi e / 12)) a pixel.
    cost = 64 * 0.5 * np.log(2 * np.pi * np.e / 12)
    assert truth - slack * cost < mean < truth


def test_array_rows_of_whole_numbers_stay_small(digits):
    rows = ArrayRows(digits, np.arange(80), Standardizer.fit(digits), torch.device("cpu"))
    assert rows.take(torch.arange(3)).shape == (3, 1, 8, 8)
    assert rows.take(torch.arange(3)).dtype == torch.float32


def test_the_border_keeps_whole_numbers_without_a_copy(trained, digits):
    checked = trained(FlowDetector)._validate(digits, reset=False)
    assert checked.dtype == np.uint8
    assert np.shares_memory(checked, digits)


def test_pixels_share_a_variance_by_default(trained, digits):
    model = trained(VAEDetector).model_
    assert model.observation.log_deviation.shape == (1,)
    own = small(VAEDetector, variance="per-feature").fit(digits)
    assert own.model_.observation.log_deviation.shape == (1, 8, 8)
    table = small(VAEDetector).fit(digits.reshape(80, -1).astype(float))
    assert table.model_.observation.log_deviation.shape == (64,)


@pytest.mark.parametrize("objective", ["denoising", "flow-matching", "improved-ddpm"])
def test_bfloat16_is_exact_enough_for_diffusion_of_images(monkeypatch, objective):
    """As on a CUDA device with units for it: the held-out loss of networks that computed in either precision."""
    images = (load_digits().images[:400, None] * 15).astype(np.uint8)

    def fit():
        return DiffusionDetector(
            denoiser="network",
            objective=objective,
            max_iter=100,
            hidden_features=16,
            random_state=0,
            device="cpu",
        ).fit(images)

    single = fit()
    monkeypatch.setattr("anomalib_gen._runtime.is_fast_in_bfloat16", lambda device: True)
    half = fit()
    assert all(weight.dtype == torch.float32 for weight in half.model_.parameters())
    assert half.validation_curve_ != single.validation_curve_
    fallen = max(single.validation_curve_) - min(single.validation_curve_)
    assert min(half.validation_curve_) == pytest.approx(min(single.validation_curve_), abs=0.05 * fallen)


def test_what_bfloat16_is_too_rough_for_stays_in_single_precision(monkeypatch):
    images = (load_digits().images[:60, None] * 15).astype(np.uint8)
    table = images.reshape(60, -1).astype(float)
    shared = {"max_iter": 3, "hidden_features": 8, "random_state": 0, "device": "cpu"}
    cases = [
        (DiffusionDetector(**shared), table),
        (DiffusionDetector(network="energy", **shared), images),
        (DiffusionDetector(denoiser="hybrid", **shared), images),
        *((cls(**shared), images) for cls in (EnergyDetector, FlowDetector, VAEDetector)),
    ]
    before = [clone(detector).fit(X).loss_curve_ for detector, X in cases]
    monkeypatch.setattr("anomalib_gen._runtime.is_fast_in_bfloat16", lambda device: True)
    assert [detector.fit(X).loss_curve_ for detector, X in cases] == before


@pytest.mark.parametrize(
    ("width", "rate", "expected"), [(64, "auto", 0.003), (512, "auto", 0.00075), (512, 0.01, 0.01)]
)
def test_the_steps_of_wide_autoencoders_are_smaller(digits, width, rate, expected):
    detector = VAEDetector(
        hidden_features=width, learning_rate=rate, max_iter=2, random_state=0, device="cpu"
    ).fit(digits)
    assert detector._training_options(100, one_pass=False).learning_rate == expected


@pytest.mark.parametrize(
    ("family", "n_rows", "expected"),
    [
        (FlowDetector, 10, 200),
        (FlowDetector, 800, 260),
        (FlowDetector, 10_000, 400),
        (FlowDetector, 20_000, 626),
        (FlowDetector, 1_000_000, 10_000),
        (VAEDetector, 10, 200),
        (VAEDetector, 800, 650),
        (VAEDetector, 10_000, 1000),
    ],
)
def test_passes_over_images_are_bounded_in_steps(digits, family, n_rows, expected):
    detector = small(family, max_iter=1).fit(digits).set_params(max_iter="auto")
    assert detector._training_options(n_rows, one_pass=False).max_iter == expected


def test_an_autoencoder_codes_digits_as_principal_components_do():
    images = load_digits().images[:, None].astype(np.uint8)
    train, test = images[:1200], images[1200:]
    detector = VAEDetector(hidden_features=64, random_state=0, device="cpu").fit(train)
    noise = np.random.default_rng(0).uniform(size=images.shape)
    flat = (images + noise).reshape(len(images), -1)
    linear = PCA(detector.n_components_).fit(flat[:1200]).score_samples(flat[1200:]).mean()
    assert detector.elbo(test).mean() > 1.1 * linear  # both are below 0
    # The learned deviation has arrived where the residuals are.
    residual = np.sqrt(np.mean((detector.reconstruct(test) - test) ** 2))
    deviation = float(detector.model_.observation.deviation.detach().mean()) * detector._scaler.scale.mean()
    assert residual / 1.3 < deviation < 1.3 * residual


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, ClosedFormDenoiser),
        ({"anomaly": "closed_form"}, ClosedFormDenoiser),
        ({"anomaly": "score_norm"}, ClosedFormDenoiser),
        ({"objective": None}, ClosedFormDenoiser),
        ({"objective": "flow-matching"}, NetworkDenoiser),
        ({"objective": Denoising(log_mean=-1.0)}, NetworkDenoiser),
        ({"network": "convolutional"}, NetworkDenoiser),
        ({"network": "energy"}, ScoreDenoiser),
        ({"denoiser": "network"}, NetworkDenoiser),
        ({"denoiser": "hybrid"}, HybridDenoiser),
    ],
)
def test_images_are_stored_unless_something_asks_for_a_network(digits, options, model):
    sizes = {} if model is ClosedFormDenoiser else {"max_iter": 1, "hidden_features": 8}
    detector = DiffusionDetector(random_state=0, device="cpu", **sizes, **options)
    assert type(detector.fit(digits[:30]).model_) is model
    assert np.isfinite(detector.score_samples(digits[30:34])).all()


@pytest.mark.slow
def test_persistent_chains_on_images_stay_bounded_and_find_noise():
    """Some hundred steps, with all that keeps energies from growing steep."""
    images = (load_digits().images[:600, None] * 15).astype(np.uint8)
    train, test = images[:500], images[500:]
    detector = EnergyDetector(
        objective=GradientPenalty(PersistentContrastiveDivergence(n_steps=5, buffer_size=256)),
        spectral_norm=3.0,
        max_iter=200,
        n_iter_no_change=100,
        hidden_features=16,
        random_state=0,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of training that diverges
        detector.fit(train)
    assert detector.n_iter_ == 200
    assert np.abs(detector.loss_curve_).max() < 50
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, test.shape, dtype=np.uint8)
    shuffled = random.permuted(test.reshape(100, 64), axis=1).reshape(test.shape)
    of_digits, of_noise, of_shuffled = map(detector.energy, (test, noise, shuffled))
    assert np.ptp(np.concatenate([of_digits, of_noise, of_shuffled])) < 200
    odd = np.repeat([False, True], 100)
    assert roc_auc_score(odd, np.concatenate([of_digits, of_noise])) > 0.95
    assert roc_auc_score(odd, np.concatenate([of_digits, of_shuffled])) > 0.9


def test_sizes_and_training_that_stored_images_do_not_use_are_told(digits):
    shared = {"random_state": 0, "device": "cpu"}
    with pytest.warns(
        UserWarning, match=r"so hidden_features, max_iter are not used\. Set denoiser='network'"
    ):
        DiffusionDetector(max_iter=1, hidden_features=8, **shared).fit(digits[:30])
    with pytest.warns(UserWarning, match="so learning_rate is not used"):
        DiffusionDetector(learning_rate=1e-3, **shared).partial_fit(digits[:30])
    table = digits[:30].reshape(30, 64)[:, 20:24].astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is used, and what was asked for by name.
        DiffusionDetector(contamination=0.1, validation_fraction=0.2, **shared).fit(digits[:30])
        for denoiser in ("closed-form", "network"):
            DiffusionDetector(denoiser=denoiser, max_iter=1, hidden_features=8, **shared).fit(digits[:30])
        DiffusionDetector(max_iter=1, hidden_features=8, **shared).fit(table)


def test_the_default_of_images_draws_restores_and_has_a_density(digits):
    detector = DiffusionDetector(random_state=0, device="cpu").fit(digits)
    drawn = detector.sample(4, n_steps=20, random_state=0)
    assert drawn.shape == (4, 1, 8, 8)
    stored = digits.astype(float)
    near = np.abs(drawn[:, None] - stored).mean(axis=(2, 3, 4)).min(axis=1)
    assert near.max() < 0.6 * np.abs(stored[:, None] - stored).mean()  # in between some that are alike
    changed = digits[:5].copy()
    changed[:, :, :2, :2] = 255
    restored = detector.reconstruct(changed)
    assert np.abs(restored - digits[:5]).mean() < np.abs(changed - digits[:5].astype(float)).mean()
    assert (detector.elbo(changed, n_steps=10) < detector.elbo(digits[:5], n_steps=10)).all()


@pytest.mark.parametrize("name", sorted({**DiffusionDetector._anomalies, **IMAGE_ANOMALIES}))
def test_every_anomaly_works_on_stored_images_as_if_fitted_with_it(digits, name):
    options = {"random_state": 0, "device": "cpu"}
    anomaly = QUICK.get((DiffusionDetector, name), name)
    fitted = DiffusionDetector(anomaly=anomaly, **options).fit(digits[:40])
    assert type(fitted.model_) is ClosedFormDenoiser
    scores = fitted.score_samples(digits[40:44])
    assert np.isfinite(scores).all()
    other = DiffusionDetector(**options).fit(digits[:40]).with_anomaly(anomaly, digits[:40])
    np.testing.assert_array_equal(other.score_samples(digits[40:44]), scores)
    assert other.offset_ == fitted.offset_
