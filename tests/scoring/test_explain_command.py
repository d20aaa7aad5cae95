"""The command `explain`, and the columns that `score --explain` adds."""

import numpy as np
import pandas as pd
import pyarrow.parquet as papq
import pytest

from anomalib_gen import ComposedDetector, save
from anomalib_gen.explain import feature_contributions
from anomalib_gen.scoring import explaining, explaining_files
from anomalib_gen.scoring import run as running


@pytest.fixture
def incoming(rows, tmp_path):
    """Two files with odd rows in them, and one bad row."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    first, second = rows(250, 1), rows(230, 2)
    first.loc[::25, "x"] *= 8
    second.loc[::23, "n"] += 40
    first.to_parquet(folder / "a.parquet")
    text = second.to_csv(index=False).splitlines(keepends=True)
    text[130] = "x,much,1,a\n"
    (folder / "b.csv").write_text("".join(text))
    return folder


@pytest.fixture
def frame(rows):
    first, second = rows(250, 1), rows(230, 2)
    first.loc[::25, "x"] *= 8
    second.loc[::23, "n"] += 40
    return pd.concat([first, second.drop(index=129)], ignore_index=True)


def explain(run, incoming, model, output, *more):
    return run("explain", incoming, "-m", model, "-k", "id", "-o", output, *more)


def test_lowest_rows_are_explained_as_in_python(run, incoming, frame, model, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(explaining_files, "rows_per_part", lambda n_columns: 100)
    result = explain(run, incoming, model, tmp_path / "why.parquet", "--top", 12)
    assert result.exit_code == 0, result.output
    assert "left out 1 row that cannot be scored" in result.stderr
    found = pd.read_parquet(tmp_path / "why.parquet")
    assert list(found) == ["id", *explaining_files.ADDED]
    rows = frame.drop(columns="id")
    scores = loaded.score_samples(rows)
    lowest = np.argsort(scores, kind="stable")[:12]
    first = found[found["rank"] == 1]
    assert first["id"].tolist() == frame["id"].iloc[lowest].tolist()
    np.testing.assert_allclose(first["score"], scores[lowest], rtol=1e-9)
    mine = feature_contributions(loaded, rows.iloc[lowest].reset_index(drop=True))
    wide = found.set_index(["id", "feature"])["contribution"].unstack("feature")  # noqa: PD010 -- nothing is pooled
    wide = wide.loc[first["id"], ["x", "n", "kind"]]
    np.testing.assert_allclose(wide, mine.values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(first["anomaly"], first["baseline"] + wide.sum(axis=1).to_numpy(), rtol=1e-6)
    assert found["contribution"].groupby(found["id"]).is_monotonic_decreasing.all()
    for _, line in first.iterrows():
        source = pd.read_parquet if line["file"].endswith("parquet") else pd.read_csv
        assert source(line["file"])["id"][line["row"]] == line["id"]
    value = found[(found["feature"] == "x")].iloc[0]
    assert float(value["value"]) == frame.set_index("id")["x"][value["id"]]


def test_all_outliers_in_order(run, incoming, frame, model, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(explaining, "BLOCK_ROWS", 7)
    monkeypatch.setattr(explaining_files, "BLOCK_ROWS", 7)
    result = explain(run, incoming, model, tmp_path / "why.csv", "--flagged", "--features", 1)
    assert result.exit_code == 0, result.output
    found = pd.read_csv(tmp_path / "why.csv")
    scores = loaded.score_samples(frame.drop(columns="id"))
    assert found["id"].tolist() == frame["id"][scores < loaded[-1].offset_].tolist()
    assert set(found["label"]) == {-1}
    assert set(found["rank"]) == {1}
    assert f"{len(found)} rows explained" in result.stderr


def test_a_background(run, rows, incoming, model, tmp_path):
    rows(400, 7).to_parquet(tmp_path / "normal.parquet")
    more = ("--top", 5, "--background", tmp_path / "normal.parquet")
    assert explain(run, incoming, model, tmp_path / "a.csv", *more).exit_code == 0
    assert explain(run, incoming, model, tmp_path / "b.csv", "--top", 5).exit_code == 0
    with_it, without = pd.read_csv(tmp_path / "a.csv"), pd.read_csv(tmp_path / "b.csv")
    assert (with_it["score"] == without["score"]).all()
    assert with_it["baseline"].nunique() == 5
    assert set(without["baseline"]) == {without["baseline"][0]}
    assert explain(run, incoming, model, tmp_path / "c.csv", *more[:3], tmp_path / "none").exit_code == 2


def test_what_cannot_be_explained_or_replaced(run, incoming, model, fitted, X, tmp_path):
    result = explain(run, incoming, model, tmp_path / "a.csv", "--method", "reconstruction")
    assert result.exit_code == 1
    assert "reconstructs no rows" in result.stderr
    assert not (tmp_path / "a.csv").exists()
    (tmp_path / "a.csv").write_text("earlier")
    assert explain(run, incoming, model, tmp_path / "a.csv").exit_code == 1
    assert (tmp_path / "a.csv").read_text() == "earlier"
    assert explain(run, incoming, model, tmp_path / "a.csv", "--overwrite", "--top", 3).exit_code == 0
    for place, message in (
        (incoming / "b.csv", "one of the inputs"),
        (incoming, "one of the inputs"),
        ("memory://why.csv", "must be a file of this machine"),
    ):
        result = explain(run, incoming, model, place, "--overwrite")
        assert result.exit_code == 1
        assert message in result.stderr
    assert (
        run("explain", incoming, "-m", model, "-k", "id", "-k", "id", "-o", tmp_path / "b.csv").exit_code == 1
    )
    assert explain(run, incoming, model, tmp_path / "a.xlsx").exit_code == 1
    assert explain(run, incoming, tmp_path / "none", tmp_path / "b.csv").exit_code == 2


def test_no_outliers_at_all(run, rows, model, tmp_path):
    frame = rows(20, 1).assign(x=0.0, n=4)
    frame.to_parquet(tmp_path / "a.parquet")
    result = explain(run, tmp_path / "a.parquet", model, tmp_path / "why.parquet", "--flagged")
    assert result.exit_code == 0, result.output
    assert papq.read_table(tmp_path / "why.parquet").num_rows == 0


# Beside the scores -----------------------------------------------------------------------------------------


def score(run, incoming, model, output, *more):
    options = ("-m", model, "-k", "id", "-o", output, "--max-bad-rows", 5, "--explain", 2)
    return run("score", incoming, *options, *more)


@pytest.mark.usefixtures("small_parts")
def test_outliers_are_explained_beside_their_scores(run, incoming, frame, model, loaded, tmp_path):
    result = score(run, incoming, model, tmp_path / "s.parquet")
    assert result.exit_code == 4, result.output
    found = pd.read_parquet(tmp_path / "s.parquet")
    flagged = found["label"] == -1
    assert flagged.any()
    rows = frame.drop(columns="id")
    np.testing.assert_array_equal(flagged, loaded.score_samples(rows) < loaded[-1].offset_)
    assert found[found.columns[found.columns.str.startswith("top_")]][~flagged].isna().all(axis=None)
    mine = feature_contributions(loaded, rows[flagged].reset_index(drop=True)).top(2)
    for k in (0, 1):
        assert found[f"top_{k + 1}_feature"][flagged].tolist() == [top[k][0] for top in mine]
        assert found[f"top_{k + 1}_value"][flagged].tolist() == [str(top[k][1]) for top in mine]
        np.testing.assert_allclose(
            found[f"top_{k + 1}_contribution"][flagged], [top[k][2] for top in mine], rtol=1e-6, atol=1e-9
        )


@pytest.mark.usefixtures("small_parts")
def test_a_killed_run_with_explanations_and_p_values_goes_on_to_the_same_bytes(
    run, rows, incoming, model, tmp_path, monkeypatch
):
    rows(300, 7).to_parquet(tmp_path / "normal.parquet")
    options = ("-m", model, "--method", "conformal", "--rate", 0.1, "-o", tmp_path / "cal")
    assert run("calibrate", tmp_path / "normal.parquet", *options).exit_code == 0
    assert score(run, incoming, tmp_path / "cal", tmp_path / "whole" / "s.parquet").exit_code == 4
    expected = (tmp_path / "whole" / "s.parquet").read_bytes()
    assert pd.read_parquet(tmp_path / "whole" / "s.parquet")["top_1_feature"].notna().any()
    real = running.Parts.write
    for moment in (1, 3, 5):
        output, count = tmp_path / f"killed-{moment}" / "s.parquet", iter(range(100))

        def dying(*arguments, count=count, moment=moment):
            if next(count) == moment:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(running.Parts, "write", dying)
            assert score(run, incoming, tmp_path / "cal", output, "--resume").exit_code == 130
        assert len(list(output.parent.glob(".s.parquet.parts/*.arrow"))) == moment
        # Without explanations it is another run.
        assert score(run, incoming, tmp_path / "cal", output, "--resume").exit_code == 4
        assert output.read_bytes() == expected
    more = ("--resume", "--explain", 1)
    assert score(run, incoming, tmp_path / "cal", output, *more).exit_code == 1
    assert score(run, incoming, tmp_path / "cal", output, *more, "--overwrite").exit_code == 4
    assert "top_2_feature" not in papq.read_schema(output).names


def test_more_columns_than_there_are(run, incoming, model, tmp_path):
    assert score(run, incoming, model, tmp_path / "s.parquet", "--explain", 5).exit_code == 4
    found = pd.read_parquet(tmp_path / "s.parquet")
    assert found["top_5_feature"].isna().all()
    assert found["top_3_feature"].notna().any()
    result = score(run, incoming, model, tmp_path / "t.parquet", "-k", "top_1_value")
    assert result.exit_code == 1


def test_a_detector_that_keeps_no_mean_row_needs_a_background(run, fitted, X, tmp_path):
    save(ComposedDetector([("a", fitted), ("b", fitted)]).fit(X), tmp_path / "model", X=X)
    pd.DataFrame(X, columns=["a", "b", "c"]).to_parquet(tmp_path / "x.parquet")
    options = (tmp_path / "x.parquet", "-m", tmp_path / "model", "-o", tmp_path / "s.csv")
    for result in (run("score", *options, "--explain", 1), run("explain", *options)):
        assert result.exit_code == 1
        assert "background" in result.stderr
    assert not (tmp_path / "s.csv").exists()
    assert not (tmp_path / ".s.csv.parts").exists()
    result = run("explain", *options, "--top", 2, "--background", tmp_path / "x.parquet")
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "s.csv")) == 6


def test_both_commands_give_the_same_reasons(run, incoming, model, tmp_path):
    """Those of `score --explain` are those of `explain` without a background."""
    options = ("-m", model, "-k", "id")
    result = run(
        "score", incoming, *options, "--explain", 3, "--max-bad-rows", 9, "-o", tmp_path / "s.parquet"
    )
    assert result.exit_code in (0, 4), result.output
    assert run("explain", incoming, *options, "--flagged", "-o", tmp_path / "why.parquet").exit_code == 0
    scores, why = pd.read_parquet(tmp_path / "s.parquet"), pd.read_parquet(tmp_path / "why.parquet")
    why = why.set_index(["id", "feature"])["contribution"]
    odd = scores[scores["label"] == -1].set_index("id")
    assert len(odd) > 3
    for k in (1, 2, 3):
        row = zip(odd.index, odd[f"top_{k}_feature"], strict=True)
        np.testing.assert_allclose(
            odd[f"top_{k}_contribution"], [why[name] for name in row], rtol=1e-6, atol=1e-9
        )
