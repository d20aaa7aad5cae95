"""Print the table of recorded figures that stands in docs/benchmark.md.

The figures of four runs on the suite `clean` are joined: flows and peers, autoencoders and energies, diffusion, and
other anomalies and objectives of diffusion. What was run on all their tables at seeds 0 to 2 is compared, as
`anomalib_gen.benchmark.summary` does it: means over seeds, then over tables; intervals by bootstrap over tables; ranks
among all that are listed. Won and lost count the tables on which AUROC differs from that of the nearest neighbour by
more than .001. With --seed the figures of one seed are compared, which is more methods.

What methods cost is that of one table, pendigits, from another run (`adbench-cost.csv`); anomalies of one model share
its fit. "–" was not measured.

Run::

    python benchmarks/recorded_table.py
    python benchmarks/recorded_table.py --seed 0
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import typer
from _measure import RESULTS

from anomalib_gen.benchmark.summary import summarise

RUNS = (
    "adbench-clean",
    "adbench-clean-vae-energy",
    "adbench-clean-diffusion",
    "adbench-clean-diffusion-anomalies",
)
PEER = "kNN(1)"
COST = "adbench-cost"
SAME = {
    "DiffusionDetector, closed form": "DiffusionDetector closed-form",
    "VAEDetector elbo": "VAEDetector",
    "EnergyDetector denoising-score-matching score_norm": "EnergyDetector",
    "EnergyDetector denoising-score-matching energy": "EnergyDetector energy",
    "EnergyDetector score-matching score_norm": "EnergyDetector score-matching",
    "EnergyDetector sliced-score-matching score_norm": "EnergyDetector sliced-score-matching",
    "EnergyDetector noise-contrastive energy": "EnergyDetector noise-contrastive",
    "EnergyDetector telescoping energy": "EnergyDetector telescoping",
    "EnergyDetector contrastive-divergence energy": "EnergyDetector contrastive-divergence",
    "EnergyDetector persistent-contrastive-divergence energy": "EnergyDetector persistent-contrastive-divergence",
}
"""Methods under the names that they have in the run of the costs, where those are others."""


def recorded(seeds: list[int]) -> pd.DataFrame:
    """Cells of all runs at these seeds, of the detectors that have all of them."""
    cells = pd.concat([pd.read_csv(RESULTS / f"{name}.csv").assign(suite="clean") for name in RUNS])
    cells["status"] = cells["status"].fillna("ok")
    cells["detector"] = cells["detector"].str.replace(r"^Flow ", "FlowDetector ", regex=True)
    cells = cells[cells["seed"].isin(seeds) & (cells["status"] == "ok")]
    cells = cells.drop_duplicates(["dataset", "seed", "detector"])
    counts = cells["detector"].value_counts()
    complete = counts[counts == cells["dataset"].nunique() * len(seeds)].index
    blank = dict.fromkeys(("failure", "error", "traceback"), "")
    times = dict.fromkeys(("fit_seconds", "score_seconds", "bits_per_dimension"), float("nan"))
    return cells[cells["detector"].isin(complete)].assign(**blank, **times)


def shown(seconds: float | None) -> str:
    """Seconds in two digits."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f}" if seconds >= 9.5 else f"{seconds:.1f}" if seconds >= 0.95 else f"{seconds:.2f}"


def lines(seeds: list[int]) -> list[str]:
    """Rows of the table, as Markdown."""
    summary = summarise(recorded(seeds))
    cost = pd.read_csv(RESULTS / f"{COST}.csv").set_index("detector")
    found = []
    for name, row in summary.table.iterrows():
        won, _, lost = summary.pairs.loc[name, PEER]
        cells = [
            str(name),
            f"{row['mean_auroc']:.3f} [{row['auroc_low']:.3f}–{row['auroc_high']:.3f}]",
            f"{row['mean_ap']:.3f} [{row['ap_low']:.3f}–{row['ap_high']:.3f}]",
            f"{row['mean_rank']:.1f}",
            "" if name == PEER else f"{won}-{lost}",
            *(
                shown(cost[kind].get(SAME.get(str(name), str(name))))
                for kind in ("fit_seconds", "score_seconds")
            ),
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def main(
    seed: Annotated[int | None, typer.Option(help="One seed alone; 0 to 2 without.")] = None,
) -> None:
    """Print the table."""
    print(
        "| detector | AUROC [95 %] | average precision [95 %] | rank | won-lost against kNN(1) | fit s | score s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines([0, 1, 2] if seed is None else [seed])))


if __name__ == "__main__":
    typer.run(main)
