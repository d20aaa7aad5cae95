"""The synthetic densities are what they claim: normalised, equal to scipy's, and sampled from."""

import pickle

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from anomalib_gen.datasets import make_anomalies

KINDS = ["local", "global", "dependency", "clustered"]


def mixture_logpdf(density, X):
    pdf = sum(
        weight * stats.multivariate_normal(mean, covariance).pdf(X)
        for weight, mean, covariance in zip(density.weights, density.means, density.covariances, strict=True)
    )
    return np.log(pdf)


def grid(density_bunch, n=500):
    """Midpoints of a grid that covers all the mass of both densities, and the area of a cell."""
    rows = np.vstack([density_bunch.inlier.sample(2000, 1), density_bunch.outlier.sample(2000, 1)])
    low, high = rows.min(axis=0) - 4, rows.max(axis=0) + 4
    axes = [a + (b - a) * (np.arange(n) + 0.5) / n for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2), np.prod((high - low) / n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_densities_integrate_to_one(kind, seed):
    bunch = make_anomalies(kind, random_state=seed)
    points, area = grid(bunch)
    assert np.exp(bunch.log_prob_inlier(points)).sum() * area == pytest.approx(1, abs=1e-3)
    # the edge of a uniform box cuts through cells
    tolerance = 1e-2 if kind == "global" else 1e-3
    assert np.exp(bunch.log_prob_outlier(points)).sum() * area == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("kind", ["local", "clustered"])
def test_mixtures_agree_with_scipy(kind):
    bunch = make_anomalies(kind, n_features=4, random_state=0)
    X = bunch.data[:200]
    np.testing.assert_allclose(bunch.log_prob_inlier(X), mixture_logpdf(bunch.inlier, X), rtol=1e-9)
    np.testing.assert_allclose(bunch.log_prob_outlier(X), mixture_logpdf(bunch.outlier, X), rtol=1e-9)


def test_uniform_agrees_with_scipy():
    bunch = make_anomalies("global", n_features=3, random_state=0)
    low, width = bunch.outlier.low, bunch.outlier.high - bunch.outlier.low
    expected = stats.uniform(low, width).logpdf(bunch.data).sum(axis=1)
    np.testing.assert_allclose(bunch.log_prob_outlier(bunch.data), expected)
    assert bunch.log_prob_outlier([bunch.outlier.high + 1])[0] == -np.inf


def test_independent_density_agrees_with_scipy_and_keeps_the_marginals():
    bunch = make_anomalies("dependency", n_features=3, random_state=0)
    joint = bunch.inlier
    deviations = np.sqrt(np.diagonal(joint.covariances, axis1=1, axis2=2))
    pdf = np.einsum("k,nkj->nj", joint.weights, stats.norm(joint.means, deviations).pdf(bunch.data[:, None]))
    np.testing.assert_allclose(bunch.log_prob_outlier(bunch.data), np.log(pdf).sum(axis=1), rtol=1e-9)
    normal, independent = bunch.inlier.sample(20_000, 1), bunch.outlier.sample(20_000, 2)
    for j in range(3):
        assert stats.ks_2samp(normal[:, j], independent[:, j]).pvalue > 1e-3
    correlation = np.corrcoef(independent.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.05


def test_dependency_of_one_component_is_the_gaussian_with_a_diagonal_covariance():
    bunch = make_anomalies("dependency", n_features=3, n_components=1, random_state=0)
    diagonal = np.diag(np.diag(bunch.inlier.covariances[0]))
    expected = stats.multivariate_normal(bunch.inlier.means[0], diagonal).logpdf(bunch.data)
    np.testing.assert_allclose(bunch.log_prob_outlier(bunch.data), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_density(kind):
    bunch = make_anomalies(kind, random_state=3)
    points, area = grid(bunch)
    for density in (bunch.inlier, bunch.outlier):
        log_prob = density.log_prob(points)
        mass = np.exp(log_prob) * area
        finite = mass > 0
        entropy = -(mass[finite] * log_prob[finite]).sum()
        rows = density.sample(20_000, 5)
        assert -density.log_prob(rows).mean() == pytest.approx(entropy, abs=0.05)
        np.testing.assert_allclose(rows.mean(axis=0), mass @ points, atol=0.15)


def test_local_widens_and_clustered_shifts():
    local = make_anomalies("local", alpha=2.0, random_state=0)
    np.testing.assert_allclose(local.outlier.covariances, 2 * local.inlier.covariances)
    np.testing.assert_array_equal(local.outlier.means, local.inlier.means)
    clustered = make_anomalies("clustered", alpha=3.0, n_features=4, random_state=0)
    shift = clustered.outlier.means - clustered.inlier.means
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape))
    inside = clustered.inlier.weights @ np.diagonal(clustered.inlier.covariances, axis1=1, axis2=2)
    assert np.linalg.norm(shift[0]) == pytest.approx(3 * np.sqrt(inside.mean()))


def test_global_box_covers_the_normals():
    bunch = make_anomalies("global", random_state=0)
    assert np.isfinite(bunch.log_prob_outlier(bunch.inlier.sample(1000, 0))).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_labels_and_determinism(kind):
    bunch = make_anomalies(kind, n_samples=205, n_features=3, contamination=0.2, random_state=7)
    assert bunch.data.shape == (205, 3)
    assert (bunch.target == -1).sum() == 41
    assert set(bunch.target) == {-1, 1}
    assert len(np.unique(bunch.target[:20])) == 2  # shuffled
    assert (bunch.name, bunch.path) == (f"synthetic_{kind}", None)
    again = make_anomalies(kind, n_samples=205, n_features=3, contamination=0.2, random_state=7)
    np.testing.assert_array_equal(bunch.data, again.data)
    other = make_anomalies(kind, n_samples=205, n_features=3, contamination=0.2, random_state=8)
    assert not np.array_equal(bunch.data, other.data)


def test_random_state_objects_advance_and_global_state_is_untouched():
    rng = np.random.RandomState(0)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = make_anomalies(random_state=rng), make_anomalies(random_state=rng)
    assert not np.array_equal(first.data, second.data)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_densities_do_not_move_with_the_number_of_rows():
    few, many = (make_anomalies("global", n_samples=n, random_state=0) for n in (10, 1000))
    np.testing.assert_array_equal(few.outlier.high, many.outlier.high)
    np.testing.assert_array_equal(few.inlier.means, many.inlier.means)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_with_its_densities(kind):
    bunch = make_anomalies(kind, n_samples=50, random_state=0)
    copy = pickle.loads(pickle.dumps(bunch))
    np.testing.assert_array_equal(copy.log_prob_outlier(bunch.data), bunch.log_prob_outlier(bunch.data))
    np.testing.assert_array_equal(copy.optimal_score(bunch.data), bunch.optimal_score(bunch.data))


@pytest.mark.parametrize("kind", KINDS)
def test_optimal_score_is_finite_and_beats_the_density_alone(kind):
    bunch = make_anomalies(kind, n_samples=4000, contamination=0.5, random_state=0)
    score = bunch.optimal_score(bunch.data)
    assert np.isfinite(score).all()
    best = roc_auc_score(bunch.target, score)
    assert 0.7 < best < 1
    assert best >= roc_auc_score(bunch.target, bunch.log_prob_inlier(bunch.data)) - 0.01


def test_optimal_auroc_of_two_shifted_gaussians():
    # AUROC = Phi(delta / sqrt 2) for equal covariances at Mahalanobis distance delta
    bunch = make_anomalies(
        "clustered", n_components=1, alpha=0.8, n_samples=40_000, contamination=0.5, random_state=0
    )
    shift = bunch.outlier.means[0] - bunch.inlier.means[0]
    delta = np.sqrt(shift @ np.linalg.solve(bunch.inlier.covariances[0], shift))
    found = roc_auc_score(bunch.target, bunch.optimal_score(bunch.data))
    assert found == pytest.approx(stats.norm.cdf(delta / np.sqrt(2)), abs=0.01)


def test_frame_pair_and_no_anomalies():
    X, y = make_anomalies(as_frame=True, return_X_y=True, contamination=0, random_state=0)
    assert list(X.columns) == ["x0", "x1"]
    assert (y == 1).all()
    assert make_anomalies(n_features=1, random_state=0).data.shape == (1000, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "odd"}, ValueError, r"kind must be one of \['clustered', .*\], got 'odd'"),
        ({"n_samples": 0}, ValueError, "n_samples == 0, must be >= 1"),
        ({"n_samples": 1.5}, TypeError, "n_samples must be an instance of"),
        ({"n_features": 0}, ValueError, "n_features == 0"),
        ({"n_components": 0}, ValueError, "n_components == 0"),
        ({"contamination": 1.0}, ValueError, "contamination == 1.0, must be < 1"),
        ({"contamination": -0.1}, ValueError, "contamination == -0.1"),
        ({"contamination": np.nan}, ValueError, "contamination == nan, must be"),
        ({"alpha": 1.0}, ValueError, "alpha == 1.0, must be > 1"),
        ({"alpha": np.nan}, ValueError, "alpha == nan, must be finite"),
        ({"kind": "global", "alpha": np.inf}, ValueError, "alpha == inf, must be finite"),
        ({"kind": "global", "alpha": 0}, ValueError, "alpha == 0, must be > 0"),
        (
            {"kind": "dependency", "alpha": 2.0},
            ValueError,
            "alpha has no meaning for kind='dependency', got 2.0",
        ),
        ({"kind": "dependency", "n_features": 1}, ValueError, "n_features must be at least 2"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_anomalies(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_checks_the_number_of_features(kind):
    bunch = make_anomalies(kind, random_state=0)
    for log_prob in (bunch.log_prob_inlier, bunch.log_prob_outlier):
        with pytest.raises(ValueError, match="X has 3 features, but this density has 2"):
            log_prob(np.zeros((4, 3)))
