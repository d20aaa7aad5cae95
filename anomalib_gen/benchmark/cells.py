"""Cells: one detector on one data set with one seed under one protocol, and what is recorded of each.

A cell that raises, exceeds its time limit, kills its process or gives scores that are not finite is a recorded failure
with its reason; it never turns into a number.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd

from .detectors import Detector
from .evaluation import Evaluation
from .protocols import Split

FORMAT = 1
_PACKAGES = ("anomalib-gen", "numpy", "scikit-learn", "torch", "pyod")
_FIGURES = (
    "auroc",
    "average_precision",
    "fit_seconds",
    "score_seconds",
    "n_train",
    "n_test",
    "n_features",
    "n_anomalies",
    "bits_per_dimension",
)


@dataclass(frozen=True)
class Cell:
    """What a cell is; its hash names the file.

    Versions are recorded with the result but are no part of this: after an update or a change of code, start a new
    folder, or the old figures stand.
    """

    suite: str
    dataset: str
    fingerprint: str  # of the table's content: another table under the same name is another cell
    detector: str
    seed: int

    @property
    def file_name(self) -> str:
        """Where its record is stored in the folder of cells."""
        identity = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        prefix = f"{self.dataset}-{self.detector.partition('(')[0].rpartition('.')[2]}-seed{self.seed}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', prefix)}-{digest}.json"


@dataclass(frozen=True)
class Job:
    """A cell with what a worker needs to run it."""

    cell: Cell
    detector: Detector
    source: str
    data_home: str | None
    threads: int


def describe_success(cell: Cell, split: Split, result: Evaluation) -> dict[str, Any]:
    """Make the record of a finished cell."""
    return {
        "format": FORMAT,
        "cell": asdict(cell),
        "status": "ok",
        "auroc": result.auroc,
        "average_precision": result.average_precision,
        "fit_seconds": result.fit_seconds,
        "score_seconds": result.score_seconds,
        "n_train": len(split.X_train),
        "n_test": len(split.X_test),
        "n_features": int(np.prod(split.X_train.shape[1:])),
        "n_anomalies": int(np.sum(split.y_test == -1)),
        "versions": _versions(),
    }


def describe_failure(cell: Cell, kind: str, reason: str | BaseException) -> dict[str, Any]:
    """Make the record of a failed cell from a sentence or an exception."""
    if isinstance(reason, BaseException):
        error, trace = f"{type(reason).__name__}: {_words(reason)}", _traceback(reason)
    else:
        error, trace = reason, ""
    return {
        "format": FORMAT,
        "cell": asdict(cell),
        "status": "failed",
        "failure": kind,
        "error": _encodable(error),
        "traceback": _encodable(trace),
        "versions": _versions(),
    }


def _words(error: BaseException) -> str:
    """Message of an exception, whose own code makes it and may fail."""
    try:
        return str(error)
    except Exception as failure:  # it is the detector's code, which raises what it likes
        return f"<its message cannot be made: {type(failure).__name__}>"


def _encodable(text: str) -> str:
    """Text that files can hold: messages may name bytes that are no text, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _traceback(error: BaseException) -> str:
    """Format a traceback without the folders of this machine."""
    text = "".join(traceback.format_exception(error))

    def shorten(match: re.Match[str]) -> str:
        path = match[1].replace("\\", "/")
        parts = path.split("/")
        for root in ("site-packages", "anomalib_gen"):
            if root in parts:
                start = parts.index(root) + (root == "site-packages")
                return f'File "{"/".join(parts[start:])}"'
        return f'File "{parts[-1]}"'

    return re.sub(r'File "([^"]*)"', shorten, text)


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def result_row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Flatten the record of a cell into a row of the table of results."""
    cell = record["cell"]
    return {
        "suite": cell["suite"],
        "dataset": cell["dataset"],
        "detector": name,
        "seed": cell["seed"],
        "status": record["status"],
        **{key: record.get(key, np.nan) for key in _FIGURES},
        "failure": record.get("failure", ""),
        "error": record.get("error", ""),
        "traceback": record.get("traceback", ""),
        "specification": cell["detector"],
        "versions": json.dumps(record["versions"], sort_keys=True),
    }


def results_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make the table of results, with its columns and types even where there are no rows."""
    text = ["suite", "dataset", "detector"]
    rest = ["failure", "error", "traceback", "specification", "versions"]
    frame = pd.DataFrame(rows, columns=[*text, "seed", "status", *_FIGURES, *rest])
    counts = {key: "Int64" for key in _FIGURES if key.startswith("n_")}
    floats = {key: "float64" for key in _FIGURES if not key.startswith("n_")}
    return frame.astype({"seed": "int64", **counts, **floats})
