"""Speed and memory of every detector family on a GPU, beside hand-written loops over the same network.

One call, below ten minutes. It first runs the tests that need a GPU (``pytest -m gpu``) and then, for each family,
number of columns or size of images, number of rows and batch size:

- *train*: rows a second through the training steps of `fit` (the first ones are left out; most families replay a
  recorded step after them), and the ratio of its time to those of two bare loops with the same network, objective and
  batch (forward, backward, AdamW, kernel by kernel; neither clipping nor averaging): one over
  ``torch.utils.data.DataLoader(TensorDataset(...))``, as one would write it, and one over rows that lie on the device
  already;
- *fit*: the share of the whole `fit` that its training steps take; the rest reads, standardises and sets the
  threshold;
- *score*: rows a second through `score_samples`, numpy to numpy, and the ratio of its time to the model alone on
  the same blocks of rows, which lie on the device already;
- the peak of allocated GPU memory while fitting and while scoring.

Ratios are times, below 1 where the detector is faster. Rows a second belong to the machine in the file; ratios travel
better. When the time budget is used up, the settings that are left are named and skipped. How well detectors find
anomalies in images is another script's question, `image_detection.py`.

Run::

    python benchmarks/gpu.py --output             # to benchmarks/results/gpu-<device>.json and .md
    python benchmarks/gpu.py --output DIR --budget 500
    python benchmarks/gpu.py --skip-tests --only images  # half of it; the other is "tables"
    python benchmarks/gpu.py --quick --device cpu # a dry run below a minute; figures mean nothing

Needs the library's own imports and the standard library; rich draws the tables where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # an unpacked tree is enough

from _measure import RESULTS, environment, markdown, save, scoring_blocks, show, watch_training  # noqa: E402

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector  # noqa: E402

Setting = tuple[tuple[int, ...], int, int]
WARM_UP = 20
"""Training steps before the clock starts, in `fit` and in the bare loops."""
SCORED_ROWS = 200_000
"""Rows of which scoring is timed, three times; memory is that of scoring them all."""


@dataclass(frozen=True)
class Family:
    """A detector to measure.

    Attributes
    ----------
    name : str
    make : callable
        Takes the detectors' common keyword arguments (``batch_size``, ``max_iter``, ``device``, ...).
    """

    name: str
    make: Callable[..., Any]


FAMILIES = [
    Family("flow nsf-autoregressive", lambda **k: FlowDetector(transform="nsf-autoregressive", **k)),
    Family("flow nsf-coupling", lambda **k: FlowDetector(transform="nsf-coupling", **k)),
    Family("flow maf", lambda **k: FlowDetector(transform="maf", **k)),
    Family("flow realnvp", lambda **k: FlowDetector(transform="realnvp", **k)),
    Family("vae", lambda **k: VAEDetector(**k)),
    Family("energy, denoising", lambda **k: EnergyDetector(objective=None, **k)),
    Family("diffusion", lambda **k: DiffusionDetector(**k)),
]

IMAGE_FAMILIES = [
    Family("flow glow", lambda **k: FlowDetector(**k)),
    Family("vae", lambda **k: VAEDetector(**k)),
    Family("energy, denoising", lambda **k: EnergyDetector(objective=None, **k)),
    Family("diffusion", lambda **k: DiffusionDetector(denoiser="network", **k)),
]
"""Those of images of 8 bits, with convolutional networks."""

HEADER = [
    "family",
    "row",
    "rows",
    "batch",
    "train rows/s",
    "/ DataLoader",
    "/ resident",
    "steps of fit",
    "score rows/s",
    "/ model",
    "fit MiB",
    "score MiB",
]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float | None:
    """MiB allocated at most since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def clean_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Clock:
    """Sees every training step of a fit and times `steps` of them after the warm-up."""

    def __init__(self, device: torch.device, warm_up: int, steps: int) -> None:
        self.device, self.first, self.last = device, warm_up, warm_up + steps
        self.step = 0
        self.model: Any = None

    def __call__(self, objective: Any, model: Any, x: torch.Tensor, generator: torch.Generator) -> None:
        if self.model is None:
            self.model = copy.deepcopy(model)

    def count(self) -> None:
        # A look that waits for the device at every step would measure the waiting, hence only at both ends.
        if self.step == self.first:
            synchronise(self.device)
            self.start = time.perf_counter()
        elif self.step == self.last:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.start
        self.step += 1


