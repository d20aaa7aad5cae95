"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

INNER = frozenset({"anomalib_gen", "sklearn", "joblib", "contextlib", "torch"})
"""Packages whose lines a user can do nothing about."""


def warn_user(message: str) -> None:
    """Warn at the nearest line outside this library and those that call it.

    A `stacklevel` would have to count the calls in between, and they differ: a detector is fitted by its user, by a
    pipeline, by a search over parameters.

    Parameters
    ----------
    message : str
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
