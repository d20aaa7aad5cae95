"""Detection on MNIST and CIFAR-10 by every family, beside peers and published figures.

One script for machines with and without a GPU. It runs the command's suite of images, cell by cell (one detector, task
and seed), until the budget is used up, and goes on where it stopped when it is called again with the same options:

    python benchmarks/image_detection.py --preset small --output DIR    # at most 4,000 images, detectors at defaults
    python benchmarks/image_detection.py --preset full --output DIR     # all images, wider networks, more steps; a GPU

Workers of ``--jobs`` take turns on one GPU: they help with what the CPU does (reading, judging), not with training.

``--record NAME`` writes the cells finished so far to ``benchmarks/results/NAME.csv`` and ``.md``, with the device that
each was run on, which stands in ``devices.json`` beside the cells;
cells that stand there and are not among them stay, so that calls on several machines add up. The tables hold average
precision on MNIST with one digit held out and AUROC on one class of CIFAR-10, each beside published figures, CIFAR-10
against other sources of the same coding, and bits per dimension where the anomaly is a density
(`bits_per_dimension.py` has those of all families).

A preset is one configuration a family for all tasks; nothing is chosen by task or by labels. Detectors of one family
that differ in the anomaly alone share a fit. A cell that is cut off by the budget starts anew in the next call, so a
budget must hold the longest cell. Published figures are of models trained on all images, and CIFAR-10's files here are
JPEG-coded copies: context, not a comparison.

Needs the ``benchmark`` extra, and the files of both collections (``ANOMALIB_GEN_DATA``).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _measure import RESULTS, environment  # noqa: E402

from anomalib_gen.benchmark import BenchmarkInterrupted, load_results, run_benchmark  # noqa: E402

TASKS = {
    "held-out": [f"mnist:not-{digit}" for digit in (1, 4, 5, 7, 9)],
    "against": ["cifar10:against-mnist", "cifar10:against-photographs"],
    "one-class-cifar10": [f"cifar10:only-{label}" for label in range(10)],
    "one-class-mnist": [f"mnist:only-{digit}" for digit in range(10)],
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "flow": ("FlowDetector", "FlowDetector", {}, ["", "input_complexity", "typicality"]),
    "vae": ("VAEDetector", "VAEDetector", {}, ["", "typicality", "multiscale_reconstruction"]),
    "energy": ("EnergyDetector", "EnergyDetector", {}, ["", "energy"]),
    "diffusion": (
        "DiffusionDetector network",
        "DiffusionDetector",
        {"denoiser": "network"},
        ["", "multiscale_reconstruction"],
    ),
    "closed-form": ("DiffusionDetector closed-form", "DiffusionDetector", {"denoiser": "closed-form"}, [""]),
}
"""Name of each family, its class and what makes it, and the anomalies that are measured: its default, and those that
are made for images.

