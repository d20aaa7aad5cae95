"""Turn the cells of a benchmark into a comparison of detectors.

How detectors are compared
--------------------------
- On each data set only the seeds that every compared detector finished count; a data set without such a seed
  is left out. All means, ranks and tests are over the data sets that remain, each with equal weight. A
  failure is therefore never a number, and it costs nobody an unequal comparison; the tables say how many data
  sets were left out and why.
- A detector that finished nothing is not compared, and is named.
- Ranks are by AUROC on each data set (1 is best, equal values share the mean rank). Two detectors tie on a
  data set if their AUROCs differ by at most `TIE`.
- Intervals are percentile bootstrap intervals over data sets: what another draw of data sets could have
  given. They say nothing about the noise of seeds, and with few data sets they say little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["RESAMPLES", "TIE", "Summary", "summarise"]

TIE = 0.001
"""Largest difference in AUROC that still counts as a tie on a data set."""

RESAMPLES = 10_000
"""Draws of data sets behind an interval."""


@dataclass(frozen=True)
class Summary:
    """A benchmark in numbers.

    Attributes
    ----------
    suite : str
        The protocol.
    table : pandas.DataFrame
        One row a compared detector, best mean AUROC first.
    pairs : pandas.DataFrame
        ``pairs.loc[a, b]`` is (wins, ties, losses) of a against b.
    auroc, average_precision : pandas.DataFrame
        One row a data set, one column a detector; means over seeds. Missing where a detector finished no
        seed.
    compared : list of str
        Data sets on which all compared detectors finished at least one common seed.
    left_out : dict of str to str
        The other data sets, and why.
    without_result : list of str
        Detectors that finished no cell.
    failures : pandas.DataFrame
        One row a detector and reason: cells, where, error and one traceback.
    n_cells : int
        Cells with a record, failures included.
    seeds : list of int
        Seeds that occur.
    bits : pandas.DataFrame
        Mean bits per dimension of normal test images, one row a data set, for the detectors that report a density;
        empty for tables.
    """

    suite: str
    table: pd.DataFrame
    pairs: pd.DataFrame
    auroc: pd.DataFrame
    average_precision: pd.DataFrame
    compared: list[str]
    left_out: dict[str, str]
    without_result: list[str]
    failures: pd.DataFrame
    n_cells: int
    seeds: list[int]
    bits: pd.DataFrame

    @property
    def basis(self) -> str:
        """What the means are over, as a sentence."""
        total = len(self.compared) + len(self.left_out)
        text = (
            f"Means are over the {len(self.compared)} of {total} data sets on which all {len(self.table)} "
            f"compared "
            "detectors finished, and on each over the seeds that all of them finished."
        )
        if self.left_out:
            text += f" Left out: {', '.join(self.left_out)}."
        if self.without_result:
            text += f" Not compared, because no cell finished: {', '.join(self.without_result)}."
        return text


def summarise(results: pd.DataFrame) -> Summary:
    """Compare the detectors of a table of results.

    Parameters
    ----------
    results : pandas.DataFrame
        What `run_benchmark` or `load_results` returned; one suite.

    Returns
    -------
    Summary
        The comparison.

    Raises
    ------
    ValueError
        If there is no result, or results of several suites.
    """
    suites = results["suite"].unique().tolist()
    if len(suites) != 1:
        raise ValueError(
            f"results must hold cells of exactly one suite, found {suites or 'no cell at all'}. "
            "Figures of different suites do not compare; summarise each alone."
        )
    ok = results[results["status"] == "ok"]
    names = [name for name in results["detector"].unique() if (ok["detector"] == name).any()]
    without = [name for name in results["detector"].unique() if name not in names]

    compared: list[str] = []
    left_out: dict[str, str] = {}
    parts = []
    for dataset, cells in results.groupby("dataset", sort=False):
        done = ok[ok["dataset"] == dataset]
        seeds = done.groupby("seed")["detector"].nunique()
        common = seeds.index[seeds == len(names)]
        if len(common):
            compared.append(str(dataset))
            parts.append(done[done["seed"].isin(common)])
        else:
            left_out[str(dataset)] = _why_left_out(cells, names)
            parts.append(done)
    counted = pd.concat(parts) if parts else ok
    order = list(dict.fromkeys(results["dataset"]))

    def means(column: str) -> pd.DataFrame:
        wide = counted.pivot_table(index="dataset", columns="detector", values=column, aggfunc="mean")
        return wide.reindex(index=order, columns=names)

    auroc, precision = means("auroc"), means("average_precision")
    used = counted[counted["dataset"].isin(compared)]
    table = _table(results, used, auroc.loc[compared], precision.loc[compared])
    best_first = list(table.index)
    return Summary(
        suite=suites[0],
        table=table,
        pairs=_pairs(auroc.loc[compared, best_first]),
        auroc=auroc[best_first],
        average_precision=precision[best_first],
        compared=compared,
        left_out=left_out,
        without_result=without,
        failures=_failures(results),
        n_cells=len(results),
        seeds=sorted(int(seed) for seed in results["seed"].unique()),
        bits=_bits(ok, best_first),
    )


def _bits(ok: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    wide = ok.pivot_table(
        index="dataset", columns="detector", values="bits_per_dimension", aggfunc="mean", sort=False
    )
    return wide.reindex(columns=[name for name in names if name in wide.columns])


def _why_left_out(cells: pd.DataFrame, names: list[str]) -> str:
    reasons = []
    for name in names:
        own = cells[cells["detector"] == name]
        failed = own[own["status"] != "ok"]
        if len(failed) == len(own):
            reasons.append(f"{name}: {failed['failure'].iloc[0] if len(failed) else 'not run'}")
    return "; ".join(reasons) or "no seed that all detectors finished"


def _table(
    results: pd.DataFrame, counted: pd.DataFrame, auroc: pd.DataFrame, precision: pd.DataFrame
) -> pd.DataFrame:
    ranks = auroc.rank(axis=1, ascending=False)
    pairs = _pairs(auroc)
    rows = {}
    for name in auroc.columns:
        wins, ties, losses = np.sum([pairs[other][name] for other in auroc.columns], axis=0)
        own = counted[counted["detector"] == name]
        rows[name] = {
            "mean_auroc": auroc[name].mean(),
            "median_auroc": auroc[name].median(),
            "mean_ap": precision[name].mean(),
            "median_ap": precision[name].median(),
            "mean_rank": ranks[name].mean(),
            "wins": int(wins),
            "ties": int(ties) - len(auroc),  # with itself
            "losses": int(losses),
            "fit_seconds": own["fit_seconds"].median(),
            "score_seconds": own["score_seconds"].median(),
            "failed_cells": int(((results["detector"] == name) & (results["status"] != "ok")).sum()),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    for short, values in (("auroc", auroc), ("ap", precision)):
        low, high = _bootstrap(values.to_numpy())
        table[f"{short}_low"], table[f"{short}_high"] = low, high
    table.index.name = "detector"
    return table.sort_values("mean_auroc", ascending=False, kind="stable") if len(table) else table


def _bootstrap(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval of the mean over data sets, for each detector over the same resampled data sets."""
    n_datasets, n_detectors = values.shape
    if n_datasets < 2:
        missing = np.full(n_detectors, np.nan)
        return missing, missing
    rows = np.random.default_rng(0).integers(n_datasets, size=(RESAMPLES, n_datasets))
    means = np.stack([values[:, j][rows].mean(axis=1) for j in range(n_detectors)], axis=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def _pairs(auroc: pd.DataFrame) -> pd.DataFrame:
    pairs = {}
    for b in auroc.columns:
        column = []
        for a in auroc.columns:
            # Rounded, because 0.951 - 0.950 is a hair more than 0.001 in binary.
            difference = (auroc[a] - auroc[b]).round(12)
            wins, losses = int((difference > TIE).sum()), int((difference < -TIE).sum())
            column.append((wins, len(difference) - wins - losses, losses))
        pairs[b] = column
    return pd.DataFrame(pairs, index=auroc.columns, dtype=object)


def _failures(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    failed = results[results["status"] != "ok"]
    for (detector, kind, error), cells in failed.groupby(["detector", "failure", "error"], sort=False):
        where = "; ".join(
            f"{dataset} (seed {', '.join(map(str, sorted(part['seed'])))})"
            for dataset, part in cells.groupby("dataset", sort=False)
        )
        trace = next((text for text in cells["traceback"] if text), "")
        rows.append((detector, kind, len(cells), where, error, trace))
    return pd.DataFrame(rows, columns=["detector", "kind", "cells", "where", "error", "traceback"])
