"""Scikit-learn transformers as bytes, by skops.

skops writes attributes, arrays and types, and refuses types that are not on its list. Three things are added: compiled
state that is followed without bounds checks (trees, nearest-neighbour searches, support vectors) is not read, sizes
are checked before anything is allocated, and the same estimator always gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import nn

from anomalib_gen.persistence._errors import ModelFolderError
from anomalib_gen.persistence._requests import without_circles

MAX_SCHEMA_BYTES = 2**24
PACKAGES = frozenset(
    {
        "_loss",
        "base",
        "cluster",
        "compose",
        "covariance",
        "cross_decomposition",
        "decomposition",
        "discriminant_analysis",
        "feature_extraction",
        "feature_selection",
        "frozen",
        "impute",
        "kernel_approximation",
        "linear_model",
        "pipeline",
        "preprocessing",
        "random_projection",
        "utils",
    }
)
"""Parts of scikit-learn whose objects hold numbers and arrays."""
PLAIN = frozenset(
    {
        "numpy.dtype",
        "sklearn.compose._column_transformer._RemainderColsList",
        "sklearn.utils._bunch.Bunch",
        "sklearn.utils._metadata_requests.MetadataRequest",
        "sklearn.utils._metadata_requests.MethodMetadataRequest",
    }
)
"""Types of no danger that skops leaves to its users."""
SCHEMA = "schema.json"


def _skops() -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise ModelFolderError(
            "Scikit-learn transformers are saved by skops, which is not installed. Install it with: "
            "pip install 'anomalib-gen[scoring]'"
        ) from error
    return skops.io


def dump_estimator(estimator: Any, trusted: Collection[str]) -> bytes:
    """Bytes of an estimator, the same whenever it is the same.

    Raises
    ------
    ModelFolderError
        If it holds something that `load_estimator` would refuse.
    """
    skops = _skops()
    try:
        data = _canonical(skops.dumps(without_circles(estimator)))
    except Exception as error:
        networks = [
            name for name, value in getattr(estimator, "__dict__", {}).items() if isinstance(value, nn.Module)
        ]
        if networks:
            raise ModelFolderError(
                f"its {networks[0]} is a network of yours, and model folders hold none. Save the detector behind it "
                "alone, and build the rest around it again."
            ) from error
        raise ModelFolderError(f"it cannot be saved without pickle ({error}).") from error
    try:
        _check(data, trusted)
    except ModelFolderError:
        raise
    except Exception as error:
        raise ModelFolderError(f"it cannot be saved without pickle ({error}).") from error
    return data


def load_estimator(data: bytes, trusted: Collection[str]) -> Any:
    """Estimator of bytes.

    Raises
    ------
    ModelFolderError
        If the bytes are damaged, or name types that are not trusted.
    """
    skops = _skops()
    try:
        allowed = _check(data, trusted)
        with warnings.catch_warnings():
            # The folder's versions are compared once, for all parts.
            from sklearn.exceptions import InconsistentVersionWarning

            warnings.simplefilter("ignore", InconsistentVersionWarning)
            return skops.loads(data, trusted=allowed)
    except ModelFolderError:
        raise
    except Exception as error:
        raise ModelFolderError(
            f"A transformer's file cannot be read ({type(error).__name__}: {error})."
        ) from error


def _check(data: bytes, trusted: Collection[str]) -> list[str]:
    """Refuse bytes that are not to be read; return the untrusted types of skops that the user trusts."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        # Stored, each by itself, so that nothing is larger than it looks.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > len(data)
        ):
            raise ModelFolderError("A transformer's file is compressed, which none is that was saved here.")
        for entry in entries:
            if entry.filename == SCHEMA:
                if entry.file_size > MAX_SCHEMA_BYTES:
                    raise ModelFolderError("A transformer's file has too large a description.")
            elif entry.filename.endswith(".npy"):
                _check_array(archive.read(entry))
            else:
                raise ModelFolderError(
                    f"A transformer's file has the part {entry.filename[:40]!r}; only plain arrays can be read, "
                    "no sparse ones."
                )
        schema = json.loads(archive.read(SCHEMA))
    # Whoever refers to objects by number can make a short chain that takes for ever to follow.
    if any("__id__" in node or node.get("__loader__") == "CachedNode" for node in _nodes(schema)):
        raise ModelFolderError(
            "A transformer's file refers to objects by number, which none does that was saved here."
        )
    compiled = {
        name
        for node in _nodes(schema)
        if (name := f"{node.get('__module__')}.{node.get('__class__')}").startswith("sklearn.")
        and name.split(".")[1] not in PACKAGES
    }
    named = {path.replace(":", ".") for path in trusted}
    untrusted = set(_skops().get_untrusted_types(data=data))
    if unknown := sorted((compiled | untrusted) - PLAIN - named):
        raise ModelFolderError(
            f"it has objects of {', '.join(unknown)}, which are not trusted. If you do trust them, save and load with "
            f"trusted={unknown!r}."
        )
    return sorted(untrusted)


def _check_array(data: bytes) -> None:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ModelFolderError("A transformer's file has an array in an unknown format.")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ModelFolderError("A transformer's file has an array of another size than it says.")


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON document, in order."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            stack.extend(reversed(list(node.values())))
        elif isinstance(node, list):
            stack.extend(reversed(node))


def _canonical(data: bytes) -> bytes:
    """Leave out the objects' places in memory, by which skops numbers them, and the time of day.

    skops describes a shared object in full wherever it occurs, so nothing but the sharing is lost.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        schema = json.loads(archive.read(SCHEMA))
        parts: dict[str, bytes] = {}
        for node in _nodes(schema):
            node.pop("__id__", None)
            if "file" in node and "__loader__" in node:
                old, node["file"] = node["file"], f"{len(parts)}.{node['file'].rpartition('.')[2]}"
                parts[node["file"]] = archive.read(old)
    parts[SCHEMA] = json.dumps(schema, sort_keys=True).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, part in sorted(parts.items()):
            archive.writestr(zipfile.ZipInfo(name), part)
    return out.getvalue()
