"""The document of a model folder: what is in it, in which format, and the hash over all of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from anomalib_gen.persistence._allowed import is_ours
from anomalib_gen.persistence._errors import ModelFolderError

FORMAT = "anomalib_gen model folder"
VERSION = 4
LIBRARIES = ("anomalib-gen", "numpy", "scipy", "scikit-learn", "torch", "nflows", "safetensors", "skops")
KINDS = ("float", "integer", "boolean", "text", "time")
"""Types of columns."""
MAX_CATEGORIES = 50
"""Of a column; with more, it is text."""


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """All objects in a tree, with their classes and states."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get("is") in ("object", "module"):
                yield node
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _before_images(document: dict[str, Any]) -> dict[str, Any]:
    """From version 1, when all rows were columns of real numbers, and norms of the score had one weighting."""
    for node in _objects(document["model"]):
        state, (module, _, name) = node["state"], node["class"].partition(":")
        if module.startswith("anomalib_gen.detectors."):
            if name == "ComposedDetector":
                if "n_features_in_" in state:
                    state.setdefault("event_shape_", {"is": "tuple", "items": [state["n_features_in_"]]})
            elif "model_" in state:
                state.setdefault("_eight_bit", False)
        elif module.startswith("anomalib_gen.models.") and "features" in state:
            state.setdefault("cell", 0.0)
            if name in ("FlowModel", "VAEModel"):
                state.setdefault("event_shape", {"is": "tuple", "items": [state["features"]]})
        elif node["class"] == "anomalib_gen._scaling:Standardizer":
            state.setdefault("cell", 0.0)
        elif node["class"] == "anomalib_gen.anomaly.score_norm:ScoreNorm":
            state.setdefault("weighting", "score")
    return document


def _before_spacings(document: dict[str, Any]) -> dict[str, Any]:
    """From version 2, when models of stored images kept no spacings: these go on without (`models.memory`)."""
    return document


def _before_shares(document: dict[str, Any]) -> dict[str, Any]:
    """From version 3, when views, matching and relative matching of stored images had a third each."""
    for node in _objects(document["model"]):
        if node["class"] == "anomalib_gen.models.memory:ImageMemory":
            node["state"].setdefault("view_share", 1 / 3)
    return document


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _before_images,
    2: _before_spacings,
    3: _before_shares,
}
"""From each earlier version of the format a function that makes a document of the next one. The hash is checked first,
so an upgrade sees what was saved. Moved or renamed classes and attributes are an upgrade, too."""


def canonical(value: Any) -> bytes:
    """JSON of which there is one form only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def content_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 over a document, which has those of all files, in hexadecimal."""
    return hashlib.sha256(canonical({k: v for k, v in document.items() if k != "hash"})).hexdigest()


def read_document(data: bytes) -> dict[str, Any]:
    """Parse a document, check its hash, and bring it to the present format.

    Raises
    ------
    ModelFolderError
        If it is damaged, was changed, or is of a format that is not known here.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ModelFolderError("model.json is none of a model folder.")
        number = document.get("version")
        if type(number) is not int or number < 1:
            raise ModelFolderError("model.json does not say which version of the format it has.")
        if number > VERSION:
            raise ModelFolderError(
                f"The folder has version {number} of the format, and this anomalib_gen knows those up to {VERSION}. "
                "Install a newer anomalib_gen."
            )
        if document.get("hash") != content_hash(document) or canonical(document) != data:
            raise ModelFolderError(
                "model.json was changed after it was saved, or is damaged: its hash differs."
            )
        found = document["hash"]
        while number < VERSION:
            document = UPGRADES[number](document)
            number += 1
            document["version"] = number
        document["hash"] = found
    except ModelFolderError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ModelFolderError(
            f"model.json cannot be read ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    return document


def malformed_part(document: Mapping[str, Any]) -> str | None:
    """Which part of what a document says for people and programs, beside the model, is not as it is written here."""
    schema = document["schema"]
    columns, n_rows = schema.get("columns"), schema.get("n_rows", "")
    if (
        type(schema.get("named")) is not bool
        or not (n_rows is None or type(n_rows) is int)
        or not (columns is None or (type(columns) is list and all(map(_is_column, columns))))
        or "columns" not in schema
    ):
        return "schema"
    for part in document["training"]:
        kinds = {"path": str, "class": str, "parameters": dict}
        if type(part) is not dict or any(type(part.get(key)) is not kind for key, kind in kinds.items()):
            return "training"
    return None


def _is_column(column: Any) -> bool:
    if type(column) is not dict or type(column.get("name")) is not str:
        return False
    ends = [column[key] for key in ("min", "max") if key in column]
    return (
        column.get("type", "") in (*KINDS, None)
        and len(ends) != 1
        and all(type(end) is float or (type(end) is int and abs(end) <= 2**64) for end in ends)
        and column.get("missing") in (True, False, None)
        and type(column.get("categories", [])) is list
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def installed_versions() -> dict[str, str]:
    """Versions of what a model depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# What the model was fitted to -------------------------------------------------------------------------------


