"""Run detectors over data sets and seeds, in worker processes, so that nothing is lost and nothing is hidden.

A cell is one detector on one data set with one seed under one protocol. A finished cell is one small JSON
file, written at once and atomically, so a run that is killed at any moment resumes where it was. A cell that
raises, exceeds its time limit, kills its process or gives scores that are not finite is a recorded failure
with its reason; it never turns into a number.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from anomalib_gen._base import GenerativeDetector
from anomalib_gen.anomaly import DiffusionELBO, ImportanceWeighted, Likelihood, NegativeELBO, ODELikelihood
from anomalib_gen.images import bits_per_dimension

from ._extra import require_benchmark_extra
from .cases import describe_cases
from .detectors import Detector, parse_detectors
from .evaluation import Evaluation, evaluate
from .protocols import IMAGE_SUITES, PROTOCOLS, Split, SplitError, images

__all__ = ["BenchmarkInterrupted", "DataError", "load_results", "run_benchmark"]

_FORMAT = 1
DENSITIES = (DiffusionELBO, ImportanceWeighted, Likelihood, NegativeELBO, ODELikelihood)
"""Anomalies that are minus a log-density or a bound on one: on images, their mean is a code length in bits."""
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


class DataError(ValueError):
    """A data set that cannot be found or read."""


class BenchmarkInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run; what was finished is stored.

    Attributes
    ----------
    finished, total : int
        Cells stored, and cells of the whole run.
    """

    def __init__(self, finished: int, total: int) -> None:
        super().__init__(
            f"stopped with {finished} of {total} cells stored; run the same command again to resume"
        )
        self.finished, self.total = finished, total


@dataclass(frozen=True)
class _Cell:
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
        identity = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        prefix = f"{self.dataset}-{self.detector.partition('(')[0].rpartition('.')[2]}-seed{self.seed}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', prefix)}-{digest}.json"


def make_cell(
    suite: str, dataset: str, X: NDArray[np.float64], y: NDArray[np.int64], detector: Detector, seed: int
) -> _Cell:
    """Make the identity of a cell from the table itself."""
    return _Cell(suite, dataset, _fingerprint(X, y), detector.specification, seed)


@dataclass(frozen=True)
class Job:
    """A cell with what a worker needs to run it."""

    cell: _Cell
    detector: Detector
    source: str
    data_home: str | None
    threads: int


