"""Run detectors over data sets and seeds, in worker processes, so that nothing is lost and nothing is hidden.

A finished cell (cells) is stored at once (store), so a run that is killed at any moment resumes where it was. Detectors
are fitted and judged in worker processes (worker), which may die without taking the run along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from anomalib_gen._runtime import available_cores

from ._extra import require_benchmark_extra
from .cells import Cell, Job, describe_failure
from .detectors import Detector, parse_detectors
from .protocols import IMAGE_SUITES, PROTOCOLS
from .sources import find_image_sources, find_sources, fingerprint, load_source
from .store import consolidate, is_finished, merge_settings, read_settings, sole_writer, write_atomically
from .worker import fit_identity, run_cell, start_worker


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
        names of sets, ``library``, ``peers`` and ``deep-peers``, which suites of images have of their own.
    suite : {"clean", "clean-unsupervised", "published", "images", "images-full"}
        The protocol; a folder belongs to one. Those of images have data sets such as ``mnist:not-1`` (digit 1 is the
        anomaly) and ``cifar10:only-0`` (class 0 is normal); detectors of tables see images as rows of pixels.
    output : str or path-like
        Folder of the results: one JSON file a cell in ``cells``, all of them in ``results.parquet``, and what
        the workers print in ``workers.log``.
    datasets : sequence of str, optional
        ADBench names, ``builtin:`` names (``builtin:digits``), or paths of npz files with a table ``X`` and
        labels ``y`` (+1 normal, -1 anomaly); tasks such as ``mnist:not-1`` for the suites of images. Default: every
        ADBench table on this machine, or all tasks of images.
    seeds : iterable of int, default=(0, 1, 2, 3, 4)
        Seeds of the splits and of the detectors that take a ``random_state``.
    jobs : int, default=1
        Worker processes. Each uses the machine's cores, or as many as OMP_NUM_THREADS says, divided by this number.
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
    TypeError
        If `detectors` or `datasets` is a text and no list, or a detector's path leads to no class with a fit method.
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
    chosen = parse_detectors(detectors, images=suite in IMAGE_SUITES)
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
    with sole_writer(folder):
        settings = read_settings(folder)
        if settings is not None and settings["suite"] != suite:
            raise ValueError(
                f"{folder} holds results of the suite {settings['suite']!r}, got suite={suite!r}. "
                "Figures of two suites do not belong in one table: choose another output folder."
            )
        find = find_image_sources if suite in IMAGE_SUITES else find_sources
        sources = find(datasets, home)
        fingerprints = {name: fingerprint(*load_source(source, home)) for name, source in sources.items()}
        load_source.cache_clear()
        merge_settings(folder, suite, chosen, fingerprints, seeds)
        threads = max(1, _usable_threads() // jobs)
        plan = [
            Job(
                Cell(suite, name, fingerprints[name], detector.specification, seed),
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
        todo = [job for job in plan if not is_finished(folder, job.cell, retry_failed)]
        try:
            _run(folder, todo, len(plan), jobs=jobs, time_limit=time_limit, progress=progress)
        except KeyboardInterrupt:
            stored = sum((folder / "cells" / job.cell.file_name).exists() for job in plan)
            raise BenchmarkInterrupted(stored, len(plan)) from None
        finally:
            results = consolidate(folder)
    ours = (
        results["detector"].isin([detector.name for detector in chosen])
        & results["dataset"].isin(list(sources))
        & results["seed"].isin(seeds)
    )
    return results[ours].reset_index(drop=True)


def _run(
    folder: Path, todo: list[Job], total: int, *, jobs: int, time_limit: float | None, progress: bool | None
) -> None:
    """Run the cells of `todo` and store each as soon as it is done."""
    with progress_bar("benchmark", total, total - len(todo), shown=progress) as advance:

        def store(job: Job, record: dict[str, Any]) -> None:
            write_atomically(folder / "cells" / job.cell.file_name, record)
            advance(record)

        run_jobs(todo, run_cell, store, folder=folder, jobs=jobs, time_limit=time_limit)


def _usable_threads() -> int:
    """Cores, or as many threads as OMP_NUM_THREADS allows: on cores that others use, two wait for each other."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    cores = available_cores()
    return min(cores, int(allowed)) if allowed.isdecimal() and int(allowed) else cores


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
    waiting = deque(list(group) for _, group in groupby(todo, fit_identity))
    broken: dict[Cell, int] = {}
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
                    broken[job.cell] = broken.get(job.cell, 0) + 1
                    if broken[job.cell] < 3:
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


def _record(cell: Cell, future: Future[Any], time_limit: float | None) -> dict[str, Any]:
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
        max_workers=1, initializer=start_worker, initargs=(log, dict(os.environ)), context=context
    )


@contextlib.contextmanager
def progress_bar(label: str, total: int, done: int = 0, *, shown: bool | None = None) -> Iterator[Any]:
    """Show progress on standard error; the value is called with the record of each finished cell."""
    from rich.console import Console
    from rich.markup import escape
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
                last=escape(record["cell"]["dataset"]),
            )

        yield advance


def make_cell(
    suite: str, dataset: str, X: NDArray[np.float64], y: NDArray[np.int64], detector: Detector, seed: int
) -> Cell:
    """Make the identity of a cell from the table itself."""
    return Cell(suite, dataset, fingerprint(X, y), detector.specification, seed)
