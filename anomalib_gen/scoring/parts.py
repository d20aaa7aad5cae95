"""Finished parts on the disk, so that a killed run goes on where it was.

Beside an output ``scores.parquet`` a run keeps a folder ``.scores.parquet.parts``. It holds the plan (model, files with
their sizes and times, columns) and an Arrow file for each finished part: its rows of the output, and in the metadata
what was left out of it and why. A part gets its name when it is complete and on the disk, so whatever moment a run is
killed at, there are only whole parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from anomalib_gen.persistence import make_folder, sync_folder
from anomalib_gen.scoring._errors import DataError, UsageError

PLAN = "plan.json"
WAIT_SECONDS = 30.0
"""How long a short output waits for another run that writes to it."""


def write_file(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a file that is there and whole, or not there. Who calls it holds the lock of the output.

    The temporary name is always the same, so that what a killed process leaves is used by the next one.
    """
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(path.parent)


def write_output(path: Path, data: bytes) -> None:
    """Write a file as `write_file` does, and its folder if need be; of several that want to, one after the other.

    Raises
    ------
    UsageError
        If another run writes to it for long.
    """
    make_folder(path.parent)
    with sole_run(path, wait=WAIT_SECONDS):
        write_file(path, data)


def to_json(value: Any) -> bytes:
    """JSON of which there is one form."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str).encode()


def digest(value: Any) -> str:
    """Short hash of a JSON value."""
    return hashlib.sha256(to_json(value)).hexdigest()[:16]


def record_of(output: Path) -> Path:
    """Where a run tells what an output was made from."""
    return output.with_name(f"{output.name}.run.json")


def read_record(data: bytes, path: str | Path) -> dict[str, Any]:
    """What the record of a run says.

    Returns
    -------
    dict
        "rows", "outliers", "bad_rows", "bad_files", "model", "threshold" (minus infinity for one that flags nothing),
        "plan", "quarantine", "partition_by" (names of columns), and "inputs": the path, size and time of each file.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        record = json.loads(data)
        counts = ("rows", "outliers", "bad_rows", "bad_files")
        found: dict[str, Any] = {name: int(record[name]) for name in counts}
        found |= {
            "model": str(record["model"]),
            "plan": str(record["plan"]),
            "quarantine": record.get("quarantine"),
            "partition_by": [str(name) for name in record.get("partition_by", [])],
        }
        found["threshold"] = -math.inf if record["threshold"] is None else float(record["threshold"])
        found["inputs"] = [(str(path), int(size), int(mtime)) for path, size, mtime in record["inputs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no record of a run: {error!r}. Score the files again.") from None
    return found


def quarantine_beside(output: Path) -> Path:
    """File of what was left out of an output, unless the user names another."""
    return output.with_name(f"{output.name}.quarantine.jsonl")


def read_quarantine(path: Path, bad_rows: int, bad_files: int) -> list[dict[str, Any]] | None:
    """What a run left out; None if the file is not that of a run that left out so many rows and files."""
    if not bad_rows and not bad_files:
        return []
    try:
        entries = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
        rows = sum(entry["row"] is not None for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entries if (rows, len(entries) - rows) == (bad_rows, bad_files) else None


def is_quarantine(path: Path) -> bool:
    """Whether a run may replace or remove what is under a name: a quarantine, or nothing."""
    try:
        with open(path, "rb") as file:
            line = file.readline(2**24)
        return not line or {"file", "row", "reason"} <= set(json.loads(line))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, TypeError):
        return False


class Parts:
    """The folder of a run's parts.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, plan: dict[str, Any], *, resume: bool) -> bool:
        """Start a run, or take up one of the same plan; return whether it is the latter."""
        if resume and self.has_plan(plan):
            for path in self.folder.glob("*.tmp"):
                path.unlink()
            return True
        self.remove()
        self.folder.mkdir(parents=True)
        write_file(self.folder / PLAN, to_json(plan))
        return False

    def has_plan(self, plan: dict[str, Any]) -> bool:
        """Whether there are parts of a run with this plan."""
        return self._plan() == to_json(plan)

    def _plan(self) -> bytes | None:
        with contextlib.suppress(OSError):
            return (self.folder / PLAN).read_bytes()
        return None

    def any(self) -> bool:
        """Whether a part is finished."""
        return next(self.folder.glob("*.arrow"), None) is not None

    def remove(self) -> None:
        """Forget the run; what a kill leaves of it has no plan, and is nothing to go on from."""
        with contextlib.suppress(OSError):
            (self.folder / PLAN).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, source: int, number: int) -> Path:
        return self.folder / f"{source:06d}-{number:08d}.arrow"

    def write(self, source: int, number: int, table: pa.Table, facts: dict[str, Any]) -> None:
        """Keep a part of the file number `source`, with facts about it: "rows", "bad" and "last"."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema.with_metadata({b"facts": to_json(facts)})) as writer:
            writer.write_table(table)
        write_file(self._path(source, number), sink.getvalue())

    def finished(self, source: int) -> tuple[int, bool]:
        """Parts of a file that are there and whole, without a gap, and whether they are all."""
        number, last = 0, False
        while not last and self._path(source, number).exists():
            try:
                last = bool(self.facts(source, number)["last"])
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
                # A damaged disk. It is done again, not read again every night.
                break
            number += 1
        return number, last

    def discard(self, source: int) -> None:
        """Forget the parts of a file."""
        for path in self.folder.glob(f"{source:06d}-*.arrow"):
            path.unlink()

    def facts(self, source: int, number: int) -> dict[str, Any]:
        """Facts that a part was kept with."""
        with pa.memory_map(str(self._path(source, number))) as file:
            metadata = pa.ipc.open_file(file).schema.metadata
        found: dict[str, Any] = json.loads(metadata[b"facts"])
        return found

    def tables(self, n_sources: int) -> Iterator[pa.Table]:
        """All parts in order."""
        for source in range(n_sources):
            for number in range(self.finished(source)[0]):
                with pa.memory_map(str(self._path(source, number))) as file:
                    yield pa.ipc.open_file(file).read_all().replace_schema_metadata(None)

    def all_facts(self, n_sources: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Facts of all parts in order, with the number of their file."""
        for source in range(n_sources):
            for number in range(self.finished(source)[0]):
                yield source, self.facts(source, number)


@contextlib.contextmanager
def sole_run(output: Path, *, wait: float = 0) -> Iterator[None]:
    """Hold the lock of an output; the system gives it back when the process dies, however it does.

    Parameters
    ----------
    output : Path
    wait : float, default=0
        Seconds to wait for another run.

    Raises
    ------
    UsageError
        If another run has it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"Another run is writing to {output}. Wait for it, or choose another output."
        ) from None
    try:
        yield
    finally:
        lock.release()
