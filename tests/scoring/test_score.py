"""The command `score`: what is in the output, for whatever files, and what bad ones lead to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as papq
import pytest
from filelock import FileLock
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from anomalib_gen import VAEDetector, persistence, save
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.images import ChannelsFirst
from anomalib_gen.scoring import run as running
from anomalib_gen.scoring import sources
from anomalib_gen.scoring._errors import DataError
from anomalib_gen.scoring.rows import threshold_of
from anomalib_gen.scoring.sources import CODECS


def read(path):
    codec = CODECS.get(path.suffix)
    if codec is not None:
        with pa.input_stream(str(path), compression=codec) as file:
            return pd.read_csv(file, sep="\t" if ".tsv" in path.name else ",", dtype={"id": str})
    if path.is_dir():
        return pd.concat([pd.read_parquet(part) for part in sorted(path.iterdir())], ignore_index=True)
    if path.suffix == ".parquet":
        return papq.read_table(path).to_pandas()
    if path.suffix in (".feather", ".arrow"):
        return pyarrow.feather.read_table(path).to_pandas()
    return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", dtype={"id": str})


def write(frame, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".feather", ".arrow"):
        pyarrow.feather.write_feather(pa.Table.from_pandas(frame), path)
    else:
        text = frame.to_csv(index=False, sep="\t" if ".tsv" in path.name else ",").encode()
        with pa.output_stream(str(path), compression=CODECS.get(path.suffix)) as file:
            file.write(text)
    return path


def assert_scored(output, frame, loaded, model):
    """The output is what the model says of the frame in memory, row by row."""
    scores = loaded.score_samples(frame.drop(columns="id"))
    found = read(output)
    assert list(found.columns) == ["id", "score", "label", "threshold", "model"]
    assert found["id"].tolist() == frame["id"].tolist()
    np.testing.assert_allclose(found["score"], scores, rtol=1e-9)
    np.testing.assert_array_equal(found["label"], np.where(scores < loaded[-1].offset_, -1, 1))
    assert set(found["threshold"]) == {loaded[-1].offset_}
    assert set(found["model"]) == {persistence.verify(model)[:16]}


PLAIN = [".parquet", ".feather", ".arrow", ".csv", ".tsv"]
FORMATS = [*PLAIN, *(f"{text}{codec}" for text in (".csv", ".tsv") for codec in CODECS)]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.usefixtures("small_parts")
def test_every_format_in_and_out(run, rows, model, loaded, tmp_path, ending):
    frame = rows(350, 1)
    source = write(frame, tmp_path / f"rows{ending}")
    output = tmp_path / f"scores{ending}"
    result = run("score", source, "-m", model, "-k", "id", "-o", output)
    assert result.exit_code == 0, result.output
    assert_scored(output, frame, loaded, model)
    # The same again gives the same bytes.
    before = output.read_bytes()
    assert run("score", source, "-m", model, "-k", "id", "-o", output, "--overwrite").exit_code == 0
    assert output.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if "parts" in path.name or "tmp" in path.name]


@pytest.mark.usefixtures("small_parts")
def test_folders_globs_and_lists_keep_their_order(run, rows, model, loaded, tmp_path):
    frames = [rows(n, seed) for seed, n in enumerate((250, 100, 1, 30))]
    incoming = tmp_path / "incoming"
    for k, (frame, ending) in enumerate(
        zip(frames, (".parquet", ".csv", ".csv.gz", ".feather"), strict=True)
    ):
        write(frame, incoming / f"2024-{k}" / f"rows{ending}")
    (incoming / "_SUCCESS").write_text("")
    (incoming / ".hidden.csv").write_text("no, this\n")
    (incoming / "readme.md").write_text("not data")
    whole = pd.concat(frames, ignore_index=True)
    given = (
        [incoming],
        [f"{incoming}/**/rows*"],
        [incoming / "2024-0", *sorted(incoming.glob("2024-[1-3]/*"))],
    )
    for k, inputs in enumerate(given):
        output = tmp_path / f"scores-{k}.parquet"
        result = run("score", *inputs, "-m", model, "-k", "id", "-o", output)
        assert result.exit_code == 0, result.output
        assert_scored(output, whole, loaded, model)
    result = run("score", incoming, "-m", model, "-k", "id", "-o", tmp_path / "scores")
    assert_scored(tmp_path / "scores", whole, loaded, model)
    # A file that is named twice is scored once.
    run("score", incoming, incoming, "-m", model, "-k", "id", "-o", tmp_path / "twice.parquet")
    assert len(read(tmp_path / "twice.parquet")) == len(whole)


def test_partitions_are_columns(run, rows, model, loaded, tmp_path):
    frame = rows(60, 1).sort_values("kind", kind="stable", ignore_index=True)
    for kind, part in frame.groupby("kind"):
        write(part.drop(columns="kind"), tmp_path / "in" / f"kind={kind}" / "rows.parquet")
    result = run("score", tmp_path / "in", "-m", model, "-k", "id", "-o", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    assert_scored(tmp_path / "out.parquet", frame, loaded, model)


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_partition_has_one_type_over_all_files(run, rows, model, tmp_path, ending):
    """Whatever each folder by itself looks like, and whether it stands for a missing value."""
    frame, output = rows(60, 1), tmp_path / "out.parquet"
    for name, values, kind in (
        ("zone", ["7", "a b/c", None], pa.string()),
        ("year", [2024, None, 7], pa.int32()),
        # It wins over what the file says, and may be all that is asked of a file.
        ("id", [None, 3, 4], pa.int32()),
    ):
        for k, (value, folder) in enumerate(zip(values, "abc", strict=True)):
            shown = {None: "__HIVE_DEFAULT_PARTITION__", "a b/c": "a%20b%2Fc"}.get(value, value)
            write(frame[20 * k : 20 * k + 20], tmp_path / name / folder / f"{name}={shown}" / f"rows{ending}")
        result = run("score", tmp_path / name, "-m", model, "-k", name, "-o", output, "--overwrite")
        assert result.exit_code == 0, result.output
        found = papq.read_table(output).column(name)
        assert (found.type, found.to_pylist()) == (kind, [value for value in values for _ in range(20)])


def test_object_stores(run, rows, model, loaded, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    frame = rows(40, 1)
    with fsspec.open("memory://bucket/day/rows.csv", "w") as file:
        frame.to_csv(file, index=False)
    for k, source in enumerate(
        ("memory://bucket/day/rows.csv", "memory://bucket/day", "memory://bucket/*/*.csv")
    ):
        output = tmp_path / f"{k}.parquet"
        result = run("score", source, "-m", model, "-k", "id", "-o", output)
        assert result.exit_code == 0, result.output
        assert_scored(output, frame, loaded, model)


@pytest.fixture
def store():
    """An object store in memory."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def results_in(store):
    return {
        path.rpartition("/")[2]: store.cat_file(path) for path in store.find("/out") if store.isfile(path)
    }


