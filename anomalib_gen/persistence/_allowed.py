"""Which classes and functions a model folder may name.

A folder names classes by import path, and whoever can write to a folder chooses the names. So a path is looked up only
in modules listed here, must lead to a class or function that is defined in the very module it names, and an object is
made without calling its `__init__` or any other method of its class. What comes from elsewhere has to be named, path
by path, by whoever loads.
"""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Collection
from typing import Any

from sklearn.base import BaseEstimator
from torch import nn

from anomalib_gen.persistence._errors import ModelFolderError

PACKAGE = "anomalib_gen"
PARTS = frozenset(
    {
        "_scaling",
        "anomaly",
        "calibration",
        "detectors",
        "explain",
        "images",
        "models",
        "networks",
        "objectives",
        "paths",
        "samplers",
    }
)
"""Modules of this package that define what a detector is made of."""
LAYERS = re.compile(r"torch\.nn\.(modules\.\w+|functional)|nflows(\.\w+)+")
"""Modules of other packages that networks are made of."""
CONTAINERS = frozenset(
    {
        "sklearn.compose._column_transformer:ColumnTransformer",
        "sklearn.frozen._frozen:FrozenEstimator",
        "sklearn.pipeline:FeatureUnion",
        "sklearn.pipeline:Pipeline",
    }
)
"""Estimators that may have a detector inside."""
HELPERS = frozenset({"nflows.transforms.linear:LinearCache"})
"""Classes of objects that those networks keep and that are no networks."""
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def path_of(value: Any) -> str:
    """Import path of a class or function, as ``package.module:name``."""
    return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"


def normalise_trusted(trusted: Collection[str]) -> frozenset[str]:
    """Check a user's list of paths; ``package.module.name`` is accepted for ``package.module:name``."""
    if isinstance(trusted, str) or not all(isinstance(path, str) for path in trusted):
        raise TypeError(f"trusted must be a list of import paths, got {trusted!r}.")
    return frozenset(path if ":" in path else ":".join(path.rsplit(".", 1)) for path in trusted)


def is_ours(value: Any) -> bool:
    """Whether an object's class is one of this package that a folder may hold."""
    return _in_package(type(value).__module__)


def is_class_allowed(cls: type[Any], trusted: Collection[str]) -> bool:
    """Whether objects of a class may be in a folder."""
    path = path_of(cls)
    if path in trusted or path in CONTAINERS or path in HELPERS or _in_package(cls.__module__):
        return True
    return issubclass(cls, nn.Module) and LAYERS.fullmatch(cls.__module__) is not None


def is_callable_allowed(value: Any, trusted: Collection[str]) -> bool:
    """Whether a function, or a class as a factory, may be in a folder by its path."""
    module = getattr(value, "__module__", None) or ""
    if path_of(value) in trusted:
        return True
    if isinstance(value, type) and not issubclass(value, nn.Module | BaseEstimator):
        return False
    return _in_package(module) or LAYERS.fullmatch(module) is not None


def find(path: Any, trusted: Collection[str]) -> Any:
    """Return the class or function that a path names.

    Raises
    ------
    ModelFolderError
        If the path is not one that a folder may name, or leads nowhere.
    """
    if not isinstance(path, str) or not PATH.fullmatch(path):
        raise ModelFolderError(f"The folder names {str(path)[:80]!r}, which is no import path.")
    module, _, name = path.partition(":")
    known = _in_package(module) or LAYERS.fullmatch(module) or path in CONTAINERS
    if not known and path not in trusted:
        raise ModelFolderError(
            f"The folder names {path}, which is neither of {PACKAGE} nor of the libraries that it builds networks "
            f"from. If you trust it, load with trusted=[{path!r}]."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelFolderError(
            f"The folder needs {path}, which is not installed here ({error}). Install the versions that the "
            "folder's model.json lists."
        ) from error
    # What a module imported from elsewhere is not its own.
    if not isinstance(found, type | types.FunctionType) or path_of(found) != path:
        raise ModelFolderError(f"The folder names {path}, which is no class or function of that module.")
    return found


def _in_package(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == PACKAGE and rest.split(".")[0] in PARTS
