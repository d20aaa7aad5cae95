"""Displays of what a model has learned: its landscape, its training, its samples."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from anomalib_gen._inputs import as_kind_of, describe_non_numeric, validate_rows
from anomalib_gen._runtime import check_count
from anomalib_gen.calibration._wrapped import check_labels, innermost, score_rows, threshold_of
from anomalib_gen.explain._columns import names_of
from anomalib_gen.inspection._style import ANOMALY, NORMAL, check_scores, ink, literal, start

MAX_POINTS = 2000
"""Points of a scatter: more hide each other."""


class LandscapeDisplay:
    """Scores over the plane of a detector of two columns, with rows and the threshold's contour.

    Make it with `from_estimator`.

    Parameters
    ----------
    x, y : ndarray of shape (resolution,)
        Grid along either column.
    values : ndarray of shape (resolution, resolution)
        Score at ``(x[j], y[i])``.
    rows : ndarray of shape (n_rows, 2)
    labels : ndarray of shape (n_rows,) or None
        +1 for normal rows, -1 for anomalies.
    threshold : float or None
        Its contour is drawn.
    feature_names : list of str
    response : str
        What is shown, for the colour bar.
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
        x: Any,
        y: Any,
        values: Any,
        rows: Any,
        labels: Any,
        threshold: float | None,
        feature_names: list[str],
        response: str,
        name: str | None = None,
    ) -> None:
        self.x = x
        self.y = y
        self.values = values
        self.rows = rows
        self.labels = labels
        self.threshold = threshold
        self.feature_names = feature_names
        self.response = response
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        response_method: str = "score_samples",
        resolution: int = 150,
        margin: float = 0.15,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Evaluate a fitted detector of two columns over the range of rows and draw.

        Parameters
        ----------
        estimator : fitted detector
        X : array-like or data frame of shape (n_rows, 2)
            Rows to show; their range, with a margin, is what is drawn.
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        response_method : str, default="score_samples"
            ``"score_samples"``, ``"energy"``, ``"log_prob"``, ``"elbo"`` or ``"p_values"``, where the detector has it.
        resolution : int, default=150
            Points of the grid along either column.
        margin : float, default=0.15
            Beyond the rows, as a share of their range.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        LandscapeDisplay

        Raises
        ------
        ValueError
            If X has another number of columns than two, or one of text or without a finite value, or if the response
            is not finite everywhere.
        """
        check_is_fitted(estimator)
        if np.ndim(X) != 2 or np.shape(X)[1] != 2:
            raise ValueError(f"X must have two columns to be drawn in a plane, got shape {np.shape(X)}.")
        try:
            rows = np.asarray(X, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{describe_non_numeric(X) or error} A plane is drawn of two columns of numbers."
            ) from error
        check_count(resolution, "resolution", least=2)
        # A pipeline may fill values that are missing; these do not tell how far the others go.
        known = np.isfinite(rows)
        if not known.any(axis=0).all():
            raise ValueError("X has a column without a finite value, so that it has no range to be drawn.")
        low = rows.min(axis=0, initial=np.inf, where=known)
        high = rows.max(axis=0, initial=-np.inf, where=known)
        space = margin * np.where(high > low, high - low, 1.0)
        u, v = (np.linspace(low[j] - space[j], high[j] + space[j], resolution) for j in (0, 1))
        points = np.column_stack([axis.ravel() for axis in np.meshgrid(u, v)])
        # As many points as there are have no index of X.
        grid = type(X)(points, columns=X.columns) if hasattr(X, "iloc") else as_kind_of(points, X)
        threshold = None
        if response_method == "score_samples":
            values = score_rows(estimator, grid, "auto")
            threshold = threshold_of(estimator)
        else:
            values = getattr(estimator, response_method)(grid)
        return cls(
            x=u,
            y=v,
            values=check_scores(values, f"{response_method} of points").reshape(resolution, resolution),
            rows=rows,
            labels=None if y is None else check_labels(y, len(rows)),
            threshold=threshold,
            feature_names=names_of(X, estimator),
            response={
                "score_samples": "score (lower = more abnormal)",
                "energy": "energy in nats",
                "log_prob": "log-density in nats",
                "elbo": "bound on the log-density in nats",
                "p_values": "p-value",
            }.get(response_method, response_method),
            name=type(innermost(estimator)).__name__,
        ).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, levels: int = 20, cmap: str = "cividis") -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        levels : int, default=20
            Colours, of which each covers as many points of the grid as any other: slopes far out would else take all.
        cmap : str, default="cividis"
            Colour map; the default is made for colour-blind readers.

        Returns
        -------
        LandscapeDisplay
        """
        ax = start(self, ax)
        import matplotlib as mpl

        edges = np.unique(np.quantile(self.values, np.linspace(0, 1, levels + 1)))
        if len(edges) < 3:
            # Up by what can be told from the value, however large it is.
            edges = np.linspace(edges[0], edges[-1] + max(1e-12, 4 * np.spacing(np.abs(edges).max())), 3)
        colors = mpl.colormaps[cmap if not self.response.startswith("energy") else f"{cmap}_r"]
        norm = mpl.colors.BoundaryNorm(edges, colors.N)
        filled = ax.contourf(self.x, self.y, self.values, edges, cmap=colors, norm=norm, extend="both")
        bar = ax.figure.colorbar(filled, ax=ax, label=self.response, ticks=edges[:: max(1, len(edges) // 6)])
        bar.ax.set_yticklabels([f"{tick:.3g}" for tick in bar.get_ticks()])
        bar.ax.minorticks_off()
        groups = [("rows", "white", self.rows)]
        if self.labels is not None:
            groups = [
                ("normal", "white", self.rows[self.labels == 1]),
                ("anomaly", ANOMALY, self.rows[self.labels == -1]),
            ]
        for label, color, rows in groups:
            shown = rows[:: -(-len(rows) // MAX_POINTS) if len(rows) else 1]
            ax.scatter(
                *shown.T, s=9 if color == "white" else 18, c=color, edgecolors="black", lw=0.4, label=label
            )
        if self.threshold is not None and self.values.min() < self.threshold < self.values.max():
            ax.contour(
                self.x,
                self.y,
                self.values,
                [self.threshold],
                colors=[ANOMALY],
                linewidths=1.8,
                linestyles="solid",
            )
            ax.plot([], [], color=ANOMALY, lw=1.8, label="threshold")
        across, up = map(literal, self.feature_names)
        ax.set(xlabel=across, ylabel=up, title=self.name)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, frameon=False, borderaxespad=0)
        return self


class LossCurveDisplay:
    """Training and held-out loss over the steps of a fit, and the step whose weights were kept.

    Make it with `from_estimator`.

    Parameters
    ----------
    steps : ndarray of shape (n_points,)
    training : ndarray of shape (n_points,)
        Loss up to each step.
    validation : ndarray of shape (n_evaluations,)
        Loss on held-out rows; empty where none were held out.
    best_step : int or None, default=None
    validation_steps : ndarray of shape (n_evaluations,) or None, default=None
        Steps of `validation`; None takes the last of `steps`.
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
        steps: Any,
        training: Any,
        validation: Any,
        best_step: int | None = None,
        validation_steps: Any = None,
        name: str | None = None,
    ) -> None:
        self.steps = steps
        self.validation_steps = validation_steps
        self.training = training
        self.validation = validation
        self.best_step = best_step
        self.name = name

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Draw the training of a fitted detector, or of the last step of a pipeline.

        Parameters
        ----------
        estimator : fitted detector of this package
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        LossCurveDisplay

        Raises
        ------
        TypeError
            If the detector keeps no loss curve.
        ValueError
            If it has none because nothing was trained, as in the closed form of `DiffusionDetector`.
        """
        inner = innermost(estimator)
        check_is_fitted(inner)
        if not hasattr(inner, "loss_curve_"):
            raise TypeError(
                f"{type(inner).__name__} keeps no loss_curve_. Use a detector that anomalib_gen trains."
            )
        training = np.asarray(inner.loss_curve_, dtype=np.float64)
        if not len(training):
            raise ValueError(
                f"The loss_curve_ of this {type(inner).__name__} is empty: its model has no weights that were trained."
            )
        steps, validation_steps = inner.loss_steps_, inner.validation_steps_
        if steps is None:
            # Not kept when the detector was saved: nearly even in one fit, up to the last step.
            steps = inner.n_iter_ * np.arange(1, len(training) + 1) / len(training)
        return cls(
            steps=np.asarray(steps),
            validation_steps=None if validation_steps is None else np.asarray(validation_steps),
            training=training,
            validation=np.asarray(inner.validation_curve_, dtype=np.float64),
            best_step=inner.best_iter_,
            name=type(inner).__name__,
        ).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional

        Returns
        -------
        LossCurveDisplay
        """
        ax = start(self, ax)
        ax.plot(
            self.steps,
            self.training,
            color=NORMAL,
            lw=1.4,
            marker=_marker(self.training),
            label="training, mean between evaluations",
        )
        if len(self.validation):
            judged = self.validation_steps
            ax.plot(
                self.steps[-len(self.validation) :] if judged is None else judged,
                self.validation,
                color=ANOMALY,
                lw=1.8,
                marker=_marker(self.validation),
                label="held out",
            )
        if self.best_step is not None and len(self.validation):
            ax.axvline(
                self.best_step, color=ink(), ls="--", lw=1, label=f"weights kept (step {self.best_step})"
            )
        values = np.concatenate([self.training, self.validation])
        values = values[np.isfinite(values)]
        if len(values) > 4:
            # The first losses of an untrained network say nothing and would flatten the rest.
            low, high = values.min(), np.quantile(values, 0.95)
            space = 0.08 * max(high - low, 1e-9)
            ax.set_ylim(low - space, high + space)
        ax.set(xlabel="gradient step", ylabel="loss a row", title=self.name)
        ax.legend(frameon=False)
        return self


def _marker(points: Any) -> str | None:
    """A line of one point is not seen."""
    return "o" if len(points) == 1 else None


class LatentSpaceDisplay:
    """Where rows lie among the causes that an autoencoder has found.

    Make it with `from_estimator`.

    Parameters
    ----------
    points : ndarray of shape (n_rows, 2)
    labels : ndarray of shape (n_rows,) or None
        +1 for normal rows, -1 for anomalies.
    axis_names : tuple of str
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self, *, points: Any, labels: Any, axis_names: tuple[str, str], name: str | None = None
    ) -> None:
        self.points = points
        self.labels = labels
        self.axis_names = axis_names
        self.name = name

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: Any = None, *, ax: Any = None, **kwargs: Any) -> Self:
        """Encode rows with a fitted autoencoder and draw.

        Parameters
        ----------
        estimator : fitted detector with `transform`
            Two latent dimensions are shown as they are; of more, the two principal axes of the rows' means.
        X : array-like or data frame of shape (n_rows, n_features)
        y : array-like of shape (n_rows,), optional
            +1 for normal rows, -1 for anomalies.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        LatentSpaceDisplay

        Raises
        ------
        TypeError
            If the estimator has no `transform`.
        ValueError
            If there is one row, and more than two dimensions.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "transform"):
            raise TypeError(
                f"{type(innermost(estimator)).__name__} has no latent space: it has no transform."
            )
        Z = np.asarray(estimator.transform(X), dtype=np.float64)
        names = ("latent dimension 1", "latent dimension 2")
        if Z.shape[1] == 1:
            Z, names = np.column_stack([Z, np.zeros(len(Z))]), (names[0], "")
        elif Z.shape[1] > 2:
            if len(Z) < 2:
                raise ValueError(f"Principal axes are those of two rows at least, got {len(Z)}.")
            centred = Z - Z.mean(axis=0)
            _, spread, axes = np.linalg.svd(centred, full_matrices=False)
            share = spread**2 / max((spread**2).sum(), np.finfo(float).tiny)
            Z = centred @ axes[:2].T
            names = (
                f"first principal axis ({share[0]:.0%} of the variance)",
                f"second principal axis ({share[1]:.0%})",
            )
        labels = None if y is None else check_labels(y, len(Z))
        name = type(innermost(estimator)).__name__
        return cls(points=Z, labels=labels, axis_names=names, name=name).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional

        Returns
        -------
        LatentSpaceDisplay
        """
        ax = start(self, ax, figsize=(5.5, 5))
        groups = [("rows", NORMAL, "o", self.points)]
        if self.labels is not None:
            groups = [
                ("normal", NORMAL, "o", self.points[self.labels == 1]),
                ("anomaly", ANOMALY, "^", self.points[self.labels == -1]),
            ]
        for label, color, marker, points in groups:
            shown = points[:: max(1, -(-len(points) // MAX_POINTS))]
            ax.scatter(
                *shown.T, s=14, c=color, marker=marker, alpha=0.6, lw=0, label=f"{label} ({len(points)})"
            )
        ax.set(xlabel=self.axis_names[0], ylabel=self.axis_names[1], title=self.name)
        ax.legend(frameon=False)
        return self


class SamplesDisplay:
    """Rows drawn from a model beside rows of the data, column by column and pair by pair.

    Make it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    data, samples : ndarray of shape (n, n_columns)
        At most a few columns.
    feature_names : list of str
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes of shape (n_columns, n_columns)
    ax_ : matplotlib Axes
        In whose place they are.
    figure_ : matplotlib Figure
    """

    def __init__(self, *, data: Any, samples: Any, feature_names: list[str], name: str | None = None) -> None:
        self.data = data
        self.samples = samples
        self.feature_names = feature_names
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        columns: Any = None,
        n_samples: int = 1000,
        random_state: Any = 0,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Draw rows from a fitted detector and show them beside the data.

        Parameters
        ----------
        estimator : fitted detector with `sample`
        X : array-like or data frame of shape (n_rows, n_features)
            Rows of the data, best ones the detector was not fitted to.
        columns : sequence of (int or str) or None, default=None
            Columns to show, by position or name; None takes the first three.
        n_samples : int, default=1000
        random_state : int, RandomState instance or None, default=0
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        SamplesDisplay

        Raises
        ------
        TypeError
            If the estimator has no `sample`.
        ValueError
            If it is one of images, or `columns` are none of X.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "sample"):
            hint = ""
            if hasattr(estimator, "steps") and hasattr(innermost(estimator), "sample"):
                hint = (
                    " Its last step does, in the units of what it is given: "
                    "SamplesDisplay.from_estimator(pipeline[-1], pipeline[:-1].transform(X))."
                )
            raise TypeError(f"{type(estimator).__name__} draws no rows: it has no sample.{hint}")
        if len(getattr(estimator, "event_shape_", ())) > 1:
            raise ValueError(
                f"SamplesDisplay shows columns of tables; this {type(estimator).__name__} draws images of shape "
                f"{tuple(estimator.event_shape_)}. Show those of its sample(), e.g. with matplotlib's imshow."
            )
        rows = validate_rows(estimator, X, reset=False, min_rows=1)
        names = names_of(X, estimator)
        wanted = list(range(min(3, len(names))) if columns is None else columns)
        unknown = [
            c for c in wanted if c not in (names if isinstance(c, str) else range(-len(names), len(names)))
        ]
        if unknown or not wanted:
            raise ValueError(
                f"columns must be among {names}, or positions from 0 to {len(names) - 1}, got {unknown}."
            )
        positions = [names.index(c) if isinstance(c, str) else int(c) for c in wanted]
        drawn = estimator.sample(n_samples, random_state=random_state)
        return cls.from_predictions(
            rows[:, positions],
            drawn[:, positions],
            feature_names=[names[j] for j in positions],
            name=type(estimator).__name__,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        data: Any,
        samples: Any,
        *,
        feature_names: list[str] | None = None,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Show samples beside data.

        Parameters
        ----------
        data, samples : array-like of shape (n, n_columns)
        feature_names : list of str, optional
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        SamplesDisplay

        Raises
        ------
        ValueError
            If the two do not have the same number of columns.
        """
        a, b = np.asarray(data, dtype=np.float64), np.asarray(samples, dtype=np.float64)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(
                f"data and samples must have the same columns, got shapes {a.shape} and {b.shape}."
            )
        names = [f"x{j}" for j in range(a.shape[1])] if feature_names is None else list(feature_names)
        return cls(data=a, samples=b, feature_names=names, name=name).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, bins: int = 25) -> Self:
        """Draw in the place of the axes given, or on a new figure.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        bins : int, default=25

        Returns
        -------
        SamplesDisplay
        """
        check_count(bins, "bins")
        n = self.data.shape[1]
        ax = start(self, ax, figsize=(2.6 * n + 0.6, 2.6 * n + 0.4))
        ax.set_axis_off()
        figure: Any = ax.figure
        place = ax.get_subplotspec()
        grid = None if place is None else place.subgridspec(n, n)
        self.axes_ = np.empty((n, n), dtype=object)
        # Both within the range of most of the data: what a sample has far out is counted by the labels.
        low, high = np.quantile(self.data, [0.002, 0.998], axis=0)
        space = 0.1 * np.where(high > low, high - low, 1.0)
        low, high = low - space, high + space
        n_shown = min(len(self.data), len(self.samples), MAX_POINTS // 2)
        sets = [("data", NORMAL, self.data), ("samples", ANOMALY, self.samples)]
        for i in range(n):
            for j in range(i + 1):
                if grid is None:  # axes that stand somewhere by themselves
                    cell = ax.inset_axes([j / n, (n - 1 - i) / n, 0.9 / n, 0.9 / n])
                else:
                    cell = figure.add_subplot(grid[i, j])
                self.axes_[i, j] = cell
                cell.set_xlim(low[j], high[j])
                for label, color, rows in sets:
                    if i == j:
                        cell.hist(
                            rows[:, j],
                            np.linspace(low[j], high[j], bins + 1),
                            density=True,
                            color=color,
                            histtype="step",
                            lw=1.4,
                            label=f"{label} ({len(rows)})",
                        )
                    else:
                        # As many of both, or the one would bury the other.
                        shown = rows[:n_shown]
                        cell.scatter(shown[:, j], shown[:, i], s=8, color=color, alpha=0.55, lw=0)
                        cell.set_ylim(low[i], high[i])
                cell.tick_params(labelsize="small")
                cell.locator_params(nbins=4)
                if i == j:
                    cell.set_yticks([])
                elif j > 0:
                    cell.set_yticklabels([])
                if i < n - 1:
                    cell.set_xticklabels([])
                if i == n - 1:
                    cell.set_xlabel(literal(self.feature_names[j]))
                if j == 0 and i > 0:
                    cell.set_ylabel(literal(self.feature_names[i]))
        handles, labels = self.axes_[0, 0].get_legend_handles_labels()
        # In the corner above the diagonal, which is empty if there are two columns; a title would run into the first.
        corner = ax if n > 1 else self.axes_[0, 0]
        corner.legend(handles, labels, title=self.name, loc="upper right", frameon=False)
        return self
