"""A scoring run as one HTML page: no file, no font and no script from elsewhere, for screens, phones and paper.

The template escapes whatever it is given (names of columns and values are anybody's), and the page's own security
policy lets no other script run and nothing be fetched. Pictures are SVG in the text's colour; each has its numbers in
words or in a table beside it. Without scripts the page is complete, but for sorting and filtering.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from typing import Any

import numpy as np

from anomalib_gen import persistence
from anomalib_gen.inspection._inline import INK, new_figure, to_svg
from anomalib_gen.inspection._style import ANOMALY, NORMAL
from anomalib_gen.monitoring import Distribution, side_by_side
from anomalib_gen.scoring._log import count
from anomalib_gen.scoring.reporting import RunReport

SHOWN_COLUMNS = 3
"""Contributions listed for an anomaly."""
MAX_COLUMNS = 300
"""Columns listed in a table; the others are counted."""
MAX_PLOTS = 8
"""Columns drawn: those that moved most."""
MAX_WEIGHTS = 12
MAX_FILES = 100
MAX_TEXT = 80
"""Characters of a value that are shown."""
BINS = 40
WIDE = (5.6, 2.9)
"""Inches of a picture as wide as the page: on a phone its words are then still legible."""
LEVELS = (1, 5, 25, 50, 75, 95, 99)
"""Quantiles of scores, in percent."""


def render(run: RunReport) -> str:
    """HTML of a run.

    Parameters
    ----------
    run : RunReport

    Returns
    -------
    str
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_gen.scoring"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["shares"] = contribution_shares
    environment.filters["day"] = day
    environment.filters |= {"number": number, "share": share, "short": short, "count": count, "size": size}
    script, _, _ = environment.loader.get_source(environment, "report.js")  # type: ignore[union-attr]
    drift = [] if run.drift is None else sorted(run.drift.columns, key=lambda c: (not c.drifted, -c.distance))
    numbered = [(column, column.distance >= run.drift.thresholds.distance) for column in drift if run.drift]
    quality = [c for c in drift if c.missing_batch or c.missing_reference or c.unseen]
    return environment.get_template("report.html").render(
        run=run,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        scores=_score_figure(run),
        levels=LEVELS,
        quantiles=_quantiles(run),
        weights=_weights_figure(run),
        drift=numbered[:MAX_COLUMNS],
        n_columns=len(drift),
        plots=[_column_figure(run, column) for column in drift[:MAX_PLOTS] if column.distance > 0],
        quality=quality[:MAX_COLUMNS],
        n_quality=len(quality),
        files=run.inputs[:MAX_FILES],
        trends=_trends(run),
        shown=SHOWN_COLUMNS,
        card=_card(run.model),
    )


# Numbers -----------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Four digits, or a dash for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}"


def share(value: float | None) -> str:
    """Percent; what is almost none is not called none."""
    if value is None:
        return "–"
    if 0 < value < 0.0001:
        return "< 0.01 %"
    return f"{100 * value:.2f} %"