def run_benchmark(
    detectors: Iterable[str | Detector],
    *,
    suite: str,
    output: str | os.PathLike[str],
    datasets: Sequence[str] | None = None,
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    jobs: int = 1,
    time_limit: float | None = None,
    data_home: str | os.PathLike[str] | None = None,
    retry_failed: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run detectors over data sets and seeds; resume what an earlier run in the same folder has left.

    Parameters
    ----------
    detectors : iterable of str or Detector
        Texts such as ``sklearn.neighbors.LocalOutlierFactor(novelty=True)`` (see `parse_detector`), or the
        names of sets, ``peers`` and ``deep-peers``.
    suite : {"clean", "clean-unsupervised", "published", "images", "images-full"}
        The protocol; a folder belongs to one. Those of images have data sets such as ``mnist:not-1`` (digit 1 is the
        anomaly) and ``cifar10:only-0`` (class 0 is normal); detectors of tables see images as rows of pixels.
    output : str or path-like
        Folder of the results: one JSON file a cell in ``cells``, all of them in ``results.parquet``, and what
        the workers print in ``workers.log``.
    datasets : sequence of str, optional
        ADBench names, ``builtin:`` names (``builtin:digits``), or paths of npz files with a table ``X`` and
        labels ``y`` (+1 normal, -1 anomaly). Default: every ADBench table on this machine.
    seeds : iterable of int, default=(0, 1, 2, 3, 4)
        Seeds of the splits and of the detectors that take a ``random_state``.
    jobs : int, default=1
        Worker processes. Each uses the machine's cores divided by this number.
    time_limit : float, optional
        Seconds of wall time for one cell, from loading to scoring. Default: no limit.
    data_home : str or path-like, optional
        Folder of the ADBench files, as in `anomalib_gen.datasets.load_adbench`.
    retry_failed : bool, default=False
        Run cells again that are stored as failures.
    progress : bool, optional
        Show progress and the time that remains on standard error. Default: if that is a terminal.

    Returns
    -------
    pandas.DataFrame
        One row a cell of this run, failures included (``status`` is ``"ok"`` or ``"failed"``).

    Raises
    ------
    DataError
        If a data set cannot be found or read; nothing is run then.
    ValueError
        If an argument is out of range, or the folder belongs to another suite.
    RuntimeError
        If another run is writing to the folder.
    BenchmarkInterrupted
        After Ctrl-C; finished cells are stored.

    Notes
    -----
    Workers import the calling script anew, so a script must call this function below ``if
    __name__ == "__main__":``. Inside a worker the global random generators are seeded for each cell, because
    some detectors draw from nothing else; the calling process is left as it is.

    Detectors of this library that differ in their ``anomaly`` alone share a fit where they follow each other in a
    worker; ``fit_seconds`` is then that of the fit they share.
    """
    require_benchmark_extra()
    suites = (*PROTOCOLS, *IMAGE_SUITES)
    if suite not in suites:
        raise ValueError(f"suite must be one of {', '.join(map(repr, suites))}, got {suite!r}.")
    chosen = parse_detectors(detectors)
    if not chosen:
        raise ValueError("detectors is empty: name at least one detector, or a set such as 'peers'.")
    seeds = list(dict.fromkeys(int(seed) for seed in seeds))
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds must be non-negative integers, at least one; got {seeds}.")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}.")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive seconds, got {time_limit}.")
    home = None if data_home is None else os.fspath(data_home)
    for detector in chosen:
        detector.resolve()  # a path that leads nowhere is a mistake in the call, not in every cell

    folder = Path(output)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder):
        settings = _read_settings(folder)
        if settings is not None and settings["suite"] != suite:
            raise ValueError(
                f"{folder} holds results of the suite {settings['suite']!r}, got suite={suite!r}. "
                "Figures of two suites do not belong in one table: choose another output folder."
            )
        find = _image_sources if suite in IMAGE_SUITES else _sources
        sources = find(datasets, home)
        fingerprints = {name: _fingerprint(*load_source(source, home)) for name, source in sources.items()}
        load_source.cache_clear()
        _merge_settings(folder, suite, chosen, fingerprints, seeds)
        threads = max(1, joblib.cpu_count() // jobs)
        plan = [
            Job(
                _Cell(suite, name, fingerprints[name], detector.specification, seed),
                detector,
                source,
                home,
                threads,
            )
            for name, source in sources.items()
            for seed in seeds
            for detector in chosen
        ]
        # Two display names of one detector share their cells.
        plan = list({job.cell: job for job in plan}.values())
        todo = [job for job in plan if not _is_finished(folder, job.cell, retry_failed)]
        try:
            _run(folder, todo, len(plan), jobs=jobs, time_limit=time_limit, progress=progress)
        except KeyboardInterrupt:
            stored = sum((folder / "cells" / job.cell.file_name).exists() for job in plan)
            raise BenchmarkInterrupted(stored, len(plan)) from None
        finally:
            results = _consolidate(folder)
    ours = (
        results["detector"].isin([detector.name for detector in chosen])
        & results["dataset"].isin(list(sources))
        & results["seed"].isin(seeds)
    )
    return results[ours].reset_index(drop=True)


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
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
    if _read_settings(folder) is None:
        raise FileNotFoundError(
            f"{folder} holds no benchmark results. Run a benchmark with this output folder first."
        )
    return _gather(folder)


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
    for name, record in _records(folder):
        if "cases" in record:
            found.setdefault(record["cell"]["dataset"], {}).setdefault(name, record["cases"])
    return found


# ------------------------------------------------------------------------------------------------ the run


def _run(
    folder: Path, todo: list[Job], total: int, *, jobs: int, time_limit: float | None, progress: bool | None
) -> None:
    """Run the cells of `todo` and store each as soon as it is done."""
    with progress_bar("benchmark", total, total - len(todo), shown=progress) as advance:

        def store(job: Job, record: dict[str, Any]) -> None:
            _write_atomically(folder / "cells" / job.cell.file_name, record)
            advance(record)

        run_jobs(todo, run_cell, store, folder=folder, jobs=jobs, time_limit=time_limit)


def run_jobs(
    todo: list[Job],
    function: Callable[[Job], dict[str, Any]],
    on_done: Callable[[Job, dict[str, Any]], None],
    *,
    folder: Path,
    jobs: int,
    time_limit: float | None = None,
) -> None:
    """Keep `jobs` workers busy with `function` until `on_done` was called for every cell of `todo`.

    Neighbours in `todo` that differ in the anomaly alone go to one worker, one after the other: it fits once.
    """
    if not todo:
        return
    waiting = deque(list(group) for _, group in groupby(todo, _fit_identity))
    broken: dict[Job, int] = {}
    # A pool for each worker, because a pool does not let one say who does what.
    pools = [_start_pool(folder) for _ in range(min(jobs, len(waiting)))]
    running: dict[Future[Any], tuple[Job, int]] = {}
    try:
        while waiting or running:
            for idle in set(range(len(pools))) - {slot for _, slot in running.values()}:
                for job in waiting.popleft() if waiting else ():
                    future = pools[idle].schedule(function, args=(job,), timeout=time_limit)
                    running[future] = job, idle
            # A time-out lets Ctrl-C through on every platform.
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                job, _ = running.pop(future)
                try:
                    record = _record(job.cell, future, time_limit)
                except BrokenProcessPool:
                    # The pool itself has failed, usually through a worker that died between two cells.
                    broken[job] = broken.get(job, 0) + 1
                    if broken[job] < 3:
                        waiting.appendleft([job])
                        continue
                    reason = "the worker processes died three times"
                    record = describe_failure(job.cell, "worker died", reason)
                on_done(job, record)
            for slot, pool in enumerate(pools):
                if not pool.active:
                    lost = [future for future, (_, where) in running.items() if where == slot]
                    if lost:
                        waiting.appendleft([running.pop(future)[0] for future in lost])
                    pool.stop()
                    pool.join()
                    pools[slot] = _start_pool(folder)
        for pool in pools:
            pool.close()
    finally:
        for pool in pools:
            pool.stop()  # harmless after close; kills what still runs otherwise
            pool.join()


def _record(cell: _Cell, future: Future[Any], time_limit: float | None) -> dict[str, Any]:
    from pebble import ProcessExpired

    try:
        return future.result()
    except TimeoutError:
        # An error of that kind inside a detector is caught in the worker, so this is the pool's own.
        return describe_failure(cell, "time limit", f"time limit of {time_limit:g} s exceeded")
    except ProcessExpired as error:
        return describe_failure(cell, "worker died", f"the worker process died ({_death(error.exitcode)})")


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-exitcode).name
            hint = ", often for want of memory" if name == "SIGKILL" else ""
            return f"signal {name}{hint}; see workers.log"
    return f"exit code {exitcode}; see workers.log"


def _start_pool(folder: Path) -> Any:
    """Start a pool of one worker."""
    import multiprocessing

    from pebble import ProcessPool

    # Forking this process can hang, because torch and OpenMP may have used threads in it. A fork server has
    # imported everything and used nothing, so workers start at once; libraries survive that on Linux only.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([__name__])
    log = os.fspath((folder / "workers.log").resolve())
    return ProcessPool(
        max_workers=1, initializer=_start_worker, initargs=(log, dict(os.environ)), context=context
    )


@contextlib.contextmanager
def progress_bar(label: str, total: int, done: int = 0, *, shown: bool | None = None) -> Iterator[Any]:
    """Show progress on standard error; the value is called with the record of each finished cell."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not (console.is_terminal if shown is None else shown):
        yield lambda record: None
        return
    columns = (
        TextColumn(f"[bold]{label}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("remaining"),
        TextColumn("{task.fields[failed]}"),
        TextColumn("[dim]{task.fields[last]}"),
    )
    failed = 0
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total, completed=done, failed="", last="")

        def advance(record: dict[str, Any]) -> None:
            nonlocal failed
            failed += record["status"] != "ok"
            bar.update(
                task,
                advance=1,
                failed=f"[red]{failed} failed" if failed else "",
                last=record["cell"]["dataset"],
            )

        yield advance


# ------------------------------------------------------------------------------------------ in the worker


def _start_worker(log: str, environment: dict[str, str]) -> None:
    """Prepare a worker process: its output goes to a file, and it ends when the parent does."""
    import faulthandler
    import multiprocessing
    from multiprocessing.connection import wait as wait_for

    os.environ.update(environment)  # a fork server may be older than the caller's variables
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)

    # A process that ends with code 0 looks to the pool like one that was dismissed, and its cell would wait
    # for ever.
    leave = os._exit
    os._exit = lambda code: leave(code or 70)  # type: ignore[assignment]

    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed run must not leave workers behind

        def follow() -> None:
            wait_for([parent.sentinel])
            leave(1)

        threading.Thread(target=follow, daemon=True).start()


