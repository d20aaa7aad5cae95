"""What is kept of training rows, and where."""

import json

import numpy as np
import pandas as pd
import pytest

from anomalib_gen import VAEDetector, load, persistence
from anomalib_gen.monitoring import (
    Batch,
    Column,
    Distribution,
    Reference,
    Summariser,
    build_reference,
    compare,
    load_reference,
    reference_of,
    summaries,
)
from anomalib_gen.persistence import ModelFolderError


def make_frame(n, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "x": rng.normal(size=n),
            "n": rng.integers(0, 9, n),
            "flag": rng.random(n) < 0.3,
            "kind": rng.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2]),
        }
    )
    frame.loc[frame.index % 10 == 3, "x"] = np.nan
    frame.loc[frame.index % 20 == 7, "kind"] = None
    return frame


def summary(frame, size=None, **options):
    made = Summariser(**options)
    for start in range(0, len(frame), size or len(frame)):
        made.add(frame[start : start + (size or len(frame))])
    return made.columns()


# Summaries -------------------------------------------------------------------------------------------------


def test_columns_are_what_numpy_says():
    frame = make_frame(500)
    x, n, flag, kind = summary(frame)
    assert [c.kind for c in (x, n, flag, kind)] == ["number", "number", "number", "category"]
    assert (x.n_rows, x.n_missing, x.missing_rate) == (500, 50, 0.1)
    np.testing.assert_array_equal(x.distribution.sample(), np.sort(frame["x"].dropna()))
    assert n.distribution.counts.tolist() == np.bincount(frame["n"]).tolist()
    assert flag.distribution.values.tolist() == [0, 1]
    assert dict(kind.categories) == frame["kind"].value_counts().to_dict()
    assert list(kind.categories) == ["a", "b", "c"]
    assert kind.n_missing == 25


@pytest.mark.parametrize("size", [7, 100, 499])
def test_summaries_do_not_depend_on_how_rows_come(size, monkeypatch):
    monkeypatch.setattr(summaries, "MIN_SAMPLED_ROWS", 50)
    monkeypatch.setattr(summaries, "MAX_SAMPLED_ROWS", 50)
    frame = make_frame(500)
    for like in (None, summary(frame)):
        for one, other in zip(summary(frame, like=like), summary(frame, size, like=like), strict=True):
            assert one.to_dict() == other.to_dict()


def test_every_row_has_the_same_chance_to_be_drawn():
    rows = pd.DataFrame({"k": np.arange(3000.0)})
    hits = summary(rows, 100, max_rows=600)[0].distribution.sample()
    assert len(hits) == 600
    # Of a tenth of the rows, a tenth of the sample: hypergeometric, with standard deviation 6.6.
    assert np.abs(np.histogram(hits, 10, (0, 3000))[0] - 60).max() < 30


def test_memory_is_that_of_a_sample():
    made = Summariser()
    for seed in range(4):
        made.add(pd.DataFrame(np.random.default_rng(seed).normal(size=(15_000, 3)), columns=["a", "b", "c"]))
    assert made._sample.rows.shape == (20_000, 3)
    column = made.columns()[0]
    assert column.n_rows == 60_000
    assert len(column.distribution.values) == 1024


def test_a_batch_is_counted_by_the_categories_of_the_reference():
    reference = summary(make_frame(100))
    batch = pd.DataFrame({"kind": ["a", "z", None, "y", "z"], "flag": True, "n": 1, "x": np.inf, "more": 0})
    found = {column.name: column for column in summary(batch, like=reference)}
    assert list(found) == ["x", "n", "flag", "kind"]
    assert dict(found["kind"].categories) == {"a": 1}
    assert (found["kind"].n_other, found["kind"].n_missing, found["kind"].unseen) == (3, 1, ("z", "y"))
    assert (found["x"].n_missing, found["x"].distribution.n) == (5, 0)
    with pytest.raises(ValueError, match="no column 'flag'"):
        summary(batch.drop(columns="flag"), like=reference)
    assert [column.n_rows for column in Summariser(reference).columns()] == [0, 0, 0, 0]


def test_many_categories_are_counted_together(monkeypatch):
    monkeypatch.setattr(summaries, "MAX_CATEGORIES", 3)
    monkeypatch.setattr(summaries, "MAX_TRACKED", 5)
    frame = pd.DataFrame({"k": [*"aaabbcdefgaa", "x" * 1000]})
    (column,) = summary(frame)
    assert dict(column.categories) == {"a": 5, "b": 2, "c": 1}
    assert column.n_other == 5
    assert column.n_rows == 13
    assert max(map(len, column.categories)) <= summaries.MAX_NAME


def test_numbers_that_come_as_objects_and_times():
    frame = pd.DataFrame(
        {
            "gaps": pd.Series([1, None, 3], dtype="Int64"),
            "flags": pd.Series([True, None, False], dtype=object),
            "when": pd.to_datetime(["2020-01-01"] * 3),
        }
    )
    gaps, flags = summary(frame)
    assert gaps.distribution.values.tolist() == [1, 3]
    assert flags.distribution.values.tolist() == [0, 1]
    assert (gaps.n_missing, flags.n_missing) == (1, 1)


# References ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_rows_kept_from_training(tiny):
    X = np.random.default_rng(0).normal(size=(400, 3))
    detector = tiny().fit(X)
    reference = build_reference(detector, X)
    held_out = detector._split(400, np.random.RandomState(detector._seeds[0]))[1]
    assert reference.held_out
    assert reference.n_scored == len(held_out) == 40
    np.testing.assert_array_equal(reference.scores.sample(), np.sort(detector.score_samples(X[held_out])))
    assert reference.n_flagged == (detector.score_samples(X[held_out]) < detector.offset_).sum()
    assert reference.threshold == detector.offset_
    assert [column.name for column in reference.columns] == ["0", "1", "2"]
    few = build_reference(tiny(validation_fraction=0.0).fit(X), X)
    assert not few.held_out
    assert few.n_scored == 400
    assert few.flagged_rate == pytest.approx(0.1, abs=0.01)