@pytest.mark.usefixtures("small_parts")
def test_an_output_in_an_object_store(run, rows, model, loaded, tmp_path, monkeypatch, store):
    frame = rows(350, 1)
    source = write(frame, tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    options = ("score", source, "-m", model, "-k", "id", "-o", "memory://out/day/s.parquet")
    assert run(*options).exit_code == 0
    first = results_in(store)
    assert set(first) == {"s.parquet", "s.parquet.run.json"}
    (tmp_path / "copy.parquet").write_bytes(first["s.parquet"])
    assert_scored(tmp_path / "copy.parquet", frame, loaded, model)
    assert not list(tmp_path.glob(".anomalib-gen/[!.]*"))
    result = run(*options)
    assert result.exit_code == 1
    assert "memory://out/day/s.parquet exists already" in result.stderr
    # What is done is left alone; other input is scored anew, if that is asked for.
    with monkeypatch.context() as patch:
        patch.setattr(running, "score_rows", lambda *arguments, **options: pytest.fail("scored again"))
        assert run(*options, "--resume").exit_code == 0
    assert results_in(store) == first
    os.utime(source, (1, 1))
    assert run(*options, "--resume").exit_code == 1
    assert results_in(store) == first
    assert run(*options, "--resume", "--overwrite").exit_code == 0
    assert results_in(store)["s.parquet"] == first["s.parquet"]
    assert results_in(store)["s.parquet.run.json"] != first["s.parquet.run.json"]


def test_an_object_that_was_damaged_since_is_scored_again(run, rows, model, tmp_path, monkeypatch, store):
    source, place = write(rows(50, 1), tmp_path / "rows.parquet"), "memory://out/s.parquet"
    options = ("score", source, "-m", model, "-o", place, "--work", tmp_path / "work", "--resume")
    assert run(*options).exit_code == 0
    first = results_in(store)
    store.pipe_file("/out/s.parquet", first["s.parquet"][:1000])
    result = run(*options)
    assert result.exit_code == 2
    assert f"{place} has 1,000 bytes, and its run wrote {len(first['s.parquet']):,}" in result.stderr
    result = run(*options, "--overwrite")
    assert result.exit_code == 0
    assert "so the files are scored again" in result.stderr
    assert results_in(store) == first
    # A record of an earlier version knows no size.
    record = json.loads(first["s.parquet.run.json"])
    del record["bytes"]
    store.pipe_file("/out/s.parquet.run.json", json.dumps(record).encode())
    with monkeypatch.context() as patch:
        patch.setattr(running, "score_rows", lambda *arguments, **options: pytest.fail("scored again"))
        assert run(*options).exit_code == 0


def test_messages_name_the_output_in_the_store(run, rows, model, tmp_path, store):
    """And not the file on this machine that is uploaded as it."""
    frame = rows(50, 1)
    frame.loc[7, "x"] = np.nan
    source, place = write(frame, tmp_path / "rows.parquet"), "memory://out/s.parquet"
    options = ("score", source, "-m", model, "-o", place, "--work", tmp_path / "work", "--resume")
    for more, code, message in (
        ((), 2, f"such rows go to {place}.quarantine.jsonl"),
        (("--max-bad-rows", 1), 4, f"are in {place}.quarantine.jsonl"),
        (("--max-bad-rows", 1), 4, f"{place} is complete already"),
        ((), 2, f"{place} is complete, but without 1 bad rows"),
        (
            ("--max-bad-rows", 1, "--overwrite", "--quarantine", tmp_path / "bad.jsonl"),
            4,
            f"{place}.quarantine.jsonl is gone",
        ),
    ):
        result = run(*options, *more)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert "work" not in result.stderr


@pytest.mark.usefixtures("small_parts")
def test_a_store_that_fails_loses_nothing(run, rows, model, tmp_path, monkeypatch, store):
    frame = rows(350, 1)
    frame.loc[7, "x"] = np.nan
    source = write(frame, tmp_path / "rows.csv")
    work = ("--work", tmp_path / "work", "--max-bad-rows", 1)
    options = ("score", source, "-m", model, "-k", "id", "-o", "memory://out/s.csv", *work)

    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    for method in ("put_file", "mv"):
        with monkeypatch.context() as patch:
            patch.setattr(type(store), method, fail)
            result = run(*options, "--resume")
        assert result.exit_code == 2
        assert "no route to host" in result.stderr
        assert "--resume" in result.stderr
        assert "s.csv" not in results_in(store)
    with monkeypatch.context() as patch:
        patch.setattr(running, "score_rows", lambda *arguments, **options: pytest.fail("scored again"))
        result = run(*options, "--resume")
    assert result.exit_code == 4, result.output
    assert {"s.csv", "s.csv.run.json", "s.csv.quarantine.jsonl"} <= set(results_in(store))
    assert not list((tmp_path / "work").glob("[!.]*"))


def test_outputs_that_no_store_takes(run, rows, model, tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    write(rows(20, 1), tmp_path / "rows.csv")
    store.put_file(str(tmp_path / "rows.csv"), "/in/rows.csv")
    for output, message in (
        ("memory://out/day", "no ending"),
        ("memory:///in/rows.csv", "one of the inputs"),
        ("magic://out/a.csv", "magic"),
        ("memory://out/a.xlsx", "no known format"),
    ):
        result = run("score", "memory:///in/rows.csv", "-m", model, "-o", output, "--overwrite")
        assert result.exit_code == 1, (output, result.output)
        assert message in result.stderr
    assert store.find("/out") == []


@pytest.mark.parametrize("command", ["fit", "score"])
@pytest.mark.parametrize("scheme", ["magic", "broken"])
def test_inputs_that_no_driver_is_there_for(run, model, tmp_path, monkeypatch, command, scheme):
    """As an output there: a message, whether the scheme is unknown or its driver is not installed."""
    registry = pytest.importorskip("fsspec.registry")
    missing = {"class": "no_such_driver.Files", "err": "Install no_such_driver"}
    monkeypatch.setitem(registry.known_implementations, "broken", missing)
    options = {"fit": ("-m", tmp_path / "m"), "score": ("-m", model, "-o", tmp_path / "out.parquet")}[command]
    result = run(command, f"{scheme}://in/rows.csv", *options, "--log-format", "json")
    assert result.exit_code == 1
    (entry,) = map(json.loads, result.stderr.splitlines())
    assert {"magic": "magic", "broken": "Install no_such_driver"}[scheme] in entry["message"]


@pytest.mark.parametrize("method", ["info", "glob", "open", "fsspec"])
@pytest.mark.parametrize("command", ["fit", "score"])
def test_whatever_the_library_of_a_store_raises_is_no_bug(
    run, rows, model, tmp_path, monkeypatch, store, command, method
):
    write(rows(20, 1), tmp_path / "rows.csv")
    store.put_file(str(tmp_path / "rows.csv"), "/in/rows.csv")

    class NoCredentialsError(Exception):
        pass

    def fail(*arguments, **options):
        raise NoCredentialsError("Unable to locate credentials")

    place = (
        "fsspec.core.url_to_fs"
        if method == "fsspec"
        else f"fsspec.implementations.memory.MemoryFileSystem.{method}"
    )
    monkeypatch.setattr(place, fail)
    options = {"fit": ("-m", tmp_path / "m"), "score": ("-m", model, "-o", tmp_path / "out.parquet")}[command]
    source = "memory://in/*.csv" if method == "glob" else "memory://in/rows.csv"
    result = run(command, source, *options, "--log-format", "json")
    assert result.exit_code == 2, result.output
    (entry,) = map(json.loads, result.stderr.splitlines())
    assert entry["message"].startswith("memory://")
    assert "cannot be read: NoCredentialsError Unable to locate credentials" in entry["message"]
    if (command, method) == ("score", "fsspec"):
        result = run("score", tmp_path / "rows.csv", "-m", model, "-o", "memory://out/a.csv")
        assert result.exit_code == 2
        assert "memory://out/a.csv: NoCredentialsError" in result.stderr


def test_a_defect_is_one_line_of_json_too(run, rows, model, tmp_path, monkeypatch):
    source = write(rows(20, 1), tmp_path / "rows.csv")
    monkeypatch.setattr(running, "find_inputs", lambda patterns: [][0])
    arguments = ("score", source, "-m", model, "-o", tmp_path / "out.parquet")
    result = run(*arguments, "--log-format", "json")
    assert result.exit_code == 5
    (entry,) = map(json.loads, result.stderr.splitlines())
    assert "IndexError" in entry["message"]
    assert "Traceback" in entry["traceback"]
    assert "Traceback" in run(*arguments).stderr


def test_a_model_without_names_takes_columns_by_position(run, fitted, X, tmp_path):
    fitted.save(tmp_path / "model", X=X)
    frame = pd.DataFrame(X, columns=["p", "q", "r"]).assign(key=range(len(X)))
    source = write(frame, tmp_path / "rows.csv")
    result = run("score", source, "-m", tmp_path / "model", "-k", "key", "-o", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(read(tmp_path / "out.parquet")["score"], fitted.score_samples(X), rtol=1e-9)
    result = run("score", source, "-m", tmp_path / "model", "-o", tmp_path / "other.parquet")
    assert result.exit_code == 2
    assert "4 columns that are no keys, and the model takes 3" in result.stderr


# Columns ---------------------------------------------------------------------------------------------------


def test_reordered_and_extra_columns_do_not_matter(run, rows, model, loaded, tmp_path):
    frame = rows(50, 1)
    for ending in (".parquet", ".csv"):
        source = write(frame[["kind", "n", "id", "x"]].assign(more=1.5, text="t"), tmp_path / f"rows{ending}")
        output = tmp_path / f"out{ending}"
        assert run("score", source, "-m", model, "-k", "id", "-o", output).exit_code == 0
        assert_scored(output, frame, loaded, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="x"), "lacks the column 'x', which the model needs"),
        (lambda f: f.drop(columns="id"), "has no column 'id'"),
        (
            lambda f: f.assign(x=f["x"].astype(str)),
            "'x' of .* has the type (large_)?string, and the model was fitted to float",
        ),
        (lambda f: f.assign(kind=1), "'kind' of .* has the type int64, and the model was fitted to text"),
        (lambda f: f.assign(x=pd.Timestamp("2024-01-01")), "'x' of .* timestamp"),
        (lambda f: f.assign(x=[[1.0]] * len(f)), "which no model takes"),
    ],
)
def test_a_changed_schema_is_one_clear_message(run, rows, model, tmp_path, change, message):
    frame = rows(50, 1)
    good = write(frame, tmp_path / "a.parquet")
    output = tmp_path / "out.parquet"
    assert run("score", good, "-m", model, "-k", "id", "-o", output).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    write(change(frame), tmp_path / "b.parquet")
    result = run("score", good, tmp_path / "b.parquet", "-m", model, "-k", "id", "-o", output, "--overwrite")
    assert result.exit_code == 2
    assert pytest.importorskip("re").search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    # Such a file can be left out instead.
    arguments = ("-m", model, "-k", "id", "-o", output, "--overwrite", "--max-bad-files", 1)
    assert run("score", good, tmp_path / "b.parquet", *arguments).exit_code == 4
    assert output.read_bytes() == before["out.parquet"]
    (entry,) = map(json.loads, (tmp_path / "out.parquet.quarantine.jsonl").read_text().splitlines())
    assert entry["row"] is None
    assert entry["file"].endswith("b.parquet")