def describe_rows(model: Any, X: Any) -> dict[str, Any]:
    """Schema of the rows that a model takes, from what it knows, and from rows where there are some.

    Returns
    -------
    dict
        "named" (bool), "n_rows" (int or None), and "columns": a list with, for each column, its "name", "type"
        ("float", "integer", "boolean", "text", "time", or None where no rows were given), "min" and "max" of numbers,
        "missing" (bool) and "categories" of text; or None if nothing is known, or the rows are images.
    """
    shape = tuple(getattr(model, "event_shape_", ()))
    if len(shape) > 1:
        if X is not None and np.shape(X)[1:] != shape:
            raise ValueError(f"X has the shape {np.shape(X)}, and the model was fitted to rows of {shape}.")
        return {"named": False, "n_rows": None if X is None else len(X), "columns": None}
    if X is not None and _are_images(model, X):
        # (A folder is not read again to count them.)
        return {"named": False, "n_rows": None if isinstance(X, str | PathLike) else len(X), "columns": None}
    names = getattr(model, "feature_names_in_", None)
    count = getattr(model, "n_features_in_", None)
    if X is None:
        if count is None:
            return {"named": False, "n_rows": None, "columns": None}
        shown = [str(name) for name in names] if names is not None else [str(j) for j in range(int(count))]
        columns = [{"name": name, "type": None} for name in shown]
        return {"named": names is not None, "n_rows": None, "columns": columns}
    columns, n_rows, named = [], None, False
    for name, values, known in _columns(X):
        named, n_rows = known, len(values)
        columns.append({"name": name, **_describe(values)})
    if count is not None and len(columns) != count:
        raise ValueError(f"X has {len(columns)} columns, and the model was fitted to {count}.")
    if names is not None and [str(name) for name in names] != [column["name"] for column in columns]:
        raise ValueError("The columns of X are not those that the model was fitted to.")
    return {"named": named, "n_rows": n_rows, "columns": columns}


def _are_images(model: Any, X: Any) -> bool:
    """Whether rows are images as the front of a pipeline takes them: a folder, paths of files, or arrays."""
    if isinstance(X, str | PathLike):
        if not Path(X).is_dir():
            raise ValueError(f"X={str(X)!r} is no folder. Give what `fit` was given: a folder, or rows.")
        return True
    if hasattr(X, "iloc") or hasattr(X, "to_pandas"):
        return False
    if np.ndim(X) == 1:
        return len(X) > 0 and all(isinstance(path, str | PathLike) for path in X)
    shapes = [getattr(part, "event_shape_", ()) for _, part in _detectors(model, "", set())]
    return np.ndim(X) > 2 and any(len(shape) > 1 for shape in shapes)