The last is the denoiser that has the training images in place of a network; it takes nothing from a preset."""
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("images", {}),
    "full": (
        "images-full",
        {"hidden_features": 256, "batch_size": 256, "max_iter": 600, "validation_fraction": 0.02},
    ),
    "dry": ("images", {"hidden_features": 8, "max_iter": 2}),
}
"""Suite, and the parameters of every family, by name of preset."""

PUBLISHED_HELD_OUT = {
    "VAE": (0.06, 0.34, 0.33, 0.15, 0.10),
    "latent energy": (0.34, 0.63, 0.62, 0.46, 0.41),
    "hierarchical VAE": (0.49, 0.92, 0.91, 0.68, 0.79),
    "joint energy prior": (0.72, 0.95, 0.98, 0.94, 0.94),
}
"""Average precision for the digits 1, 4, 5, 7 and 9 (Cui, Wu and Han 2023, CVPR, table 3)."""
PUBLISHED_CIFAR10 = {"AnoGAN": 0.61, "Deep SVDD": 0.65, "OCGAN": 0.66}
"""Mean AUROC over the ten one-class tasks, without pretrained features."""


def specifications(families: Sequence[str], preset: str, device: str) -> list[str]:
    """Detectors of the families as the benchmark reads them; those that share a fit stand side by side."""
    found = []
    for family in families:
        name, cls, made, anomalies = FAMILIES[family]
        for anomaly in anomalies:
            arguments = made | ({} if family == "closed-form" else PRESETS[preset][1])
            arguments |= {"device": device} if device != "auto" else {}
            arguments |= {"anomaly": anomaly} if anomaly else {}
            text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            found.append(f"{name}{' ' + anomaly if anomaly else ''}=anomalib_gen.{cls}({text})")
    return found


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Interrupt what runs inside when the time is over, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line(name: str, values: Sequence[Any]) -> str:
    shown = [
        value if isinstance(value, str) else "–" if pd.isna(value) else f"{value:.3f}" for value in values
    ]
    return "| " + " | ".join([name, *shown]) + " |"


def table(head: Sequence[str], body: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body, ""]


def by_task(results: pd.DataFrame, tasks: Sequence[str], figure: str) -> pd.DataFrame:
    """Mean over seeds of a figure, one row a detector, in the order of the run; detectors without any left out."""
    ok = results[(results["status"] == "ok") & results["dataset"].isin(tasks)]
    wide = ok.pivot_table(index="detector", columns="dataset", values=figure, aggfunc="mean", sort=False)
    return wide.reindex(columns=list(tasks)).dropna(how="all")


def tables(results: pd.DataFrame) -> str:
    """All tables of the finished cells, as Markdown."""
    lines = []
    held_out = TASKS["held-out"]
    digits = [task[-1] for task in held_out]
    for title, figure in (("Average precision", "average_precision"), ("AUROC", "auroc")):
        found = by_task(results, held_out, figure)
        if len(found):
            lines += [f"## MNIST, one digit held out: {title}", ""]
            body = [line(str(name), row) for name, row in zip(found.index, found.to_numpy(), strict=True)]
            if figure == "average_precision":
                body += [
                    line(f"published: {name}", [f"{value:.2f}" for value in row])
                    for name, row in PUBLISHED_HELD_OUT.items()
                ]
                share = (
                    results[results["status"] == "ok"].groupby("dataset")[["n_anomalies", "n_test"]].first()
                )
                chance = (share["n_anomalies"] / share["n_test"]).reindex(held_out)
                body.append(line("chance", chance.astype(float).to_numpy()))
            lines += table(["detector", *digits], body)
    for key, title in (("one-class-cifar10", "CIFAR-10"), ("one-class-mnist", "MNIST")):
        found = by_task(results, TASKS[key], "auroc")
        if len(found):
            done = found.columns[found.notna().any()]
            lines += [f"## {title}, one class against the rest: AUROC", ""]
            body = []
            for name, row in found[done].iterrows():
                values = row.to_numpy(dtype=float)
                mean = values.mean() if len(done) == 10 else np.nan
                body.append(line(str(name), [*values, mean]))
            if key == "one-class-cifar10":
                blank = [""] * len(done)
                body += [
                    line(f"published: {name}", [*blank, f"{mean:.2f}"])
                    for name, mean in PUBLISHED_CIFAR10.items()
                ]
            lines += table(["detector", *(task.rpartition("-")[2] for task in done), "mean of ten"], body)
    found = by_task(results, TASKS["against"], "auroc")
    if len(found):
        done = found.columns[found.notna().any()]
        lines += ["## CIFAR-10 against another source of the same coding: AUROC", ""]
        body = [line(str(name), row) for name, row in zip(found.index, found[done].to_numpy(), strict=True)]
        lines += table(["detector", *(task.rpartition("-")[2] for task in done)], body)
    bits = results[(results["status"] == "ok") & results["bits_per_dimension"].notna()]
    if len(bits):
        lines += ["## Bits per dimension of normal test images", ""]
        bits = bits.assign(collection=bits["dataset"].str.partition(":")[0])
        grouped = bits.groupby(["collection", "detector"], sort=False)
        body = [
            f"| {collection} | {name} | {len(part)} | {part['bits_per_dimension'].mean():.2f} | "
            f"{part['fit_seconds'].median():.0f} |"
            for (collection, name), part in grouped
        ]
        lines += table(["collection", "detector", "cells", "bits per dimension", "fit s (median)"], body)
    failed = results[results["status"] != "ok"]
    lines += ["## Failures", "", *([] if len(failed) else ["None."])]
    lines += [f"- {row.detector} on {row.dataset}: {row.error}" for row in failed.itertuples()]
    return "\n".join(lines).rstrip() + "\n"


def device_name(device: str = "auto") -> str:
    """Name of what detectors with that `device` run on in this process."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU, {environment()['processor']}"


