"""Show a comparison of detectors: in a terminal, as Markdown, and as one self-contained page with figures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare

from anomalib_gen.inspection._inline import INK, new_figure, to_svg

from ._extra import require_benchmark_extra
from .cases import KINDS, ranks_in_words
from .store import load_cases, load_results
from .summary import RESAMPLES, TIE, Summary, summarise

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Panel", "print_summary", "to_html", "to_markdown", "write_report"]


@dataclass(frozen=True)
class Panel:
    """A figure for the page.

    Attributes
    ----------
    title, caption : str
        Words around the figure.
    svg : str
        The figure.
    """

    title: str
    caption: str
    svg: str


# ------------------------------------------------------------------------------------------ terminal, text


def print_summary(summary: Summary, *, console: Console | None = None) -> None:
    """Print the comparison as a table.

    Parameters
    ----------
    summary : Summary
        From `summarise`.
    console : rich.console.Console, optional
        Where to print. Default: standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    columns: dict[str, Callable[[pd.Series], str]] = {
        "AUROC": lambda row: _number(row["mean_auroc"]),
        "95 % interval": lambda row: _interval(row["auroc_low"], row["auroc_high"]),
        "AP": lambda row: _number(row["mean_ap"]),
        "Rank": lambda row: _number(row["mean_rank"], 2),
        "Win/tie/loss": lambda row: f"{row['wins']:.0f}/{row['ties']:.0f}/{row['losses']:.0f}",
        "Fit s": lambda row: _seconds(row["fit_seconds"]),
        "Score s": lambda row: _seconds(row["score_seconds"]),
        "Failed": lambda row: f"{row['failed_cells']:.0f}" if row["failed_cells"] else "",
    }

    def build() -> Table:
        table = Table(title=f"Suite {summary.suite}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("Detector", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, row in summary.table.iterrows():
            table.add_row(escape(str(name)), *(show(row) for show in columns.values()))
        return table

    # On a narrow terminal whole columns go rather than letters of all; the report has them.
    roomy = console.options.update(width=1000)
    for column in ("95 % interval", "Score s", "Failed", "Win/tie/loss"):
        if console.measure(build(), options=roomy).maximum <= console.width:
            break
        del columns[column]
    console.print(build())
    console.print(escape(summary.basis), highlight=False)
    for _, failure in summary.failures.head(10).iterrows():
        cells = f"{failure['cells']} cell{'s' if failure['cells'] > 1 else ''}"
        text = f"failed: {failure['detector']}, {cells}, {failure['kind']}: {_shorten(failure['error'], 200)}"
        console.print(f"[red]{escape(text)}[/red]", highlight=False)
    if len(summary.failures) > 10:
        more = len(summary.failures) - 10
        console.print(f"[red]... and {more} more kinds of failure, see the report[/red]")


def to_markdown(summary: Summary) -> str:
    """Write the comparison in Markdown.

    Parameters
    ----------
    summary : Summary
        From `summarise`.

    Returns
    -------
    str
        Tables of the comparison, of the pairs, of the data sets and of the failures.
    """
    lines = [f"# Benchmark, suite {summary.suite}", "", _markdown_text(summary.basis), ""]
    head = [
        "Detector",
        "AUROC mean [95 %]",
        "median",
        "AP mean [95 %]",
        "median",
        "Rank",
        "Win/tie/loss",
        "Fit s",
        "Score s",
        "Failed cells",
    ]
    body = [
        [
            name,
            f"{_number(row['mean_auroc'])} [{_interval(row['auroc_low'], row['auroc_high'])}]",
            _number(row["median_auroc"]),
            f"{_number(row['mean_ap'])} [{_interval(row['ap_low'], row['ap_high'])}]",
            _number(row["median_ap"]),
            _number(row["mean_rank"], 2),
            f"{row['wins']:.0f}/{row['ties']:.0f}/{row['losses']:.0f}",
            _seconds(row["fit_seconds"]),
            _seconds(row["score_seconds"]),
            f"{row['failed_cells']:.0f}",
        ]
        for name, row in summary.table.iterrows()
    ]
    lines += [
        *_markdown_table(head, body),
        "",
        f"Win/tie/loss: over pairs of detector and data set; a difference of at most {TIE} AUROC is a tie.",
        "Fit and score seconds are medians over cells. AP: average precision, anomalies positive.",
        "",
        "## Wins/ties/losses of the row against the column",
        "",
    ]
    names = list(summary.pairs.index)
    body = [[a, *("" if a == b else _wtl(summary.pairs.loc[a, b]) for b in names)] for a in names]
    lines += [*_markdown_table(["", *names], body), ""]
    for title, values in (("AUROC", summary.auroc), ("Average precision", summary.average_precision)):
        lines += [f"## {title} by data set (mean over seeds)", ""]
        body = [
            [f"{dataset}{'' if dataset in summary.compared else ' (left out)'}", *map(_number, row)]
            for dataset, row in zip(values.index, values.to_numpy(), strict=True)
        ]
        lines += [*_markdown_table(["Data set", *values.columns], body), ""]
    if len(summary.bits):
        lines += ["## Bits per dimension of normal test images (mean over seeds)", ""]
        body = [[dataset, *(_number(value, 2) for value in row)] for dataset, row in summary.bits.iterrows()]
        lines += [*_markdown_table(["Data set", *summary.bits.columns], body), ""]
    lines += ["## Failures", ""]
    if len(summary.failures):
        head = ["Detector", "Kind", "Cells", "Where", "Error"]
        body = [
            [row["detector"], row["kind"], str(row["cells"]), row["where"], _shorten(row["error"], 300)]
            for _, row in summary.failures.iterrows()
        ]
        lines += _markdown_table(head, body)
    else:
        lines += ["None."]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(_markdown_text(str(cell)) for cell in row) + " |" for row in rows]


