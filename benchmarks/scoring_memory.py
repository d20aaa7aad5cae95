"""Peak memory of `anomalib-gen score` over a large folder of Parquet files.

A folder of 20 files with a million rows of four columns and a key each is made in a temporary folder, a small flow is
fitted, and the command scores the folder in a process of its own. The figure is that process's largest resident set as
Linux counts it: everything, Python and torch included. It is to stay below a gigabyte, and to be about the same for a
tenth of the rows.

Run (ten minutes on one core; 2 GB on the disk, in `--folder`, removed at the end)::

    python benchmarks/scoring_memory.py --output benchmarks/results/scoring-memory.json
    python benchmarks/scoring_memory.py --quick     # seconds
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as papq
import typer
from _measure import environment, markdown, save, show

from anomalib_gen import FlowDetector
from anomalib_gen import save as save_model

COLUMNS = 4


def make_rows(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(rng.normal(size=(n, COLUMNS)), columns=[f"x{j}" for j in range(COLUMNS)])
    return rows.assign(id=np.arange(n) + seed * n)


def watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the most memory that it had, as the system tells of it (VmHWM), in bytes.

    (What `wait4` tells would be at least the memory of this process, from which the other was started.)
    """
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
                peak = max(peak, 1024 * int(found[1]))
        except OSError:
            continue
        time.sleep(0.05)
    return peak


def measure(folder: Path, n_files: int, rows_per_file: int) -> dict[str, Any]:
    """Score a folder of so many files in a process of its own."""
    incoming = folder / "incoming"
    incoming.mkdir()
    for k in range(n_files):
        make_rows(rows_per_file, k).to_parquet(incoming / f"{k:04d}.parquet")
    on_disk = sum(path.stat().st_size for path in incoming.iterdir())
    output = folder / "scores.parquet"
    command = [sys.executable, "-m", "anomalib_gen.cli", "score", str(incoming), "-m", str(folder / "model")]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "-k", "id", "-o", str(output), "--quiet"])
    peak = watch(process)
    assert process.returncode == 0, "the command failed"
    scored = papq.ParquetFile(output).metadata.num_rows
    assert scored == n_files * rows_per_file
    for path in [*incoming.iterdir(), output]:
        path.unlink()
    incoming.rmdir()
    return {
        "rows": scored,
        "bytes_on_disk": on_disk,
        "peak_rss_bytes": peak,
        "seconds": time.perf_counter() - start,
    }


def main(
    files: Annotated[int, typer.Option(help="Files of the larger folder.")] = 20,
    rows: Annotated[int, typer.Option(help="Rows of each.")] = 1_000_000,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary folder is made.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; a table goes beside it as Markdown.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run end to end in seconds.")] = False,
) -> None:
    """Report the peak memory of scoring."""
    if quick:
        files, rows = 4, 2000
    with tempfile.TemporaryDirectory(dir=folder) as place:
        train = make_rows(2000, 10**6).drop(columns="id")
        detector = FlowDetector(
            transform="realnvp", n_layers=2, hidden_features=8, max_iter=50, random_state=0, device="cpu"
        )
        save_model(detector.fit(train), Path(place) / "model", X=train)
        found = [measure(Path(place), n, rows) for n in dict.fromkeys((max(1, files // 10), files))]
    header = ("rows", "on the disk", "peak resident memory")
    lines = [
        (
            f"{one['rows']:,}",
            f"{one['bytes_on_disk'] / 1e6:,.0f} MB",
            f"{one['peak_rss_bytes'] / 1e6:,.0f} MB",
        )
        for one in found
    ]
    title = f"anomalib-gen score, {COLUMNS} columns and a key, a small realnvp flow"
    show(title, header, lines)
    if output is not None:
        save(output, {"environment": environment(), "runs": found}, markdown(title, header, lines))


if __name__ == "__main__":
    typer.run(main)
