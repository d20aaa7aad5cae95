"""A first look: detectors on the real tables that ship with scikit-learn, without any download."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from anomalib_gen._outlier import is_below
from anomalib_gen.inspection._inline import new_figure, to_svg

from ._extra import require_benchmark_extra
from .cells import Cell, Job, result_row, results_frame
from .detectors import Detector
from .evaluation import Evaluation
from .protocols import Split
from .report import Panel, print_summary, summarise, to_html
from .runner import make_cell, progress_bar, run_jobs
from .sources import load_source
from .worker import evaluate_cell

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]

_DATASETS = ("builtin:digits", "builtin:breast_cancer", "builtin:wine")  # the longest first
_DETECTORS = (
    Detector("FlowDetector", "anomalib_gen.FlowDetector"),
    Detector("IsolationForest", "sklearn.ensemble.IsolationForest"),
    Detector("LocalOutlierFactor", "sklearn.neighbors.LocalOutlierFactor", (("novelty", True),)),
    Detector("kNN(5)", "anomalib_gen.benchmark.KNNDistance", (("n_neighbors", 5),)),
)
_INTRODUCTION = (
    "One-class detection on real tables that ship with scikit-learn. Each detector learns from one half of "
    "the normal "
    "rows alone and ranks the other half together with the anomalies. Every detector runs at its defaults; "
    "nothing was "
    "tuned to these tables."
)


def run_demo(
    output: str | os.PathLike[str] = "anomalib-gen-demo",
    *,
    detectors: Sequence[Detector] = _DETECTORS,
    seeds: Sequence[int] = (0, 1),
    console: Console | None = None,
) -> Path:
    """Compare a few detectors on built-in tables, print the table and write a page with the scores.

    Parameters
    ----------
    output : str or path-like, default="anomalib-gen-demo"
        Folder of the page; it is made if absent.
    detectors : sequence of Detector
        What to compare. Default: `anomalib_gen.FlowDetector` and three well-known peers, all at their
        defaults.
    seeds : sequence of int, default=(0, 1)
        Seeds of the splits and detectors. The figures of scores show the first.
    console : rich.console.Console, optional
        Where to print. Default: standard output.

    Returns
    -------
    Path
        The page.
    """
    require_benchmark_extra()
    from rich.console import Console

    console = console or Console()
    page = Path(output) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    for detector in detectors:
        detector.resolve()
    cores = joblib.cpu_count()
    todo = []
    for dataset in _DATASETS:
        X, y = load_source(dataset)
        for seed in seeds:
            for detector in detectors:
                cell = make_cell("clean", dataset.removeprefix("builtin:"), X, y, detector, seed)
                todo.append(Job(cell, detector, dataset, None, 1))
    records: dict[Cell, dict[str, Any]] = {}
    with progress_bar("demo", len(todo)) as advance:

        def keep(job: Job, record: dict[str, Any]) -> None:
            records[job.cell] = record
            advance(record)

        # One thread a worker: networks this small gain nothing from a second, and lose much on a busy machine.
        run_jobs(todo, _run_and_draw, keep, folder=page.parent, jobs=min(cores, len(todo)))
    rows = [result_row(job.detector.name, records[job.cell]) for job in todo]
    first = [records[job.cell] for job in todo if job.cell.seed == seeds[0]]
    panels = [record["panel"] for record in first if "panel" in record]
    results = results_frame(rows)
    print_summary(summarise(results), console=console)
    title = "Anomaly detection on built-in tables"
    html = to_html(results, title=title, introduction=_INTRODUCTION, panels=panels)
    page.write_text(html, encoding="utf-8")
    console.print(
        f"\nReport with the scores of each detector: {page.resolve()}", soft_wrap=True, highlight=False
    )
    return page


def _run_and_draw(job: Job) -> dict[str, Any]:
    """Run a cell inside a worker process and add the figure of its scores to the record."""
    record, parts = evaluate_cell(job)
    if parts is not None:
        record["panel"] = _histogram(job.cell.dataset, job.detector.name, *parts)
    return record


def _histogram(dataset: str, detector: str, estimator: Any, split: Split, result: Evaluation) -> Panel:
    """Draw the scores of normal rows and anomalies, with the detector's own threshold if it has one."""
    scores, is_anomaly = result.scores, split.y_test == -1
    low, high = np.quantile(scores[~is_anomaly], [0.05, 0.95])
    # Densities fall without bound; without an edge one far row would squeeze all others into one bar.
    edge = max(scores.min(), low - 4 * (high - low))
    threshold = float(estimator.offset_) if hasattr(estimator, "offset_") else None
    if threshold is not None:
        edge = min(edge, threshold)
    beyond = int(np.sum(scores < edge))

    figure, axes = new_figure(3.9, 2.3)
    bins = np.linspace(edge, scores.max(), 41)
    for rows, label, color in ((~is_anomaly, "normal", "#3b82f6"), (is_anomaly, "anomaly", "#ea580c")):
        inside = np.clip(scores[rows], edge, None)
        weights = np.full(len(inside), 1 / len(inside))
        axes.hist(inside, bins=bins, weights=weights, color=color, alpha=0.6, label=label)
    if threshold is not None:
        axes.axvline(threshold, color="#64748b", linestyle="--", linewidth=1.4)
    axes.set_xlabel("score (lower = more abnormal)")
    axes.set_ylabel("share of rows")
    axes.locator_params(axis="x", nbins=5)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": 2}
    legend = axes.legend(frameon=False, fontsize=8, **place)
    for text in legend.get_texts():
        text.set_color(axes.xaxis.label.get_color())

    caption = f"AUROC {result.auroc:.3f}, AP {result.average_precision:.3f}."
    if threshold is not None:
        flagged = is_below(scores, threshold)
        caption += (
            f" Below the detector's threshold (dashed): {np.sum(flagged & is_anomaly)} of "
            f"{np.sum(is_anomaly)} "
            f"anomalies, {np.sum(flagged & ~is_anomaly)} of {np.sum(~is_anomaly)} normal rows."
        )
    else:
        caption += " This detector sets no threshold."
    if beyond:
        caption += f" The first bar includes {beyond} row{'s' if beyond > 1 else ''} beyond the left edge."
    title = f"{dataset}: {detector}"
    return Panel(title, caption, to_svg(figure, label=f"Histogram of scores, {title}"))
