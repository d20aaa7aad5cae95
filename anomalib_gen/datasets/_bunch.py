"""The one shape in which every loader returns its data, and the one place where labels are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import Bunch


def make_bunch(
    X: NDArray[Any],
    is_anomaly: NDArray[np.bool_],
    *,
    name: str,
    description: str,
    feature_names: Sequence[str] | None = None,
    path: Path | None = None,
    as_frame: bool = False,
    return_X_y: bool = False,
    **extras: Any,
) -> Any:
    """Return a `Bunch` (or ``(data, target)``) with target +1 for inliers and -1 for anomalies.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        The rows; converted to float64.
    is_anomaly : bool array of shape (n_samples,)
        True for anomalies.
    name, description : str
        Stored as ``name`` and ``DESCR``.
    feature_names : sequence of str, optional
        Defaults to ``x0``, ``x1``, ...
    path : Path, optional
        The file behind the data, if there is one.
    as_frame : bool
        Return a DataFrame and a Series in place of arrays.
    return_X_y : bool
        Return the pair ``(data, target)`` alone.
    **extras : Any
        Further members of the `Bunch`.
    """
    data: Any = np.ascontiguousarray(X, dtype=np.float64)
    target: Any = np.where(is_anomaly, -1, 1)
    names = (
        [f"x{j}" for j in range(data.shape[1])] if feature_names is None else [str(f) for f in feature_names]
    )
    if as_frame:
        import pandas as pd

        data = pd.DataFrame(data, columns=names)
        target = pd.Series(target, name="target")
    if return_X_y:
        return data, target
    return Bunch(
        data=data, target=target, feature_names=names, name=name, DESCR=description, path=path, **extras
    )
