import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from anomalib_gen.benchmark import PROTOCOLS, SplitError, clean, clean_unsupervised, published


def make_table(n_normal, n_anomaly, n_features=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_normal + n_anomaly, n_features))
    y = np.r_[np.ones(n_normal, int), -np.ones(n_anomaly, int)]
    order = rng.permutation(len(y))
    return X[order], y[order]


def reference():
    data = os.environ.get("ANOMALIB_GEN_DATA")
    path = Path(data or ".").parent / "tools" / "protocol.py"
    if not data or not path.is_file():
        pytest.skip("no reference implementation next to ANOMALIB_GEN_DATA")
    spec = importlib.util.spec_from_file_location("reference_protocol", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 3])
def test_clean_equals_the_reference(seed):
    module = reference()
    for _, path in list(module.datasets().items())[:24]:  # by size; the largest take the reference long
        with np.load(path, allow_pickle=True) as archive:
            X, y = archive["X"], np.where(archive["y"].ravel() == 1, -1, 1)
        X_train, X_test, is_anomaly = module.split(path, seed)
        split = clean(X, y, seed)
        np.testing.assert_array_equal(split.X_train, X_train)
        np.testing.assert_array_equal(split.X_test, X_test)
        np.testing.assert_array_equal(split.y_test == -1, is_anomaly == 1)


@pytest.mark.parametrize("protocol", ["clean", "clean-unsupervised"])
def test_repeated_rows_never_reach_both_sides(protocol):
    X, y = make_table(60, 20)
    split = PROTOCOLS[protocol](np.r_[X, X, X], np.r_[y, y, y], 0)
    rows = np.r_[split.X_train, split.X_test]
    assert len(np.unique(rows, axis=0)) == len(rows) == 80


def test_a_row_with_both_labels_is_kept_with_both():
    X, y = make_table(40, 10)
    X[np.flatnonzero(y == 1)[0]] = X[np.flatnonzero(y == -1)[0]]
    split = clean(X, y, 0)
    assert len(split.X_train) + len(split.X_test) == 50


def test_clean_caps_and_proportions():
    X, y = make_table(12_000, 6_000, n_features=1)
    split = clean(X, y, 0)
    assert len(split.X_train) == 5000
    assert np.sum(split.y_test == 1) == np.sum(split.y_test == -1) == 5000
    X, y = make_table(101, 7)
    split = clean(X, y, 0)
    assert (len(split.X_train), np.sum(split.y_test == 1), np.sum(split.y_test == -1)) == (50, 51, 7)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_standardised_on_the_training_rows(protocol):
    X, y = make_table(2000, 200)
    X = np.c_[3 + 5 * X, np.full(len(X), 7.0)]
    before = X.copy()
    split = PROTOCOLS[protocol](X, y, 1)
    np.testing.assert_allclose(split.X_train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(split.X_train[:, :3].std(0), 1)
    assert np.isfinite(split.X_test).all()
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_seeds_decide(protocol):
    X, y = make_table(300, 60)
    one, two, other = (PROTOCOLS[protocol](X, y, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.X_train, two.X_train)
    assert not np.array_equal(one.X_train, other.X_train)


def test_unsupervised_keeps_contamination_and_ignores_labels():
    X, y = make_table(400, 100)
    split = clean_unsupervised(X, y, 0)
    assert len(split.X_train) == 250
    n_anomalies_in_training = 100 - np.sum(split.y_test == -1)
    assert 25 < n_anomalies_in_training < 75
    # Other labels on the same rows give the same training rows: the split does not look at them.
    swapped = clean_unsupervised(X, -y, 0)
    np.testing.assert_array_equal(split.X_train, swapped.X_train)


def test_no_anomaly_in_the_test_half_is_an_error_with_a_reason():
    X, y = make_table(50, 1)
    outcomes = []
    for seed in range(8):
        try:
            clean_unsupervised(X, y, seed)
        except SplitError as error:
            outcomes.append(str(error))
    assert 0 < len(outcomes) < 8
    assert "no test anomalies" in outcomes[0]


def test_published_small_table_is_drawn_with_replacement_before_the_split():
    X, y = make_table(150, 50)
    split = published(X, y, 0)
    rng = np.random.RandomState(0)
    rows = rng.choice(200, 1000, replace=True)
    normal = rows[y[rows] == 1]
    assert len(split.X_train) == round(len(normal) / 2)
    assert len(split.X_train) + len(split.X_test) == 1000
    mean, deviation = X[normal[: len(split.X_train)]].mean(0), X[normal[: len(split.X_train)]].std(0)
    np.testing.assert_allclose(split.X_train[0], (X[normal[0]] - mean) / deviation)


def test_published_takes_the_first_half_of_the_normals_in_file_order():
    X, y = make_table(1000, 100)
    split = published(X, y, 0)
    normal = X[y == 1]
    mean, deviation = normal[:500].mean(0), normal[:500].std(0)
    np.testing.assert_allclose(split.X_train, (normal[:500] - mean) / deviation)
    np.testing.assert_allclose(split.X_test[split.y_test == 1], (normal[500:] - mean) / deviation)
    assert np.sum(split.y_test == -1) == 100


def test_published_large_table_is_drawn_down():
    X, y = make_table(52_000, 3_000, n_features=1)
    split = published(X, y, 0)
    assert len(split.X_train) + len(split.X_test) == 50_000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_of_another_convention_are_refused(protocol):
    X, y = make_table(30, 10)
    with pytest.raises(ValueError, match=r"numpy.where\(y == 1, -1, 1\)"):
        PROTOCOLS[protocol](X, (y == -1).astype(int), 0)
