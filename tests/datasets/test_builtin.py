"""The tasks made of scikit-learn's own data."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from anomalib_gen.datasets import list_builtin, load_builtin


@pytest.mark.parametrize(
    ("name", "shape", "n_anomalies"),
    [("breast_cancer", (569, 30), 212), ("digits", (1797, 64), 180), ("wine", (178, 13), 48)],
)
def test_default_tasks(name, shape, n_anomalies):
    bunch = load_builtin(name)
    assert bunch.data.shape == shape
    assert bunch.data.dtype == np.float64
    assert set(bunch.target) == {-1, 1}
    assert (bunch.target == -1).sum() == n_anomalies
    assert (bunch.name, bunch.path) == (name, None)
    assert len(bunch.feature_names) == shape[1]
    assert bunch.DESCR.startswith(f"{name}: normal classes")


def test_list():
    assert list_builtin() == ["breast_cancer", "digits", "wine"]


@pytest.mark.parametrize("normal", [3, "3", [3], np.int64(3), np.array([3])])
def test_one_normal_class(normal):
    X, y = load_builtin("Digits", normal=normal, return_X_y=True)
    np.testing.assert_array_equal(y == 1, load_digits().target == 3)
    np.testing.assert_array_equal(X, load_digits().data)


def test_classes_by_name_or_number():
    by_name = load_builtin("wine", normal=["class_0", "class_2"]).target
    np.testing.assert_array_equal(by_name, load_builtin("wine", normal=[0, 2]).target)


def test_frame():
    bunch = load_builtin("wine", as_frame=True)
    assert bunch.data.columns[0] == bunch.feature_names[0] == "alcohol"
    assert bunch.target.name == "target"


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        (3, "normal contains 3, which is no class of this data set; choose from .*class_0"),
        ("red", "normal contains 'red'"),
        (-1, "normal contains -1"),
        (1.0, "normal contains 1.0, which is no class"),
        ([], "leaves no normal rows"),
        ([0, 1, 2], "leaves no anomalies"),
    ],
)
def test_wrong_normal(normal, message):
    with pytest.raises(ValueError, match=message):
        load_builtin("wine", normal=normal)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name='digit'. Did you mean 'digits'\? list_builtin\(\)"):
        load_builtin("digit")