def bare_loop(
    model: Any,
    objective: Any,
    batches: Iterator[torch.Tensor],
    warm_up: int,
    steps: int,
    device: torch.device,
) -> float:
    """Seconds a step of forward, backward and AdamW."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    model.train()
    for step in range(warm_up + steps):
        if step == warm_up:
            synchronise(device)
            start = time.perf_counter()
        loss = objective(model, next(batches), generator).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    synchronise(device)
    return (time.perf_counter() - start) / steps


def loader_batches(rows: torch.Tensor, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Batches as a hand-written script takes them."""
    loader = DataLoader(
        TensorDataset(rows), batch_size=batch, shuffle=True, drop_last=True, pin_memory=device.type == "cuda"
    )
    while True:
        for (x,) in loader:
            yield x.to(device, non_blocking=True)


def resident_batches(rows: torch.Tensor, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Batches cut on the device."""
    rows = rows.to(device)
    while True:
        order = torch.randperm(len(rows), device=device)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch]]


def measure(
    family: Family, X: np.ndarray, batch: int, warm_up: int, steps: int, device: torch.device, scored: bool
) -> dict[str, Any]:
    """Measure one family on one table, or on one array of images."""
    clean_memory(device)
    detector = family.make(
        batch_size=batch, max_iter=warm_up + steps + 1, validation_fraction=0.0, random_state=0, device=device
    )
    clock = Clock(device, warm_up, steps)
    watch_training(detector, clock, count=clock.count)
    start = time.perf_counter()
    detector.fit(X)
    synchronise(device)
    fit_seconds = time.perf_counter() - start
    found: dict[str, Any] = {"fit_peak_mib": peak_memory(device)}
    step_seconds = clock.seconds / steps

    axes = 0 if X.ndim == 2 else None  # images have one scale
    z = torch.from_numpy(((X - X.mean(axes)) / X.std(axes)).astype(np.float32))
    bare = {}
    for name, cut in (("loader", loader_batches), ("resident", resident_batches)):
        model, objective = copy.deepcopy(clock.model), detector._resolve_objective().part
        bare[name] = bare_loop(model, objective, cut(z, batch, device), warm_up, steps, device)
    found |= {
        "train_rows_per_second": batch / step_seconds,
        "train_over_loader": step_seconds / bare["loader"],
        "train_over_resident": step_seconds / bare["resident"],
        "steps_share_of_fit": step_seconds * (warm_up + steps + 1) / fit_seconds,
    }
    if scored:
        clean_memory(device)
        detector.score_samples(X)
        found["score_peak_mib"] = peak_memory(device)
        X = X[:SCORED_ROWS]
        blocks = scoring_blocks(detector, X)
        model, anomaly = detector.model_, detector.anomaly_
        generator = torch.Generator(device).manual_seed(0)

        def alone() -> None:
            with torch.inference_mode():
                for x in blocks:
                    anomaly(model, x, generator)

        alone()
        times: dict[str, list[float]] = {"detector": [], "alone": []}
        for _ in range(3):
            times["detector"] += [seconds_of(lambda: detector.score_samples(X), device)]
            times["alone"] += [seconds_of(alone, device)]
        found |= {
            "score_rows_per_second": len(X) / float(np.median(times["detector"])),
            "score_over_model": float(np.median(np.divide(times["detector"], times["alone"]))),
        }
    return found


def run_gpu_tests(timeout: float) -> dict[str, Any]:
    """Run ``pytest -m gpu`` on the files that have such tests, and count what happened."""
    files = sorted(
        str(path) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text("utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    if find_spec("xdist") is not None:
        command += ["-n", "4"]
    try:
        done = subprocess.run(
            [*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"not finished after {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)}
    outcome = {0: "passed", 1: "failed", 5: "no test needs a GPU"}.get(done.returncode, "could not run")
    if done.returncode not in (0, 5):
        print("\n".join([*lines[-25:], *done.stderr.strip().splitlines()[-5:]]))
    return {"outcome": outcome, "summary": summary.strip("= "), **counts}


def line_of(case: dict[str, Any]) -> list[str]:
    """Return one row of the table."""

    def show_as(key: str, form: str) -> str:
        value = case.get(key)
        return "" if value is None else format(value, form)

    return [
        case["family"],
        case["row"],
        f"{case['rows']:,}",
        f"{case['batch']:,}",
        show_as("train_rows_per_second", ",.0f"),
        show_as("train_over_loader", ".2f"),
        show_as("train_over_resident", ".2f"),
        show_as("steps_share_of_fit", ".0%"),
        show_as("score_rows_per_second", ",.0f"),
        show_as("score_over_model", ".2f"),
        show_as("fit_peak_mib", ",.0f"),
        show_as("score_peak_mib", ",.0f"),
    ]


def in_turn(first: list[Setting], second: list[Setting]) -> list[Setting]:
    """Take one of each, as long as there are; a run that is cut off then has some of both."""
    pairs = zip_longest(first, second)
    return [setting for pair in pairs for setting in pair if setting is not None]


def main(arguments: list[str] | None = None) -> None:
    """Run the tests and measure every family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing new starts")
    parser.add_argument("--steps", type=int, default=200, help="timed training steps of each setting")
    parser.add_argument("--output", type=Path, nargs="?", const=RESULTS, help="folder for the figures")
    parser.add_argument("--only", choices=["images", "tables"])
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a dry run")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was asked for, but torch finds no CUDA device")

    # (shape of a row, rows, batch): large batches, with which scoring is measured, and then small ones.
    tables: list[Setting] = [((c,), 10**5, b) for b in (4096, 256) for c in (10, 100)]
    images: list[Setting] = [(shape, 20_000, b) for b in (256, 64) for shape in ((3, 32, 32), (1, 28, 28))]
    steps, warm_up = options.steps, WARM_UP
    if device.type == "cpu":
        tables = [((c,), 10**4, b) for b in (2048, 256) for c in (10, 100)]
        images, steps = [((1, 28, 28), 200, 64)], min(steps, 20)
    if options.quick:
        tables, images, steps, warm_up = [((10,), 1000, 256)], [((1, 8, 8), 64, 16)], 3, 2
    settings = {"images": images, "tables": tables}.get(options.only) or in_turn(tables, images)
    tests = None
    if not options.skip_tests:
        tests = run_gpu_tests(timeout=60 if options.quick else 0.4 * options.budget)
        print(f"tests that need a GPU: {tests['outcome']}. {tests.get('summary', '')}", flush=True)

    rng = np.random.default_rng(0)
    for family in (
        [] if options.quick else FAMILIES
    ):  # the first kernels of a process are slow: compilation, libraries, memory
        measure(family, rng.normal(size=(1000, 10)), 256, 1, 1, device, scored=True)
    cases: list[dict[str, Any]] = []
    skipped: list[str] = []
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    title = f"Detectors on {where}"

    def keep() -> None:
        """Write what there is; a run that is cut off leaves it."""
        if options.output is None:
            return
        figures = {
            "environment": {**environment(), "device": where},
            "setting": {"steps": steps, "warm_up": warm_up, "quick": options.quick},
            "gpu_tests": tests,
            "cases": cases,
            "skipped": skipped,
        }
        slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
        lines = [line_of(case) for case in cases]
        save(options.output / f"gpu-{slug}.json", figures, markdown(title, HEADER, lines))

    for shape, n_rows, batch in settings:
        if len(shape) == 1:
            X = (rng.normal(size=(n_rows, *shape)) @ rng.normal(size=2 * shape)).astype(np.float32)
        else:
            X = rng.integers(0, 256, size=(n_rows, *shape), dtype=np.uint8)
        row = " x ".join(map(str, shape))
        for family in FAMILIES if len(shape) == 1 else IMAGE_FAMILIES:
            name = f"{family.name}, {row}, {n_rows:,} rows, batch {batch:,}"
            if time.perf_counter() - begin > options.budget:
                skipped.append(name)
                continue
            case: dict[str, Any] = {"family": family.name, "row": row, "rows": n_rows, "batch": batch}
            try:
                # A score does not depend on the batch, so the largest one of each shape is enough.
                largest = max(b for other, _, b in settings if other == shape)
                case |= measure(family, X, batch, warm_up, steps, device, scored=batch == largest)
            except torch.OutOfMemoryError as error:
                case["failed"] = str(error).split("\n")[0]
                print(f"{name}: {case['failed']}", flush=True)
            cases.append(case)
            keep()
            print(f"{time.perf_counter() - begin:4.0f} s  {name}", flush=True)

    keep()
    show(title, HEADER, [line_of(case) for case in cases])
    for name in skipped:
        print(f"skipped, out of time: {name}")


if __name__ == "__main__":
    main()
