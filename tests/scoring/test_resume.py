"""Nothing is lost: a run that ends at any moment goes on to the same bytes, and scores nothing twice."""

import contextlib
import errno
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomalib_gen.scoring import parts
from anomalib_gen.scoring import run as running
from anomalib_gen.scoring.sources import Reader


class Killed(BaseException):
    """What no code handles."""


def is_killed(run, *arguments):
    try:
        run(*arguments)
    except Killed:
        return True
    return False


def results(folder):
    """All files that a run leaves, but for what is hidden: its lock, and what is not done."""
    found = {str(path.relative_to(folder)): path for path in folder.glob("**/*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def of_output(found, name):
    """Those that are the output, a file or a folder."""
    return {key: data for key, data in found.items() if name in (key, key.split("/")[0])}


PARTITIONED = ("out", ("-k", "kind", "--partition-by", "kind"))


@pytest.fixture
def incoming(rows, tmp_path):
    """Two files, with a bad row in the second."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    rows(250, 1).to_parquet(folder / "a.parquet")
    text = rows(230, 2).to_csv(index=False).splitlines(keepends=True)
    text[130] = "x,much,1,a\n"
    (folder / "b.csv").write_text("".join(text))
    return folder


def command(incoming, model, output, *more):
    return (
        "score",
        incoming,
        "-m",
        model,
        "-k",
        "id",
        "-o",
        output,
        "--max-bad-rows",
        5,
        "--resume",
        "--quiet",
        *more,
    )


@pytest.fixture
def expected(run, incoming, model, tmp_path, small_parts):
    folder = tmp_path / "expected"
    assert run(*command(incoming, model, folder / "out.parquet")).exit_code == 4
    return results(folder)


@pytest.fixture
def counted(monkeypatch):
    """Rows that were scored, one entry for each part."""
    seen = []
    real = running.score_rows

    def count(model, frame, **options):
        seen.append(len(frame))
        return real(model, frame, **options)

    monkeypatch.setattr(running, "score_rows", count)
    return seen


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("name", "more"), [("out.parquet", ()), PARTITIONED], ids=["file", "partitions"])
def test_a_run_that_is_killed_at_any_call_goes_on_to_the_same_bytes(
    run, incoming, model, tmp_path, counted, monkeypatch, name, more
):
    """Each call that gives something its place on the disk is the last one of a run, in turn."""
    assert run(*command(incoming, model, tmp_path / "expected" / name, *more)).exit_code == 4
    expected = results(tmp_path / "expected")
    places = [(os, "replace"), (os, "rename"), (os, "fsync"), (parts.Parts, "remove")]
    real = {(owner, method): getattr(owner, method) for owner, method in places}
    moment, finished_before = 0, set()
    while True:
        folder = tmp_path / f"killed-{moment}"
        calls = iter(range(10_000))

        def dying(function, calls=calls, moment=moment):
            def wrapped(*arguments, **options):
                if next(calls) >= moment:
                    raise Killed
                return function(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:
            for (owner, method), function in real.items():
                patch.setattr(owner, method, dying(function))
            if not is_killed(run, *command(incoming, model, folder / name, *more)):
                break
        visible = results(folder)
        if (folder / name).exists():  # whenever it is there, it is whole
            assert of_output(visible, name) == of_output(expected, name)
        done = len(list((folder / f".{name}.parts").glob("*.arrow")))
        finished_before.add(done)
        counted.clear()
        assert run(*command(incoming, model, folder / name, *more)).exit_code == 4
        assert results(folder) == expected
        assert len(counted) == (6 - done if f"{name}.run.json" not in visible or done else 0)
        moment += 1
    assert moment > 20
    assert finished_before == set(range(7))


@pytest.mark.usefixtures("small_parts", "expected")
def test_a_finished_run_is_left_alone_and_other_input_is_scored_anew(
    run, rows, incoming, model, tmp_path, counted
):
    output = tmp_path / "expected" / "out.parquet"
    before = results(output.parent)
    assert run(*command(incoming, model, output)).exit_code == 4
    assert counted == []
    assert results(output.parent) == before
    rows(120, 3).to_parquet(incoming / "c.parquet")
    result = run(*command(incoming, model, output))
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert run(*command(incoming, model, output, "--overwrite")).exit_code == 4
    assert sum(counted) == 250 + 229 + 120
    after = results(output.parent)
    assert after["out.parquet"] != before["out.parquet"]
    (incoming / "c.parquet").unlink()
    (incoming / "b.csv").unlink()
    assert run(*command(incoming, model, output, "--overwrite")).exit_code == 0
    # A quarantine of other rows does not stay beside it.
    assert set(results(output.parent)) == {"out.parquet", "out.parquet.run.json"}


@pytest.mark.usefixtures("small_parts", "expected")
def test_parts_that_were_being_removed_do_not_stay(run, incoming, model, tmp_path, counted, monkeypatch):
    folder = tmp_path / "out"

    def die(path, **options):
        for part in path.glob("*.arrow"):
            part.unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", die)
        assert is_killed(run, *command(incoming, model, folder / "out.parquet"))
    before = results(folder)
    counted.clear()
    assert run(*command(incoming, model, folder / "out.parquet")).exit_code == 4
    assert counted == []
    assert results(folder) == before
    assert not (folder / ".out.parquet.parts").exists()


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_run_are_not_used(run, incoming, model, tmp_path, expected, counted, monkeypatch):
    folder = tmp_path / "out"

    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_result", die)
        assert is_killed(run, *command(incoming, model, folder / "out.parquet"))
    assert len(counted) == 6
    # The same bytes, at another time: not the same file, for all that is known.
    later = time.time() + 5
    os.utime(incoming / "a.parquet", (later, later))
    counted.clear()
    result = run(*[item for item in command(incoming, model, folder / "out.parquet") if item != "--quiet"])
    assert "discarding" in result.stderr
    assert len(counted) == 6
    assert results(folder)["out.parquet"] == expected["out.parquet"]


@pytest.mark.usefixtures("small_parts", "expected")
def test_a_lower_limit_counts_what_was_left_out_already(run, incoming, model, tmp_path, monkeypatch):
    def die(*arguments):
        raise Killed

    arguments = command(incoming, model, tmp_path / "out" / "out.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(running, "write_result", die)
        assert is_killed(run, *arguments)
    result = run(*arguments, "--max-bad-rows", 0)
    assert result.exit_code == 2
    assert "left out 1 bad rows, more than 0" in result.stderr
    assert run(*arguments).exit_code == 4


@pytest.mark.usefixtures("small_parts", "expected")
def test_a_finished_run_is_judged_by_the_limits_of_today(run, incoming, model, tmp_path, counted):
    folder = tmp_path / "expected"
    arguments = command(incoming, model, folder / "out.parquet")
    before = results(folder)
    result = run(*arguments, "--max-bad-rows", 0)
    assert result.exit_code == 2
    assert "complete, but without 1 bad rows, more than 0" in result.stderr
    assert results(folder) == before
    assert run(*arguments).exit_code == 4
    assert results(folder) == before
    assert counted == []


@pytest.mark.usefixtures("small_parts", "expected")
def test_the_quarantine_of_a_finished_run_goes_where_it_is_wanted(run, incoming, model, tmp_path, counted):
    folder = tmp_path / "expected"
    arguments = command(incoming, model, folder / "out.parquet")
    before = results(folder)
    for place in (tmp_path / "bad.jsonl", tmp_path / "worse.jsonl"):
        assert run(*arguments, "--quarantine", place).exit_code == 4
        assert place.read_bytes() == before["out.parquet.quarantine.jsonl"]
        assert set(results(folder)) == {"out.parquet", "out.parquet.run.json"}
    assert not (tmp_path / "bad.jsonl").exists()
    assert run(*arguments).exit_code == 4
    assert results(folder) == before
    assert not (tmp_path / "worse.jsonl").exists()
    assert counted == []
    # A file that two runs share is the other one's now, and stays; so does whatever else a record might name.
    for text in ("precious", '{"file": "other.csv", "row": 3, "reason": "bad"}\n'):
        (folder / "out.parquet.quarantine.jsonl").write_text(text)
        result = run(*arguments, "--quarantine", tmp_path / "bad.jsonl")
        assert result.exit_code == 1
        assert "gone or another run's" in result.stderr
        assert (folder / "out.parquet.quarantine.jsonl").read_text() == text
    # What is gone can only be found by scoring again.
    (folder / "out.parquet.quarantine.jsonl").unlink()
    assert run(*arguments, "--quarantine", tmp_path / "bad.jsonl").exit_code == 1
    assert run(*arguments, "--quarantine", tmp_path / "bad.jsonl", "--overwrite").exit_code == 4
    assert (tmp_path / "bad.jsonl").read_bytes() == before["out.parquet.quarantine.jsonl"]
    assert sum(counted) == 250 + 229


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_leaves_earlier_results(run, incoming, model, tmp_path, expected, monkeypatch):
    folder = tmp_path / "expected"
    output = folder / "out.parquet"
    record = folder / "out.parquet.run.json"
    real = running.write_file

    def fill(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("anomalib_gen.scoring.parts.write_file", "anomalib_gen.scoring.run.write_result"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fill if target.endswith("file") else lambda *arguments: fill(None, None))
            os.utime(incoming / "b.csv")
            result = run(*command(incoming, model, output, "--overwrite"))
        assert result.exit_code == 2
        assert "disk is full" in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 2
        visible = results(folder)
        assert visible["out.parquet"] == expected["out.parquet"]
        assert visible["out.parquet.run.json"] == expected["out.parquet.run.json"]
    assert running.write_file is real
    assert run(*command(incoming, model, output, "--overwrite")).exit_code == 4
    assert output.read_bytes() == expected["out.parquet"]
    assert record.exists()


@pytest.mark.parametrize("name", ["out.parquet", "folder"])
@pytest.mark.usefixtures("small_parts")
def test_an_output_that_was_damaged_since_is_not_taken_for_complete(
    run, incoming, model, tmp_path, counted, name
):
    output = tmp_path / "scores" / name
    arguments = command(incoming, model, output)
    assert run(*arguments).exit_code == 4
    damaged = max(output.iterdir()) if output.is_dir() else output
    whole, size = damaged.read_bytes(), running.size_of(output)
    damaged.write_bytes(whole[:1000])
    counted.clear()
    result = run(*arguments)
    assert result.exit_code == 2
    lost = len(whole) - 1000
    assert f"{output} has {size - lost:,} bytes, and its run wrote {size:,}" in result.stderr
    assert "with --overwrite" in result.stderr
    assert damaged.read_bytes() == whole[:1000]
    assert not counted
    result = run(*arguments, "--overwrite")
    assert result.exit_code == 4
    assert "so the files are scored again" in result.stderr
    assert damaged.read_bytes() == whole
    assert counted
    counted.clear()
    assert run(*arguments, "--overwrite").exit_code == 4
    assert not counted


@pytest.mark.usefixtures("small_parts")
def test_a_record_that_knows_no_size_is_trusted(run, incoming, model, tmp_path, counted):
    output = tmp_path / "out.parquet"
    assert run(*command(incoming, model, output)).exit_code == 4
    path = tmp_path / "out.parquet.run.json"
    record = json.loads(path.read_bytes())
    assert record.pop("bytes") == output.stat().st_size
    path.write_text(json.dumps(record))
    counted.clear()
    assert run(*command(incoming, model, output)).exit_code == 4
    assert not counted


SLOW_PARTS = """
import sys, time
import anomalib_gen.scoring.run as running
running.rows_per_part = lambda n_columns: 100
real = running.Parts.write
def slow(*arguments):
    time.sleep(0.02)
    real(*arguments)
running.Parts.write = slow
from anomalib_gen.cli import app
"""


def start(arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = SLOW_PARTS + 'print("ready", flush=True)\napp(sys.argv[1:])\n'
    code = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Imports once, then forks for each run: a process of its own, that can be killed, without the start of one.
FORKS = (
    SLOW_PARTS
    + """
import json, os
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            app(json.loads(line))
        except SystemExit as stopped:
            os._exit(stopped.code or 0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
)


@pytest.fixture
def forks():
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        process.stdin.close()
        assert process.wait() == 0


def begin(forks, arguments):
    """Start a run; its exit code is what `forks` prints next."""
    forks.stdin.write(json.dumps([str(item) for item in arguments]).encode() + b"\n")
    return int(forks.stdout.readline())


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_is_killed_three_times_goes_on_to_the_same_bytes(
    run, rows, model, tmp_path, counted, forks
):
    """After some parts, wherever it is then; early enough that none of the processes gets through."""
    rows(4030, 1).to_parquet(tmp_path / "rows.parquet")
    assert run(*command(tmp_path / "rows.parquet", model, tmp_path / "whole" / "out.csv")).exit_code == 0
    folder = tmp_path / "killed"
    chance, done = random.Random(0), 0
    for least in sorted(chance.sample(range(1, 20), 3)):
        pid = begin(forks, command(tmp_path / "rows.parquet", model, folder / "out.csv"))
        wait_for(lambda least=least: len(list(folder.glob(".out.csv.parts/*.arrow"))) >= least)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert int(forks.stdout.readline()) == -signal.SIGKILL
        assert len(list(folder.glob(".out.csv.parts/*.arrow"))) >= max(done, least)
        done = len(list(folder.glob(".out.csv.parts/*.arrow")))
        assert not (folder / "out.csv").exists()
    counted.clear()
    assert run(*command(tmp_path / "rows.parquet", model, folder / "out.csv")).exit_code == 0
    assert len(counted) == 41 - done < 41
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [("out.csv", ()), ("out.csv", ("--p-values", "--explain", 2)), PARTITIONED],
    ids=["scores", "explanations", "partitions"],
)
def test_runs_that_are_killed_fifty_times_go_on_to_the_same_bytes(
    run, rows, model, tmp_path, forks, name, more
):
    """Killed at random moments until one is through, and then another, until there were fifty kills."""
    if "--p-values" in more:
        rows(500, 9).to_parquet(tmp_path / "normal.parquet")
        options = ("-m", model, "--method", "conformal", "-o", tmp_path / "calibrated")
        assert run("calibrate", tmp_path / "normal.parquet", *options).exit_code == 0
        model = tmp_path / "calibrated"
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    for k in range(4):
        rows(730, k).to_parquet(incoming / f"{k}.parquet")

    def run_for(folder, seconds):
        """Exit code, and how long it took."""
        pid = begin(forks, command(incoming, model, folder / name, *more))
        started = time.monotonic()
        if not select.select([forks.stdout], [], [], seconds)[0]:
            with contextlib.suppress(ProcessLookupError):  # it was just through
                os.kill(pid, signal.SIGKILL)
        return int(forks.stdout.readline()), time.monotonic() - started

    code, longest = run_for(tmp_path / "whole", None)
    assert code == 0
    expected = results(tmp_path / "whole")
    chance = random.Random(0)
    n_kills, n_with_parts, n_with_output, n_runs = 0, 0, 0, 0
    while n_kills < 50:
        folder, code, resumed = tmp_path / f"run-{n_runs}", None, False
        while code != 0:
            code, took = run_for(folder, chance.uniform(0, longest))
            if code == 0 and not resumed:
                longest = took
            resumed = True
            assert code in (0, -signal.SIGKILL)
            n_kills += code != 0
            n_with_parts += code != 0 and any(folder.glob(f".{name}.parts/*.arrow"))
            if (folder / name).exists():
                n_with_output += code != 0
                assert of_output(results(folder), name) == of_output(expected, name)
        assert results(folder) == expected
        n_runs += 1
        print(f"{n_kills} kills of {n_runs} runs", flush=True)
    print(
        f"{n_kills} kills of {n_runs} runs; {n_with_parts} with parts on the disk, {n_with_output} with the output"
    )
    assert n_with_parts > 10


@pytest.mark.usefixtures("small_parts")
def test_files_may_only_grow_so_large(run, rows, model, tmp_path):
    """A limit of the system, which like a full disk is met in the middle of a file."""
    rows(3000, 1).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "out.csv"
    output.write_text("earlier")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(command(tmp_path / "rows.parquet", model, output, "--overwrite"), preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2, errors.decode()
    assert b"The disk is full" in errors
    assert output.read_text() == "earlier"
    assert not (tmp_path / ".out.csv.tmp").exists()
    assert run(*command(tmp_path / "rows.parquet", model, output, "--overwrite")).exit_code == 0
    assert len(output.read_text().splitlines()) == 3001


def test_a_lock_goes_with_its_process(run, rows, model, tmp_path):
    rows(2000, 1).to_parquet(tmp_path / "rows.parquet")
    first = start(command(tmp_path / "rows.parquet", model, tmp_path / "out.csv"))
    wait_for((tmp_path / ".out.csv.parts").exists)
    first.send_signal(signal.SIGSTOP)  # it holds the lock and gets no further
    result = run(*command(tmp_path / "rows.parquet", model, tmp_path / "out.csv"))
    assert result.exit_code == 1
    assert "Another run is writing" in result.stderr
    first.kill()
    first.wait()
    assert run(*command(tmp_path / "rows.parquet", model, tmp_path / "out.csv")).exit_code == 0


def test_parts_are_whole_or_not_there(tmp_path):
    import pyarrow as pa

    kept = parts.Parts(tmp_path / "parts")
    assert not kept.begin({"a": 1}, resume=True)
    table = pa.table({"score": [1.0, 2.0]})
    kept.write(0, 0, table, {"bad": [], "rows": 2, "last": False})
    kept.write(0, 2, table, {"bad": [], "rows": 2, "last": True})
    # A gap: what comes after it does not count.
    assert kept.finished(0) == (1, False)
    kept.write(0, 1, table, {"bad": [], "rows": 2, "last": True})
    assert kept.finished(0) == (2, True)
    assert kept.finished(1) == (0, False)
    # What a damaged disk leaves of one does not count either.
    for damage in (b"", b"\0" * 500, (kept.folder / "000000-00000001.arrow").read_bytes()[:-9]):
        (kept.folder / "000000-00000001.arrow").write_bytes(damage)
        assert kept.finished(0) == (1, False)
        assert [len(part) for part in kept.tables(1)] == [2]
    assert kept.begin({"a": 1}, resume=True)
    assert not kept.begin({"a": 2}, resume=True)
    assert kept.finished(0) == (0, False)


def test_parts_do_not_depend_on_how_a_file_comes(rows, tmp_path):
    """Row groups and blocks of any size give the same parts."""
    from anomalib_gen.scoring._columns import Wanted
    from anomalib_gen.scoring.sources import find_inputs

    frame = rows(1000, 1)
    wanted = Wanted(("x", "n"), 2, ("float", "integer"), ("id",))
    for n_rows in (1, 7, 250, 999, 1000, 1001):
        found = []
        for size in (3, 100, 5000):
            frame.to_parquet(tmp_path / "rows.parquet", row_group_size=size)
            (item,) = find_inputs([str(tmp_path / "rows.parquet")])
            listed = list(Reader(item, wanted).parts(n_rows))
            assert [part.last for part in listed] == [False] * (len(listed) - 1) + [True]
            assert [row for part in listed for row in part.rows] == list(range(1000))
            found.append([part.table.column("id").to_pylist() for part in listed])
        assert found[0] == found[1] == found[2]
        assert [len(ids) for ids in found[0]] == [n_rows] * (1000 // n_rows) + [1000 % n_rows]


def test_records_are_the_same_whatever_happened(expected):
    record = json.loads(expected["out.parquet.run.json"])
    assert (record["rows"], record["bad_rows"]) == (479, 1)
    assert len(expected[Path("out.parquet.quarantine.jsonl").name].splitlines()) == 1
