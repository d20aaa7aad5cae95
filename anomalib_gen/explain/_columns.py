"""From the columns that a detector sees back to those that a user knows, through scalers, imputers and encoders.

Contributions are additive, so those of the columns made from one input column (the flags of a one-hot encoding) add up
to that column's. Which column a column was made from is asked of the transformers where they say it exactly, and else
read from `get_feature_names_out`, whose names start with the input column's by scikit-learn's convention. A column made
from several (a principal component) belongs to none of them and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import OneToOneFeatureMixin
from sklearn.compose import ColumnTransformer
from sklearn.frozen import FrozenEstimator
from sklearn.impute import MissingIndicator
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import KBinsDiscretizer, OneHotEncoder, OrdinalEncoder
from sklearn.utils import _safe_indexing

from anomalib_gen._inputs import column_names
from anomalib_gen.calibration._wrapped import innermost


def split_pipeline(detector: Any) -> tuple[Any, Any]:
    """Transformer in front of a fitted detector, or None, and the detector itself.

    Meta-estimators of `calibration` are opened where they hold a single detector.
    """
    while True:
        if isinstance(detector, FrozenEstimator):
            # (First: it passes on what it is asked for, and looks like what is inside.)
            detector = detector.estimator
        elif isinstance(detector, Pipeline):
            front, last = detector[:-1], detector.steps[-1][1]
            if not len(front):
                detector = last
                continue
            inner_front, inner = split_pipeline(last)
            return (front if inner_front is None else Pipeline([("a", front), ("b", inner_front)])), inner
        elif hasattr(detector, "estimator_") and hasattr(detector, "score_direction"):
            detector = detector.estimator_
        elif innermost(detector) is not detector and not hasattr(detector, "steps"):
            detector = (
                detector.best_estimator_ if hasattr(detector, "best_estimator_") else detector.estimator
            )
        else:
            return None, detector


def names_of(X: Any, detector: Any) -> list[str]:
    """Names of the columns of X: its own, those the detector was fitted with, else x0, x1, ..."""
    names = column_names(X)
    if names is not None:
        return [str(name) for name in names]
    known = getattr(detector, "feature_names_in_", None)
    return [f"x{j}" for j in range(np.shape(X)[1])] if known is None else [str(name) for name in known]


def sources(transformer: Any, columns: Sequence[int], names: Sequence[str]) -> list[int]:
    """Input column that each output column of a fitted transformer was made from.

    Parameters
    ----------
    transformer : fitted transformer or "passthrough"
    columns : sequence of int
        What the transformer's input columns stand for.
    names : sequence of str
        Names of its input columns.

    Raises
    ------
    ValueError
        If a column was made from several.
    """
    if transformer is None or transformer == "passthrough" or isinstance(transformer, OneToOneFeatureMixin):
        return list(columns)
    if isinstance(transformer, Pipeline):
        for _, step in transformer.steps:
            inner_names = list(names)
            made = sources(step, range(len(inner_names)), inner_names)
            columns = [columns[j] for j in made]
            names = _names_out(step, inner_names, len(made))
        return list(columns)
    if isinstance(transformer, ColumnTransformer):
        return _sources_of_columns(transformer, columns, names)
    if isinstance(transformer, OneHotEncoder):
        return [columns[j] for j in _encoded_columns(transformer)]
    if isinstance(transformer, MissingIndicator) or hasattr(transformer, "indicator_"):
        return [columns[j] for part in _imputed_columns(transformer) for j in part]
    return [columns[_by_name(name, names, transformer)] for name in _names_out(transformer, names, None)]


def _encoded_columns(encoder: OneHotEncoder) -> list[int]:
    """Position of the input column of each flag, asked of a copy that names flags by nothing else."""
    own = copy.copy(encoder)
    own.feature_name_combiner = lambda name, category: name
    own.__dict__.pop("feature_names_in_", None)
    return [int(name) for name in own.get_feature_names_out([str(j) for j in range(own.n_features_in_)])]


def _imputed_columns(imputer: Any) -> tuple[list[int], list[int]]:
    """Positions of the input columns that an imputer fills, and then of those whose missing values it marks."""
    own = copy.copy(imputer)
    own.__dict__.pop("feature_names_in_", None)
    made = own.get_feature_names_out([str(j) for j in range(own.n_features_in_)])
    filled = [int(name) for name in made if name.isdecimal()]
    return filled, [int(name.rpartition("_")[2]) for name in made[len(filled) :]]


def _sources_of_columns(
    transformer: ColumnTransformer, columns: Sequence[int], names: Sequence[str]
) -> list[int]:
    found: dict[int, int] = {}
    for name, part, chosen in transformer.transformers_:
        place = transformer.output_indices_[name]
        if part == "drop" or place.stop == place.start:
            continue
        positions = _positions(chosen, names)
        made = sources(part, [columns[j] for j in positions], [names[j] for j in positions])
        if len(made) != place.stop - place.start:
            raise ValueError(
                f"Transformer {name!r} makes {place.stop - place.start} columns, {len(made)} are known."
            )
        found.update(dict(zip(range(place.start, place.stop), made, strict=True)))
    return [found[j] for j in range(len(found))]


def _positions(chosen: Any, names: Sequence[str]) -> list[int]:
    """Columns of a ColumnTransformer's part, by position."""
    if isinstance(chosen, slice):
        if isinstance(chosen.start, str) or isinstance(chosen.stop, str):
            start = 0 if chosen.start is None else list(names).index(chosen.start)
            stop = len(names) if chosen.stop is None else list(names).index(chosen.stop) + 1
            return list(range(start, stop))
        return list(range(len(names)))[chosen]
    values = [chosen] if isinstance(chosen, str | int) else list(chosen)
    if values and all(isinstance(value, bool | np.bool_) for value in values):
        return [int(j) for j in np.flatnonzero(values)]
    return [list(names).index(str(v)) if isinstance(v, str) else int(v) % len(names) for v in values]


