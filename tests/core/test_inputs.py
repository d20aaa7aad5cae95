"""Tables of every kind give what the same numbers in a plain array give."""

import tracemalloc

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import sparse

from anomalib_gen import _scaling

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def rounded(X):
    """Rows that float32 and float64 hold alike."""
    return X.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def reference(tiny, rounded):
    return tiny().fit(rounded)


ARRAYS = {
    "float64, Fortran order": np.asfortranarray,
    "float32": lambda X: X.astype(np.float32),
    "float32, Fortran order": lambda X: np.asfortranarray(X.astype(np.float32)),
    "float16 of coarse values": lambda X: np.round(X).astype(np.float16),
    "every second row": lambda X: np.repeat(X, 2, axis=0)[::2],
    "every second column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "rows backwards twice": lambda X: X[::-1].copy()[::-1],
    "big endian": lambda X: X.astype(">f8"),
    "a list of lists": lambda X: X.tolist(),
    "a list of tuples": lambda X: [tuple(row) for row in X],
    "objects that are numbers": lambda X: X.astype(object),
    "read-only": lambda X: np.lib.stride_tricks.as_strided(X, writeable=False),
    "integers": lambda X: np.round(X).astype(np.int64),
    "small integers": lambda X: np.round(X).astype(np.int16),
    "booleans": lambda X: X > 0,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_give_the_same_scores(tiny, reference, rounded, kind):
    given = ARRAYS[kind](rounded)
    plain = np.array(given, dtype=np.float64)
    detector = reference if np.array_equal(plain, rounded) else tiny().fit(plain)
    np.testing.assert_allclose(detector.score_samples(given), detector.score_samples(plain), rtol=1e-12)
    refitted = tiny().fit(given)
    np.testing.assert_allclose(refitted.score_samples(given), detector.score_samples(plain), rtol=1e-6)


FRAMES = {
    "pandas": lambda X: pd.DataFrame(X, columns=NAMES),
    "pandas, float32": lambda X: pd.DataFrame(X.astype(np.float32), columns=NAMES),
    "pandas, an index of its own": lambda X: pd.DataFrame(X, columns=NAMES, index=np.arange(len(X))[::-1]),
    "pandas, nullable": lambda X: pd.DataFrame(X, columns=NAMES).convert_dtypes(),
    "pandas, arrow": lambda X: pd.DataFrame(X, columns=NAMES).astype("float64[pyarrow]"),
    "polars": lambda X: pl.DataFrame(X, schema=NAMES),
    "pyarrow": lambda X: pa.table({name: X[:, j] for j, name in enumerate(NAMES)}),
    "pyarrow, chunks": lambda X: pa.concat_tables([FRAMES["pyarrow"](X[:50]), FRAMES["pyarrow"](X[50:])]),
    "pyarrow, decimals": lambda X: FRAMES["pyarrow"](X).cast(
        pa.schema([(n, pa.decimal128(38, 33)) for n in NAMES])
    ),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_give_the_same_scores_and_names(tiny, reference, rounded, kind):
    given = FRAMES[kind](rounded)
    detector = tiny().fit(given)
    assert list(detector.feature_names_in_) == NAMES
    np.testing.assert_allclose(detector.score_samples(given), reference.score_samples(rounded), rtol=1e-6)
    assert detector.predict(given).shape == (200,)


@pytest.mark.parametrize("other", FRAMES)
def test_a_frame_of_one_kind_scores_on_one_of_another(tiny, rounded, other):
    detector = tiny().fit(FRAMES["pandas"](rounded))
    given = FRAMES[other](rounded)
    expected = detector.score_samples(FRAMES["pandas"](rounded))
    np.testing.assert_allclose(detector.score_samples(given), expected, rtol=1e-12)


def test_frames_of_narwhals_are_those_within(tiny, rounded):
    narwhals = pytest.importorskip("narwhals")
    frame = FRAMES["polars"](rounded)
    expected = tiny().fit(frame).score_samples(frame)
    given = narwhals.from_native(frame)
    np.testing.assert_array_equal(tiny().fit(given).score_samples(given), expected)
    dated = given.with_columns(day=narwhals.lit("2020-01-01").str.to_datetime(format="%Y-%m-%d"))
    with pytest.raises(TypeError, match=r"column 'day' \(dates or times\)"):
        tiny().fit(dated)


def test_columns_of_unlike_types_mix(tiny):
    frame = pd.DataFrame(
        {"count": np.arange(50), "flag": np.arange(50) % 2 == 0, "part": np.linspace(0, 1, 50)}
    )
    scores = tiny().fit(frame).score_samples(frame)
    np.testing.assert_allclose(scores, tiny().fit(frame.astype(float)).score_samples(frame), rtol=1e-12)


def test_names_are_asked_for_at_scoring(tiny, X):
    detector = tiny().fit(pd.DataFrame(X, columns=NAMES))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        detector.score_samples(X)
    with pytest.warns(UserWarning, match="X has feature names, but FlowDetector was fitted without"):
        tiny().fit(X).score_samples(pd.DataFrame(X, columns=NAMES))


def test_input_is_left_alone(tiny, X):
    given = X.copy()
    detector = tiny().fit(given)
    detector.score_samples(given)
    np.testing.assert_array_equal(given, X)


def test_sparse_rows_work_once_made_dense(tiny, X):
    scores = tiny().fit(sparse.csr_array(X).toarray()).score_samples(X)
    np.testing.assert_array_equal(scores, tiny().fit(X).score_samples(X))


# Memory-mapped rows ---------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path, X):
    """Make a read-only memory map of rows."""

    def make(rows, order="C"):
        how = {"dtype": rows.dtype, "shape": rows.shape, "order": order}
        file = np.memmap(tmp_path / "rows.bin", mode="w+", **how)
        file[:] = rows
        file.flush()
        del file
        return np.memmap(tmp_path / "rows.bin", mode="r", **how)

    return make


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_memory_mapped_rows_give_the_same_bits(tiny, X, mapped, dtype):
    rows = X.astype(dtype)
    file = mapped(rows)
    detector = tiny().fit(rows)
    np.testing.assert_array_equal(detector.score_samples(file), detector.score_samples(rows))
    np.testing.assert_array_equal(tiny().fit(file).score_samples(rows), detector.score_samples(rows))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_memory_mapped_rows_are_not_copied(fitted, X, mapped, dtype, order):
    file = mapped(X.astype(dtype), order)
    assert np.shares_memory(fitted._validate(file, reset=False), file)
    np.testing.assert_array_equal(fitted.score_samples(file), fitted.score_samples(X.astype(dtype)))
    in_memory = X.astype(dtype)
    assert np.shares_memory(fitted._validate(in_memory, reset=False), in_memory)


def test_rows_that_do_not_fit_train_batch_by_batch(tiny, X, monkeypatch):
    resident = tiny().fit(X)
    monkeypatch.setattr(_scaling, "RESIDENT_BYTES", 0)
    streamed = tiny().fit(X)
    np.testing.assert_array_equal(streamed.score_samples(X), resident.score_samples(X))
    assert streamed.loss_curve_ == resident.loss_curve_


def test_training_from_a_file_needs_a_fraction_of_its_size(tiny, mapped, monkeypatch):
    file = mapped(np.random.default_rng(0).normal(size=(100_000, 40)))  # 32 MB
    monkeypatch.setattr(_scaling, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(_scaling, "BLOCK_BYTES", 2**18)
    detector = tiny(n_layers=1).fit(file[:100])  # what is imported late is not counted
    tracemalloc.start()
    try:
        detector.fit(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Positions and scores of all rows, and blocks.
    assert peak < file.nbytes / 3


@pytest.mark.parametrize("transform", ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"])
@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (2, 1500), (40, 1500), (300, 1)])
def test_shapes_at_both_ends_train_and_score(tiny, transform, rows, columns):
    X = np.random.default_rng(0).normal(size=(rows, columns))
    detector = tiny(transform=transform, n_layers="auto", hidden_features=16, max_iter=2).fit(X)
    scores = detector.score_samples(X)
    assert np.isfinite(scores).all()
    assert detector.decision_function(X).shape == (rows,)
