"""Display of the rows that a detector finds most abnormal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
from sklearn.utils import _safe_indexing

from anomalib_gen._outlier import is_below
from anomalib_gen._runtime import check_count
from anomalib_gen.calibration._wrapped import check_labels, score_rows, threshold_of
from anomalib_gen.explain import FeatureContributions, feature_contributions
from anomalib_gen.explain._columns import split_pipeline
from anomalib_gen.inspection._style import (
    ANOMALY,
    check_scores,
    ink,
    literal,
    start,
)
from anomalib_gen.inspection.contributions import UNITS, _show

HEADS = {"key": "row", "score": "score", "p_value": "p-value", "flagged": "flagged", "label": "label"}
STRONGEST = 0.55
"""Opacity of the largest contribution: the text over it stays legible on light and on dark backgrounds."""


class TopAnomaliesDisplay:
    """Table of the most abnormal rows, most abnormal first, with the columns that make them so.

    Make it with `from_estimator` or `from_predictions`. A notebook shows it as text that can be marked and copied, in
    place of the figure.

    Parameters
    ----------
    frame : DataFrame of shape (n_shown, ...)
        See `frame_`.
    n_rows : int
        Rows that were scored.
    threshold : float or None, default=None
        Rows below it are flagged.
    unit : str or None, default=None
        Of the contributions.
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    frame_ : DataFrame
        The table as data: the rank as its index; ``key`` and ``score``; where they are known ``p_value``, ``flagged``
        (whether the score is below the threshold) and ``label`` (+1 or -1); and for the columns that contribute most
        ``column_1``, ``value_1``, ``contribution_1``, ``column_2``, ...
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        *,
        frame: Any,
        n_rows: int,
        threshold: float | None = None,
        unit: str | None = None,
        name: str | None = None,
    ) -> None:
        self.frame_ = frame
        self.n_rows = n_rows
        self.threshold = threshold
        self.unit = unit
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        keys: Any = None,
        n_top: int = 10,
        n_columns: int = 3,
        score_direction: str = "auto",
        ax: Any = None,
        **options: Any,
    ) -> Self:
        """Score rows with a fitted detector, explain those that come first, and draw.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one. p-values are shown of those
            that have `p_values`, and columns of those that `anomalib_gen.explain.feature_contributions` explains.
        X : array-like or data frame of shape (n_rows, n_features), or images (n_rows, channels, height, width)
            Images have no columns to be shown.
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        keys : array-like of shape (n_rows,), optional
            What the rows are known by. None takes the index of a data frame, and the position in anything else.
        n_top : int, default=10
            Rows of the table.
        n_columns : int, default=3
            Columns shown for each row; 0 explains nothing, which saves time.
        score_direction : {"auto", "normal", "abnormal"}, default="auto"
            What a high score of the estimator means.
        ax : matplotlib Axes, optional
        **options : dict
            Passed to `anomalib_gen.explain.feature_contributions`, ``background`` above all.

        Returns
        -------
        TopAnomaliesDisplay
        """
        scores = score_rows(estimator, X, score_direction)
        threshold = threshold_of(estimator)
        if keys is None and hasattr(X, "index") and hasattr(X, "iloc"):
            keys = X.index
        top = _top(check_scores(scores), n_top)
        contributions = None
        if n_columns and np.ndim(X) == 2 and hasattr(split_pipeline(estimator)[1], "_torch_energy"):
            contributions = feature_contributions(estimator, _safe_indexing(X, top), **options)
        frame = _table(
            scores,
            top,
            keys=keys,
            p_values=estimator.p_values(X) if hasattr(estimator, "p_values") else None,
            y=y,
            threshold=threshold,
            contributions=contributions,
            n_columns=n_columns,
        )
        return cls(
            frame=frame,
            n_rows=len(scores),
            threshold=threshold,
            unit=None if contributions is None else UNITS[contributions.method],
            name=type(split_pipeline(estimator)[1]).__name__,
        ).plot(ax=ax)

    @classmethod
    def from_predictions(
        cls,
        scores: Any,
        y: Any = None,
        *,
        keys: Any = None,
        p_values: Any = None,
        contributions: FeatureContributions | None = None,
        threshold: float | None = None,
        n_top: int = 10,
        n_columns: int = 3,
        name: str | None = None,
        ax: Any = None,
    ) -> Self:
        """Rank rows by scores at hand and draw.

        Parameters
        ----------
        scores : array-like of shape (n_rows,)
            Lower = more abnormal.
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        keys : array-like of shape (n_rows,), optional
            What the rows are known by. None takes their position.
        p_values : array-like of shape (n_rows,), optional
        contributions : FeatureContributions, optional
            Of the same rows.
        threshold : float, optional
            Rows below it are flagged.
        n_top : int, default=10
            Rows of the table.
        n_columns : int, default=3
            Columns shown for each row.
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional

        Returns
        -------
        TopAnomaliesDisplay

        Raises
        ------
        ValueError
            If scores, contributions, keys, p-values and labels are not of the same rows, or `n_columns` is negative.
        """
        values = check_scores(scores)
        if contributions is not None:
            if len(contributions.values) != len(values):
                raise ValueError(
                    f"contributions must be of the {len(values)} rows that have scores, got those of "
                    f"{len(contributions.values)} rows."
                )
            top = _top(values, n_top)
            contributions = replace(
                contributions,
                values=contributions.values[top],
                anomaly=contributions.anomaly[top],
                baseline=contributions.baseline[top],
                data=contributions.data[top],
                index=None if contributions.index is None else contributions.index[top],
            )
        frame = _table(
            values,
            _top(values, n_top),
            keys=keys,
            p_values=p_values,
            y=y,
            threshold=threshold,
            contributions=contributions,
            n_columns=n_columns,
        )
        return cls(
            frame=frame,
            n_rows=len(values),
            threshold=threshold,
            unit=None if contributions is None else UNITS[contributions.method],
            name=name,
        ).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional

        Returns
        -------
        TopAnomaliesDisplay
        """
        heads, rows, shades = self._text()
        # As wide as the text: about a twelfth of an inch a letter, and a tenth in the title.
        letters = [max(len(text) for text in column) + 3 for column in zip(heads, *rows, strict=True)]
        self._own_figure = ax is None
        width = max(4.0, 0.085 * sum(letters), 0.1 * len(self._title()))
        ax = start(self, ax, figsize=(width, 0.75 + 0.28 * len(rows)))
        import matplotlib as mpl

        color = ink()
        table = ax.table(
            cellText=[[literal(text) for text in row] for row in [heads, *rows]],
            colWidths=[n / sum(letters) for n in letters],
            cellLoc="left",
            bbox=(0, 0, 1, 1),
        )
        table.auto_set_font_size(False)
        table.set_fontsize("medium")
        for (i, j), cell in table.get_celld().items():
            cell.PAD = 0.04
            cell.set(facecolor="none", linewidth=0)
            cell.get_text().set_color(color)
            if i == 0:
                cell.get_text().set_weight("bold")
            elif shades[i - 1][j]:
                cell.set_facecolor(mpl.colors.to_rgba(ANOMALY, shades[i - 1][j]))
        lines = np.arange(1, len(rows) + 1) / (len(rows) + 1)
        ax.hlines(lines, 0, 1, colors=color, lw=[*[0.3] * (len(rows) - 1), 1.0])
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set_axis_off()
        ax.set_title(self._title(), loc="left")
        if self.unit is not None:
            note = f"shading and +: {self.unit}"
            ax.text(0, -0.02, note, transform=ax.transAxes, va="top", fontsize="small", color=color)
        return self

    def style(self) -> Any:
        """The table as a pandas Styler, for notebooks and reports; it needs Jinja2.

        Returns
        -------
        pandas.io.formats.style.Styler
            Without colours of its own but for half-transparent shades, so that it suits any background.
        """
        import pandas as pd

        heads, rows, shades = self._text()
        # Named by position: heads repeat.
        shown: Any = pd.DataFrame(rows, columns=heads[:], index=list(self.frame_.index)).drop(columns="rank")
        shown.columns = range(shown.shape[1])
        red, green, blue = (int(ANOMALY[i : i + 2], 16) for i in (1, 3, 5))
        css = pd.DataFrame(
            [
                [f"background-color: rgba({red}, {green}, {blue}, {a:.2f})" if a else "" for a in row[1:]]
                for row in shades
            ],
            index=shown.index,
            columns=shown.columns,
        )
        caption = self._title() + ("" if self.unit is None else f"; shading and +: {self.unit}")
        return (
            shown.style.apply(lambda _: css, axis=None)
            .format(escape="html")
            .format_index(lambda j: heads[1:][j], axis="columns", escape="html")
            .set_caption(caption)
            .set_properties(**{"text-align": "left", "white-space": "nowrap", "padding": "2px 8px"})
            .set_table_styles(
                [
                    {"selector": "th", "props": "text-align: left; white-space: nowrap; padding: 2px 8px"},
                    {"selector": "caption", "props": "text-align: left; white-space: nowrap"},
                ]
            )
        )

    def _repr_html_(self) -> str:
        try:
            html = str(self.style().to_html())
        except ImportError:  # no Jinja2
            html = str(self.frame_.to_html())
        if getattr(self, "_own_figure", False):
            # The notebook would show the same table a second time, as a picture.
            import matplotlib.pyplot as plt

            plt.close(self.figure_)  # type: ignore[attr-defined]
        return html

    def _title(self) -> str:
        name = "" if self.name is None else f"{self.name}: "
        return f"{name}the {len(self.frame_)} most abnormal of {self.n_rows} rows"

    def _text(self) -> tuple[list[str], list[list[str]], list[list[float]]]:
        """Heads, cells and opacities of the cells' shades."""
        frame = self.frame_
        known = [name for name in HEADS if name in frame]
        n = sum(str(name).startswith("column_") for name in frame)
        largest = max((frame[f"contribution_{k + 1}"].max() for k in range(n)), default=0.0)
        heads = ["rank", *(HEADS[name] for name in known), *(["because of", *[""] * (n - 1)] if n else [])]
        rows, shades = [], []
        for rank, row in zip(frame.index, frame.to_dict("records"), strict=True):
            cells, alphas = [str(rank)], [0.0]
            for name in known:
                cells.append(_cell(name, row[name]))
                alphas.append(0.0)
            for k in range(1, n + 1):
                part = row[f"contribution_{k}"]
                cells.append(f"{row[f'column_{k}']} = {_show(row[f'value_{k}'])} ({part:+.3g})")
                alphas.append(STRONGEST * float(np.clip(part / largest, 0, 1)) if largest > 0 else 0.0)
            rows.append(cells)
            shades.append(alphas)
        return heads, rows, shades


