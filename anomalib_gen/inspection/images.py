"""Display of heat maps over the images that they explain."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from anomalib_gen._runtime import check_count
from anomalib_gen.explain._columns import split_pipeline
from anomalib_gen.heatmaps import explain_images, resolve_kind
from anomalib_gen.inspection._style import ANOMALY, NORMAL, check_scores, ink, start

UNITS = {
    "residual": "squared residual, in standardised pixels",
    "score": "squared slope of log p, in standardised pixels",
    "likelihood": "surprise, in nats",
    "matching": "unmatched gradients, as a share of all",
}
OPACITY = 0.9
"""Of the overlay where a map is at the end of its scale: what is below can still be seen."""
DIMMED = (0.3, 0.6)
"""Grey levels between which images lie under their maps: the same heat looks alike on dark and on bright pixels."""
HIGHEST = 0.998
"""Quantile of the maps at the end of the scale, so that one pixel does not set it for all."""

WIDTH, HEIGHT = 1.2, 3.6
"""Inches: an image is as large as fits between them."""
TEXT_LINE, TEXT_WIDTH = 0.3, 1.1
"""Inches that a score takes above its pair."""
BAR, MIN_BAR = 0.13, 2.4
"""Inches: thickness of the colour bar, and the height of images from which its label fits beside them."""


class ImageHeatmapDisplay:
    """Images, each beside itself in faint grey under its heat map, all maps on one scale.

    Make it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    images : ndarray of shape (n_images, channels, height, width)
        Grey or of three colours, with values from 0 to 255 if they are uint8; others are stretched to the range of all.
    maps : ndarray of shape (n_images, height, width)
        Higher = more anomalous.
    scores : ndarray of shape (n_images,) or None, default=None
        Of the images, lower = more abnormal.
    masks : bool ndarray of shape (n_images, height, width) or None, default=None
        True where an anomaly is known to be; its outline is drawn.
    unit : str or None, default=None
        Of the maps.
    name : str or None, default=None
        Of the detector.

    Attributes
    ----------
    ax_ : matplotlib Axes
        All images are on it.
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        *,
        images: Any,
        maps: Any,
        scores: Any = None,
        masks: Any = None,
        unit: str | None = None,
        name: str | None = None,
    ) -> None:
        self.images = images
        self.maps = maps
        self.scores = scores
        self.masks = masks
        self.unit = unit
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        masks: Any = None,
        kind: str = "auto",
        smooth: int | str = "auto",
        subtract: Any = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Explain images by a fitted detector and draw.

        Parameters
        ----------
        estimator : fitted detector of images
            Of this package, or a pipeline that ends in one; images are shown as the detector sees them.
        X : array-like of shape (n_images, channels, height, width), or what the pipeline takes
            All of them are drawn, in their order.
        masks : array-like of shape (n_images, height, width), optional
            True where an anomaly is known to be.
        kind, smooth, subtract : see `anomalib_gen.heatmaps.explain_images`
            `subtract` is images of the same form as X.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        ImageHeatmapDisplay
        """
        front, detector = split_pipeline(estimator)
        images, reference = (
            rows if front is None or rows is None else front.transform(rows) for rows in (X, subtract)
        )
        return cls.from_predictions(
            images,
            explain_images(detector, images, kind=kind, smooth=smooth, subtract=reference),
            scores=estimator.score_samples(X),
            masks=masks,
            unit=UNITS[resolve_kind(detector.model_, kind)].replace(
                ",", "," if subtract is None else " above normal,"
            ),
            name=type(detector).__name__,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        images: Any,
        maps: Any,
        *,
        scores: Any = None,
        masks: Any = None,
        unit: str | None = None,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Draw maps at hand.

        Parameters
        ----------
        images : array-like of shape (n_images, channels, height, width)
            Of one channel or three.
        maps : array-like of shape (n_images, height, width)
            Higher = more anomalous.
        scores : array-like of shape (n_images,), optional
            Of the images, lower = more abnormal.
        masks : array-like of shape (n_images, height, width), optional
            True where an anomaly is known to be.
        unit : str, optional
            Of the maps.
        name : str, optional
            Of the detector.
        ax : matplotlib Axes, optional
        **kwargs : dict
            Passed to `plot`.

        Returns
        -------
        ImageHeatmapDisplay

        Raises
        ------
        ValueError
            If images, maps, masks and scores do not fit together, or a map is not finite.
        """
        X, heat = np.asarray(images), np.asarray(maps, dtype=np.float64)
        if X.ndim != 4 or X.shape[1] not in (1, 3) or not len(X):
            raise ValueError(
                f"images must have the shape (n, channels, height, width) with 1 or 3 channels, got {X.shape}."
            )
        flat = (len(X), *X.shape[2:])
        marked = None if masks is None else np.asarray(masks, dtype=bool)
        for label, given in (("maps", heat), ("masks", marked)):
            if given is not None and given.shape != flat:
                raise ValueError(f"{label} must have the shape {flat} of the images, got {given.shape}.")
        if not np.isfinite(heat).all():
            raise ValueError(f"maps must be finite, and {int((~np.isfinite(heat)).sum())} values are not.")
        values = None if scores is None else check_scores(scores)
        if values is not None and len(values) != len(X):
            raise ValueError(f"scores must be one for each of {len(X)} images, got {len(values)}.")
        return cls(images=X, maps=heat, scores=values, masks=marked, unit=unit, name=name).plot(
            ax=ax, **kwargs
        )

    def plot(self, ax: Any = None, *, n_columns: int = 4) -> Self:
        """Draw on the axes given, or on new ones.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        n_columns : int, default=4
            Pairs of images in a row.

        Returns
        -------
        ImageHeatmapDisplay
        """
        n, height, width = self.maps.shape
        across = min(check_count(n_columns, "n_columns"), n)
        down = math.ceil(n / across)
        # Inches a pixel; then in pixels a pair, the space between pairs, and the line of text above each.
        unit = min(WIDTH / width, HEIGHT / height)
        gap = 0.25 * width
        if self.scores is not None:
            gap = max(gap, TEXT_WIDTH / unit - 2 * width)
        text = (TEXT_LINE if self.scores is not None else 0.5 * TEXT_LINE) / unit
        step_x, step_y = 2 * width + gap, height + text
        wide, tall, given = across * step_x * unit, down * step_y * unit, ax is not None
        bar_x, bar_y = (1.1, 0.0) if tall >= MIN_BAR else (0.1, 1.0)
        legend = 0.0 if self.masks is None else TEXT_LINE
        ax = start(self, ax, figsize=(max(wide, 2 * WIDTH) + bar_x, tall + 0.5 + bar_y + legend))
        if given:
            wide, tall = ax.get_window_extent().size / ax.figure.dpi
        import matplotlib as mpl

        edge: dict[str, Any] = {"fill": False, "lw": 0.6, "ec": ink()}
        low, high = 0.0, float(np.quantile(self.maps, HIGHEST))
        if high <= low:
            # Few pixels are hot, or none is: then the scale is that of how cold they are.
            high = max(float(self.maps.max()), low) or float(np.abs(self.maps).max()) or 1.0
        norm = mpl.colors.Normalize(low, high, clip=True)
        fade = mpl.colors.LinearSegmentedColormap.from_list(
            "heat", [mpl.colors.to_rgba(ANOMALY, alpha) for alpha in (0, OPACITY)]
        )
        for k, (image, heat) in enumerate(zip(_pictures(self.images), self.maps, strict=True)):
            x, y = (k % across) * step_x, (k // across) * step_y
            faint = DIMMED[0] + (DIMMED[1] - DIMMED[0]) * image.mean(-1, keepdims=True).repeat(3, -1)
            for left, shown in ((x, image), (x + width, faint)):
                extent = (left, left + width, y + height, y)
                ax.imshow(shown, extent=extent, interpolation="nearest")
                if left > x:
                    ax.imshow(heat, cmap=fade, norm=norm, extent=extent, interpolation="nearest")
                ax.add_patch(mpl.patches.Rectangle((left, y), width, height, **edge))
            if self.masks is not None and self.masks[k].any() and not self.masks[k].all():
                # Along the pixels' edges, where a contour of the mask itself would cut corners.
                fine = np.kron(np.pad(self.masks[k], 1), np.ones((8, 8)))
                u = x + width + (np.arange(fine.shape[1]) + 0.5) / 8 - 1
                v = y + (np.arange(fine.shape[0]) + 0.5) / 8 - 1
                ax.contour(u, v, fine, [0.5], colors=[NORMAL], linewidths=1.2)
            if self.scores is not None:
                ax.text(
                    x,
                    y - 0.15 * TEXT_LINE / unit,
                    f"score {self.scores[k]:.4g}",
                    fontsize="small",
                    va="bottom",
                )
        ax.set(xlim=(-0.02 * width, across * step_x - gap + 0.02 * width), aspect="equal")
        ax.set_ylim(down * step_y - text + 0.02 * height, -text)
        ax.set_axis_off()
        ax.set_title(self.name)
        beside = tall >= MIN_BAR  # else the bar lies below
        length = 0.9 * (tall if beside else wide)
        bar = ax.figure.colorbar(
            mpl.cm.ScalarMappable(norm, fade),
            ax=ax,
            label="anomaly" if self.unit is None else self.unit.replace(", ", "\n"),
            extend="max",
            extendfrac=min(0.05, BAR / length),
            location="right" if beside else "bottom",
            shrink=0.9,
            aspect=length / BAR,
            pad=0.02,
        )
        bar.ax.set_facecolor(str(np.mean(DIMMED)))
        if self.masks is not None:
            ax.plot([], [], color=NORMAL, lw=1.2, label="known anomaly")
            ax.legend(loc="upper left", bbox_to_anchor=(0, 0), frameon=False, borderaxespad=0.2)
        return self


def _pictures(images: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Images ``(n, height, width, 3)`` from 0 to 1."""
    if images.dtype == np.uint8:
        shown = images / 255.0
    else:
        low, high = float(images.min()), float(images.max())
        shown = (images - low) / (high - low if high > low else 1.0)
    return np.repeat(shown, 4 - shown.shape[1], axis=1).transpose(0, 2, 3, 1)[..., :3].clip(0, 1)