def day(seconds: float) -> str:
    """Date and time, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M")


def size(n_bytes: int) -> str:
    """Bytes in units that people read."""
    value, units = float(n_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.4g} {units[0]}"


def short(value: Any) -> str:
    """Value as a few words; long ones are cut, and numbers have six digits, as many as counts and years need."""
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def contribution_shares(contributions: list[tuple[str, Any, float]]) -> list[tuple[str, Any, float, float]]:
    """Contributions that make a row abnormal, each with its percentage of all of them."""
    raising = [entry for entry in contributions if entry[2] > 0]
    total = sum(by for _, _, by in raising)
    return [(name, value, by, 100 * by / total) for name, value, by in raising]


# Pictures ----------------------------------------------------------------------------------------------------


def _score_figure(run: RunReport) -> str:
    """Scores of the run as bars, those of normal rows in training as a line, and the threshold."""
    if run.scores is None or not len(run.scores.values):
        return ""
    parts = [run.scores] if run.reference is None else [run.scores, run.reference.scores]
    ends = np.array([part.quantile([0.01, 0.99]) for part in parts if len(part.values)])
    low, high = float(ends.min()), float(ends.max())
    if math.isfinite(run.threshold):
        # The threshold is of interest even if hardly a row is below it.
        low, high = min(low, run.threshold - 0.1 * (high - low)), max(high, run.threshold)
    if low >= high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / BINS
    # No bin lies on both sides of the threshold.
    start = run.threshold if low <= run.threshold <= high else low
    first, last = -math.ceil((start - low) / width), math.ceil((high - start) / width)
    edges = start + width * np.arange(first, last + 1)
    low, high = edges[0], edges[-1]
    figure, axes = new_figure(*WIDE, fontsize=10)
    shares = _in_bins(run.scores, edges)
    odd = edges[1:] <= run.threshold + width / 2
    settings = {"align": "edge", "width": np.diff(edges), "linewidth": 0}
    axes.bar(edges[:-1], shares, color=np.where(odd, ANOMALY, NORMAL).tolist(), alpha=0.85, **settings)
    axes.plot([], [], color=NORMAL, linewidth=6, label="this run")
    if run.reference is not None and len(run.reference.scores.values):
        axes.stairs(
            _in_bins(run.reference.scores, edges),
            edges,
            color=INK,
            linewidth=1.6,
            label="normal rows in training",
        )
    if low <= run.threshold <= high:
        axes.axvline(run.threshold, color=ANOMALY, linestyle="--", linewidth=1.4, label="threshold")
    axes.set_xlabel("score (lower is more abnormal)")
    axes.set_ylabel("% of rows")
    axes.set_xlim(low, high)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left")
    below = share(run.outliers / run.rows)
    words = (
        f"Histogram of {count(run.rows, 'score')}; {below} are below the threshold {number(run.threshold)}"
    )
    return to_svg(figure, label=words)


def _quantiles(run: RunReport) -> list[tuple[str, list[float]]]:
    parts = [("This run", run.scores), ("Training", run.reference.scores if run.reference else None)]
    levels = np.array(LEVELS) / 100
    return [(name, part.quantile(levels).tolist()) for name, part in parts if part and len(part.values)]


def _in_bins(distribution: Distribution, edges: Any) -> Any:
    """Percent of values in bins; what lies beyond counts to the outer ones."""
    return 100 * np.diff(np.concatenate([[0.0], distribution.cdf(edges[1:-1], side="left"), [1.0]]))


def _weights_figure(run: RunReport) -> str:
    """Columns that contribute most to the anomalies that are listed."""
    weights = list(run.weights.items())[:MAX_WEIGHTS][::-1]
    if not weights:
        return ""
    figure, axes = new_figure(WIDE[0], 0.7 + 0.27 * max(len(weights), 3), fontsize=10)
    places = np.arange(len(weights))
    axes.barh(places, [value for _, value in weights], color=ANOMALY, height=0.62)
    axes.set_yticks(places, [_plain(name, 24) for name, _ in weights])
    axes.set_ylim(-0.6, max(len(weights), 3) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("mean contribution over the anomalies listed")
    top = ", ".join(_plain(name, 24) for name, _ in weights[::-1][:3])
    return to_svg(figure, label=f"Columns that contribute most to the anomalies: {top}")


def _column_figure(run: RunReport, drift: Any) -> dict[str, Any]:
    """A column in training and in this run, side by side."""
    assert run.reference is not None
    found = side_by_side(
        run.reference.column(drift.name), run.columns[drift.name], 16 if drift.kind == "number" else 8
    )
    figure, axes = new_figure(3.6, 2.1)
    batch, reference = (100 * np.asarray(part) for part in (found.batch, found.reference))
    if found.labels:
        places = np.arange(len(found.labels))
        axes.bar(places, batch, color=NORMAL, width=0.7, alpha=0.85)
        axes.hlines(reference, places - 0.42, places + 0.42, color=INK, linewidth=2)
        rotation = 0 if max(map(len, found.labels)) < 5 else 40
        axes.set_xticks(places, [_plain(name, 12) for name in found.labels], rotation=rotation, fontsize=8)
        if rotation:
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
    elif found.edges:
        edges = np.asarray(found.edges)
        axes.bar(edges[:-1], batch, width=np.diff(edges), align="edge", color=NORMAL, linewidth=0, alpha=0.85)
        axes.stairs(reference, edges, color=INK, linewidth=1.6)
    axes.set_ylabel("% of values")
    words = f"Column {_plain(drift.name, 40)} in this run and in training; distance {number(drift.distance)}"
    return {"name": drift.name, "drifted": drift.drifted, "svg": to_svg(figure, label=words), "drift": drift}


def _trends(run: RunReport) -> list[tuple[str, str, str]]:
    """Pictures of the last runs, this one last: title, what the lines are, and SVG."""
    if not run.earlier or run.drift is None:
        return []
    drift, limits, runs = run.drift, run.drift.thresholds, run.earlier
    here = None if drift.scores is None else drift.scores.distance
    usual = drift.usual_rows
    rate = 100 * run.reference.flagged_rate if run.reference is not None else math.nan
    alerts = [*(past.alert for past in runs), bool(drift.alerts)]
    shares = [(past.outliers, past.rows) for past in runs] + [(run.outliers, run.rows)]
    return [
        _trend(
            "Rows",
            "Lines: the usual number, and where an alert begins" if usual else "",
            [*(past.rows for past in runs), run.rows],
            [] if usual is None else [usual],
            [] if usual is None else [usual / limits.volume, usual * limits.volume],
            alerts,
        ),
        _trend(
            "Anomalies, % of rows",
            "Lines: normal rows in training, and where an alert may begin",
            [100 * odd / n if n else None for odd, n in shares],
            [rate],
            [rate * limits.alert_rate],
            alerts,
        ),
        _trend(
            "Distance of the scores from training",
            "Line: where an alert may begin",
            [*(past.distance for past in runs), here],
            [],
            [limits.distance],
            alerts,
        ),
    ]


def _trend(
    title: str,
    lines: str,
    values: list[float | None],
    usual: list[float],
    limits: list[float],
    alerts: list[bool],
) -> tuple[str, str, str]:
    figure, axes = new_figure(3.6, 2.1)
    places = np.arange(1 - len(values), 1)
    known = np.array([math.nan if value is None else value for value in values])
    for level in usual:
        axes.axhline(level, color=INK, linewidth=1)
    for level in limits:
        axes.axhline(level, color=ANOMALY, linestyle="--", linewidth=1.2)
    axes.plot(places, known, color=NORMAL, linewidth=1.4)
    for alert, colour, mark in ((False, NORMAL, "o"), (True, ANOMALY, "D")):
        chosen = np.array(alerts) == alert
        axes.plot(places[chosen], known[chosen], mark, color=colour, markersize=4.5, linestyle="none")
    axes.set_ylim(bottom=0)
    axes.set_xlim(places[0] - 0.5, 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("runs before this one (0: this one)")
    last = number(values[-1])
    return title, lines, to_svg(figure, label=f"{title} of the last {len(values)} runs; of this one {last}")


def _plain(text: str, length: int) -> str:
    """Text for matplotlib, for which dollars mean mathematics."""
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.replace("$", r"\$")


# The model card ----------------------------------------------------------------------------------------------


def _card(document: dict[str, Any]) -> Any:
    """HTML of the model card: tables and lists, and of links, pictures and HTML in names of columns nothing."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    tokens: list[Any] = []
    for token in parser.parse(persistence.model_card(document)):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
        elif token.type == "th_open":
            token.attrSet("scope", "col")
        tokens.append(token)
    html = parser.renderer.render(_without_empty_heads(tokens), parser.options, {})
    html = html.replace(
        "<table>",
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of the model card"><table>',
    )
    return Markup(html.replace("</table>", "</table></div>"))


def _without_empty_heads(tokens: list[Any]) -> list[Any]:
    """Leave out headings of tables that say nothing: rows are then headed by their first cell."""
    kept: list[Any] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.type == "thead_open":
            end = next(k for k in range(position, len(tokens)) if tokens[k].type == "thead_close")
            if not any(part.content for part in tokens[position:end] if part.type == "inline"):
                position = end + 1
                # From here to the end of the table first cells are headings.
                first = False
                while tokens[position].type != "table_close":
                    part = tokens[position]
                    if part.type == "tr_open":
                        first = True
                    elif part.type == "td_open" and first:
                        part.tag, part.attrs = "th", {"scope": "row"}
                    elif part.type == "td_close" and first:
                        part.tag, first = "th", False
                    kept.append(part)
                    position += 1
                continue
        kept.append(token)
        position += 1
    return kept