def finished_cells(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cells").glob("*.json")}


def note_devices(folder: Path, before: set[str], device: str) -> None:
    """Keep beside the cells what those that were finished since `before` ran on, with the version of torch.

    Cells that had no note before get none: what they ran on is not known.
    """
    here = f"{device_name(device)}, torch {torch.__version__}"
    notes = read_devices(folder) | dict.fromkeys(sorted(finished_cells(folder) - before), here)
    (folder / "devices.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def read_devices(folder: Path) -> dict[str, str]:
    path = folder / "devices.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def devices_of(folder: Path) -> pd.DataFrame:
    """Device of each cell of a folder, by task, seed and specification."""
    notes, rows = read_devices(folder), []
    for file in sorted(finished_cells(folder)):
        cell = json.loads((folder / "cells" / file).read_text(encoding="utf-8"))["cell"]
        rows.append((cell["dataset"], cell["seed"], cell["detector"], notes.get(file, "not noted")))
    return pd.DataFrame(rows, columns=["dataset", "seed", "specification", "device"])


def record(folder: Path, name: str, command: str) -> None:
    """Write the finished cells, those recorded before, and their tables into the folder of recorded results."""
    results = load_results(folder)
    suite = results["suite"].iloc[0]
    columns = ["dataset", "seed", "detector", "status", "auroc", "average_precision", "bits_per_dimension"]
    columns += ["fit_seconds", "score_seconds", "n_train", "n_test", "n_anomalies", "specification", "error"]
    keys = ["dataset", "seed", "specification"]
    results = results[columns].merge(devices_of(folder).drop_duplicates(keys), on=keys, how="left")
    results = results.round(
        {"auroc": 4, "average_precision": 4, "bits_per_dimension": 3} | {"fit_seconds": 1, "score_seconds": 1}
    )
    file = RESULTS / f"{name}.csv"
    if file.exists():
        both = pd.concat([pd.read_csv(file), results])
        results = both.drop_duplicates(["dataset", "seed", "detector"], keep="last")
    counts = ["n_train", "n_test", "n_anomalies"]
    results[counts] = results[counts].astype("Int64")
    # In the order of the tasks and families above, whatever the calls were.
    tasks = [task for group in TASKS.values() for task in group]
    detectors = [text.partition("=")[0] for text in specifications(list(FAMILIES), "small", "auto")]
    places = {name: k for k, name in enumerate([*tasks, *detectors])}
    results = results.sort_values(
        ["dataset", "seed", "detector"],
        key=lambda c: c.map(lambda v: (places.get(v, len(places)), v)),
        kind="stable",
    )
    RESULTS.mkdir(exist_ok=True)
    results.to_csv(file, index=False)
    trained = results.loc[results["status"] == "ok", "n_train"]
    sizes = " to ".join(f"{n:,.0f}" for n in sorted({trained.min(), trained.max()}))
    seeds = sorted(results["seed"].unique())
    head = [
        "# Detection on images",
        "",
        f"Written by `{command}`: suite `{suite}`, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}, {sizes} training images, on {'; '.join(results['device'].unique())}. Every "
        f"cell, with its device, is in `{name}.csv`; – was not run. Seconds are wall time, and mean little where other "
        "work ran on the machine. Published figures are of models trained on all images.",
        "",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(head) + "\n" + tables(results), encoding="utf-8")
    print(f"written: {file} and .md")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--no-peers", action="store_true", help="leave out the detectors of other libraries")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, which share the device")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which the call ends")
    parser.add_argument("--output", type=Path, help="folder of the cells; the same one continues a run")
    parser.add_argument("--record", metavar="NAME", help="write the finished cells to benchmarks/results")
    parser.add_argument("--record-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--quick", action="store_true", help="a dry run on one task; its figures mean nothing"
    )
    options = parser.parse_args()
    if options.quick:
        options.preset, options.tasks, options.device = "dry", ["mnist:not-1"], "cpu"
        options.output = options.output or Path(tempfile.mkdtemp())
    if options.output is None:
        parser.error("--output is needed: the folder in which cells are kept between calls")
    tasks = [task for name in options.tasks for task in TASKS.get(name, [name])]
    detectors = specifications(options.families, options.preset, options.device)
    if not (options.no_peers or options.quick):
        detectors += ["peers", "deep-peers"]
    if not options.record_only:
        start = time.perf_counter()
        before = finished_cells(options.output)
        try:
            with stopped_after(options.budget):
                run_benchmark(
                    detectors,
                    suite=PRESETS[options.preset][0],
                    datasets=tasks,
                    seeds=options.seeds,
                    output=options.output,
                    jobs=options.jobs,
                )
            print(f"All cells are done after {time.perf_counter() - start:.0f} s.")
        except BenchmarkInterrupted as stopped:
            print(f"{stopped.finished} of {stopped.total} cells are done. The same command goes on.")
        except KeyboardInterrupt:  # before the first cell, or after the last
            print("Stopped. The same command goes on.")
        finally:
            if finished_cells(options.output) > before:
                note_devices(options.output, before, options.device)
    if not list((options.output / "cells").glob("*.json")):
        print("No cell is done yet. If that stays so, the budget is shorter than a cell.")
    elif options.record:
        record(
            options.output, options.record, f"python benchmarks/image_detection.py --preset {options.preset}"
        )
    else:
        print(tables(load_results(options.output)))


if __name__ == "__main__":
    main()
