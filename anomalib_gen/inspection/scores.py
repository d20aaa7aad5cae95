"""Displays of what detectors say of rows: scores, curves, p-values."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from sklearn.utils import check_random_state

from anomalib_gen._outlier import is_below
from anomalib_gen._runtime import check_count
from anomalib_gen.calibration._wrapped import check_labels, innermost, score_rows, threshold_of
from anomalib_gen.inspection._style import (
    ANOMALY,
    NORMAL,
    check_confidence,
    check_scores,
    ink,
    start,
)

GRID = np.linspace(0, 1, 201)


class ScoreHistogramDisplay:
    """Histogram of scores with the threshold below which rows are flagged.

    Make it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    scores : ndarray of shape (n_rows,)
        Lower = more abnormal.
    threshold : float or None, default=None
        Rows below it are flagged.
    y : ndarray of shape (n_rows,) or None, default=None
        +1 for normal rows, -1 for anomalies; None draws one histogram.
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self, *, scores: Any, threshold: float | None = None, y: Any = None, name: str | None = None
    ) -> None:
        self.scores = scores
        self.threshold = threshold
        self.y = y
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        score_direction: str = "auto",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Score rows with a fitted detector and draw.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one.
        X : array-like or data frame of shape (n_rows, n_features)
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        score_direction : {"auto", "normal", "abnormal"}, default="auto"
            What a high score of the estimator means.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        ScoreHistogramDisplay
        """
        return cls.from_predictions(
            score_rows(estimator, X, score_direction),
            y,
            threshold=threshold_of(estimator),
            name=type(innermost(estimator)).__name__,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        scores: Any,
        y: Any = None,
        *,
        threshold: float | None = None,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Draw scores.

        Parameters
        ----------
        scores : array-like of shape (n_rows,)
            Lower = more abnormal.
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        threshold : float, optional
            Rows below it are flagged.
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        ScoreHistogramDisplay
        """
        values = check_scores(scores)
        labels = None if y is None else check_labels(y, len(values))
        return cls(scores=values, threshold=threshold, y=labels, name=name).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, bins: int = 50) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        bins : int, default=50

        Returns
        -------
        ScoreHistogramDisplay
        """
        check_count(bins, "bins")
        ax = start(self, ax)
        low, middle, high = np.quantile(self.scores, [0.25, 0.5, 0.75])
        # A few rows far out would squeeze all others into one bin: they are counted at the edge.
        reach = 6 * max(high - low, np.finfo(float).tiny)
        left = max(float(self.scores.min()), middle - reach)
        right = min(float(self.scores.max()), middle + reach)
        if self.threshold is not None and np.isfinite(self.threshold):
            left, right = min(left, self.threshold - 0.5 * (high - low)), max(right, self.threshold)
        edges = np.linspace(left, right, bins + 1)
        clipped = np.clip(self.scores, left, right)
        groups: list[tuple[str, str, npt.NDArray[np.float64]]] = [("all rows", NORMAL, clipped)]
        if self.y is not None:
            groups = [("normal", NORMAL, clipped[self.y == 1]), ("anomaly", ANOMALY, clipped[self.y == -1])]
        for label, color, values in groups:
            if len(values):
                share = np.full(len(values), 1 / len(values))
                ax.hist(values, edges, weights=share, color=color, alpha=0.35)
                ax.hist(
                    values,
                    edges,
                    weights=share,
                    color=color,
                    histtype="step",
                    lw=1.4,
                    label=f"{label} ({len(values)})",
                )
        if self.threshold is not None and np.isfinite(self.threshold):
            flagged = is_below(self.scores, self.threshold).mean()
            ax.axvline(self.threshold, color=ink(), ls="--", lw=1.2, label=f"threshold ({flagged:.1%} below)")
        outside = {"left": int((self.scores < left).sum()), "right": int((self.scores > right).sum())}
        counted = ", ".join(
            f"{n} row{'s' if n > 1 else ''} farther {side}" for side, n in outside.items() if n
        )
        note = f"\ncounted at the edge: {counted}" if counted else ""
        ax.set(xlabel=f"score (lower = more abnormal){note}", ylabel="share of rows", title=self.name)
        ax.legend(frameon=False)
        return self


class DetectionCurveDisplay:
    """ROC or precision-recall curve with bootstrap intervals; anomalies are what is to be found.

    Make it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    kind : {"roc", "precision-recall"}
    x, y : ndarray
        The curve: false-positive rate and recall, or recall and precision.
    low, high : ndarray of shape (201,)
        Interval of y on an even grid of x from 0 to 1.
    area : float
        Area under the ROC curve, or average precision.
    interval : tuple of float
        Of the area.
    prevalence : float
        Share of anomalies among the rows.
    confidence : float
        Of the intervals.
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        *,
        kind: str,
        x: Any,
        y: Any,
        low: Any,
        high: Any,
        area: float,
        interval: tuple[float, float],
        prevalence: float,
        confidence: float,
        name: str | None = None,
    ) -> None:
        self.kind = kind
        self.x = x
        self.y = y
        self.low = low
        self.high = high
        self.area = area
        self.interval = interval
        self.prevalence = prevalence
        self.confidence = confidence
        self.name = name

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any, *, score_direction: str = "auto", ax: Any = None, **kwargs: Any
    ) -> Self:
        """Score rows with a fitted detector and draw.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one.
        X : array-like or data frame of shape (n_rows, n_features)
        y : array-like of shape (n_rows,)
            +1 for normal rows, -1 for anomalies.
        score_direction : {"auto", "normal", "abnormal"}, default="auto"
            What a high score of the estimator means.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `from_predictions`.

        Returns
        -------
        DetectionCurveDisplay
        """
        kwargs.setdefault("name", type(innermost(estimator)).__name__)
        return cls.from_predictions(y, score_rows(estimator, X, score_direction), ax=ax, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        y: Any,
        scores: Any,
        *,
        kind: str = "roc",
        n_resamples: int = 500,
        confidence: float = 0.95,
        random_state: Any = 0,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the curve of scores.

        Parameters
        ----------
        y : array-like of shape (n_rows,)
            +1 for normal rows, -1 for anomalies.
        scores : array-like of shape (n_rows,)
            Lower = more abnormal.
        kind : {"roc", "precision-recall"}, default="roc"
        n_resamples : int, default=500
            Bootstrap samples, of normal rows and anomalies apart.
        confidence : float, default=0.95
            Of the intervals, which are pointwise.
        random_state : int, RandomState instance or None, default=0
            Draws the bootstrap samples.
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        DetectionCurveDisplay

        Raises
        ------
        ValueError
            If the kind is unknown, scores are not finite, or labels are not +1 and -1, with both among them.
        """
        if kind not in ("roc", "precision-recall"):
            raise ValueError(f"kind must be 'roc' or 'precision-recall', got {kind!r}.")
        confidence, n_resamples = check_confidence(confidence), check_count(n_resamples, "n_resamples")
        anomaly = -check_scores(scores)
        target = check_labels(y, len(anomaly)) == -1
        if target.all() or not target.any():
            raise ValueError("y must hold normal rows and anomalies; one of them is missing.")
        x_curve, y_curve, area = _curve(kind, target, anomaly)
        random = check_random_state(random_state)
        normal, abnormal = np.flatnonzero(~target), np.flatnonzero(target)
        curves, areas = np.empty((n_resamples, len(GRID))), np.empty(n_resamples)
        for b in range(n_resamples):
            rows = np.concatenate(
                [random.choice(normal, len(normal)), random.choice(abnormal, len(abnormal))]
            )
            x_b, y_b, areas[b] = _curve(kind, target[rows], anomaly[rows])
            curves[b] = _on_grid(kind, x_b, y_b)
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        low, high = np.quantile(curves, tails, axis=0)
        interval = np.quantile(areas, tails)
        return cls(
            kind=kind,
            x=x_curve,
            y=y_curve,
            low=low,
            high=high,
            area=area,
            interval=(float(interval[0]), float(interval[1])),
            prevalence=float(target.mean()),
            confidence=confidence,
            name=name,
        ).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, color: Any = NORMAL) -> Self:
        """Draw on the axes given, or on new ones; several detectors may share them.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        color : matplotlib colour, optional

        Returns
        -------
        DetectionCurveDisplay
        """
        fresh = ax is None or not ax.lines
        ax = start(self, ax, figsize=(5, 5))
        roc = self.kind == "roc"
        what = "AUC" if roc else "AP"
        label = f"{what} {self.area:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        label = label if self.name is None else f"{self.name}, {label}"
        ax.plot(self.x, self.y, color=color, lw=1.6, label=label, drawstyle="default" if roc else "steps-pre")
        ax.fill_between(GRID, self.low, self.high, color=color, alpha=0.25, lw=0)
        if fresh:
            chance = [0, 1] if roc else [self.prevalence, self.prevalence]
            ax.plot([0, 1], chance, color=ink(), ls=":", lw=1, label="chance")
        ax.set(
            xlabel="false-positive rate" if roc else "recall (share of anomalies found)",
            ylabel="recall (share of anomalies found)"
            if roc
            else "precision (share of flags that are right)",
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.03),
            aspect="equal",
        )
        ax.legend(
            loc="lower right" if roc else "lower left",
            # Over the line of chance, which is low where anomalies are rare.
            edgecolor="none",
            fontsize="small",
            title=f"{100 * self.confidence:g}% bootstrap intervals",
            title_fontsize="small",
        )
        return self


def _curve(
    kind: str, target: npt.NDArray[np.bool_], anomaly: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """The curve with rising x, and its area."""
    if kind == "roc":
        false_positives, recall, _ = roc_curve(target, anomaly)
        return false_positives, recall, float(roc_auc_score(target, anomaly))
    precision, recall, _ = precision_recall_curve(target, anomaly)
    return recall[::-1], precision[::-1], float(average_precision_score(target, anomaly))


def _on_grid(kind: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if kind == "roc":
        return np.interp(GRID, x, y)
    # Precision at the first threshold that reaches the recall: no lines between points, which would flatter.
    return y[np.minimum(np.searchsorted(x, GRID), len(y) - 1)]


class PValueDisplay:
    """Are p-values of normal rows what they say: the share of rows at or below each p-value.

    Make it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    p_values : ndarray of shape (n_rows,)
        Of normal rows.
    confidence : float, default=0.95
        Of the band in which the share lies, at each p-value, if rows are drawn and p-values are uniform.
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, *, p_values: Any, confidence: float = 0.95, name: str | None = None) -> None:
        self.p_values = p_values
        self.confidence = confidence
        self.name = name

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Take p-values of normal rows from a fitted conformal detector and draw.

        Parameters
        ----------
        estimator : fitted detector with `p_values`
        X : array-like or data frame of shape (n_rows, n_features)
            Normal rows that the detector has not seen.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `from_predictions`.

        Returns
        -------
        PValueDisplay

        Raises
        ------
        TypeError
            If the estimator has no `p_values`.
        """
        if not hasattr(estimator, "p_values"):
            raise TypeError(
                f"{type(estimator).__name__} has no p_values. Wrap it in an "
                "anomalib_gen.calibration.SplitConformalDetector."
            )
        name, inner = type(estimator).__name__, getattr(estimator, "estimator", None)
        kwargs.setdefault("name", name if inner is None else f"{name} of {type(innermost(inner)).__name__}")
        return cls.from_predictions(estimator.p_values(X), ax=ax, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        p_values: Any,
        *,
        confidence: float = 0.95,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Draw p-values of normal rows.

        Parameters
        ----------
        p_values : array-like of shape (n_rows,)
        confidence : float, default=0.95
            Of the band.
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        PValueDisplay

        Raises
        ------
        ValueError
            If a value does not lie in [0, 1].
        """
        p = check_scores(p_values, "p_values")
        if p.min() < 0 or p.max() > 1:
            raise ValueError(f"p_values must lie in [0, 1], got {p.min():g} to {p.max():g}.")
        return cls(p_values=np.sort(p), confidence=check_confidence(confidence), name=name).plot(
            ax=ax, **kwargs
        )

    def plot(self, ax: Any = None, *, log: bool = True, color: Any = NORMAL) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        log : bool, default=True
            Logarithmic axes: decisions are made at small p-values.
        color : matplotlib colour, optional

        Returns
        -------
        PValueDisplay
        """
        ax = start(self, ax, figsize=(5, 5))
        n = len(self.p_values)
        lowest = 1 / (2 * n)
        t = np.geomspace(lowest, 1, 300) if log else np.linspace(0, 1, 301)
        low, high = stats.binom.interval(self.confidence, n, t)
        ax.fill_between(
            t,
            np.maximum(low, 0.3) / n,
            np.maximum(high, 0.3) / n,
            color=ink(),
            alpha=0.12,
            lw=0,
            label=f"{100 * self.confidence:g}% band of {n} uniform p-values",
        )
        ax.plot([lowest if log else 0, 1], [lowest if log else 0, 1], color=ink(), ls=":", lw=1)
        values, counts = np.unique(self.p_values, return_counts=True)
        share = np.cumsum(counts) / n
        ax.step(np.r_[values, 1], np.r_[share, 1], where="post", color=color, lw=1.6, label="normal rows")
        if log:
            ax.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.2))
        else:
            ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set(xlabel="p-value t", ylabel="share of normal rows with p ≤ t", title=self.name)
        ax.legend(loc="upper left", frameon=False, fontsize="small")
        return self