def test_a_reference_comes_back_as_it_was():
    columns = summary(make_frame(3000))
    reference = reference_of(columns, np.r_[-np.inf, np.arange(9999.0)], threshold=500, held_out=True)
    assert reference.scores.n == 4096
    assert (reference.n_scored, reference.n_flagged, reference.n_rows) == (10_000, 501, 3000)
    data = reference.to_bytes()
    again = Reference.from_bytes(data)
    assert again.to_bytes() == data
    assert again.column("kind") == reference.column("kind")
    with pytest.raises(KeyError):
        again.column("none")
    json.loads(data, parse_constant=pytest.fail)
    assert reference_of(columns, [1.0], threshold=-np.inf, held_out=True).threshold is None


def test_a_reference_of_many_columns_stays_small():
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 1500))).rename(columns=str)
    reference = reference_of(summary(frame), [0.0], threshold=0, held_out=True)
    assert len(reference.to_bytes()) < 8_000_000
    assert reference.columns[0].distribution.resolution < 0.005


def test_malformed_references_are_refused():
    good = json.loads(
        reference_of(summary(make_frame(30)), [1.0, 2.0], threshold=0, held_out=True).to_bytes()
    )
    changes = (
        {"format": "other"},
        {"version": 2},
        {"rows": -1},
        {"rows": True},
        {"flagged": 3},
        {"held_out": 1},
        {"threshold": "low"},
        {"columns": [1]},
        {"columns": [{**good["columns"][0], "kind": "other"}]},
        {"columns": [{**good["columns"][0], "missing": 31}]},
        {"columns": [{**good["columns"][3], "categories": {"a": -1}}]},
        {"scores": None},
    )
    for change in changes:
        with pytest.raises(ValueError, match="training reference cannot be read"):
            Reference.from_bytes(json.dumps(good | change).encode())
    for data in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="training reference cannot be read"):
            Reference.from_bytes(data)
    assert Column.from_dict(good["columns"][0]).name == "x"


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, part):
    if not path:
        return part
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], part)
    return copy


@pytest.mark.parametrize("part", ["null", "-1", "1.5", '"x"', "[]", "{}", "true", "1e400", "9" * 400, "NaN"])
def test_any_reference_is_read_or_refused(part):
    """Every part of a reference in turn is something else; what is read can be compared with."""
    frame = make_frame(12)
    good = json.loads(reference_of(summary(frame), [1.0, 2.0], threshold=0, held_out=True).to_bytes())
    assert Reference.from_bytes(json.dumps(good).encode()).n_rows == 12
    for path in places(good):
        data = json.dumps(put(good, path, "@")).replace('"@"', part).encode()
        try:
            reference = Reference.from_bytes(data)
        except ValueError:
            continue
        batch = Batch(5, 1, Distribution.of([1.0, 2.0]), summary(frame, like=good_columns(reference, frame)))
        json.dumps(compare(reference, batch).to_dict(), allow_nan=False)


def good_columns(reference, frame):
    return [column for column in reference.columns if column.name in frame]


def test_a_reference_is_part_of_a_folder(tiny, X, tmp_path):
    detector = tiny().fit(X)
    plain = detector.save(tmp_path / "plain", X=X)
    assert load_reference(tmp_path / "plain") is None
    reference = build_reference(detector, X)
    folder = tmp_path / "model"
    content = persistence.save_described(detector, folder, X=X, reference=reference.to_bytes())
    assert content != plain
    assert persistence.verify(folder) == content
    assert load_reference(folder).to_bytes() == reference.to_bytes()
    np.testing.assert_array_equal(load(folder).score_samples(X), detector.score_samples(X))
    schema = persistence.inspect(folder)["schema"]
    persistence.save_described(detector, tmp_path / "third", schema=schema)
    assert persistence.inspect(tmp_path / "third")["schema"] == schema

    data = (folder / "reference.json").read_bytes()
    for changed in (data[:-1], data.replace(b'"held_out":true', b'"held_out":null'), None):
        if changed is None:
            (folder / "reference.json").unlink()
        else:
            (folder / "reference.json").write_bytes(changed)
        for read in (load, load_reference, persistence.verify):
            with pytest.raises(ModelFolderError, match=r"truncated or was changed|hash differs|same files"):
                read(folder)
    (tmp_path / "plain" / "reference.json").write_bytes(data)
    for read in (load, load_reference):
        with pytest.raises(ModelFolderError, match="do not have the same files"):
            read(tmp_path / "plain")
    persistence.save_described(detector, tmp_path / "odd", reference=b"no JSON")
    with pytest.raises(ModelFolderError, match="training reference cannot be read"):
        load_reference(tmp_path / "odd")


def test_images_have_no_reference():
    images = np.random.default_rng(0).normal(size=(20, 1, 8, 8))
    detector = VAEDetector(max_iter=2, hidden_features=4, random_state=0, device="cpu").fit(images)
    with pytest.raises(ValueError, match="images"):
        build_reference(detector, images)


def test_an_empty_distribution_is_kept():
    column = Column("x", "number", 5, 5, distribution=Distribution.of([np.nan] * 5))
    assert Column.from_dict(column.to_dict()).to_dict() == column.to_dict()
