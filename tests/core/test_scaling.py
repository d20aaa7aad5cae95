"""Standardising agrees with numpy where numpy is right, and holds where it is not; rows are the same wherever kept."""

import numpy as np
import pytest
import torch

from anomalib_gen import _scaling
from anomalib_gen._scaling import ArrayRows, Standardizer, TailedStandardizer, column_grain

CPU = torch.device("cpu")


def table(n=500, dtype=np.float64):
    rng = np.random.default_rng(0)
    return (rng.gamma(2.0, size=(n, 4)) * [1, 1e-3, 50, 1e4] + [0, 5, -300, 1e5]).astype(dtype)


def assert_standardises(scaler, X, weights=None, rtol=1e-10):
    """Compare with numpy's mean and standard deviation."""
    X = np.asarray(X, dtype=np.float64)
    mean = np.average(X, axis=0, weights=weights)
    deviation = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(scaler.shift, mean, rtol=rtol)
    np.testing.assert_allclose(scaler.scale, deviation, rtol=rtol)
    np.testing.assert_allclose(scaler.log_det, -np.log(deviation).sum(), rtol=rtol)


def as_memory_map(X, folder):
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode="r")


@pytest.fixture(params=[2**24, 4 * 8 * 7], ids=["one-block", "many-blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(_scaling, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize("layout", ["C", "F", "memory-map", "strided"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_mean_and_deviation_are_those_of_numpy(dtype, layout, tmp_path, blocks):
    X = table(dtype=dtype)
    if layout == "memory-map":
        X = as_memory_map(X, tmp_path)
    elif layout == "strided":
        X = np.repeat(X, 2, axis=0)[::2]
    else:
        X = np.asarray(X, order=layout)
    scaler = Standardizer.fit(X)
    assert scaler.shift.dtype == scaler.scale.dtype == np.float64
    assert_standardises(scaler, X)


def test_weights_and_a_choice_of_rows(blocks):
    X, rng = table(), np.random.default_rng(1)
    rows = np.sort(rng.choice(len(X), 200, replace=False))
    weights = rng.uniform(size=200)
    assert_standardises(Standardizer.fit(X, rows), X[rows])
    assert_standardises(Standardizer.fit(X, rows, weights), X[rows], weights)
    assert_standardises(Standardizer.fit(X[rows], weights=weights), X[rows], weights)
    counts = rng.integers(1, 4, size=len(X))
    repeated = Standardizer.fit(np.repeat(X, counts, axis=0))
    weighted = Standardizer.fit(X, weights=counts.astype(float))
    np.testing.assert_allclose(weighted.scale, repeated.scale, rtol=1e-12)


def test_a_large_offset_costs_no_digits():
    small = 1e-3 * np.random.default_rng(0).uniform(-1, 1, size=(1000, 1))
    X = 1e9 + small
    stored = X - 1e9  # exact, unlike X
    scaler = Standardizer.fit(X)
    np.testing.assert_allclose(scaler.scale, stored.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(scaler.shift - 1e9, stored.mean(axis=0), atol=1e-6)
    Z = scaler.transform(X)
    assert abs(Z.mean()) < 1e-3
    np.testing.assert_allclose(Z.std(), 1, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e9, 1e300, 1e-300])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_constant_column_has_scale_one(value, dtype):
    if dtype is np.float32 and abs(value) > 1e38:
        value = 1e38
    X = np.full((37, 2), value, dtype=dtype)
    X[:, 1] = np.arange(37)
    scaler = Standardizer.fit(X)
    assert scaler.scale[0] == 1
    assert scaler.shift[0] == X[0, 0]
    assert (scaler.transform(X)[:, 0] == 0).all()
    # One step from the constant is one unit away, not 1e8 of them.
    assert scaler.log_det == pytest.approx(-np.log(X[:, 1].std()))


def test_rounding_errors_about_a_constant_are_no_variation():
    X = np.full((50, 1), 0.3)
    X[::2] = 0.1 + 0.2
    assert X.std() > 0
    assert Standardizer.fit(X).scale[0] == 1


@pytest.mark.parametrize("size", [1e300, 1e-300, 7e307])
def test_values_at_the_ends_of_the_range(size):
    unit = np.random.default_rng(0).uniform(-1, 1, size=(300, 2))
    with np.errstate(all="raise", under="ignore"):
        scaler = Standardizer.fit(unit * size)
        Z = scaler.transform(unit * size)
    np.testing.assert_allclose(scaler.scale / size, unit.std(axis=0), rtol=1e-10)
    np.testing.assert_allclose(Z, (unit - unit.mean(axis=0)) / unit.std(axis=0), rtol=1e-9, atol=1e-12)
    assert np.isfinite(scaler.log_det)


def test_what_is_too_far_saturates():
    scaler = Standardizer.fit(1e-200 * np.random.default_rng(0).normal(size=(50, 1)))
    limit = np.finfo(np.float64).max
    assert scaler.transform(np.array([[1e300], [-1e300]])).tolist() == [[limit], [-limit]]


def test_inverse(blocks):
    X = table()
    scaler = Standardizer.fit(X)
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(X)), X, rtol=1e-13)
    Z = np.random.default_rng(0).normal(size=(20, 4))
    np.testing.assert_allclose(scaler.transform(scaler.inverse_transform(Z)), Z, atol=1e-7)


