"""The command `calibrate`, and the p-values that `score` writes with what it makes."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.frozen import FrozenEstimator

from anomalib_gen import load, persistence
from anomalib_gen.calibration import (
    FalsePositiveRate,
    SplitConformalDetector,
    TailProbability,
    ThresholdDetector,
    conformal_p_values,
)
from anomalib_gen.monitoring import load_reference
from anomalib_gen.scoring import calibrating


@pytest.fixture
def normal(rows, tmp_path):
    """Files of normal rows, in two formats."""
    folder = tmp_path / "normal"
    folder.mkdir()
    rows(500, 1).to_parquet(folder / "a.parquet")
    rows(499, 2).to_csv(folder / "b.csv", index=False)
    return folder


@pytest.fixture
def frame(rows):
    return pd.concat([rows(500, 1), rows(499, 2)], ignore_index=True).drop(columns="id")


def calibrate(run, normal, model, *more):
    return run("calibrate", normal, "-m", model, *more)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--rate", 0.02), FalsePositiveRate(0.02)),
        (("--rate", 0.02, "--confidence", 0.9), FalsePositiveRate(0.02, 0.9)),
        (("--method", "tail", "--rate", 0.0001, "--tail-fraction", 0.2), TailProbability(0.0001, 0.2)),
        (("--method", "contamination", "--rate", 0.02), "contamination"),
    ],
    ids=str,
)
def test_thresholds_are_those_of_python(run, normal, frame, model, loaded, tmp_path, options, rule):
    result = calibrate(run, normal, model, *options, "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    calibrated = load(tmp_path / "new")
    scores = loaded.score_samples(frame)
    if rule == "contamination":
        assert calibrated.offset_ == pytest.approx(np.quantile(scores, 0.02))
    else:
        mine = ThresholdDetector(FrozenEstimator(loaded), threshold=rule).fit(frame)
        assert calibrated.offset_ == pytest.approx(mine.offset_, rel=1e-9)
        assert repr(calibrated.threshold_) == repr(mine.threshold_)
    np.testing.assert_array_equal(calibrated.score_samples(frame), scores)
    assert found["rows"] == 999
    assert found["flagged"] == (scores < calibrated.offset_).mean()
    assert found["model"] == persistence.verify(tmp_path / "new") != persistence.verify(model)
    reference = load_reference(tmp_path / "new")
    assert reference.held_out
    assert (reference.n_scored, reference.n_rows) == (999, 999)
    assert reference.threshold == calibrated.offset_
    assert [column.name for column in reference.columns] == ["x", "n", "kind"]
    for folder in (model, tmp_path / "new"):
        assert (
            persistence.inspect(folder)["schema"]["columns"]
            == persistence.inspect(model)["schema"]["columns"]
        )


@pytest.mark.usefixtures("small_parts")
def test_p_values_are_those_of_python_and_those_that_score_writes(
    run, rows, normal, frame, model, loaded, tmp_path
):
    result = calibrate(run, normal, model, "--method", "conformal", "--rate", 0.02, "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    mine = SplitConformalDetector(FrozenEstimator(loaded), alpha=0.02).fit(frame)
    calibrated = load(tmp_path / "new")
    assert calibrated.offset_ == pytest.approx(mine.offset_, rel=1e-9)
    later = rows(250, 3)
    later.to_parquet(tmp_path / "later.parquet")
    options = ("-m", tmp_path / "new", "-k", "id", "--p-values")
    assert run("score", tmp_path / "later.parquet", *options, "-o", tmp_path / "s.parquet").exit_code == 0
    found = pd.read_parquet(tmp_path / "s.parquet")
    assert list(found) == ["id", "score", "p_value", "label", "threshold", "model"]
    np.testing.assert_allclose(found["p_value"], mine.p_values(later.drop(columns="id")), rtol=1e-9)
    np.testing.assert_array_equal(found["label"] == -1, found["p_value"] <= 0.02)
    # Normal rows: uniform p-values, within what 250 rows and 999 of calibration allow.
    assert abs((found["p_value"] <= 0.5).mean() - 0.5) < 0.15
    # Of a model that makes some they are always there; of others they are refused, with what to do.
    options = ("-m", tmp_path / "new", "-o", tmp_path / "t.csv")
    assert run("score", tmp_path / "later.parquet", *options).exit_code == 0
    assert "p_value" in pd.read_csv(tmp_path / "t.csv")
    result = run("score", tmp_path / "later.parquet", "-m", model, "--p-values", "-o", tmp_path / "u.csv")
    assert result.exit_code == 1
    assert "anomalib-gen calibrate NORMAL_FILES" in result.stderr
    assert run("score", normal, *options[:2], "-k", "p_value", "-o", tmp_path / "u.csv").exit_code == 1


def drawn(values, limit, part):
    sample = calibrating._Sample(limit)
    for start in range(0, len(values), part):
        sample.add(np.asarray(values[start : start + part], dtype=np.float64))
    assert sample.n_rows == len(values)
    return sample.scores()


def test_of_many_scores_some_are_drawn_whatever_they_are():
    places = np.arange(1000)
    np.testing.assert_array_equal(drawn(places, 1000, 70), places)
    expected = drawn(places, 64, 1000)
    assert len(set(expected)) == 64
    assert (np.diff(expected) > 0).all()
    # Neither how the rows were cut nor what they score makes a difference.
    for part in (1, 7, 129):
        np.testing.assert_array_equal(drawn(places, 64, part), expected)
    scores = np.random.default_rng(0).normal(size=1000)
    np.testing.assert_array_equal(drawn(scores, 64, 129), scores[expected.astype(int)])
    # They come from everywhere.
    assert len(drawn(np.arange(100_000), 10_000, 999)) == 10_000
    assert stats.kstest(drawn(np.arange(100_000), 10_000, 999) / 1e5, "uniform").pvalue > 0.01


def test_p_values_of_a_sample_keep_their_promise():
    """Of 400 exchangeable scores 39 calibrate, so p-values of a new one are uniform on multiples of 1 / 40."""
    random, n = np.random.default_rng(0), 4000
    ranks = []
    for _ in range(n):
        rows = random.normal(size=401)
        ranks.append(40 * conformal_p_values(rows[-1:], drawn(rows[:-1], 39, 50))[0])
    counts = np.bincount(np.round(ranks).astype(int), minlength=41)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.usefixtures("small_parts")
def test_a_folder_holds_a_stated_number_of_scores(run, normal, frame, model, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "MAX_SCORES", 200)
    options = ("--method", "conformal", "--rate", 0.02, "-o", tmp_path / "new")
    result = calibrate(run, normal, model, *options)
    assert result.exit_code == 0, result.output
    assert "200 rows of 999 calibrate" in result.stderr
    found, calibrated = json.loads(result.stdout), load(tmp_path / "new")
    assert (found["rows"], found["scores"]) == (999, 200)
    np.testing.assert_array_equal(
        calibrated.calibration_scores_, np.sort(drawn(loaded.score_samples(frame), 200, 999))
    )
    assert found["flagged"] == (calibrated.calibration_scores_ < calibrated.offset_).mean()
    reference = load_reference(tmp_path / "new")
    assert (reference.n_scored, reference.n_rows) == (200, 999)
    # More rows would not help here.
    result = calibrate(run, normal, model, "--method", "conformal", "--rate", 0.002, "-o", tmp_path / "low")
    assert result.exit_code == 2
    assert "Of 999 rows 200 calibrate, and no more can" in result.stderr


def test_a_rate_that_no_row_can_reach_is_refused(run, normal, model, tmp_path):
    for method in ("conformal", "false-positive-rate"):
        result = calibrate(run, normal, model, "--method", method, "--rate", 0.0005, "-o", tmp_path / "new")
        assert result.exit_code == 2
        assert "999" in result.stderr
    assert not (tmp_path / "new").exists()
    options = ("--method", "conformal", "--rate", 0.001, "-o", tmp_path / "new")
    assert calibrate(run, normal, model, *options).exit_code == 0


def test_a_model_is_calibrated_again_from_the_inside(run, normal, model, loaded, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert calibrate(run, normal, model, "--method", "conformal", "-o", first).exit_code == 0
    assert calibrate(run, normal, first, "-o", second).exit_code == 0
    found = load(second)
    assert isinstance(found, ThresholdDetector)
    assert type(found.estimator_) is FrozenEstimator
    assert type(found.estimator_.estimator) is type(loaded)
    direct = calibrate(run, normal, model, "-o", tmp_path / "direct")
    assert json.loads(direct.stdout)["model"] == persistence.verify(second)


def test_keep_describes_rows_and_leaves_the_threshold(run, rows, normal, model, loaded, tmp_path):
    folder = tmp_path / "kept"
    assert calibrate(run, normal, model, "--method", "keep", "-o", folder).exit_code == 0
    kept = load(folder)
    assert type(kept) is type(loaded)
    assert kept[-1].offset_ == loaded[-1].offset_
    rows(300, 5).to_parquet(tmp_path / "a.parquet")
    assert run("score", tmp_path / "a.parquet", "-m", folder, "-o", tmp_path / "s.parquet").exit_code == 0
    assert run("monitor", tmp_path / "s.parquet", "-m", folder).exit_code == 0


def test_folders_are_replaced_only_when_asked(run, normal, model, tmp_path):
    result = calibrate(run, normal, model)
    assert result.exit_code == 1
    assert "Give an --output" in result.stderr
    persistence.save_described(load(model), tmp_path / "mine", schema=persistence.inspect(model)["schema"])
    before = persistence.verify(tmp_path / "mine")
    assert calibrate(run, normal, tmp_path / "mine", "-o", tmp_path / "mine").exit_code == 1
    assert persistence.verify(tmp_path / "mine") == before
    result = calibrate(run, normal, tmp_path / "mine", "--overwrite")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["model"] == persistence.verify(tmp_path / "mine") != before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("three years")
    result = calibrate(run, normal, model, "-o", tmp_path / "precious", "--overwrite")
    assert result.exit_code == 1
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_rows_and_options_that_do_not_fit(run, rows, model, tmp_path):
    frame = rows(50, 1)
    frame.loc[3, "x"] = np.nan
    frame.to_parquet(tmp_path / "bad.parquet")
    result = calibrate(run, tmp_path / "bad.parquet", model, "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "row 3, missing or infinite in 'x'" in result.stderr
    frame[:0].to_parquet(tmp_path / "none.parquet")
    result = calibrate(run, tmp_path / "none.parquet", model, "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "no rows" in result.stderr
    for option, message in (
        (("--method", "magic"), "must be one of false-positive-rate"),
        (("--rate", 0), "from 1e-12 to 0.5"),
        (("--method", "tial"), "Did you mean 'tail'"),
        (("--method", "magic"), "contamination, conformal, keep, got 'magic'.\n"),
    ):
        result = calibrate(run, tmp_path / "none.parquet", model, "-o", tmp_path / "new", *option)
        assert result.exit_code == 1
        assert message in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_model_without_names(run, fitted, X, tmp_path):
    fitted.save(tmp_path / "model", X=X)
    np.savetxt(tmp_path / "rows.csv", X, delimiter=",", header="a,b,c", comments="")
    options = ("-o", tmp_path / "new")
    assert calibrate(run, tmp_path / "rows.csv", tmp_path / "model", *options).exit_code == 0
    reference = load_reference(tmp_path / "new")
    assert [column.name for column in reference.columns] == ["0", "1", "2"]
    options = ("-m", tmp_path / "new", "-o", tmp_path / "s.parquet")
    assert run("score", tmp_path / "rows.csv", *options).exit_code == 0
    more = ("--input", tmp_path / "rows.csv", "--json")
    result = run("monitor", tmp_path / "s.parquet", "-m", tmp_path / "new", *more)
    assert result.exit_code == 0, result.output
    assert [column["distance"] for column in json.loads(result.stdout)["report"]["columns"]] == [0, 0, 0]
