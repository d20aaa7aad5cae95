"""Scores are finite for every finite row, however far out, and fall on the way there."""

import numpy as np
import pytest

from anomalib_gen import DiffusionDetector, EnergyDetector, VAEDetector

TRANSFORMS = ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"]
OBSERVATIONS = ["gaussian", "student-t", "discretised-logistic"]
FAMILIES = [*TRANSFORMS, *OBSERVATIONS]
POWERS = np.array([2, 3, 6, 10, 30, 100, 200, 300, 308])


def directions(n_features):
    """Both signs of every axis, diagonals, and directions at random, each with a largest coordinate of one."""
    rng = np.random.default_rng(0)
    axes = np.concatenate([np.eye(n_features), -np.eye(n_features)])
    diagonals = np.sign(rng.normal(size=(8, n_features)))
    anywhere = rng.normal(size=(12, n_features))
    anywhere /= np.abs(anywhere).max(axis=1, keepdims=True)
    return np.concatenate([axes, diagonals, np.ones((1, n_features)), anywhere])


@pytest.fixture
def make(tiny):
    """Factory of small detectors of any family, by what tells its members apart."""

    def make(member, **parameters):
        if member in TRANSFORMS:
            return tiny(transform=member, **parameters)
        settings = {"hidden_features": 8, "max_iter": 20, "random_state": 0, "device": "cpu"}
        return VAEDetector(observation=member, **{**settings, **parameters})

    return make


@pytest.fixture(scope="module", params=[1, 2, 6])
def rows(request):
    n_features = request.param
    rng = np.random.default_rng(n_features)
    return rng.normal(size=(200, n_features)) @ (np.eye(n_features) + np.tri(n_features) / 2)


@pytest.mark.parametrize("member", FAMILIES)
def test_scores_fall_along_every_ray_to_the_end_of_the_range(make, rows, member):
    detector = make(member, max_iter=60).fit(rows)
    worst = detector.score_samples(rows).min()
    for direction in directions(rows.shape[1]):
        scores = detector.score_samples(10.0 ** POWERS[:, None] * direction)
        assert np.isfinite(scores).all(), direction
        assert (np.diff(scores) < 0).all(), (direction, scores)
        assert scores[0] < worst, (direction, scores[0], worst)
        assert (detector.predict(10.0 ** POWERS[:, None] * direction) == -1).all()


@pytest.mark.parametrize("member", FAMILIES)
def test_the_largest_numbers_are_scored(make, rows, member):
    largest = np.finfo(np.float64).max
    detector = make(member).fit(rows)
    ends = np.array([[largest], [-largest]]) * np.ones(rows.shape[1])
    scores = detector.score_samples(ends)
    assert np.isfinite(scores).all()
    assert (scores < detector.score_samples(rows).min()).all()
    assert np.isfinite(
        detector.score_samples(np.full((1, rows.shape[1]), np.finfo(np.float32).max, np.float32))
    )
    tiniest = np.full((1, rows.shape[1]), 5e-324)
    np.testing.assert_allclose(detector.score_samples(tiniest), detector.score_samples(0 * tiniest))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("member", ["realnvp", *OBSERVATIONS])
def test_the_units_of_the_columns_do_not_matter(make, rows, member, scale):
    expected = make(member).fit(rows).score_samples(rows) - rows.shape[1] * np.log(scale)
    scaled = make(member).fit(scale * rows)
    np.testing.assert_allclose(scaled.score_samples(scale * rows), expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(scaled.sample(5, random_state=0)).all()


@pytest.mark.parametrize("member", FAMILIES)
@pytest.mark.parametrize("value", [1e30, -1e200, 1e308])
def test_an_extreme_value_among_the_training_rows(make, rows, member, value):
    spoilt = rows.copy()
    spoilt[17, 0] = value
    # An autoencoder's first steps are spent on the scale of all other rows.
    detector = make(member, max_iter=20 if member in TRANSFORMS else 200).fit(spoilt)
    scores = detector.score_samples(spoilt)
    assert np.isfinite(scores).all()
    # To a likelihood of cells the column is a flag that is up in one row of 200, which costs log 200 nats and no more.
    below = (scores < scores[17]).sum()
    assert below <= (5 if member == "discretised-logistic" else 0)
    assert np.isfinite(detector.sample(10, random_state=0)).all()
    assert np.isfinite(detector.loss_curve_).all()


@pytest.mark.parametrize("member", ["realnvp", *OBSERVATIONS])
def test_columns_over_the_whole_range(make, member):
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, size=(100, 2)) * np.finfo(np.float64).max
    detector = make(member).fit(rows)
    assert np.isfinite(detector.score_samples(rows)).all()
    assert np.isfinite(detector.offset_)


