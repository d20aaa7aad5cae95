"""Real data that ships with scikit-learn, as anomaly detection tasks: no download, no network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from anomalib_gen.datasets._bunch import make_bunch
from anomalib_gen.datasets._manifest import read_card, resolve_name

# Loader and the classes that are normal by default, as scikit-learn names them.
_TASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "breast_cancer": (load_breast_cancer, ("benign",)),
    "digits": (load_digits, tuple("012345678")),
    "wine": (load_wine, ("class_0", "class_1")),
}


def load_builtin(
    name: str,
    *,
    normal: Any = None,
    as_frame: bool = False,
    return_X_y: bool = False,
) -> Any:
    """Load a classification set of scikit-learn with some classes as normal and all others as anomalies.

    Parameters
    ----------
    name : {"breast_cancer", "digits", "wine"}
        The data set, in any case.
    normal : int, str or sequence of these, optional
        The normal classes, by number or by scikit-learn's name. Default: ``"benign"`` for breast_cancer, the
        digits 0 to 8 for digits (9 is the anomaly), classes 0 and 1 for wine (2 is the anomaly).
    as_frame : bool, default=False
        Return ``data`` as a DataFrame and ``target`` as a Series.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead of a `Bunch`.

    Returns
    -------
    sklearn.utils.Bunch
        - data : float64 array of shape (n_samples, n_features), in scikit-learn's order
        - target : int array of shape (n_samples,), +1 inlier, -1 anomaly
        - feature_names : list of str
        - name : str
        - DESCR : str, the task, the card and scikit-learn's description
        - path : None

    Raises
    ------
    ValueError
        Unknown name, or ``normal`` names a class that does not exist, no class, or all of them.

    Examples
    --------
    >>> from anomalib_gen.datasets import load_builtin
    >>> task = load_builtin("digits", normal=[0, 1])
    >>> task.data.shape, int((task.target == 1).sum())
    ((1797, 64), 360)
    """
    name = resolve_name(name, _TASKS, listing="list_builtin()")
    loader, default = _TASKS[name]
    source = loader()
    classes = [str(label) for label in source.target_names]
    chosen = _class_numbers(default if normal is None else normal, classes)
    normal_names = ", ".join(classes[k] for k in chosen)
    return make_bunch(
        source.data,
        ~np.isin(source.target, chosen),
        name=name,
        description=f"{name}: normal classes {normal_names}; all others are anomalies.\n\n"
        f"{read_card('sklearn')}\n{source.DESCR}",
        feature_names=source.feature_names,
        as_frame=as_frame,
        return_X_y=return_X_y,
    )


def list_builtin() -> list[str]:
    """List the names that `load_builtin` knows.

    Returns
    -------
    list of str
        Sorted.
    """
    return sorted(_TASKS)


def _class_numbers(normal: Any, classes: list[str]) -> list[int]:
    wanted = [normal] if isinstance(normal, str) or not isinstance(normal, Iterable) else list(normal)
    chosen = set()
    for label in wanted:
        if isinstance(label, str) and label in classes:
            chosen.add(classes.index(label))
        elif (
            isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < len(classes)
        ):
            chosen.add(int(label))
        else:
            raise ValueError(
                f"normal contains {label!r}, which is no class of this data set; "
                f"choose from {classes} or their numbers 0 to {len(classes) - 1}."
            )
    if not 0 < len(chosen) < len(classes):
        raise ValueError(
            f"normal={normal!r} leaves no {'anomalies' if chosen else 'normal rows'}; "
            f"choose at least one and not all of {classes}."
        )
    return sorted(chosen)
