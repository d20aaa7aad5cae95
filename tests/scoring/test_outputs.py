"""Outputs that several processes write at a time."""

import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from anomalib_gen.persistence import _files
from anomalib_gen.scoring._errors import UsageError
from anomalib_gen.scoring.parts import sole_run, write_file, write_output
from anomalib_gen.scoring.sinks import write_result

WRITER = """
import sys
from pathlib import Path
from anomalib_gen.scoring.parts import write_output
print("ready", flush=True)
sys.stdin.read(1)
for _ in range(20):
    write_output(Path(sys.argv[1]), sys.argv[2].encode() * 2**20)
"""


def test_an_output_is_of_one_process_however_many_write_it(tmp_path):
    path = tmp_path / "deep" / "found.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), letter * length],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for letter, length in (("a", 1), ("b", 2))
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"1")
        process.stdin.flush()
    whole = (b"a" * 2**20, b"b" * 2**21)
    seen = set()
    while any(process.poll() is None for process in processes):
        if path.exists():
            data = path.read_bytes()
            assert data in whole
            seen.add(data[:1])
    assert [process.wait() for process in processes] == [0, 0]
    assert seen
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] == ["found.json"]


def test_what_a_killed_process_left_is_used_and_does_not_stay(tmp_path):
    path = tmp_path / "found.json"
    path.with_name("found.json.tmp").write_bytes(b"half of something longer than what comes")
    write_output(path, b"whole")
    assert path.read_bytes() == b"whole"
    # Neither does what could not be finished.
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_file(tmp_path / "taken", b"whole")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_is_replaced_after_a_kill_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    """There two names change one after the other; a kill leaves the earlier folder under a third one."""
    table, path = pa.table({"score": [1.0]}), tmp_path / "scores"
    monkeypatch.setattr(_files.ctypes, "CDLL", lambda *arguments, **options: object())
    for is_there in (True, False):
        write_result(path, [table], table.schema)
        shutil.copytree(path, tmp_path / ".scores.old")
        if not is_there:
            shutil.rmtree(path)
        write_result(path, [table], table.schema)
        assert os.listdir(tmp_path) == ["scores"]


def test_a_loss_of_power_takes_no_folder_that_was_made_for_an_output(tmp_path, monkeypatch):
    """A file is found again only if every folder above it has been flushed since it got the next one's name."""
    flushed, real = [], _files.sync_folder
    monkeypatch.setattr(_files, "sync_folder", lambda folder: (flushed.append(folder), real(folder)))
    write_output(tmp_path / "2026" / "11" / "found.json", b"whole")
    assert flushed == [tmp_path, tmp_path / "2026"]
    with pytest.raises(OSError, match="found"):
        write_output(tmp_path / "2026" / "11" / "found.json" / "more" / "found.json", b"whole")


def test_who_waits_for_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_gen.scoring.parts.WAIT_SECONDS", 0.05)
    with sole_run(tmp_path / "a.html"), pytest.raises(UsageError, match="Another run is writing to"):
        write_output(tmp_path / "a.html", b"whole")
    assert not (tmp_path / "a.html").exists()
