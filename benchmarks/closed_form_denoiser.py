"""What exact neighbours and closed-form denoisers cost beside scikit-learn's `NearestNeighbors`.

Every figure is a ratio of two times of one run in one process on one thread, below 1 where ours is faster: the median
over pairs that alternate, with quartiles. It says nothing about other machines' absolute speed.

Search
    `nearest_rows` against `kneighbors` of the brute-force search and of the tree (k-d tree), for rows from a normal of
    full dimension, where trees help in few columns only, and for rows near a plane of three dimensions, where they help
    in any number. Ours computes in float64 from rows stored in float32; scikit-learn gets the same values in float64.
    The distances found are compared. Building the tree, which ours has not, is not counted.
Denoisers
    One call of each denoiser against one brute-force search for as many neighbours.

Run::

    python benchmarks/closed_form_denoiser.py                  # minutes
    python benchmarks/closed_form_denoiser.py --rows 1000000 --queries 500
    python benchmarks/closed_form_denoiser.py --output benchmarks/results/closed-form-denoiser.json
    python benchmarks/closed_form_denoiser.py --quick          # seconds; figures mean nothing
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import environment, ratio, save, show, show_ratio
from sklearn.neighbors import NearestNeighbors

from anomalib_gen.models import KernelDenoiser, LocalLinearDenoiser, nearest_rows, neighbor_scale
from anomalib_gen.paths import EDM


def make_rows(kind: str, n: int, columns: int, seed: int) -> torch.Tensor:
    """Draw rows of unit variance from a normal, or from the neighbourhood of a plane; the plane is always the same."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((n, columns), generator=generator)
    if kind == "plane":
        axes = torch.randn((3, columns), generator=torch.Generator().manual_seed(0))
        plane = torch.randn((n, 3), generator=generator) @ (axes / axes.norm(dim=0))
        rows = 0.99**0.5 * plane + 0.1 * rows
    return rows


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time callables in turns, after one untimed call of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for repeat in range(repeats):
        for name in list(calls) if repeat % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def measure(kind: str, n: int, columns: int, k: int, queries: int, repeats: int) -> dict[str, Any]:
    """Compare on one set of rows."""
    rows = make_rows(kind, n, columns, 0)
    x = make_rows(kind, queries, columns, 1).double()
    X = x.numpy()
    peers = {
        name: NearestNeighbors(n_neighbors=k, algorithm=name, n_jobs=1).fit(rows.double().numpy())
        for name in ("brute", "kd_tree")
    }
    scale = neighbor_scale(rows[: min(n, 20_000)])
    level = torch.full((queries,), scale, dtype=torch.float64)
    models = {
        "kernel, nearest rows": KernelDenoiser(rows, EDM(), n_neighbors=k),
        "kernel, all rows": KernelDenoiser(rows, EDM()),
        "local linear": LocalLinearDenoiser(rows, EDM(), n_neighbors=k),
    }
    distances = nearest_rows(x, rows, k).squared.sqrt().numpy()
    np.testing.assert_allclose(distances, peers["kd_tree"].kneighbors(X)[0], rtol=1e-9, atol=1e-9)
    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: nearest_rows(x, rows, k),
        **{name: lambda peer=peer: peer.kneighbors(X) for name, peer in peers.items()},
        **{name: lambda model=model: model.denoise(x, level) for name, model in models.items()},
    }
    times = alternate(calls, repeats)
    return {
        "kind": kind,
        "rows": n,
        "columns": columns,
        "neighbors": k,
        "search": {name: ratio(times["search"], times[name]) for name in peers},
        "denoisers": {name: ratio(times[name], times["brute"]) for name in models},
    }


def main(
    rows: Annotated[int, typer.Option(help="Stored rows.")] = 100_000,
    queries: Annotated[int, typer.Option(help="Rows to look up.")] = 500,
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A dry run in seconds.")] = False,
) -> None:
    """Measure exact search and closed-form denoisers beside scikit-learn."""
    cases = [("normal", 5, 50), ("normal", 10, 1), ("normal", 10, 50), ("plane", 30, 50), ("normal", 100, 50)]
    if quick:
        rows, queries, repeats, cases = 2000, 50, 1, cases[2:4]
    torch.set_num_threads(1)
    found = []
    for kind, columns, k in cases:
        print(f"measuring {kind} rows of {columns} columns, {k} neighbours ...", flush=True)
        found.append(measure(kind, rows, columns, k, queries, repeats))
    for part, title in (
        ("search", "Search / scikit-learn's"),
        ("denoisers", "Denoiser / brute-force search"),
    ):
        lines = [
            [
                f"{one['kind']}, {one['columns']} columns",
                str(one["neighbors"]),
                *map(show_ratio, one[part].values()),
            ]
            for one in found
        ]
        show(
            f"{title}, {rows:,} stored rows, {queries:,} queries: median (quartiles)",
            ["rows", "k", *found[0][part]],
            lines,
        )
    if output is not None:
        setting = {"rows": rows, "queries": queries, "repeats": repeats, "quick": quick}
        save(output, {"environment": environment(), "setting": setting, "cases": found})


if __name__ == "__main__":
    typer.run(main)
