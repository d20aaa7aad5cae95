"""What the scripts share: pairs of times, a look into a running fit, tables and files.

Needs numpy and torch alone; rich draws the tables where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"


class Watched:
    """A detector's own objective or anomaly that calls `look(part, model, x, generator)` before it works.

    Only calls with gradients count as training steps; dry runs and validation pass unseen. A step that was recorded and
    is replayed makes no call; `count` runs before all steps.
    """

    def __init__(
        self, part: Any, look: Callable[..., None], *, training: bool, count: Callable[[], None] | None = None
    ) -> None:
        self.part, self.look, self.training, self.count = part, look, training, count

    @property
    def recordable(self) -> bool:
        return getattr(self.part, "recordable", False)

    def set_progress(self, fraction: float) -> None:
        if self.count is not None:
            self.count()
        if hasattr(self.part, "set_progress"):
            self.part.set_progress(fraction)

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if torch.is_grad_enabled() == self.training:
            self.look(self.part, model, x, generator)
        return self.part(model, x, generator)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The dry run, which has gradients too, works on a copy of the part: nobody looks at that.
        return copy.deepcopy(self.part, memo)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


def watch_training(
    detector: Any, look: Callable[..., None], *, count: Callable[[], None] | None = None
) -> Any:
    """Let `look(objective, model, x, generator)` run at the start of the training steps of `detector.fit`.

    That is of all of them on a CPU, and of those that are not replayed on a GPU; `count` runs before all of them.
    """
    make = detector._resolve_objective
    detector._resolve_objective = lambda: Watched(make(), look, training=True, count=count)
    return detector


def scoring_blocks(detector: Any, X: np.ndarray) -> list[torch.Tensor]:
    """Return the blocks of standardised rows, as the model of a fitted detector sees them when scoring `X`."""
    blocks: list[torch.Tensor] = []
    anomaly = detector.anomaly_
    detector.anomaly_ = Watched(
        anomaly, lambda part, model, x, generator: blocks.append(x.clone()), training=False
    )
    try:
        # In one thread: several would hand in their blocks in another order.
        with mock.patch("anomalib_gen._runtime.scoring_threads", return_value=1):
            detector.score_samples(X)
    finally:
        detector.anomaly_ = anomaly
    return blocks


def ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired times."""
    low, median, high = np.quantile(np.asarray(ours) / np.asarray(peer), [0.25, 0.5, 0.75])
    return {"ratio": float(median), "low": float(low), "high": float(high), "pairs": len(ours)}


def show_ratio(figures: dict[str, float]) -> str:
    return f"{figures['ratio']:.2f} ({figures['low']:.2f} to {figures['high']:.2f}, n={figures['pairs']})"


def environment() -> dict[str, Any]:
    """Versions and hardware that the figures belong to."""
    packages = {}
    for name in ("anomalib-gen", "torch", "numpy", "scikit-learn", "nflows", "zuko"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": packages,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is there."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[j]) for line in [header, *rows]) for j in range(len(header))]
        print(f"\n{title}")
        for line in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for j, name in enumerate(header):
        table.add_column(name, justify="left" if j == 0 else "right")
    for line in rows:
        table.add_row(*line)
    # Off a terminal a line is as wide as it needs to be: a log that drops figures is no log.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def image_options(
    description: str | None, families: Sequence[str], *, n_test: int, quick: dict[str, Any]
) -> argparse.Namespace:
    """Options of a script that measures families on one collection of images, with `quick` ones where that is asked."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", default="mnist", choices=["mnist", "cifar10"])
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=n_test)
    parser.add_argument("--families", nargs="+", default=list(families), choices=list(families))
    parser.add_argument("--max-iter", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; the same one continues a run")
    parser.add_argument("--quick", action="store_true", help="one family, next to no training; to see it run")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(quick)
    return options


def continued(
    path: Path | None, collection: str, setting: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of all collections that are in a file so far, and those of one, at this setting."""
    found: dict[str, Any] = {"environment": environment(), "collections": {}}
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    here = found["collections"].setdefault(collection, {**setting, "figures": {}})
    if here | setting != here:
        sys.exit(f"{path} has {collection} at another setting.")
    return found, here


def save(path: Path, figures: dict[str, Any], text: str | None = None) -> None:
    """Write the figures as JSON and, if given, their tables as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    if text is not None:
        path.with_suffix(".md").write_text(text)
    print(f"written: {path}")
