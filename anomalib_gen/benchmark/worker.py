"""What a worker process does: fit and judge one cell after the other."""

from __future__ import annotations

import os
import random
import sys
import threading
from typing import Any

import numpy as np

from anomalib_gen._base import GenerativeDetector
from anomalib_gen.anomaly import DiffusionELBO, ImportanceWeighted, Likelihood, NegativeELBO, ODELikelihood
from anomalib_gen.images import bits_per_dimension

from .cases import describe_cases
from .cells import Job, describe_failure, describe_success
from .evaluation import Evaluation, evaluate
from .protocols import IMAGE_SUITES, Split, SplitError
from .sources import load_split

DENSITIES = (DiffusionELBO, ImportanceWeighted, Likelihood, NegativeELBO, ODELikelihood)
"""Anomalies that are minus a log-density or a bound on one: on images, their mean is a code length in bits."""


def start_worker(log: str, environment: dict[str, str]) -> None:
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
        split = load_split(cell.suite, job.source, job.data_home, cell.seed)
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
        _last_fit[:] = [(fit_identity(job), estimator, result.fit_seconds)] if shared else []
    except KeyboardInterrupt:
        raise  # Ctrl-C reaches workers, too, and is nobody's failure
    except BaseException as error:  # SystemExit is one, and so is what libraries in Rust raise
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


def fit_identity(job: Job) -> tuple[Any, ...]:
    """All that a fit depends on; two cells with the same differ in the anomaly alone."""
    arguments = tuple(pair for pair in job.detector.arguments if pair[0] != "anomaly")
    cell = job.cell
    return cell.suite, cell.dataset, cell.fingerprint, cell.seed, job.detector.path, repr(arguments)


def _from_last_fit(job: Job, estimator: Any, split: Split) -> tuple[Any, float | None]:
    """Give `estimator` the fit of the cell before, if that differs in the anomaly alone; else return it as it is."""
    if _last_fit and hasattr(estimator, "with_anomaly"):
        identity, fitted, seconds = _last_fit[0]
        if identity == fit_identity(job):
            return fitted.with_anomaly(estimator.anomaly, split.X_train), seconds
    return estimator, None
