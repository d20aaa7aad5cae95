"""The folder of a run: one small JSON file for each finished cell, written at once and atomically."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from .cells import FORMAT, Cell, result_row, results_frame
from .detectors import Detector


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the operating system gives it back when the process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"Another run is writing to {folder}. Wait for it, or choose another output folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def load_results(output: str | os.PathLike[str]) -> pd.DataFrame:
    """Read all results of an output folder, from finished and from interrupted runs.

    Parameters
    ----------
    output : str or path-like
        Folder of `run_benchmark`.

    Returns
    -------
    pandas.DataFrame
        One row a cell.

    Raises
    ------
    FileNotFoundError
        If the folder holds no results.
    """
    folder = Path(output)
    if read_settings(folder) is None:
        raise FileNotFoundError(
            f"{folder} holds no benchmark results. Run a benchmark with this output folder first."
        )
    return gather(folder)


def load_cases(output: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Read the best and worst cases on images of an output folder, of the first seed.

    Parameters
    ----------
    output : str or path-like
        Folder of `run_benchmark`.

    Returns
    -------
    dict of str to dict of str to dict
        By data set and detector, what `anomalib_gen.benchmark.cases.describe_cases` gives. Empty for tables.
    """
    folder = Path(output)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in records(folder):
        if "cases" in record:
            found.setdefault(record["cell"]["dataset"], {}).setdefault(name, record["cases"])
    return found


def is_finished(folder: Path, cell: Cell, retry_failed: bool) -> bool:
    """Whether the folder holds the cell's record, and not one of a failure that is to be tried again."""
    record = _read_json(folder / "cells" / cell.file_name)
    return record is not None and (record.get("status") == "ok" or not retry_failed)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Read what the folder is about, or None of a new one."""
    path = folder / "settings.json"
    if not path.exists():
        return None
    settings = _read_json(path)
    if settings is None or settings.get("format") != FORMAT:
        raise ValueError(f"{path} is damaged or of another version. Choose another output folder.")
    return settings


def merge_settings(
    folder: Path, suite: str, detectors: list[Detector], fingerprints: dict[str, str], seeds: list[int]
) -> None:
    """Add this run to what the folder is about; a name given anew stands for its new meaning."""
    old = read_settings(folder) or {"detectors": {}, "datasets": {}, "seeds": []}
    settings = {
        "format": FORMAT,
        "suite": suite,
        "detectors": old["detectors"] | {detector.name: detector.specification for detector in detectors},
        "datasets": old["datasets"] | fingerprints,
        "seeds": sorted(set(old["seeds"]) | set(seeds)),
    }
    write_atomically(folder / "settings.json", settings)


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Display name and record of each stored cell that the folder is about, by data set, detector and seed."""
    settings = read_settings(folder)
    assert settings is not None
    for dataset, fingerprint in settings["datasets"].items():
        for name, specification in settings["detectors"].items():
            for seed in settings["seeds"]:
                cell = Cell(settings["suite"], dataset, fingerprint, specification, seed)
                record = _read_json(folder / "cells" / cell.file_name)
                if record is not None:
                    yield name, record


def gather(folder: Path) -> pd.DataFrame:
    """Make the table of all stored cells."""
    return results_frame([result_row(name, record) for name, record in records(folder)])


def consolidate(folder: Path) -> pd.DataFrame:
    """Make the table of all stored cells, and keep it as Parquet."""
    results = gather(folder)
    temporary = folder / ".results.parquet.part"
    results.to_parquet(temporary, index=False)
    os.replace(temporary, folder / "results.parquet")
    return results


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either absent or whole, whenever the process or the machine stops."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".part-", delete=False
    ) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