def _markdown_text(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _number(value: float, digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def _interval(low: float, high: float) -> str:
    return "–" if pd.isna(low) else f"{low:.3f}–{high:.3f}"


def _seconds(value: float) -> str:
    if pd.isna(value):
        return "–"
    return "<0.01" if value < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _wtl(pair: tuple[int, int, int]) -> str:
    return "/".join(map(str, pair))


def _shorten(text: str, length: int) -> str:
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= length else text[: length - 1] + "…"


# -------------------------------------------------------------------------------------------------- figures


def _interval_figure(table: pd.DataFrame) -> str:
    rows = table.iloc[::-1]
    figure, axes = new_figure(7.2, 0.7 + 0.27 * len(rows))
    y = np.arange(len(rows))
    if rows["auroc_low"].notna().all():
        axes.hlines(y, rows["auroc_low"], rows["auroc_high"], color="#3b82f6", linewidth=5, alpha=0.45)
    axes.plot(rows["mean_auroc"], y, "o", color="#2563eb", markersize=6)
    axes.set_yticks(y, rows.index, parse_math=False)  # names are no formulas
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("mean AUROC over data sets")
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return to_svg(figure, label="Mean AUROC with 95 percent interval for each detector")


def critical_difference(auroc: pd.DataFrame) -> tuple[str, str]:
    """Draw the critical-difference diagram of a complete table of AUROCs.

    Parameters
    ----------
    auroc : pandas.DataFrame
        One row a data set, one column a detector, nothing missing.

    Returns
    -------
    svg : str
        The diagram, or an empty string.
    caption : str
        How to read it, or why it is left out.
    """
    n_datasets, n_detectors = auroc.shape
    if n_detectors < 3 or n_datasets < 5:
        return "", (
            "Left out: a test over ranks needs at least 3 detectors and 5 data sets, here are "
            f"{n_detectors} and {n_datasets}."
        )
    import scikit_posthocs as sp

    if np.ptp(auroc.to_numpy(), axis=1).max() == 0:
        return "", "Left out: all detectors are equal on every data set."
    p_value = float(friedmanchisquare(*auroc.to_numpy().T).pvalue)
    ranks = auroc.rank(axis=1, ascending=False).mean()
    p_pairs = sp.posthoc_nemenyi_friedman(auroc.to_numpy())
    p_pairs.index = p_pairs.columns = auroc.columns
    figure, axes = new_figure(8.4, 1.1 + 0.16 * n_detectors)
    sp.critical_difference_diagram(
        ranks,
        p_pairs,
        ax=axes,
        label_fmt_left="{label} ({rank:.2f}) ",
        label_fmt_right=" ({rank:.2f}) {label}",
        label_props={"fontsize": 9, "parse_math": False},
        elbow_props={"color": INK, "linewidth": 0.8},
        marker_props={"color": "#2563eb", "s": 22},
        crossbar_props={"color": "#2563eb", "linewidth": 3},
        text_h_margin=0.1,
    )
    axes.spines["top"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", labelsize=9)
    caption = (
        f"Mean ranks by AUROC over {n_datasets} data sets, best on the side of rank 1. The Friedman test "
        f"gives "
        f"p = {p_value:.2g}. Detectors joined by a bar do not differ at the 5 % level (Nemenyi test)."
    )
    if p_value >= 0.05:
        caption += " The Friedman test itself finds no difference, so the pairs should not be read."
    return to_svg(figure, label="Critical-difference diagram of mean ranks"), caption


# ------------------------------------------------------------------------------------------------- the page


def to_html(
    results: pd.DataFrame,
    *,
    title: str = "Benchmark of anomaly detectors",
    introduction: str = "",
    panels: Sequence[Panel] = (),
    cases: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Write the comparison as one page that needs no other file and no network.

    Parameters
    ----------
    results : pandas.DataFrame
        What `run_benchmark` or `load_results` returned; one suite.
    title : str
        Heading of the page.
    introduction : str
        A paragraph below the heading.
    panels : sequence of Panel
        Further figures, in the order given.
    cases : mapping of str to mapping, optional
        Pictures of the best and worst cases on images, by data set and detector, from
        `anomalib_gen.benchmark.store.load_cases`.

    Returns
    -------
    str
        The page.
    """
    require_benchmark_extra()
    import jinja2
    from markupsafe import Markup, escape

    summary = summarise(results)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_gen.benchmark"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": _number,
        "seconds": _seconds,
        "wtl": _wtl,
        "breakable": lambda name: Markup(str(escape(name)).replace(".", ".<wbr>").replace("(", "<wbr>(")),
        "around_half": _around_half,
        "ranks": ranks_in_words,
    }
    environment.globals["interval"] = _interval
    figure = _interval_figure(summary.table) if summary.compared else ""
    diagram, diagram_caption = critical_difference(summary.auroc.loc[summary.compared])
    return environment.get_template("report.html").render(
        title=title,
        introduction=introduction,
        panels=panels,
        summary=summary,
        rows=list(summary.table.iterrows()),
        tie=TIE,
        resamples=RESAMPLES,
        figure=figure,
        diagram=diagram,
        diagram_caption=diagram_caption,
        heat=[
            ("AUROC", summary.auroc, _around_half),
            ("Average precision", summary.average_precision, _from_zero),
        ],
        failures=[row for _, row in summary.failures.iterrows()],
        case_kinds=KINDS,
        cases=_ordered_cases(cases or {}, summary),
        specifications=dict(zip(results["detector"], results["specification"], strict=True)),
        sizes=_sizes(results),
        versions=_versions_used(results),
    )


def _ordered_cases(
    cases: Mapping[str, Mapping[str, Any]], summary: Summary
) -> list[tuple[str, list[tuple[str, float, Any]]]]:
    """Data sets with detectors, their AUROC and their cases; the best detector on each data set first."""
    ordered = []
    for dataset, by_detector in cases.items():
        known = summary.auroc.loc[dataset].to_dict()
        best_first = sorted(by_detector, key=known.__getitem__, reverse=True)
        ordered.append((dataset, [(name, known[name], by_detector[name]) for name in best_first]))
    return ordered


def _around_half(value: float) -> str:
    """Blue above chance, orange below, as a tint that any text colour can be read on."""
    if pd.isna(value):
        return "transparent"
    strength = min(1.0, abs(value - 0.5) * 2) ** 1.5 * 0.6
    return f"rgb({'37 99 235' if value >= 0.5 else '234 88 12'} / {strength:.3f})"


def _from_zero(value: float) -> str:
    return "transparent" if pd.isna(value) else f"rgb(37 99 235 / {0.6 * value:.3f})"


def _sizes(results: pd.DataFrame) -> list[Any]:
    ok = results[results["status"] == "ok"]
    columns = ["n_train", "n_test", "n_features", "n_anomalies"]
    first = ok.groupby("dataset", sort=False)[columns].first()
    return first.reset_index().to_dict("records")


def _versions_used(results: pd.DataFrame) -> dict[str, list[str]]:
    used: dict[str, set[str]] = {}
    for text in results["versions"].unique():
        for package, version in json.loads(text).items():
            used.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in used.items()}


def write_report(output: str | os.PathLike[str], *, console: Console | None = None) -> Path:
    """Print the comparison of an output folder and write ``report.md`` and ``report.html`` into it.

    Parameters
    ----------
    output : str or path-like
        Folder of `run_benchmark`.
    console : rich.console.Console, optional
        Where to print. Default: standard output.

    Returns
    -------
    Path
        The page.
    """
    results = load_results(output)
    summary = summarise(results)
    print_summary(summary, console=console)
    (Path(output) / "report.md").write_text(to_markdown(summary), encoding="utf-8")
    page = Path(output) / "report.html"
    page.write_text(to_html(results, cases=load_cases(output)), encoding="utf-8")
    return page
