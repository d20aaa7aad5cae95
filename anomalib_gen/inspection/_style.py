"""Colours and axes of all displays: told apart by colour-blind readers, legible on light and on dark backgrounds."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support

NORMAL, ANOMALY, THIRD = "#2B8CC4", "#E0641A", "#009E73"
"""Blue, vermilion and green after Okabe and Ito (2008), the first two between their shades for light and for dark."""


def start(display: Any, ax: Any, **figure: Any) -> Any:
    """Axes to draw on, new ones if None; the display remembers them and their figure."""
    check_matplotlib_support(f"{type(display).__name__}.plot")
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(layout="constrained", **figure)
    display.ax_, display.figure_ = ax, ax.figure
    return ax


def ink() -> str:
    """Colour of neutral lines: that of the text, whatever the background."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def literal(text: str) -> str:
    """Text as it stands: matplotlib would set what is between two dollar signs as mathematics."""
    return text.replace("$", r"\$")


def check_confidence(value: Any) -> float:
    """A share between 0 and 1."""
    if not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {value!r}.")
    return float(value)


def check_scores(scores: Any, name: str = "scores") -> npt.NDArray[np.float64]:
    """Finite numbers ``(n,)``."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must be one number a row, of one row at least, got shape {values.shape}.")
    odd = ~np.isfinite(values)
    if odd.any():
        raise ValueError(
            f"{name} must be finite, and {int(odd.sum())} of {len(values)} are not, the first at {int(odd.argmax())}."
        )
    return values