def run_cell(job: Job) -> dict[str, Any]:
    """Run one cell inside a worker process and describe what happened."""
    return evaluate_cell(job)[0]


def evaluate_cell(job: Job) -> tuple[dict[str, Any], tuple[Any, Split, Evaluation] | None]:
    """Run one cell inside a worker process; the record, and what it is made of unless the cell failed."""
    from threadpoolctl import threadpool_limits

    cell = job.cell
    # Read by libraries that are loaded from here on; those already loaded are told below.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(job.threads)
    try:
        split = _split(cell.suite, job.source, job.data_home, cell.seed)
    except SplitError as error:
        return describe_failure(cell, "data", str(error)), None
    except Exception as error:  # a file that cannot be read fails its cells, not the run
        return describe_failure(cell, "data", error), None
    images_shown = split.X_test if cell.suite in IMAGE_SUITES else None
    try:
        # For peers that draw from the global generators; the process is the benchmark's own.
        random.seed(cell.seed)
        np.random.seed(cell.seed)  # noqa: NPY002
        if not issubclass(job.detector.resolve(), GenerativeDetector):
            split = split.as_table()
        n_features = int(np.prod(split.X_train.shape[1:]))
        estimator = job.detector.build(seed=cell.seed, n_features=n_features)
        if "torch" in sys.modules:
            import torch

            torch.manual_seed(cell.seed)
            torch.set_num_threads(job.threads)
        # Copies, because a detector that writes to its input must not spoil the next one's.
        own = Split(split.X_train.copy(), split.X_test.copy(), split.y_test.copy())
        with threadpool_limits(limits=job.threads):
            estimator, seconds = _from_last_fit(job, estimator, own)
            result = evaluate(estimator, own, fit_seconds=seconds)
        shared = hasattr(estimator, "with_anomaly")
        _last_fit[:] = [(_fit_identity(job), estimator, result.fit_seconds)] if shared else []
    except (Exception, SystemExit) as error:
        return describe_failure(cell, "exception", error), None
    record = describe_success(cell, split, result)
    if images_shown is not None:
        record["cases"] = describe_cases(images_shown, split.y_test, result.scores)
        if isinstance(getattr(estimator, "anomaly_", None), DENSITIES):
            normal = result.scores[split.y_test == 1]
            bits = bits_per_dimension(normal, images_shown.shape[1:])
            record["bits_per_dimension"] = float(bits.mean())
    return record, (estimator, split, result)