def test_log_det_is_what_a_density_changes_by():
    """log p_X(x) = log p_Z(z) + log_det: for a Gaussian, both sides are known."""
    from scipy import stats

    X = table()
    scaler = Standardizer.fit(X)
    expected = stats.norm(X.mean(axis=0), X.std(axis=0)).logpdf(X).sum(axis=1)
    actual = stats.norm.logpdf(scaler.transform(X)).sum(axis=1) + scaler.log_det
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    jacobian = (scaler.transform(X[:1] + np.diag([1, 1e-3, 10, 1e3])) - scaler.transform(X[:1])) / [
        [1],
        [1e-3],
        [10],
        [1e3],
    ]
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], scaler.log_det, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_images_have_one_scale(dtype, blocks):
    rng = np.random.default_rng(0)
    X = (rng.gamma(2.0, size=(40, 3, 5, 4)) * np.array([1, 10, 100]).reshape(-1, 1, 1)).astype(dtype)
    weights = rng.uniform(size=40)
    scaler = Standardizer.fit(X)
    assert scaler.shift.shape == scaler.scale.shape == (1, 1, 1)
    np.testing.assert_allclose(scaler.shift.item(), X.mean(dtype=np.float64), rtol=1e-10)
    np.testing.assert_allclose(scaler.scale.item(), X.astype(np.float64).std(), rtol=1e-10)
    assert scaler.log_det == pytest.approx(-60 * np.log(X.astype(np.float64).std()))
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(X)), X, rtol=1e-6, atol=1e-12)
    weighted = Standardizer.fit(X, weights=weights)
    assert weighted.shift.item() == pytest.approx(np.average(X.reshape(40, -1).mean(axis=1), weights=weights))


# The grid of a column -------------------------------------------------------------------------------------


def test_grain_is_the_deviation_of_a_uniform_over_a_cell():
    rng = np.random.default_rng(0)
    X = np.stack(
        [3.0 * rng.integers(0, 9, 400), rng.integers(0, 2, 400), rng.normal(size=400), np.ones(400)], 1
    )
    scaler = Standardizer.fit(X)
    grain = column_grain(X, np.arange(400), scaler) * scaler.scale
    np.testing.assert_allclose(grain[:2], np.array([3, 1]) / np.sqrt(12))
    assert grain[2] < 0.01
    assert grain[3] == 0


# Rows as tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(3,), (2, 4, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_resident_and_streamed_rows_are_the_same(event_shape, dtype, monkeypatch, tmp_path, blocks):
    rng = np.random.default_rng(0)
    X = as_memory_map(rng.normal(3, 2, size=(100, *event_shape)).astype(dtype), tmp_path)
    index = rng.permutation(100)[:70]
    scaler = Standardizer.fit(X, index)
    resident = ArrayRows(X, index, scaler, CPU)
    monkeypatch.setattr(_scaling, "RESIDENT_BYTES", 0)
    streamed = ArrayRows(X, index, scaler, CPU)
    assert resident._resident is not None
    assert streamed._resident is None
    expected = torch.from_numpy(scaler.transform(X[index]).astype(np.float32))
    chosen = torch.tensor([69, 0, 3, 3, 12])
    for rows in (resident, streamed):
        assert len(rows) == 70
        assert torch.equal(rows.take(chosen), expected[chosen])
        assert rows.take(chosen).dtype == torch.float32
        for size in (1, 32, 70, 1000):
            blocks_of_rows = list(rows.blocks(size))
            assert [len(block) for block in blocks_of_rows][:-1] == [size] * (len(blocks_of_rows) - 1)
            assert torch.equal(torch.cat(blocks_of_rows), expected)


@pytest.mark.parametrize("resident_bytes", [0, 2**30])
def test_rows_beyond_single_precision_saturate(resident_bytes, monkeypatch):
    monkeypatch.setattr(_scaling, "RESIDENT_BYTES", resident_bytes)
    X = np.array([[1e300], [-1e300], [0.5]])
    scaler = Standardizer(shift=np.zeros(1), scale=np.ones(1), log_det=0.0)
    rows = ArrayRows(X, np.arange(3), scaler, CPU)
    limit = torch.finfo(torch.float32).max
    assert rows.take(torch.arange(3)).flatten().tolist() == [limit, -limit, 0.5]


# Compressed tails -----------------------------------------------------------------------------------------


def test_compressed_tails_leave_the_bulk_alone_and_bound_the_rest():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 3)) * [1.0, 30.0, 1e-3] + [0.0, 1e3, 5.0]
    plain, tailed = Standardizer.fit(X), TailedStandardizer.fit(X)
    np.testing.assert_array_equal(tailed.transform(X), plain.transform(X))
    np.testing.assert_array_equal(tailed.transform_with_log_dets(X)[1], np.full(500, plain.log_det))
    far = np.array([1e2, 1e8, 1e30, 1e300, np.finfo(float).max])[:, None] * [1.0, -1.0, 1.0]
    z = tailed.transform(far)
    assert (np.diff(np.abs(z), axis=0) >= 0).all()
    assert (np.abs(z) < 720).all()
    np.testing.assert_allclose(tailed.inverse_transform(z[:4]), far[:4], rtol=1e-9)
    assert np.isfinite(tailed.inverse_transform(z)).all()


def test_the_jacobian_of_compressed_tails_is_that_of_autograd():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 2)) * [2.0, 0.1]
    tailed = TailedStandardizer.fit(X)
    x = torch.tensor([[0.0, 0.0], [40.0, 0.1], [-40.0, 9.0]], dtype=torch.float64, requires_grad=True)
    z, log_det = tailed.transform_tensor(x)
    (slopes,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_det.detach(), slopes.log().sum(1))
    found, log_dets = tailed.transform_with_log_dets(x.detach().numpy())
    np.testing.assert_allclose(found, z.detach().numpy())
    np.testing.assert_allclose(log_dets, log_det.detach().numpy())
