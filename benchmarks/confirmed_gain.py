"""How much of a gain is selection? Choose on one half of the data sets, confirm on the other, many times.

The best of several detectors on some data sets is better there than it will be elsewhere: the choice itself is fitted
to them. So the data sets are halved at random. On one half, of the candidates the one with the best mean AUROC is
chosen, and so is the best of the baselines; the gain of the one over the other on the *other* half is what the choice
is worth. Over many draws this gives the confirmed gain, the share of draws in which it is positive, and how often each
candidate was chosen. A candidate's own gain over all data sets stands beside it, with its standard error over data
sets, the median, and the data sets won and lost by more than .001.

Input is the folder of a finished `anomalib-gen benchmark`, or a recorded file of its cells, or several of the same
suite. Figures are in points of AUROC and of average precision (hundredths), means over the seeds that all detectors
finished.

Run::

    python benchmarks/confirmed_gain.py benchmarks/results/adbench-clean-diffusion.csv \\
        --baseline 'kNN(1)' --baseline 'kNN(5)' --output benchmarks/results/confirmed-gain.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from _measure import markdown, save, show

from anomalib_gen.benchmark import load_results

METRICS = {"auroc": "AUROC", "average_precision": "average precision"}
TIE = 0.1
"""In points."""


def points(paths: list[Path], metric: str) -> pd.DataFrame:
    """Data sets by detectors: means over the seeds that all detectors finished."""
    cells = pd.concat([load_results(path) if path.is_dir() else pd.read_csv(path) for path in paths])
    cells = cells[cells["status"] == "ok"]
    wide = cells.pivot_table(index=["dataset", "seed"], columns="detector", values=metric, aggfunc="first")
    wide = wide.dropna()
    return 100 * wide.groupby(level="dataset").mean()


def gains(table: pd.DataFrame, candidates: list[str], baseline: str) -> list[dict[str, Any]]:
    """Gain of each candidate over one baseline, over all data sets."""
    found = []
    for name in candidates:
        gain = table[name] - table[baseline]
        found.append(
            {
                "detector": name,
                "mean": float(table[name].mean()),
                "gain": float(gain.mean()),
                "standard_error": float(gain.std(ddof=1) / len(gain) ** 0.5),
                "median": float(gain.median()),
                "won": int((gain > TIE).sum()),
                "lost": int((gain < -TIE).sum()),
                "worst": float(gain.min()),
                "worst_data_set": str(gain.idxmin()),
            }
        )
    return found


def confirm(
    table: pd.DataFrame, candidates: list[str], baselines: list[str], draws: int, random: np.random.Generator
) -> dict[str, Any]:
    """Choose on a random half and judge on the other."""
    names = list(table.index)
    confirmed, chosen = [], []
    for _ in range(draws):
        order = random.permutation(len(names))
        first, second = (table.iloc[part] for part in np.array_split(order, 2))
        best = first[candidates].mean().idxmax()
        peer = first[baselines].mean().idxmax()
        confirmed.append(float((second[best] - second[peer]).mean()))
        chosen.append(best)
    low, high = np.quantile(confirmed, [0.05, 0.95])
    return {
        "draws": draws,
        "mean": float(np.mean(confirmed)),
        "low": float(low),
        "high": float(high),
        "positive": float(np.mean(np.array(confirmed) > 0)),
        "chosen": {name: chosen.count(name) / draws for name in candidates},
    }


def main(
    paths: Annotated[list[Path], typer.Argument(help="Folders of finished benchmarks, or files of cells.")],
    baseline: Annotated[list[str], typer.Option(help="Detectors to beat. May be repeated.")],
    candidate: Annotated[
        list[str] | None, typer.Option(help="Detectors to choose from; all others by default.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random halves.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="JSON file; tables go beside it as Markdown.")] = None,
) -> None:
    """Report the gains of detectors, and what of the best one is confirmed."""
    figures: dict[str, Any] = {"baselines": baseline}
    text = []
    for metric, title in METRICS.items():
        table = points(paths, metric)
        candidates = candidate or [name for name in table if name not in baseline]
        best = str(table[baseline].mean().idxmax())
        found = gains(table, candidates, best)
        halves = confirm(table, candidates, baseline, draws, np.random.default_rng(0))
        figures[metric] = {"best_baseline": best, "all": found, "halves": halves, "data_sets": len(table)}
        header = ("detector", "mean", f"gain over {best}", "median", "won-lost", "worst", "chosen")
        rows = [
            (
                one["detector"],
                f"{one['mean']:.2f}",
                f"{one['gain']:+.2f} +- {one['standard_error']:.2f}",
                f"{one['median']:+.2f}",
                f"{one['won']}-{one['lost']}",
                f"{one['worst']:+.1f} ({one['worst_data_set']})",
                f"{halves['chosen'][one['detector']]:.0%}",
            )
            for one in found
        ]
        caption = f"{title}, {len(table)} data sets"
        result = (
            f"Confirmed on the other half: {halves['mean']:+.2f} points (5 % to 95 % of {draws} draws: "
            f"{halves['low']:+.2f} to {halves['high']:+.2f}; positive in {halves['positive']:.0%})."
        )
        show(caption, header, rows)
        print(result)
        text.append(markdown(caption, header, rows) + f"\n{result}\n")
    if output is not None:
        save(output, figures, "\n".join(text))


if __name__ == "__main__":
    typer.run(main)