_last_fit: list[tuple[Any, Any, float]] = []
"""In a worker: what the last finished cell fitted, with the seconds it took, if other anomalies can share it."""


def _fit_identity(job: Job) -> tuple[Any, ...]:
    """All that a fit depends on; two cells with the same differ in the anomaly alone."""
    arguments = tuple(pair for pair in job.detector.arguments if pair[0] != "anomaly")
    cell = job.cell
    return cell.suite, cell.dataset, cell.fingerprint, cell.seed, job.detector.path, repr(arguments)


def _from_last_fit(job: Job, estimator: Any, split: Split) -> tuple[Any, float | None]:
    """Give `estimator` the fit of the cell before, if that differs in the anomaly alone; else return it as it is."""
    if _last_fit and hasattr(estimator, "with_anomaly"):
        identity, fitted, seconds = _last_fit[0]
        if identity == _fit_identity(job):
            return fitted.with_anomaly(estimator.anomaly, split.X_train), seconds
    return estimator, None


def describe_success(cell: _Cell, split: Split, result: Evaluation) -> dict[str, Any]:
    """Make the record of a finished cell."""
    return {
        "format": _FORMAT,
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


def describe_failure(cell: _Cell, kind: str, reason: str | BaseException) -> dict[str, Any]:
    """Make the record of a failed cell from a sentence or an exception."""
    raised = isinstance(reason, BaseException)
    return {
        "format": _FORMAT,
        "cell": asdict(cell),
        "status": "failed",
        "failure": kind,
        "error": f"{type(reason).__name__}: {reason}" if raised else reason,
        "traceback": _traceback(reason) if isinstance(reason, BaseException) else "",
        "versions": _versions(),
    }


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


# ------------------------------------------------------------------------------------------------ the data


def _sources(datasets: Sequence[str] | None, data_home: str | None) -> dict[str, str]:
    """Map the name of each data set to where it comes from; names are checked, nothing is read."""
    from anomalib_gen.datasets import list_adbench, list_builtin

    if datasets is None:
        names = list_adbench(data_home=data_home, available_only=True)
        if not names:
            raise DataError(
                "No ADBench table was found on this machine. Name data sets to have them downloaded "
                "(datasets), give "
                "the folder of the files (data_home or the environment variable ANOMALIB_GEN_DATA), or use "
                "the data "
                "shipped with scikit-learn: builtin:breast_cancer, builtin:digits, builtin:wine."
            )
        return {name: name for name in names}
    known = {name.lower(): name for name in list_adbench()}
    sources: dict[str, str] = {}
    for item in datasets:
        text = os.fspath(item)
        if text.startswith("builtin:"):
            if text.removeprefix("builtin:") not in list_builtin():
                raise DataError(
                    f"Unknown data set {text!r}. Choose from builtin:{', builtin:'.join(list_builtin())}."
                )
            name = source = text
        elif text.endswith(".npz"):
            path = Path(text).expanduser().resolve()
            if not path.is_file():
                raise DataError(f"The file {text} does not exist.")
            name, source = path.stem, os.fspath(path)
        elif text.lower() in known:
            name = source = known[text.lower()]
        else:
            import difflib

            near = [known[key] for key in difflib.get_close_matches(text.lower(), known, n=3)]
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"Unknown data set {text!r}. {hint}A data set is an ADBench name, "
                f"builtin:{'|'.join(list_builtin())}, "
                "or the path of an npz file with X and y."
            )
        if sources.setdefault(name, source) != source:
            raise DataError(f"Two data sets are called {name!r}; rename one of the files.")
    if not sources:
        raise DataError("datasets is empty: name at least one, or leave the argument out.")
    return sources


