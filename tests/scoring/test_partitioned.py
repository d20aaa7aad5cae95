"""Outputs of folders ``column=value/``: what is in them, for whom they can be read, and what is refused."""

import datetime
import errno
import json
import os

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.feather
import pyarrow.parquet as papq
import pytest

from anomalib_gen.scoring import partitions, sinks
from anomalib_gen.scoring import run as running
from anomalib_gen.scoring.partitions import Partitioning

NASTY = ["a b", "a/b", "a=b", "100 %", "é:", "..", "x\ny", "", None]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def incoming(rows, tmp_path):
    """Two files, with a bad row in the second; kinds come in turn."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    rows(250, 1).to_parquet(folder / "a.parquet")
    frame = rows(230, 2)
    frame["x"] = frame["x"].astype(object)
    frame.loc[129, "x"] = "much"
    frame.to_csv(folder / "b.csv.gz", index=False)
    return folder


def by_kind(incoming, model, output, *more):
    options = ("-k", "id", "-k", "kind", "--partition-by", "kind", "--max-bad-rows", 5)
    return ("score", incoming, "-m", model, "-o", output, *options, *more)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("most_open", "most_groups"), [(200, 32), (1, 32), (200, 2)])
def test_rows_are_those_of_one_file_in_its_order(
    run, incoming, model, tmp_path, monkeypatch, most_open, most_groups
):
    monkeypatch.setattr(sinks, "MAX_OPEN", most_open)
    monkeypatch.setattr(sinks, "MAX_ROW_GROUPS", most_groups)
    output = tmp_path / "scores"
    result = run(*by_kind(incoming, model, output))
    assert result.exit_code == 4, result.output
    options = ("-k", "id", "-k", "kind", "--max-bad-rows", 5)
    assert run("score", incoming, "-m", model, "-o", tmp_path / "one.parquet", *options).exit_code == 4
    one = pd.read_parquet(tmp_path / "one.parquet")
    n_files = {(200, 32): 1, (1, 32): 6, (200, 2): 3}[most_open, most_groups]
    for kind in "ab":
        files = sorted((output / f"kind={kind}").iterdir())
        assert [path.name for path in files] == [f"part-{k:06d}.parquet" for k in range(n_files)]
        found = pd.concat([papq.ParquetFile(path).read().to_pandas() for path in files], ignore_index=True)
        expected = one[one["kind"] == kind].drop(columns="kind").reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)
    assert sorted(os.listdir(output)) == ["kind=a", "kind=b"]
    # What reads such folders has all columns.
    dataset = pads.dataset(output, partitioning="hive").to_table().to_pandas()
    assert set(dataset.columns) == set(one.columns)
    assert len(dataset) == len(one) == 479
    lazy = pl.scan_parquet(output, hive_partitioning=True).select("id", "kind", "score").collect().sort("id")
    assert lazy.rows() == sorted(one[["id", "kind", "score"]].itertuples(index=False, name=None))
    # The same again gives the same bytes.
    before = tree(output)
    assert run(*by_kind(incoming, model, output, "--overwrite")).exit_code == 4
    assert tree(output) == before
    record = json.loads((tmp_path / "scores.run.json").read_text())
    assert record["partition_by"] == ["kind"]
    assert record["bytes"] == sum(map(len, before.values()))
    assert len((tmp_path / "scores.quarantine.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        NASTY,
        [3, -4, 2**62, None],
        [True, False, None],
        [datetime.date(2024, 2, 29), datetime.date(1969, 1, 1), None],
    ],
    ids=["text", "integers", "booleans", "dates"],
)
@pytest.mark.parametrize("name", ["plain", "_a b/c=%d"])
def test_whatever_values_and_names_are_read_again(run, rows, model, tmp_path, values, name):
    table = pa.Table.from_pandas(rows(60, 1), preserve_index=False)
    column = pa.array([values[k % len(values)] for k in range(60)])
    table = table.append_column(name, column)
    papq.write_table(table, tmp_path / "rows.parquet")
    options = ("-k", name, "-k", "id", "--partition-by", name)
    result = run("score", tmp_path / "rows.parquet", "-m", model, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    hive = pads.partitioning(table.select([name]).schema, flavor="hive")
    found = pads.dataset(tmp_path / "out", partitioning=hive).to_table()
    assert found.schema.field(name).type == column.type
    pairs = dict(zip(found["id"].to_pylist(), found[name].to_pylist(), strict=True))
    assert pairs == dict(zip(table["id"].to_pylist(), column.to_pylist(), strict=True))
    assert len(os.listdir(tmp_path / "out")) == len(values)


def test_folders_are_named_as_pyarrow_names_them(tmp_path):
    """Whatever characters there are, and in all types."""
    texts = [*NASTY, *("".join(map(chr, range(k, k + 43))) for k in (1, 44, 87))]
    dates = pa.array([datetime.date(2024, 1, 2), datetime.date(1960, 12, 31), None] * 4, pa.date32())
    keys = {"k": texts, "n": pa.array(range(-6, 6), pa.int8()), "b": [True, False, None] * 4}
    keys |= {
        "u": pa.array([2**64 - 1] * 12, pa.uint64()),
        "d": dates,
        "e": dates.cast(pa.date64()),
        "z": pa.nulls(12),
    }
    table = pa.table({**keys, "s": range(12)})
    schema = table.select(list(keys)).schema
    hive = pads.partitioning(schema, flavor="hive")
    pads.write_dataset(table, tmp_path / "out", format="parquet", partitioning=hive)
    folders, numbers = Partitioning(schema).folders(table)
    for path in (tmp_path / "out").rglob("*.parquet"):
        (row,) = papq.ParquetFile(path).read(columns=["s"])["s"].to_pylist()
        assert folders[numbers[row]] == str(path.parent.relative_to(tmp_path / "out"))


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_partitions_of_the_input_are_kept_without_being_asked(run, rows, model, tmp_path, ending):
    frame = rows(60, 1)
    for k, day in enumerate(("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__")):
        place = tmp_path / "in" / f"day={day}" / f"rows{ending}"
        place.parent.mkdir(parents=True)
        part = frame[20 * k : 20 * k + 20]
        part.to_parquet(place) if ending == ".parquet" else part.to_csv(place, index=False)
    options = ("-k", "id", "-k", "kind", "--partition-by", "day", "--partition-by", "kind")
    result = run("score", tmp_path / "in", "-m", model, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(os.listdir(tmp_path / "in"))
    found = pads.dataset(tmp_path / "out", partitioning="hive").to_table().to_pandas()
    expected = frame.assign(day=np.repeat(["2024-01-01", "2024-01-02", None], 20))
    pd.testing.assert_frame_equal(
        found.sort_values("id", ignore_index=True)[["id", "kind", "day"]].astype(object),
        expected[["id", "kind", "day"]].astype(object),
    )


def test_the_configuration_knows_it(run, incoming, model, tmp_path):
    (tmp_path / "c.toml").write_text(
        f'[score]\nmodel = "{model}"\noutput = "{tmp_path}/out"\nkey = ["id", "kind"]\npartition-by = "kind"\n'
        "max-bad-rows = 5\n"
    )
    assert run("score", incoming, "--config", tmp_path / "c.toml").exit_code == 4
    assert sorted(os.listdir(tmp_path / "out")) == ["kind=a", "kind=b"]


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--partition-by", "day"), 1, "--partition-by day is none of the columns that are kept: those of --key (id)"),
        (("--partition-by", "day"), 1, "folders of the input are named after (none). Add --key day"),
        (("-k", "day", "--partition-by", "day"), 2, "has no column 'day'. It has 'id', 'x', 'n', 'kind'"),
        (("--partition-by", "label"), 1, "--partition-by label is a column that scoring adds."),
        (("--explain", 1, "--partition-by", "top_1_feature"), 1, "top_1_feature is a column that scoring adds"),
        (("--partition-by", "id", "--partition-by", "id"), 1, "--partition-by names a column twice"),
        (("-k", "x", "--partition-by", "x"), 1, "--partition-by x is of type double, and folders are named after"),
        (("-k", "when", "--partition-by", "when"), 1, "is of type timestamp[us], and folders"),
        (("-k", "price", "--partition-by", "price"), 1, "is of type decimal128(5, 2), and folders"),
        (("-k", "raw", "--partition-by", "raw"), 1, "is of type binary, and folders"),
        (("-k", "long", "--partition-by", "long"), 2, "longer than the 255 bytes that a name may have"),
    ],
)  # fmt: skip
def test_columns_that_make_no_folders(run, rows, model, tmp_path, options, code, message):
    table = pa.Table.from_pandas(rows(20, 1), preserve_index=False)
    for name, value, kind in (
        ("when", datetime.datetime(2024, 1, 1), pa.timestamp("us")),
        ("price", 1, pa.decimal128(5, 2)),
        ("raw", b"a", pa.binary()),
        ("long", "ä" * 50, pa.string()),
    ):
        if name in options:
            table = table.append_column(name, pa.array([value] * 20, kind))
    pyarrow.feather.write_feather(table, tmp_path / "rows.feather")
    arguments = (
        "score",
        tmp_path / "rows.feather",
        "-m",
        model,
        "-o",
        tmp_path / "out",
        "-k",
        "id",
        *options,
    )
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.parquet", "out.csv.gz"])
def test_one_file_has_no_folders(run, incoming, model, tmp_path, name):
    result = run(*by_kind(incoming, model, tmp_path / name))
    assert result.exit_code == 1
    assert (
        f"{name} is one file. Name a folder, without an ending, such as {tmp_path / 'out'}." in result.stderr
    )
    result = run(*by_kind(incoming, model, f"memory://bucket/{name}"))
    assert result.exit_code == 1
    assert f"in a store one file is written, --output memory://bucket/{name}" in result.stderr


def test_too_many_folders_are_found_before_the_work_is_done(run, rows, model, tmp_path, monkeypatch):
    assert partitions.MAX_FOLDERS == 1024
    monkeypatch.setattr(partitions, "MAX_FOLDERS", 40)
    frame = rows(41, 1)
    options = ("-m", model, "-k", "id", "-k", "kind", "--partition-by", "kind", "--partition-by", "id")
    frame[:-1].to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "out"
    assert run("score", tmp_path / "rows.parquet", "-o", output, *options).exit_code == 0
    before = tree(tmp_path)
    frame.to_parquet(tmp_path / "more.parquet")
    result = run("score", tmp_path / "more.parquet", "-o", output, *options, "--overwrite")
    assert result.exit_code == 2
    assert (
        "--partition-by would make 41 folders of 41 rows, more than 40. Values of 'kind': 2, of 'id': 41."
    ) in result.stderr
    (tmp_path / "more.parquet").unlink()
    assert tree(tmp_path) == before


# What was there before -------------------------------------------------------------------------------------


def test_folders_of_parts_alone_are_replaced(run, incoming, model, tmp_path):
    output = tmp_path / "out"
    assert run(*by_kind(incoming, model, output)).exit_code == 4
    assert run(*by_kind(incoming, model, output)).exit_code == 1
    # By an output with other folders, or none, and back.
    flat = ("score", incoming, "-m", model, "-o", output, "--max-bad-rows", 5, "--overwrite")
    assert run(*flat).exit_code == 4
    assert sorted(os.listdir(output)) == ["part-000000.parquet", "part-000001.parquet"]
    assert run(*by_kind(incoming, model, output, "--overwrite")).exit_code == 4
    assert sorted(os.listdir(output)) == ["kind=a", "kind=b"]
    precious = output / "kind=a" / "thesis.txt"
    precious.write_text("three years")
    assert run(*by_kind(incoming, model, output, "--overwrite")).exit_code == 1
    assert precious.read_text() == "three years"
    precious.unlink()
    (output / "kind=c").symlink_to(tmp_path / "incoming")
    assert run(*by_kind(incoming, model, output, "--overwrite")).exit_code == 1


@pytest.mark.parametrize("name", ["part-0.parquet", "part-00000-c000.snappy.parquet"])
def test_folders_of_other_programs_are_not_replaced(run, incoming, model, tmp_path, name):
    theirs = tmp_path / "out" / "kind=a" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    assert run(*by_kind(incoming, model, tmp_path / "out", "--overwrite")).exit_code == 1
    assert theirs.read_bytes() == b"theirs"


def test_folders_that_a_file_system_takes_for_one_lose_no_rows(tmp_path):
    class Alike(Partitioning):
        def folders(self, table):
            return ["x=a", "x=a/"], np.array([0, 1])  # as x=a and x=A are where case does not count

    table = pa.table({"x": ["a", "A"], "score": [0.5, 0.25]})
    with pytest.raises(sinks.DataError, match="differ in upper and lower case alone"):
        sinks.write_result(tmp_path / "out", [table], table.schema, Alike(table.select(["x"]).schema))
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_leaves_earlier_folders(run, incoming, model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert run(*by_kind(incoming, model, output)).exit_code == 4
    before, calls, real = tree(output), iter(range(100)), papq.ParquetWriter.write_table

    def fill(writer, table):
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, table)

    monkeypatch.setattr(papq.ParquetWriter, "write_table", fill)
    result = run(*by_kind(incoming, model, output, "--overwrite"))
    assert result.exit_code == 2
    assert "The disk is full" in result.stderr
    assert tree(output) == before
    assert not (tmp_path / ".out.tmp").exists()
    # What was scored is not scored again.
    monkeypatch.setattr(running, "score_rows", lambda *arguments, **options: pytest.fail("scored again"))
    assert run(*by_kind(incoming, model, output, "--resume")).exit_code == 4
    assert tree(output) == before


@pytest.mark.usefixtures("small_parts")
def test_a_folder_that_was_damaged_is_not_taken_for_complete(run, incoming, model, tmp_path):
    output = tmp_path / "out"
    assert run(*by_kind(incoming, model, output)).exit_code == 4
    before = tree(output)
    (output / "kind=b" / "part-000000.parquet").unlink()
    assert run(*by_kind(incoming, model, output, "--resume")).exit_code == 2
    assert run(*by_kind(incoming, model, output, "--resume", "--overwrite")).exit_code == 4
    assert tree(output) == before


# Who reads it ----------------------------------------------------------------------------------------------


def test_an_output_without_rows_has_its_columns(run, rows, described, tmp_path):
    rows(5, 1)[:0].astype({"id": str, "kind": str}).to_parquet(tmp_path / "rows.parquet")
    options = ("-m", described, "-k", "id", "-k", "kind", "--partition-by", "kind", "-o", tmp_path / "out")
    assert run("score", tmp_path / "rows.parquet", *options).exit_code == 0
    names = pads.dataset(tmp_path / "out", partitioning="hive").schema.names
    assert names == ["id", "kind", "score", "label", "threshold", "model"]
    assert run("monitor", tmp_path / "out", "-m", described).exit_code in (0, 3)
    assert run("report", tmp_path / "out", "-m", described).exit_code == 0


@pytest.mark.usefixtures("small_parts")
def test_the_folder_is_evaluated(run, rows, model, tmp_path):
    frame = rows(250, 1).assign(y=np.where(np.arange(250) % 10, 1, -1))
    frame.loc[::7, "kind"] = "a b"
    frame.to_parquet(tmp_path / "rows.parquet")
    keys = [item for name in ("x", "n", "kind", "y") for item in ("-k", name)]
    options = ("-m", model, *keys, "--partition-by", "y", "--partition-by", "kind", "-o", tmp_path / "out")
    assert run("score", tmp_path / "rows.parquet", *options).exit_code == 0
    expected, found = (
        json.loads(run("evaluate", place, "-m", model, "--label", "y").stdout)
        for place in (tmp_path / "rows.parquet", tmp_path / "out")
    )
    assert found == pytest.approx(expected)


def test_monitor_and_report_are_those_of_one_file(run, rows, described, tmp_path, monkeypatch):
    from anomalib_gen.scoring import reporting
    from anomalib_gen.scoring._log import Log
    from anomalib_gen.scoring.config import ReportOptions

    for module in (running, reporting):
        monkeypatch.setattr(module, "rows_per_part", lambda n_columns: 100)
    frame = rows(400, 1)
    frame.loc[::50, "x"] = 30 + np.arange(8)
    frame.loc[5, "n"] = np.nan
    frame["zone"] = np.resize(np.array(["007", "a b", None, ""], dtype=object), 400)
    frame[:150].to_parquet(tmp_path / "a.parquet")
    frame[150:].to_parquet(tmp_path / "b.parquet")
    inputs = (tmp_path / "a.parquet", tmp_path / "b.parquet")
    options = ("-m", described, "-k", "id", "-k", "zone", "--max-bad-rows", 1)
    found = []
    for output, more in ((tmp_path / "one.parquet", ()), (tmp_path / "many", ("--partition-by", "zone"))):
        result = run("score", *inputs, *options, "-o", output, *more)
        assert result.exit_code == 4, result.output
        watched = run("monitor", output, "-m", described, *(f"--input={path}" for path in inputs), "--json")
        assert watched.exit_code in (0, 3), watched.output
        report = json.loads(watched.stdout)["report"]
        page = reporting.gather(output, ReportOptions(scores=str(output), model=str(described)), Log())
        assert page.notes == []
        found.append((report, page))
    (one, first), (many, second) = found
    assert many["columns"] == one["columns"]
    assert (many["n_rows"], many["n_flagged"]) == (one["n_rows"], one["n_flagged"])
    assert many["scores"]["distance"] == pytest.approx(one["scores"]["distance"])
    assert len(first.anomalies) == len(second.anomalies) > 5
    for a, b in zip(first.anomalies, second.anomalies, strict=True):
        assert (a.score, a.keys) == (b.score, b.keys)
        assert [name for name, _, _ in a.contributions[:1]] == [name for name, _, _ in b.contributions[:1]]
        assert {name: value for name, value, _ in a.contributions} == {
            name: value for name, value, _ in b.contributions
        }
    assert first.inputs == second.inputs


def test_a_report_finds_that_rows_went_to_other_folders(run, rows, described, tmp_path):
    frame = rows(60, 1)
    frame.to_parquet(tmp_path / "rows.parquet")
    options = ("-m", described, "-k", "id", "-k", "kind", "--partition-by", "kind", "-o", tmp_path / "out")
    assert run("score", tmp_path / "rows.parquet", *options).exit_code == 0
    (tmp_path / "out" / "kind=a").rename(tmp_path / "out" / "kind=c")
    result = run("report", tmp_path / "out", "-m", described)
    assert result.exit_code == 4
    assert "belong to other folders than the scores have" in result.stderr