def _names_out(transformer: Any, names: Sequence[str], n: int | None) -> list[str]:
    if transformer == "passthrough":
        return list(names)
    try:
        known = getattr(transformer, "feature_names_in_", names)
        return [str(name) for name in transformer.get_feature_names_out(known)]
    except (AttributeError, ValueError) as error:
        if n is not None and n == len(names):
            return list(names)
        raise ValueError(
            f"{type(transformer).__name__} does not say which columns it makes from which (no "
            "get_feature_names_out). Explain the detector behind it on transformed rows instead."
        ) from error


def _by_name(made: str, names: Sequence[str], transformer: Any) -> int:
    """Input column whose name an output column's name starts with, the longest if there are several."""
    matching = [j for j, name in enumerate(names) if made == name or made.startswith(f"{name}_")]
    if not matching:
        raise ValueError(
            f"Column {made!r} of {type(transformer).__name__} was not made from one input column, so contributions "
            "have none to go to. Explain the detector behind it on transformed rows instead."
        )
    return max(matching, key=lambda j: len(names[j]))


def gather(
    contributions: npt.NDArray[np.float64], made_from: Sequence[int], n: int
) -> npt.NDArray[np.float64]:
    """Sums of contributions ``(rows, columns)`` over the columns made from each of `n` input columns."""
    summed = np.zeros((len(contributions), n))
    for j, source in enumerate(made_from):
        summed[:, source] += contributions[:, j]
    return summed


