"""What is read of a file is what stands in it."""

import os
import sys

import pandas as pd
import pyarrow.fs as pafs
import pyarrow.parquet as papq
import pytest

from anomalib_gen.scoring import run as running
from anomalib_gen.scoring import sources
from anomalib_gen.scoring._columns import Wanted
from anomalib_gen.scoring._errors import DataError
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
    # Rows are counted, and not lines.
    text = (
        (tmp_path / "a.csv").read_bytes().replace(b'\n"one\ntwo ""100""', b'\nodd,one,2\n"one\ntwo ""100""')
    )
    (tmp_path / "a.csv").write_bytes(text)
    parts = parts_of(tmp_path / "a.csv", 70)
    assert [list(part.malformed) for part in parts] == [[], [100], []]
    assert [row for part in parts for row in part.rows] == [row for row in range(201) if row != 100]


def test_numbers_in_names_of_folders_are_columns_of_text_files_too(tmp_path):
    (tmp_path / "x=7").mkdir()
    (tmp_path / "x=7" / "a.csv").write_text("id\na\nNA\n")
    (part,) = parts_of(tmp_path)
    frame, bad = part.frame(["x"], ("float",))
    assert bad == {}
    assert frame["x"].tolist() == [7.0, 7.0]
    assert part.table.column("id").to_pylist() == ["a", "NA"]


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


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(run, rows, model, tmp_path, monkeypatch, ending):
    """Somebody still writes yesterday's file, or puts a better one in its place."""
    frame, path = rows(300, 1), tmp_path / f"in{ending}"
    frame.to_csv(path, index=False) if ending == ".csv" else frame.to_parquet(path)
    real, left = running.score_rows, [1]

    def changing(*arguments, **options):
        if left:
            left.pop()
            other = pd.concat([frame, frame])
            other.to_csv(path, index=False) if ending == ".csv" else other.to_parquet(path)
        return real(*arguments, **options)

    monkeypatch.setattr(running, "score_rows", changing)
    monkeypatch.setattr(running, "rows_per_part", lambda n_columns: 50)
    arguments = ("score", path, "-m", model, "-o", tmp_path / "out.parquet", "--resume")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "has changed while it was read. Run again" in result.stderr
    assert not (tmp_path / "out.parquet").exists()
    assert run(*arguments).exit_code == 0
    assert papq.read_table(tmp_path / "out.parquet").num_rows == 600


def test_a_file_is_read_once_however_its_path_is_written(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("id,x\na,1\n")
    monkeypatch.chdir(tmp_path)
    found = find_inputs(["a.csv", "./a.csv", str(tmp_path / "a.csv"), ".", "*.csv"])
    assert [item.path for item in found] == ["a.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes")
def test_names_that_are_no_text_are_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.csv"
    with open(name, "w") as file:
        file.write("id,x\na,1\n")
    for given in (folder, os.fsdecode(name), f"{folder}/*.csv"):
        with pytest.raises(DataError, match=r"no UTF-8.*Rename it"):
            find_inputs([str(given)])


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    here = pafs.LocalFileSystem()

    class Forbidding:
        def get_file_info(self, what):
            if isinstance(what, pafs.FileSelector):
                raise PermissionError("Cannot list directory")
            return here.get_file_info(what)

    monkeypatch.setattr(sources.pafs, "LocalFileSystem", Forbidding)
    with pytest.raises(DataError, match="cannot be read: Cannot list"):
        find_inputs([str(tmp_path)])