def _columns(X: Any) -> Iterator[tuple[str, Any, bool]]:
    if hasattr(X, "to_pandas"):  # pyarrow, polars
        X = X.to_pandas()
    if hasattr(X, "iloc") and hasattr(X, "columns"):
        for j, name in enumerate(X.columns):
            column = X.iloc[:, j]
            if getattr(column.dtype, "kind", "O") in "iuf" and column.isna().any():
                # Nullable integers would come as objects.
                yield str(name), column.to_numpy(dtype=np.float64, na_value=np.nan), isinstance(name, str)
            else:
                yield str(name), column.to_numpy(), isinstance(name, str)
    else:
        array = np.asarray(X)
        if array.ndim != 2:
            raise ValueError(f"X must be a table, got an array of shape {array.shape}.")
        for j in range(array.shape[1]):
            yield str(j), array[:, j], False


def _describe(values: Any) -> dict[str, Any]:
    values = np.asarray(values)
    kind = values.dtype.kind
    if kind in "iufb":
        finite = values[np.isfinite(values)]
        found: dict[str, Any] = {
            "type": {"f": "float", "b": "boolean"}.get(kind, "integer"),
            "missing": bool(kind == "f" and np.isnan(values).any()),
        }
        if kind != "b" and len(finite):
            plain = float if kind == "f" else int
            found |= {"min": plain(finite.min()), "max": plain(finite.max())}
        return found
    if kind in "mM":
        return {"type": "time", "missing": bool(np.isnat(values).any())}
    missing = np.array(
        [value is None or type(value).__name__ == "NAType" or value != value for value in values], dtype=bool
    )
    if kind == "O" and not missing.all() and all(type(value) is bool for value in values[~missing]):
        return {"type": "boolean", "missing": bool(missing.any())}
    found = {"type": "text", "missing": bool(missing.any())}
    different = {str(value) for value in values[~missing]}
    if len(different) <= MAX_CATEGORIES:
        found["categories"] = sorted(different)
    return found


# How it was fitted ------------------------------------------------------------------------------------------


def describe_training(model: Any) -> list[dict[str, Any]]:
    """Summary of each detector within a model, for people: nothing is loaded from it."""
    return [_describe_detector(path, part) for path, part in _detectors(model, "", set())]


def _detectors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BaseEstimator):
        if is_ours(value) and hasattr(value, "score_samples"):
            yield path, value
        for name, part in vars(value).items():
            yield from _detectors(part, f"{path}.{name}".strip("."), seen)
    elif isinstance(value, list | tuple):
        for k, part in enumerate(value):
            yield from _detectors(part, f"{path}[{k}]", seen)


def _describe_detector(path: str, detector: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"path": path, "class": type(detector).__name__}
    found["parameters"] = {name: _shown(value) for name, value in detector.get_params(deep=False).items()}
    for name in ("offset_", "n_iter_", "best_iter_", "n_features_in_", "log_normalizer_"):
        value = getattr(detector, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            found[name.strip("_")] = float(value) if isinstance(value, float) else int(value)
    shape = tuple(getattr(detector, "event_shape_", ()))
    if len(shape) > 1:
        # n_features_in_ is the number of channels, which nobody would call columns.
        found.pop("n_features_in", None)
        found["image_shape"] = list(shape)
    for name, label in (("loss_curve_", "last_loss"), ("validation_curve_", "best_validation_loss")):
        curve = [value for value in getattr(detector, name, None) or [] if math.isfinite(value)]
        if curve:
            found[label] = float(min(curve) if name.startswith("validation") else curve[-1])
    if hasattr(detector, "_seeds"):
        found["seeds"] = [int(seed) for seed in detector._seeds]
    if hasattr(detector, "model_"):
        found["n_weights"] = sum(weight.numel() for weight in detector.model_.parameters())
    if hasattr(detector, "anomaly_"):
        found["anomaly"] = _shown(detector.anomaly_)
    return found


def _shown(value: Any) -> str:
    """Show a value, without its place in memory."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))[:200]