@functools.lru_cache(maxsize=1)  # cells come ordered by data set and seed
def load_source(source: str, data_home: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read a data set: an ADBench name, ``builtin:`` and a name, or the path of an npz file."""
    from anomalib_gen.datasets import load_adbench, load_builtin

    if source.startswith(tuple(f"{name}:" for name in IMAGE_CLASSES)):
        train, test = _load_image_task(source, data_home)
        return np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    try:
        if source.startswith("builtin:"):
            bunch = load_builtin(source.removeprefix("builtin:"))
            X, y = bunch.data, bunch.target
        elif source.endswith(".npz"):
            with np.load(source, allow_pickle=False) as archive:
                X, y = archive["X"], archive["y"].ravel()
        else:
            bunch = load_adbench(source, data_home=data_home)
            X, y = bunch.data, bunch.target
        X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    except Exception as error:
        raise DataError(f"The data set {source} cannot be read: {error}") from error
    if X.ndim != 2 or y.shape != (len(X),) or not set(np.unique(y).tolist()) <= {1, -1}:
        raise DataError(
            f"The data set {source} must hold a table X and one label a row in y, +1 for a normal row and "
            f"-1 for an "
            f"anomaly; found X of shape {X.shape}, y of shape {y.shape} and the labels "
            f"{np.unique(y)[:5].tolist()}."
        )
    return X, y.astype(np.int64)


@functools.lru_cache(maxsize=1)
def _split(suite: str, source: str, data_home: str | None, seed: int) -> Split:
    if suite in IMAGE_SUITES:
        return images(*_load_image_task(source, data_home), seed, caps=IMAGE_SUITES[suite])
    return PROTOCOLS[suite](*load_source(source, data_home), seed)


IMAGE_CLASSES = {"mnist": 10, "cifar10": 10}
"""Collections of images and their numbers of classes."""
IMAGE_TASKS = (
    *(f"mnist:not-{digit}" for digit in (1, 4, 5, 7, 9)),
    *(f"mnist:only-{digit}" for digit in range(10)),
    *(f"cifar10:only-{label}" for label in range(10)),
    "cifar10:against-mnist",
    "cifar10:against-photographs",
)
"""Tasks that a suite of images has by default: those with published figures, and CIFAR-10 against other sources of the
same coding."""
OTHER_IMAGES = 10_000
"""Images of another source in the test part, as many as there are of CIFAR-10."""


def _image_sources(datasets: Sequence[str] | None, data_home: str | None) -> dict[str, str]:
    """Names of image tasks, which are their sources; names are checked, nothing is read."""
    names = list(IMAGE_TASKS if datasets is None else map(str, datasets))
    for name in names:
        match = re.fullmatch(r"(\w+):(not|only)-(\d)", name)
        if name not in IMAGE_TASKS and (match is None or match[1] not in IMAGE_CLASSES):
            raise DataError(
                f"Unknown image task {name!r}. A task is a collection ({', '.join(IMAGE_CLASSES)}), 'not' for one "
                "class as the anomaly or 'only' for one as the normal class, and its number: mnist:not-1, "
                "cifar10:only-0. CIFAR-10 as a whole stands against other sources in cifar10:against-mnist and "
                "cifar10:against-photographs."
            )
    if not names:
        raise DataError("datasets is empty: name at least one, or leave the argument out.")
    return {name: name for name in names}


@functools.lru_cache(maxsize=1)
def _load_image_task(
    source: str, data_home: str | None
) -> tuple[tuple[NDArray[Any], NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.int64]]]:
    """Images and labels to train on, and to test on."""
    from anomalib_gen.datasets import load_images, load_other_images

    collection, _, task = source.partition(":")
    kind, _, label = task.partition("-")
    everything = range(IMAGE_CLASSES[collection])
    normal = [0] if kind == "against" else [k for k in everything if (k == int(label)) == (kind == "only")]
    try:
        train, test = (
            load_images(collection, normal=normal, subset=subset, data_home=data_home, return_X_y=True)
            for subset in ("train", "test")
        )
        if kind == "against":
            other = load_other_images(label, n_samples=OTHER_IMAGES, random_state=0, data_home=data_home)
            train = train[0], np.ones_like(train[1])
            target = np.repeat([1, -1], [len(test[0]), len(other)])
            test = np.concatenate([test[0], other]), target
    except Exception as error:
        raise DataError(f"The data set {source} cannot be read: {error}") from error
    return train, test


def _fingerprint(X: NDArray[np.float64], y: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(f"{X.shape}".encode())
    digest.update(np.ascontiguousarray(X).tobytes())
    digest.update(np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- the files


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
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


def _is_finished(folder: Path, cell: _Cell, retry_failed: bool) -> bool:
    record = _read_json(folder / "cells" / cell.file_name)
    return record is not None and (record.get("status") == "ok" or not retry_failed)


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / "settings.json"
    if not path.exists():
        return None
    settings = _read_json(path)
    if settings is None or settings.get("format") != _FORMAT:
        raise ValueError(f"{path} is damaged or of another version. Choose another output folder.")
    return settings


def _merge_settings(
    folder: Path, suite: str, detectors: list[Detector], fingerprints: dict[str, str], seeds: list[int]
) -> None:
    """Add this run to what the folder is about; a name given anew stands for its new meaning."""
    old = _read_settings(folder) or {"detectors": {}, "datasets": {}, "seeds": []}
    settings = {
        "format": _FORMAT,
        "suite": suite,
        "detectors": old["detectors"] | {detector.name: detector.specification for detector in detectors},
        "datasets": old["datasets"] | fingerprints,
        "seeds": sorted(set(old["seeds"]) | set(seeds)),
    }
    _write_atomically(folder / "settings.json", settings)


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Display name and record of each stored cell that the folder is about, by data set, detector and seed."""
    settings = _read_settings(folder)
    assert settings is not None
    for dataset, fingerprint in settings["datasets"].items():
        for name, specification in settings["detectors"].items():
            for seed in settings["seeds"]:
                cell = _Cell(settings["suite"], dataset, fingerprint, specification, seed)
                record = _read_json(folder / "cells" / cell.file_name)
                if record is not None:
                    yield name, record


def _gather(folder: Path) -> pd.DataFrame:
    return results_frame([result_row(name, record) for name, record in _records(folder)])


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


def _consolidate(folder: Path) -> pd.DataFrame:
    results = _gather(folder)
    temporary = folder / ".results.parquet.part"
    results.to_parquet(temporary, index=False)
    os.replace(temporary, folder / "results.parquet")
    return results
