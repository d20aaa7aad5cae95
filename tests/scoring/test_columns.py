"""Columns of files as a model takes them."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from anomalib_gen.scoring._columns import kind_of, to_frame


def one(values, kind, arrow=None):
    frame, bad = to_frame(pa.table({"x": pa.array(values, arrow)}), ["x"], (kind,))
    return frame["x"], bad


def test_text_becomes_numbers_where_it_is_one():
    good = ["1", "+1.5", "-2.", ".5", " 3 ", "1e3", "1E-3", "+.5e+2", "inf", "-inf", "NaN", None]
    column, bad = one(good, "float")
    assert bad == {}
    expected = [1, 1.5, -2, 0.5, 3, 1000, 0.001, 50, np.inf, -np.inf, np.nan, np.nan]
    np.testing.assert_array_equal(column, expected)
    for text in ("one", "1,5", "0x10", "1_000", "--1", "1e", "", "e5", "1 2", "١"):
        column, bad = one(["1", text], "float")
        assert bad == {1: f"column 'x': {text!r} is no number"}
        assert np.isnan(column[1])


@pytest.mark.parametrize("kind", ["integer", None])
def test_whole_numbers_stay_whole_where_the_model_has_seen_them(kind):
    column, _ = one(["1", "2"], kind)
    assert column.dtype == (np.int64 if kind else np.float64)
    assert one(["1", "2.5"], kind)[0].dtype == np.float64
    assert one(["1", None], kind)[0].dtype == np.float64


def test_flags():
    for values in (["true", "False", "1", "0"], [True, False, True, False], [1, 0, 1, 0]):
        column, bad = one(values, "boolean")
        assert bad == {}
        assert column.tolist() == [True, False, True, False]
        assert column.dtype == bool
    assert one(["true", "perhaps"], "boolean")[1] == {1: "column 'x': 'perhaps' is no number"}


def test_text_and_times():
    column, bad = one(["a", None], "text")
    assert bad == {}
    assert column[0] == "a"
    assert pd.isna(column[1])
    column, bad = one(["2024-01-31", "soon", None], "time")
    assert bad == {1: "column 'x': 'soon' is no time"}
    assert column[0] == pd.Timestamp("2024-01-31")


def test_a_model_that_does_not_say_takes_numbers_where_they_can_be():
    assert one(["1", "two"], None)[1] == {1: "column 'x': 'two' is no number"}
    column, bad = one(["one", "two"], None)
    assert bad == {}
    assert column.tolist() == ["one", "two"]


@pytest.mark.parametrize(
    ("arrow", "kind"),
    [
        (pa.float32(), "float"),
        (pa.decimal128(5, 2), "float"),
        (pa.null(), "float"),
        (pa.uint8(), "integer"),
        (pa.bool_(), "boolean"),
        (pa.large_string(), "text"),
        (pa.dictionary(pa.int8(), pa.string()), "text"),
        (pa.date32(), "time"),
        (pa.timestamp("ns", "UTC"), "time"),
        (pa.list_(pa.int8()), None),
        (pa.binary(), None),
    ],
    ids=str,
)
def test_kinds(arrow, kind):
    assert kind_of(arrow) == kind
    if kind in ("float", "integer"):
        column, bad = one([1, None] if arrow != pa.null() else [None, None], kind, arrow)
        assert bad == {}
        assert np.isnan(column[1])
