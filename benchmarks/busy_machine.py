"""What fitting and scoring cost on a machine that does other work as well.

Scheduled jobs and notebooks share their cores. Threads that share the parts of one operation wait for one another at
its end, and where another process has one of the cores, that is most of the time. So rows of tables are scored in
threads that have blocks of their own. Each figure is how many times as long a thing takes as it does with one thread on
the idle machine, below 1 where it takes less: the median over rounds, with quartiles,

- *idle*: with nothing beside;
- *busy*: while a process of another session counts on one core.

It is measured with one thread, with all of them as they are used, and, for scoring, with all of them in every operation
(*shared operations*), as torch would by itself. Fitting has only the latter: its steps follow one another.

Run (ten minutes; on an otherwise idle machine with two cores or more)::

    OMP_NUM_THREADS=2 python benchmarks/busy_machine.py --output benchmarks/results/busy-machine.json
    python benchmarks/busy_machine.py --quick     # seconds; figures mean nothing
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from _measure import environment, markdown, ratio, save, show, show_ratio

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector

COLUMNS, TRAIN_ROWS = 10, 3000
DETECTORS: dict[str, Callable[..., Any]] = {
    "FlowDetector": FlowDetector,
    "VAEDetector": VAEDetector,
    "EnergyDetector": EnergyDetector,
    "DiffusionDetector": DiffusionDetector,
    "DiffusionDetector closed-form": lambda **options: DiffusionDetector(denoiser="closed-form", **options),
}
ONE, ALL, SHARED = "one thread", "all threads", "all threads, shared operations"


@contextmanager
def other_work(wanted: bool) -> Iterator[None]:
    """Keep one core busy inside the block, if wanted."""
    if not wanted:
        yield
        return
    # In another session, as other jobs are: many systems share cores out among sessions, not processes.
    # It ends with this process, however that ends.
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        # It has to have its core before the first look at the clock.
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def seconds(function: Callable[[], Any], n_threads: int) -> float:
    """Time of one call with so many threads of torch."""
    torch.set_num_threads(n_threads)
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(1)


def ways(
    make: Callable[..., Any], steps: int, rows: np.ndarray, n_threads: int
) -> dict[str, Callable[[], float]]:
    """What is timed of a detector: calls that return their time."""
    train = np.random.default_rng(0).normal(size=(TRAIN_ROWS, COLUMNS))
    fitted = make(max_iter=steps, random_state=0, device="cpu").fit(train)

    def fit() -> Any:
        return make(max_iter=steps, random_state=0, device="cpu").fit(train)

    def score() -> Any:
        return fitted.score_samples(rows)

    def score_shared() -> float:
        with mock.patch("anomalib_gen._runtime.scoring_threads", return_value=1):
            return seconds(score, n_threads)

    return {
        f"fit, {ONE}": lambda: seconds(fit, 1),
        f"fit, {SHARED}": lambda: seconds(fit, n_threads),
        f"score, {ONE}": lambda: seconds(score, 1),
        f"score, {ALL}": lambda: seconds(score, n_threads),
        f"score, {SHARED}": score_shared,
    }


def main(
    steps: Annotated[int, typer.Option(help="Gradient steps of a fit.")] = 25,
    wanted_seconds: Annotated[float, typer.Option("--seconds", help="Of scoring with one thread.")] = 0.25,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; a table goes beside it as Markdown.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report what a busy core costs."""
    if quick:
        steps, wanted_seconds, repeats = 2, 0.01, 1
    n_threads = torch.get_num_threads()
    figures: dict[str, Any] = {}
    lines: list[tuple[str, ...]] = []
    for name, make in DETECTORS.items():
        print(name, flush=True)
        rng = np.random.default_rng(1)
        pilot = ways(make, steps, rng.normal(size=(1024, COLUMNS)), n_threads)[f"score, {ONE}"]
        pilot()
        rows = rng.normal(size=(max(1024, int(1024 * wanted_seconds / pilot())), COLUMNS))
        calls = ways(make, steps, rows, n_threads)
        times: dict[str, dict[str, list[float]]] = {key: {"idle": [], "busy": []} for key in calls}
        for call in calls.values():
            call()
        for _ in range(repeats):
            for place in ("idle", "busy"):
                with other_work(place == "busy"):
                    for key, call in calls.items():
                        times[key][place].append(call())
        figures[name] = {}
        for key in calls:
            base = times[f"{key.split(',')[0]}, {ONE}"]["idle"]
            figures[name][key] = {place: ratio(found, base) for place, found in times[key].items()}
            what, how = key.split(", ", 1)
            lines.append(
                (name, what, how, *(show_ratio(figures[name][key][place]) for place in ("idle", "busy")))
            )
    header = ("detector", "what", "how", "idle", "busy")
    title = f"Time on {n_threads} threads, by that of one on the idle machine"
    show(title, header, lines)
    if output is not None:
        save(
            output,
            {"environment": {**environment(), "torch_threads": n_threads}, "results": figures},
            markdown(title, header, lines),
        )


if __name__ == "__main__":
    typer.run(main)