def test_numbers_of_other_widths_and_dictionaries_are_fine(run, rows, model, loaded, tmp_path):
    frame = rows(50, 1)
    frame["x"] = frame["x"].astype(np.float32).astype(float)
    other = frame.assign(
        x=frame["x"].astype(np.float32), n=frame["n"].astype(np.uint8), kind=frame["kind"].astype("category")
    )
    source = write(other, tmp_path / "rows.parquet")
    assert run("score", source, "-m", model, "-k", "id", "-o", tmp_path / "out.parquet").exit_code == 0
    assert_scored(tmp_path / "out.parquet", frame, loaded, model)


# Bad rows and files ----------------------------------------------------------------------------------------

BAD = "id,x,n,kind\n1,.5,3,a\n2,much,3,b\n3,1,2\n4,1,,b\n5,inf,1,a\n6, 1.5 ,1,zz\n7,0.25,2,b\n"


@pytest.mark.parametrize("n_rows", [2, 3, 100])
def test_bad_rows_go_to_the_quarantine(run, model, loaded, tmp_path, monkeypatch, n_rows):
    monkeypatch.setattr(running, "rows_per_part", lambda n_columns: n_rows)
    source = tmp_path / "rows.csv"
    source.write_text(BAD)
    output = tmp_path / "out.parquet"
    result = run("score", source, "-m", model, "-k", "id", "-o", output, "--max-bad-rows", 4)
    assert result.exit_code == 4, result.output
    good = pd.DataFrame({"id": list("167"), "x": [0.5, 1.5, 0.25], "n": [3, 1, 2], "kind": ["a", "zz", "b"]})
    assert_scored(output, good, loaded, model)
    entries = [
        json.loads(line) for line in (tmp_path / "out.parquet.quarantine.jsonl").read_text().splitlines()
    ]
    assert [entry["row"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["reason"] for entry in entries] == [
        "column 'x': 'much' is no number",
        "the line has 3 fields, not 4",
        "missing or infinite in 'n'",
        "missing or infinite in 'x'",
    ]
    assert entries[0]["values"] == {"id": "2", "x": "much", "n": "3", "kind": "b"}
    assert entries[1]["line"] == "3,1,2"
    record = json.loads((tmp_path / "out.parquet.run.json").read_text())
    assert (record["rows"], record["bad_rows"]) == (3, 4)
    # One fewer than there are is too few, and nothing changes.
    before = output.read_bytes()
    result = run("score", source, "-m", model, "-k", "id", "-o", output, "--max-bad-rows", 3, "--overwrite")
    assert result.exit_code == 2
    assert "more bad rows than 3" in result.stderr
    assert output.read_bytes() == before


def test_rows_that_only_the_model_can_refuse_are_found(tiny):
    """Those are found by halving; the others are scored as if the bad ones were not there."""
    frame = pd.DataFrame({"a": np.arange(40.0)})

    class Picky:
        def score_samples(self, X):
            if (X["a"] % 13 == 5).any():
                raise ValueError("thirteen\nand more")
            return -X["a"].to_numpy()

    scores, bad = running.score_rows(Picky(), frame, named=True, limit=10)
    assert bad == {5: "thirteen", 18: "thirteen", 31: "thirteen"}
    np.testing.assert_array_equal(scores, np.where(frame["a"] % 13 == 5, np.nan, -frame["a"]))
    assert len(running.score_rows(Picky(), frame, named=True, limit=0)[1]) > 0


def test_missing_values_that_the_model_fills_are_no_bad_rows(run, rows, tmp_path):
    frame = rows(200, 0)
    frame.loc[::7, "x"] = np.nan
    source = write(frame, tmp_path / "train.parquet")
    result = run(
        "fit",
        source,
        "-m",
        tmp_path / "model",
        "--exclude",
        "id",
        "--detector",
        "anomalib_gen.VAEDetector(max_iter=10)",
    )
    assert result.exit_code == 0, result.output
    frame.loc[3, "n"] = np.nan
    mixed = write(frame, tmp_path / "rows.parquet")
    arguments = ("-m", tmp_path / "model", "-k", "id", "-o", tmp_path / "out.parquet", "--max-bad-rows", 1)
    result = run("score", mixed, *arguments)
    assert result.exit_code == 4, result.output
    found = read(tmp_path / "out.parquet")
    assert len(found) == 199
    assert np.isfinite(found["score"]).all()


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz", ".feather"])
def test_unreadable_files(run, rows, model, tmp_path, ending):
    good = write(rows(300, 1), tmp_path / "a.parquet")
    bad = write(rows(3000, 2), tmp_path / f"b{ending}")
    data = bad.read_bytes()
    for content in (
        b"",
        b"\x00\xffrubbish" * 20,
        data[: len(data) // 2] if ending != ".csv" else b"id,x\n\xff\xfe,1\n",
    ):
        bad.write_bytes(content)
        output = tmp_path / "out.parquet"
        result = run("score", good, bad, "-m", model, "-k", "id", "-o", output, "--overwrite")
        assert result.exit_code == 2, result.output
        assert f"b{ending}" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not output.exists()
        arguments = ("-m", model, "-k", "id", "-o", output, "--max-bad-files", 1)
        result = run("score", good, bad, *arguments)
        assert result.exit_code == 4, result.output
        assert len(read(output)) == 300
        output.unlink()


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_breaks_off_is_left_out_as_a_whole(run, rows, model, loaded, tmp_path, monkeypatch):
    frames = [rows(250, 1), rows(450, 2), rows(150, 3)]
    for k, frame in enumerate(frames):
        write(frame, tmp_path / "in" / f"{k}.parquet")
    real = sources.Reader.parts

    def break_off(reader, n_rows):
        for number, part in enumerate(real(reader, n_rows)):
            if reader.item.path.endswith("1.parquet") and number == 3:
                raise running.DataError("1.parquet cannot be read: broken.")
            yield part

    monkeypatch.setattr(sources.Reader, "parts", break_off)
    arguments = ("-m", model, "-k", "id", "-o", tmp_path / "out.parquet")
    result = run("score", tmp_path / "in", *arguments)
    assert result.exit_code == 2
    assert "broken" in result.stderr
    result = run("score", tmp_path / "in", *arguments, "--max-bad-files", 1, "--resume")
    assert result.exit_code == 4, result.output
    assert_scored(
        tmp_path / "out.parquet", pd.concat([frames[0], frames[2]], ignore_index=True), loaded, model
    )


def test_no_files_at_all(run, model, tmp_path):
    for source, message in ((tmp_path / "no.csv", "does not exist"), (f"{tmp_path}/*.csv", "names no file")):
        result = run("score", source, "-m", model, "-o", tmp_path / "out.parquet")
        assert result.exit_code == 2
        assert message in result.stderr
    (tmp_path / "rows.xlsx").write_text("x")
    result = run("score", tmp_path / "rows.xlsx", "-m", model, "-o", tmp_path / "out.parquet")
    assert result.exit_code == 2
    assert "no known format" in result.stderr


def test_an_empty_table_is_scored(run, rows, model, tmp_path):
    for ending in (".parquet", ".csv"):
        source = write(
            rows(0, 0).astype({"x": float, "n": int, "id": str, "kind": str}), tmp_path / f"rows{ending}"
        )
        result = run("score", source, "-m", model, "-k", "id", "-o", tmp_path / f"out{ending}")
        assert result.exit_code == 0, result.output
        assert len(read(tmp_path / f"out{ending}")) == 0


def test_a_model_without_names_takes_one_order_of_columns(run, fitted, X, tmp_path):
    fitted.save(tmp_path / "model", X=X)
    frame = pd.DataFrame(X, columns=["p", "q", "r"]).assign(key=range(len(X)))
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    frame.to_parquet(first)
    frame[["key", "r", "q", "p"]].to_parquet(second)
    out = tmp_path / "out.parquet"
    base = ("-m", tmp_path / "model", "-k", "key", "-o", out)
    for command in ("score", "explain"):
        result = run(command, first, second, *base)
        assert result.exit_code == 2, result.output
        assert f"{second} has the column 'r' where {first} has 'p'" in result.stderr
        assert not out.exists()
    result = run("score", first, second, *base, "--max-bad-files", 1)
    assert result.exit_code == 4, result.output
    assert len(papq.read_table(out)) == len(X)
    for path in (first, second):
        pd.read_parquet(path).drop(columns="key").to_parquet(path)
    result = run("calibrate", first, second, "-m", tmp_path / "model", "-o", tmp_path / "calibrated")
    assert result.exit_code == 2, result.output
    assert "goes by the order of columns" in result.stderr


def test_a_column_of_missing_values_has_any_type(run, rows, model, tmp_path):
    """As pandas writes it: of the type null."""
    frame = rows(20, 0)
    frame.to_parquet(tmp_path / "a.parquet")
    for column in ("kind", "id"):
        frame.assign(**{column: None}).to_parquet(tmp_path / "b.parquet")
        assert pa.types.is_null(papq.read_schema(tmp_path / "b.parquet").field(column).type)
        pair = tmp_path / "a.parquet", tmp_path / "b.parquet"
        for files in (pair, pair[::-1]):
            for command in ("score", "explain"):
                out = tmp_path / "out.parquet"
                result = run(command, *files, "-m", model, "-k", "id", "-o", out, "--overwrite")
                assert result.exit_code == 0, result.output
                found = papq.read_table(out)["id"]
                assert found.type == pa.string()
                assert found.null_count == (len(found) // 2 if column == "id" else 0)


@pytest.mark.parametrize("ending", ["parquet", "feather"])
def test_columns_of_one_name_are_named(run, rows, model, tmp_path, ending):
    table = pa.Table.from_pandas(rows(20, 0), preserve_index=False)
    table = table.append_column("more", table["x"]).append_column("more", table["x"])
    source = tmp_path / f"rows.{ending}"
    (papq.write_table if ending == "parquet" else pyarrow.feather.write_feather)(table, source)
    for result in (
        run("score", source, "-m", model, "-o", tmp_path / "out.csv"),
        run("fit", source, "-m", tmp_path / "fitted"),
    ):
        assert result.exit_code == 2
        assert f"{source} has the column 'more' more than once" in result.stderr


# Model, output, codes --------------------------------------------------------------------------------------


def test_a_damaged_model_is_code_2(run, rows, tmp_path, fitted):
    source = write(rows(5, 0), tmp_path / "rows.csv")
    result = run("score", source, "-m", tmp_path / "nowhere", "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    fitted.save(tmp_path / "model")
    (tmp_path / "model" / "tensors.safetensors").write_bytes(b"")
    result = run("score", source, "-m", tmp_path / "model", "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "truncated" in result.stderr


def test_outputs_that_may_not_be_made(run, rows, model, tmp_path, monkeypatch):
    source = write(rows(20, 0), tmp_path / "rows.parquet")
    base = ("score", source, "-m", model)
    assert run(*base, "-o", tmp_path / "out.xlsx").exit_code == 1
    assert run(*base, "-k", "score", "-o", tmp_path / "out.csv").exit_code == 1
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("three years")
    result = run(*base, "-o", tmp_path / "precious", "--overwrite")
    assert result.exit_code == 1
    assert (tmp_path / "precious" / "thesis.txt").exists()
    # Nor, after hours of scoring, a file where a folder is wanted, or a link to a folder.
    (tmp_path / "plain").write_text("three years")
    (tmp_path / "linked").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(running, "score_rows", None)
    for name in ("plain", "linked"):
        result = run(*base, "-o", tmp_path / name, "--overwrite")
        assert result.exit_code == 1
        assert "is not replaced. Choose another output" in result.stderr
    assert (tmp_path / "plain").read_text() == "three years"
    (tmp_path / "out.csv").write_text("earlier")
    result = run(*base, "-o", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert (tmp_path / "out.csv").read_text() == "earlier"


@pytest.mark.parametrize("ending", [".csv", ".tsv.gz", ".parquet", "", ".feather"])
def test_keys_that_a_format_cannot_hold_are_refused_before_the_work(
    run, rows, model, tmp_path, monkeypatch, ending
):
    table = pa.Table.from_pandas(rows(3, 0))
    table = table.append_column("list", pa.array([[1], [], None]))
    table = table.append_column("span", pa.array([(1, 2, 3)] * 3, pa.month_day_nano_interval()))
    table = table.append_column("bytes", pa.array([b"\xff", b"a", None]))
    pyarrow.feather.write_feather(table, tmp_path / "in.feather")
    base = ("score", tmp_path / "in.feather", "-m", model)
    refused = {".parquet": ["span"], "": ["span"], ".feather": []}.get(ending, ["list", "span"])
    for key in ("list", "span", "bytes"):
        with monkeypatch.context() as patch:
            if key in refused:
                patch.setattr(running, "score_rows", None)
            result = run(*base, "-k", key, "-o", tmp_path / f"{key}{ending}")
        # (Whether bytes are text shows when they are written.)
        late = key == "bytes" and ending in (".csv", ".tsv.gz")
        assert result.exit_code == (1 if key in refused else 2 if late else 0), result.output
        if key in refused:
            assert f"Column '{key}' is of type" in result.stderr
        if late:
            assert "cannot be written: Invalid UTF8" in result.stderr


def test_a_quarantine_replaces_quarantines_alone(run, rows, model, tmp_path):
    """A good night removes it, and would remove whatever has its name."""
    base = ("score", write(rows(20, 0), tmp_path / "rows.csv"), "-m", model, "-o", tmp_path / "out.csv")
    for name, text in (("notes.txt", "three years"), ("rows.csv", None), ("folder", None), ("a.json", "[1]")):
        place = tmp_path / name
        if name == "folder":
            place.mkdir()
        elif text:
            place.write_text(text)
        result = run(*base, "--quarantine", place)
        assert result.exit_code == 1
        assert f"--quarantine {place} would replace" in result.stderr
        assert place.exists()
    (tmp_path / "bad.jsonl").write_text('{"file": "b.csv", "reason": "r", "row": 1}\n')
    assert run(*base, "--quarantine", tmp_path / "bad.jsonl").exit_code == 0
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.mark.parametrize("name", ["incoming/a.parquet", "incoming"])
def test_an_input_is_never_replaced(run, rows, model, tmp_path, monkeypatch, name):
    (tmp_path / "incoming").mkdir()
    source = write(rows(20, 0), tmp_path / "incoming" / "part-000000.parquet")
    if name.endswith(".parquet"):
        source = source.rename(tmp_path / name)
    before = source.read_bytes()
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        result = run("score", "incoming", "-m", model, "-o", path, "--overwrite")
        assert result.exit_code == 1
        assert "one of the inputs" in result.stderr
    for path, message in (
        (source, "one of the inputs"),
        ("out.csv", "by the run"),
        ("out.csv.run.json", "by the run"),
        ("memory://bad.jsonl", "must be a file of this machine"),
    ):
        result = run("score", "incoming", "-m", model, "-o", "out.csv", "--quarantine", path)
        assert result.exit_code == 1
        assert message in result.stderr
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["incoming"]
    assert run("score", "incoming", "-m", model, "-o", "incoming.csv").exit_code == 0


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet", "feather"])
def test_a_file_without_a_byte_says_so(run, model, tmp_path, ending):
    source = tmp_path / f"a.{ending}"
    source.touch()
    result = run("score", source, "-m", model, "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert f"{source} is empty: it has 0 bytes." in result.stderr


def test_a_model_of_images_is_refused_at_once(run, rows, tmp_path):
    images = np.random.default_rng(0).normal(size=(20, 1, 8, 8))
    detector = VAEDetector(max_iter=2, hidden_features=4, random_state=0, device="cpu").fit(images)
    save(detector, tmp_path / "model")
    save(make_pipeline(ChannelsFirst(), detector), tmp_path / "pipeline")
    write(rows(5, 0), tmp_path / "rows.csv")
    for command in ("score", "calibrate", "explain"):
        for folder in ("model", "pipeline"):
            options = ("-m", tmp_path / folder, "-o", tmp_path / "out.csv")
            result = run(command, tmp_path / "rows.csv", *options)
            assert result.exit_code == 2, result.output
            assert "a detector of images of 1 x 8 x 8" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_a_threshold_that_flags_nothing_is_null_in_json(run, rows, model, loaded, tmp_path):
    frame = rows(60, 0).drop(columns="id")
    with pytest.warns(UserWarning, match="no row will be flagged"):
        detector = SplitConformalDetector(FrozenEstimator(loaded), alpha=0.001).fit(frame)
    save(detector, tmp_path / "model", X=frame)
    source = write(rows(50, 1).assign(y=1), tmp_path / "rows.parquet")
    result = run("score", source, "-m", tmp_path / "model", "-o", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out.csv.run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["threshold"] is None
    result = run("evaluate", source, "-m", tmp_path / "model", "--label", "y", "-o", tmp_path / "f.json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["threshold"] is None
    assert json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail)["flagged"] == 0


def test_a_folder_is_there_at_every_moment(run, rows, model, tmp_path, monkeypatch):
    """Replaced in one step, where the system can: the name is never taken away."""
    source, output = write(rows(20, 1), tmp_path / "rows.parquet"), tmp_path / "out"
    assert run("score", source, "-m", model, "-o", output).exit_code == 0
    before = (output / "part-000000.parquet").read_bytes()
    os.utime(source, (1, 1))
    real = os.rename

    def watched(old, new, **options):
        assert str(old) != str(output)
        return real(old, new, **options)

    monkeypatch.setattr(os, "rename", watched)
    assert run("score", source, "-m", model, "-o", output, "--overwrite").exit_code == 0
    assert (output / "part-000000.parquet").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.parquet",
        "out",
        "out.run.json",
        ".out.lock",
    }


def test_a_model_that_scores_no_rows_is_code_2(run, rows, tmp_path, fitted):
    save(make_union(VAEDetector(max_iter=5).fit(rows(50, 0)[["x", "n"]])), tmp_path / "model")
    result = run(
        "score", write(rows(20, 0), tmp_path / "a.csv"), "-m", tmp_path / "model", "-o", tmp_path / "out.csv"
    )
    assert result.exit_code == 2
    assert "scores no rows" in result.stderr


def test_two_runs_on_one_output_are_refused(run, rows, model, tmp_path):
    source = write(rows(20, 0), tmp_path / "rows.parquet")
    with FileLock(tmp_path / ".out.csv.lock"):
        result = run("score", source, "-m", model, "-o", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "Another run is writing" in result.stderr
    assert run("score", source, "-m", model, "-o", tmp_path / "out.csv").exit_code == 0


def test_an_alert_is_code_3(run, rows, model, tmp_path):
    far = rows(50, 1).assign(x=1e3)
    source = write(far, tmp_path / "rows.parquet")
    arguments = ("-m", model, "-o", tmp_path / "out.parquet", "--overwrite")
    result = run("score", source, *arguments, "--alert-above", 0.5)
    assert result.exit_code == 3
    assert "alert: 100.00% of the rows" in result.stderr
    assert len(read(tmp_path / "out.parquet")) == 50
    assert run("score", source, *arguments, "--alert-above", 1.0).exit_code == 0


def test_internal_errors_are_code_5(run, rows, model, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError("surprise")

    source = write(rows(20, 0), tmp_path / "rows.parquet")
    monkeypatch.setattr(sources, "to_frame", fail)
    assert run("score", source, "-m", model, "-o", tmp_path / "out.parquet").exit_code == 5
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".parts"]


def test_logs_for_machines_and_silence(run, rows, model, tmp_path):
    source = write(rows(20, 0), tmp_path / "rows.parquet")
    arguments = ("score", source, "-m", model, "-o", tmp_path / "out.parquet", "--overwrite")
    result = run(*arguments, "--log-format", "json")
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert records[-1]["rows"] == 20
    assert records[-1]["level"] == "info"
    assert result.stdout == ""
    assert run(*arguments, "--quiet").stderr == ""
    result = run("score", "nowhere.csv", "-m", model, "-o", "out.csv", "--quiet", "--log-format", "json")
    assert json.loads(result.stderr)["code"] == 2


MEASURE = """
import resource, sys
from anomalib_gen.cli import app
try:
    app(sys.argv[1:])
except SystemExit as stopped:
    print(stopped.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_memory_does_not_grow_with_the_files(rows, model, tmp_path, ending):
    """Eight times the rows take the same memory, but for what one part more or less costs."""
    frame = rows(200_000, 1)
    used = []
    for copies in (2, 16):
        for k in range(copies):
            write(frame, tmp_path / str(copies) / f"{k}{ending}")
        arguments = [
            "score",
            tmp_path / str(copies),
            "-m",
            model,
            "-k",
            "id",
            "-o",
            tmp_path / f"{copies}.parquet",
        ]
        code = [sys.executable, "-c", MEASURE, *map(str, arguments)]
        done = subprocess.run(
            code, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        code, megabytes = map(int, done.stdout.split())
        assert code == 0
        used.append(megabytes)
    print(used)
    assert used[1] < used[0] + 60


def test_the_paths_in_a_record_are_those_given(run, rows, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(rows(20, 0), Path("rows.parquet"))
    assert run("score", "rows.parquet", "-m", model, "-o", "out.parquet").exit_code == 0
    assert json.loads(Path("out.parquet.run.json").read_text())["inputs"][0][0] == "rows.parquet"


def test_only_what_is_needed_is_read(run, rows, model, loaded, tmp_path):
    """A column that no reader could decode does not matter where nobody asks for it."""
    frame = rows(50, 1)
    source = tmp_path / "rows.parquet"
    papq.write_table(
        pa.Table.from_pandas(frame.assign(blob="q" * 5000)), source, use_dictionary=False, compression=None
    )
    data = source.read_bytes()
    start = data.index(b"q" * 4000)
    # The length of its first value.
    source.write_bytes(data[: start - 4] + b"\xff" * 4 + data[start:])
    with pytest.raises((OSError, pa.ArrowException)):
        papq.read_table(source)
    result = run("score", source, "-m", model, "-k", "id", "-o", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    assert_scored(tmp_path / "out.parquet", frame, loaded, model)


def test_mistakes_of_the_night_are_named(run, rows, model, tmp_path):
    rows(20, 1).to_csv(tmp_path / "semi.csv", sep=";", index=False)
    for key in ((), ("--key", "id")):
        result = run("score", tmp_path / "semi.csv", "-m", model, *key, "-o", tmp_path / "s.parquet")
        assert result.exit_code == 2
        assert "It has 'id;x;n;kind'. Fields of .csv are separated by commas" in result.stderr
    rows(20, 1)[:0].to_parquet(tmp_path / "empty.parquet")
    result = run("score", tmp_path / "empty.parquet", "-m", model, "-o", tmp_path / "s.parquet", "--quiet")
    assert result.exit_code == 0
    assert "warning: no row was scored" in result.stderr
    result = run("score", tmp_path / "empty.parquet", "-m", model, "-o", tmp_path / "semi.csv" / "s.parquet")
    assert result.exit_code == 2
    assert "is a file where a folder should be" in result.stderr


def test_a_model_without_a_threshold_is_no_internal_error():
    density = KernelDensity().fit(np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"A KernelDensity has no threshold.*calibrate"):
        threshold_of(make_pipeline(StandardScaler(), density))


def test_a_process_that_refuses_text_ends_with_its_code(rows, model, tmp_path):
    """No thread in the background is left that would end it by a signal."""
    source = write(rows(500, 1), tmp_path / "rows.csv")
    command = [sys.executable, "-m", "anomalib_gen", "score", source, "-m", model, "--key", "nobody"]
    done = subprocess.run(
        [*map(str, command), "-o", str(tmp_path / "out.parquet")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "has no column 'nobody'" in done.stderr