def _cell(name: str, value: Any) -> str:
    if name == "flagged":
        return "yes" if value else "no"
    if name == "label":
        return "anomaly" if value == -1 else "normal"
    if name == "key":
        return str(value)
    return f"{value:.2g}" if name == "p_value" else f"{value:.4g}"


def _top(scores: Any, n: int) -> Any:
    """Positions of the lowest scores, lowest first; the earlier of two that tie."""
    return np.argsort(scores, kind="stable")[: check_count(n, "n_top")]


def _table(
    scores: Any,
    top: Any,
    *,
    keys: Any,
    p_values: Any,
    y: Any,
    threshold: float | None,
    contributions: FeatureContributions | None,
    n_columns: int,
) -> Any:
    import pandas as pd

    if isinstance(n_columns, bool) or not isinstance(n_columns, int | np.integer) or n_columns < 0:
        raise ValueError(f"n_columns must be a non-negative integer, got {n_columns!r}.")
    known = list(range(len(scores)) if keys is None else keys)
    named = {"keys": known, "p_values": p_values}
    for name, given in named.items():
        if given is not None and len(given) != len(scores):
            raise ValueError(f"{name} must be one for each of {len(scores)} rows, got {len(given)}.")
    columns = {"key": [known[i] for i in top], "score": np.asarray(scores)[top]}
    if p_values is not None:
        columns["p_value"] = np.asarray(p_values, dtype=np.float64)[top]
    if threshold is not None:
        columns["flagged"] = is_below(columns["score"], threshold)
    if y is not None:
        columns["label"] = check_labels(y, len(scores))[top]
    if contributions is not None:
        for k, found in enumerate(zip(*contributions.top(n_columns), strict=True), 1):
            for part, values in zip(
                ("column", "value", "contribution"), zip(*found, strict=True), strict=True
            ):
                columns[f"{part}_{k}"] = list(values)
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(top) + 1, name="rank"))
