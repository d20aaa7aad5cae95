"""What is read of a file is what stands in it."""

import pandas as pd
import pyarrow.parquet as papq
import pytest

from anomalib_gen.scoring import sources
from anomalib_gen.scoring._columns import Wanted
from anomalib_gen.scoring.sources import Reader, find_inputs


def parts_of(path, n_rows=10_000, keys=("id",)):
    (item,) = find_inputs([str(path)])
    return list(Reader(item, Wanted(("x",), 1, ("float",), keys)).parts(n_rows))


def test_a_line_break_in_quotes_is_part_of_a_value_wherever_a_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CSV_BLOCK_BYTES", 256)
    frame = pd.DataFrame({"id": [f'one\ntwo "{k}"\r\nthree' for k in range(200)], "x": range(200)})
    frame.to_csv(tmp_path / "a.csv", index=False)
    parts = parts_of(tmp_path / "a.csv", 70)
    assert [part.malformed for part in parts] == [{}] * 3
    assert [key for part in parts for key in part.table.column("id").to_pylist()] == frame["id"].tolist()


NAMES = ["NA", "null", "nan", "007", "", " a ", "1e5"]


def test_a_key_stays_as_it_was_written(run, rows, model, tmp_path):
    """NA is a country, and null a name."""
    frame = rows(len(NAMES), 1).assign(id=NAMES)
    frame.to_csv(tmp_path / "in.csv", index=False)
    for name in ("out.parquet", "out.csv"):
        result = run("score", tmp_path / "in.csv", "-m", model, "-k", "id", "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    expected = [name or None for name in NAMES]
    assert papq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == expected
    found = pd.read_csv(tmp_path / "out.csv", dtype={"id": str}, keep_default_na=False)
    assert found["id"].tolist() == NAMES


@pytest.mark.parametrize("text", ["NA", "", "NULL", "#N/A", "nan"])
def test_a_value_that_stands_for_none_is_missing_to_a_model(tmp_path, text):
    (tmp_path / "a.csv").write_text(f"id,x\na,1\nb,{text}\n")
    (part,) = parts_of(tmp_path / "a.csv")
    frame, bad = part.frame(["x"], ("float",))
    assert bad == {}
    assert frame["x"].isna().tolist() == [False, True]
    frame, _ = part.frame(["x"], ("text",))
    assert frame["x"].isna().tolist() == [False, True]
    # So it is no label either, and of a file with types text is text.
    assert part.column("x").to_pylist() == ["1", None]
    pd.DataFrame({"id": ["a"], "x": [text]}).to_parquet(tmp_path / "a.parquet")
    (item,) = find_inputs([str(tmp_path / "a.parquet")])
    (part,) = Reader(item, Wanted(("x",), 1, ("text",), ("id",))).parts(10)
    assert part.frame(["x"], ("text",))[0]["x"].tolist() == [text]