def invert(transformer: Any, Z: npt.NDArray[Any], X: Any) -> Any:
    """Rows before a transformer from rows after it; a frame if X is one.

    A `ColumnTransformer` has no inverse of its own: its parts are inverted one by one, and columns that it drops are
    taken from X. Nor has an imputer: what it has filled stays so.

    Raises
    ------
    ValueError
        If a part has no inverse.
    """
    if transformer is None or transformer == "passthrough":
        return Z
    if isinstance(transformer, Pipeline):
        inputs = [X]
        for _, step in transformer.steps[:-1]:
            inputs.append(inputs[-1] if step == "passthrough" else step.transform(inputs[-1]))
        for (_, step), before in zip(reversed(transformer.steps), reversed(inputs), strict=True):
            Z = invert(step, Z, before)
        return Z
    if isinstance(transformer, ColumnTransformer):
        names = names_of(X, transformer)
        frame = hasattr(X, "iloc")
        result: Any = X.copy() if frame else np.array(X)
        for name, part, chosen in transformer.transformers_:
            place = transformer.output_indices_[name]
            if part == "drop" or place.stop == place.start:
                continue
            positions = _positions(chosen, names)
            values = np.asarray(invert(part, np.asarray(Z)[:, place], _safe_indexing(X, positions, axis=1)))
            for k, j in enumerate(positions):
                if frame:
                    result.isetitem(j, values[:, k] if values.dtype != object else list(values[:, k]))
                else:
                    result[:, j] = values[:, k]
        return result
    if hasattr(transformer, "indicator_"):
        # An imputer: in a normal row nothing is missing. Columns without a value, which it drops, are those of X.
        filled, _ = _imputed_columns(transformer)
        Z = np.asarray(Z)[:, : len(filled)]
        if len(filled) < transformer.n_features_in_:
            given = np.asarray(X)
            given = given.astype(np.result_type(given, Z))
            given[:, filled] = Z
            Z = given
        return Z
    if isinstance(transformer, OneHotEncoder):
        return _with_own_rare(transformer, transformer.inverse_transform(_nearest_flags(transformer, Z)), X)
    if isinstance(transformer, OrdinalEncoder):
        codes = np.clip(np.rint(Z), 0, np.array(_count_codes(transformer)) - 1)
        return _with_own_rare(transformer, transformer.inverse_transform(codes), X)
    if isinstance(transformer, KBinsDiscretizer) and transformer.encode == "ordinal":
        return transformer.inverse_transform(np.clip(np.rint(Z), 0, transformer.n_bins_ - 1))
    if not hasattr(transformer, "inverse_transform"):
        raise ValueError(
            f"{type(transformer).__name__} has no inverse_transform, so rows cannot be returned to the columns before "
            "it. Ask the detector behind it on transformed rows instead."
        )
    return transformer.inverse_transform(Z)


def _nearest_flags(encoder: OneHotEncoder, Z: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The flags of categories nearest to rows that a model has made, whose flags are no zeros and ones."""
    made_from, rows = np.array(_encoded_columns(encoder), dtype=np.int64), np.arange(len(Z))
    flags = np.zeros(np.shape(Z))
    for j in range(encoder.n_features_in_):
        places = np.flatnonzero(made_from == j)
        if not len(places):
            continue
        best = places[Z[:, places].argmax(axis=1)]
        # All zeros stand for a category that has no flag.
        dropped = encoder.drop_idx_ is not None and encoder.drop_idx_[j] is not None
        flags[rows, best] = (Z[rows, best] > 0.5) if dropped else 1.0
    return flags


def _count_codes(encoder: OrdinalEncoder) -> list[int]:
    """How many codes of values each column has: rare ones share one, and what marks a missing value is none."""
    import pandas as pd

    rare = getattr(encoder, "infrequent_categories_", None) or [None] * encoder.n_features_in_
    return [
        int((~pd.isna(known)).sum()) - (0 if few is None else len(few) - 1)
        for known, few in zip(encoder.categories_, rare, strict=True)
    ]


def _with_own_rare(encoder: Any, categories: npt.NDArray[Any], X: Any) -> npt.NDArray[Any]:
    """Categories, with those of X in the place of what stands for any rare one; the first of these if X has another."""
    for j, rare in enumerate(getattr(encoder, "infrequent_categories_", None) or []):
        if rare is None:
            continue
        own = np.asarray(_safe_indexing(X, j, axis=1), dtype=object)
        at = np.flatnonzero(categories[:, j] == "infrequent_sklearn")
        known = set(rare)
        categories[at, j] = [value if value in known else rare[0] for value in own[at]]
    return categories