@pytest.mark.parametrize("member", ["realnvp", *OBSERVATIONS])
def test_values_next_to_zero_keep_their_shape(make, rows, member):
    # Subnormal numbers have too few digits for more than a finite answer.
    assert np.isfinite(make(member).fit(1e-320 * rows).score_samples(1e-320 * rows)).all()


@pytest.mark.parametrize("member", FAMILIES)
def test_saturation_in_float32_is_finite_too(make, rows, member, monkeypatch):
    import torch

    monkeypatch.setattr("anomalib_gen._runtime.scoring_dtype", lambda device: torch.float32)
    monkeypatch.setattr("anomalib_gen._runtime.scoring_block_rows", lambda size, device: 64)
    detector = make(member).fit(rows)
    for direction in directions(rows.shape[1])[:6]:
        scores = detector.score_samples(10.0 ** POWERS[:, None] * direction)
        assert np.isfinite(scores).all()
        # Beyond 3.4e38 standard deviations all rows are alike but for the last digit, which may depend on the place of
        # a row in its block.
        assert (np.diff(scores) <= 1e-6 * np.abs(scores[:-1])).all()


# Energies -------------------------------------------------------------------------------------------------

ENERGIES = [
    {},
    {"max_noise": None},
    {"anomaly": "score_norm"},
    {"anomaly": "score_norm", "max_noise": None},
    {"objective": "score-matching", "network": "mlp", "max_noise": None},
    {"objective": "contrastive-divergence"},
    {"objective": "noise-contrastive"},
    {"objective": "telescoping"},
]


def make_energy(**parameters):
    settings = {
        "anomaly": "energy",
        "hidden_features": 16,
        "max_iter": 60,
        "contamination": 0.1,
        "random_state": 0,
        "device": "cpu",
    }
    return EnergyDetector(**{**settings, **parameters})


@pytest.mark.parametrize("parameters", ENERGIES, ids=str)
def test_energies_rise_along_every_ray_to_the_end_of_the_range(rows, parameters):
    detector = make_energy(**parameters).fit(rows)
    worst = detector.score_samples(rows).min()
    powers = np.append(10.0**POWERS, np.finfo(np.float64).max)
    for direction in directions(rows.shape[1]):
        scores = detector.score_samples(powers[:, None] * direction)
        assert np.isfinite(scores).all(), direction
        assert (np.diff(scores) < 0).all(), (direction, scores)
        assert scores[0] < worst, (direction, scores[0], worst)


@pytest.mark.parametrize("value", [1e30, 1e308])
def test_an_extreme_value_among_the_training_rows_of_an_energy(rows, value):
    spoilt = rows.copy()
    spoilt[17, 0] = value
    detector = make_energy().fit(spoilt)
    scores = detector.score_samples(spoilt)
    assert np.isfinite(scores).all()
    assert scores.argmin() == 17
    assert np.isfinite(detector.loss_curve_).all()


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_units_of_the_columns_do_not_matter_to_an_energy(rows, scale):
    expected = make_energy().fit(rows).energy(rows) + rows.shape[1] * np.log(scale)
    np.testing.assert_allclose(
        make_energy().fit(scale * rows).energy(scale * rows), expected, rtol=1e-4, atol=1e-4
    )


# Diffusion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anomaly", list(DiffusionDetector._anomalies))
def test_anomalies_of_diffusion_rise_along_every_ray_to_the_end_of_the_range(rows, anomaly):
    settings = {"hidden_features": 16, "max_iter": 60, "contamination": 0.1, "random_state": 0}
    detector = DiffusionDetector(anomaly=anomaly, device="cpu", **settings).fit(rows)
    worst = detector.score_samples(rows).min()
    powers = np.append(10.0**POWERS, np.finfo(np.float64).max)
    rays = directions(rows.shape[1])[:4]
    far = (powers[:, None] * np.array(rays)[:, None]).reshape(-1, rows.shape[1])
    scores = detector.score_samples(far).reshape(len(rays), -1)
    assert np.isfinite(scores).all()
    assert (np.diff(scores, axis=1) < 0).all()
    assert (scores[:, 1] < worst).all()
