"""Display of the contributions of columns to one row's anomaly."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Self

import numpy as np
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import _num_samples

from anomalib_gen._runtime import check_count
from anomalib_gen.explain import FeatureContributions, feature_contributions
from anomalib_gen.inspection._style import ANOMALY, NORMAL, ink, literal, start

UNITS = {
    "integrated-gradients": "contribution to the energy, in nats",
    "conditional": "surprise given the columns before, in nats",
    "score": "contribution to the norm of the score",
    "reconstruction": "squared residual over the number of columns",
}

ENERGIES = ("integrated-gradients", "conditional")


class FeatureContributionsDisplay:
    """Bars of the columns that make one row anomalous, largest first, with the row's values.

    Make it with `from_estimator` or `from_contributions`.

    Parameters
    ----------
    contributions : FeatureContributions
    row : int, default=0
        Which of its rows.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, *, contributions: FeatureContributions, row: int = 0) -> None:
        self.contributions = contributions
        self.row = row

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, row: int = 0, ax: Any = None, max_columns: int = 10, **options: Any
    ) -> Self:
        """Explain a row by a fitted detector and draw.

        Parameters
        ----------
        estimator : fitted detector
        X : array-like or data frame of shape (n_rows, n_features)
        row : int, default=0
            Which row of X.
        ax : matplotlib Axes, optional
        max_columns : int, default=10
            Bars; the other columns are added up in one more.
        **options : dict
            Passed to `anomalib_gen.explain.feature_contributions`.

        Returns
        -------
        FeatureContributionsDisplay
        """
        i = _check_row(row, _num_samples(X))
        found = feature_contributions(estimator, _safe_indexing(X, [i]), **options)
        return cls.from_contributions(found, ax=ax, max_columns=max_columns)

    @classmethod
    def from_contributions(
        cls, contributions: FeatureContributions, *, row: int = 0, ax: Any = None, max_columns: int = 10
    ) -> Self:
        """Draw contributions that were found before.

        Parameters
        ----------
        contributions : FeatureContributions
        row : int, default=0
            Which of its rows.
        ax : matplotlib Axes, optional
        max_columns : int, default=10
            Bars; the other columns are added up in one more.

        Returns
        -------
        FeatureContributionsDisplay
        """
        return cls(contributions=contributions, row=row).plot(ax=ax, max_columns=max_columns)

    def plot(self, ax: Any = None, *, max_columns: int = 10) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        max_columns : int, default=10
            Bars; the other columns are added up in one more.

        Returns
        -------
        FeatureContributionsDisplay
        """
        found, i = self.contributions, _check_row(self.row, len(self.contributions.values))
        values = found.values[i]
        check_count(max_columns, "max_columns")
        order = np.argsort(-np.abs(values), kind="stable")
        shown, rest = order[:max_columns], order[max_columns:]
        shown = shown[np.argsort(-values[shown], kind="stable")]
        labels = [f"{found.feature_names[j]} = {_show(found.data[i, j])}" for j in shown]
        heights = list(values[shown])
        if len(rest):
            labels.append(f"{len(rest)} other column{'s' if len(rest) > 1 else ''}")
            heights.append(float(values[rest].sum()))
        ax = start(self, ax, figsize=(6, 1.2 + 0.32 * len(labels)))
        positions = np.arange(len(labels))[::-1]
        colors = [ANOMALY if height > 0 else NORMAL for height in heights]
        bars = ax.barh(positions, heights, color=colors, height=0.7)
        if len(rest):
            bars[-1].set_alpha(0.5)
        ax.bar_label(bars, [f"{height:+.2f}" for height in heights], padding=3, fontsize="small")
        ax.axvline(0, color=ink(), lw=0.8)
        ax.set_yticks(positions, [literal(label) for label in labels])
        ax.margins(x=0.18)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        title = f"{'energy' if found.method in ENERGIES else 'anomaly'} {found.anomaly[i]:.4g}"
        if found.method == "integrated-gradients":
            title += f", baseline {found.baseline[i]:.4g}"
        ax.set(
            xlabel=UNITS[found.method],
            title=title,
        )
        return self


def _check_row(row: Any, n: int) -> int:
    """Position of a row, which may be counted from the end."""
    if not isinstance(row, Integral) or not -n <= int(row) < n:
        raise ValueError(f"row must be an integer from 0 to {n - 1}, got {row!r}.")
    return int(row) % n


def _show(value: Any) -> str:
    return str(value)[:20] if isinstance(value, str) else f"{value:.4g}"
