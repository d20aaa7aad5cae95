r"""Objects as a tree of plain JSON, and back.

None, booleans, integers, strings, finite floats and lists stand for themselves. Everything else is a JSON object whose
"is" says what:

    tuple, set, frozenset, dict, range, slice, partial      containers, by their items
    float                                                   nan, inf and -inf
    number, array, tensor, parameter, dtype, device         numpy's and torch's; the values are in the tensors file
    random                                                  states of numpy's generators
    requests                                                what metadata an estimator asks for
    object, module                                          an instance: its class and its attributes
    callable                                                a class or function, by import path
    estimator                                               a scikit-learn estimator, in a file of its own
    same                                                    an object that the tree has described before

The attributes of an instance are all that is known of it: no `__init__` runs when it is made, so nothing depends on
parameters that were changed after fitting, on the shapes of buffers, or on parts that training added to a network.
Objects, arrays and tensors that are shared stay shared.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.metadata_routing import MetadataRequest
from torch import nn

from anomalib_gen.persistence._allowed import (
    CONTAINERS,
    find,
    is_callable_allowed,
    is_class_allowed,
    is_ours,
    path_of,
)
from anomalib_gen.persistence._errors import ModelFolderError
from anomalib_gen.persistence._requests import (
    ATTRIBUTE,
    name_owner,
    requests_from_plain,
    requests_to_plain,
)

MAX_DEPTH = 100
"""Objects within objects; the deepest of our own models has about twenty."""
MAX_TEXT_BYTES = 2**26
"""Of an array of strings."""
NUMERIC = re.compile(
    r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(8|16)|<[mM]8(\[\d*(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
TEXT = re.compile(r"\|O|<U\d{1,7}|\|S\d{1,7}")
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
# What torch itself keeps on a module; which names there are depends on its version.
_TORCH_OWN = frozenset(vars(nn.Module()))
_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


def _is_name(name: str) -> bool:
    """Whether an attribute may be called so. (Modules in a sequence are called 0, 1, ...)"""
    return name.replace("_", "a").isalnum() and not name.startswith("__")


def contains_ours(value: Any, _seen: set[int] | None = None) -> bool:
    """Whether a detector of this package is somewhere within an estimator."""
    seen = set() if _seen is None else _seen
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, BaseEstimator):
        return is_ours(value) or any(contains_ours(part, seen) for part in vars(value).values())
    if isinstance(value, dict):
        return any(contains_ours(part, seen) for part in value.values())
    return isinstance(value, list | tuple) and any(contains_ours(part, seen) for part in value)


class Encoder:
    """Turn objects into trees.

    Parameters
    ----------
    trusted : collection of str
        Import paths that are allowed beside those of `_allowed`.
    dump_estimator : callable
        Turns a scikit-learn estimator into bytes.

    Attributes
    ----------
    arrays : dict of str to ndarray
        Values of arrays and tensors, by the names that the tree gives them.
    estimators : list of bytes
    """

    def __init__(self, trusted: Collection[str], dump_estimator: Callable[[Any], bytes]) -> None:
        self.trusted, self._dump_estimator = trusted, dump_estimator
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.estimators: list[bytes] = []
        # By id; the objects are kept, so that no id is used twice.
        self._known: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._numbers = 0

    def encode(self, value: Any, where: str) -> Any:
        """Tree of a value; `where` is its place, for messages.

        Raises
        ------
        ModelFolderError
            If there is something that a folder cannot or must not hold.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"is": "float", "value": repr(value)}
        if type(value) is list:
            return self._items(value, where)
        if id(value) in self._known:
            return self._known[id(value)][1]
        if type(value) in (tuple, set, frozenset):
            items = (
                value
                if type(value) is tuple
                else sorted(value, key=lambda item: (type(item).__name__, repr(item)))
            )
            return {"is": type(value).__name__, "items": self._items(items, where)}
        if type(value) is dict:
            pairs = [
                [self.encode(key, where), self.encode(item, f"{where}[{key!r}]")]
                for key, item in value.items()
            ]
            return {"is": "dict", "items": pairs}
        if isinstance(value, range | slice):
            parts = [self.encode(part, where) for part in (value.start, value.stop, value.step)]
            return {"is": type(value).__name__, "items": parts}
        if isinstance(value, np.generic):
            return {"is": "number", "of": self._array(np.asarray(value), where)}
        if isinstance(value, np.ndarray):
            return self._remember(value, self._array(value, where))
        if isinstance(value, torch.Tensor):
            return self._remember(value, self._tensor(value, where))
        if isinstance(value, np.dtype):
            return {"is": "dtype", "of": "numpy", "name": self._dtype(value, where)}
        if isinstance(value, torch.dtype):
            return {"is": "dtype", "of": "torch", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"is": "device", "name": str(value)}
        if isinstance(value, np.random.RandomState | np.random.Generator):
            return self._random(value, where)
        if isinstance(value, MetadataRequest):
            return {"is": "requests", "of": requests_to_plain(value, where)}
        if isinstance(value, functools.partial):
            parts = [value.func, list(value.args), dict(value.keywords)]
            return {"is": "partial", "items": self._items(parts, where)}
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            return self._callable(value, where)
        if isinstance(value, BaseEstimator) and path_of(type(value)) not in self.trusted:
            inside = path_of(type(value)) in CONTAINERS and contains_ours(value)
            if not inside and not is_ours(value):
                if contains_ours(value):
                    raise ModelFolderError(
                        f"{where} is a {type(value).__name__} with a detector inside, which a folder cannot hold. "
                        "Pipelines, column transformers, feature unions and frozen estimators may have one; of a "
                        "search, save best_estimator_."
                    )
                return self._estimator(value, where)
        return self._instance(value, where)

    def _items(self, values: Any, where: str) -> list[Any]:
        return [self.encode(value, f"{where}[{k}]") for k, value in enumerate(values)]

    def _remember(self, value: Any, node: dict[str, Any]) -> dict[str, Any]:
        self._known[id(value)] = (value, node)
        return node

    def _instance(self, value: Any, where: str) -> dict[str, Any]:
        cls = type(value)
        if not is_class_allowed(cls, self.trusted):
            raise ModelFolderError(
                f"{where} is a {path_of(cls)}, and a model folder does not hold objects of that class. Use what "
                f"anomalib_gen provides, or, for a class of your own at the top of an importable module, save and "
                f"load with trusted=[{path_of(cls)!r}]."
            )
        find(path_of(cls), self.trusted)
        self._numbers += 1
        number = self._numbers
        self._known[id(value)] = (value, {"is": "same", "id": number})
        node: dict[str, Any] = {"is": "object", "id": number, "class": path_of(cls)}
        try:
            state = dict(vars(value))
        except TypeError:
            raise ModelFolderError(f"{where} is a {path_of(cls)}, whose attributes cannot be read.") from None
        if isinstance(value, nn.Module):
            if any(getattr(value, hooks, None) for hooks in _HOOKS):
                raise ModelFolderError(
                    f"{where} has hooks, and a model folder holds no code. Remove them first."
                )
            node |= {"is": "module", "training": value.training}
            for kind in ("parameters", "buffers", "modules"):
                parts = getattr(value, f"_{kind}")
                node[kind] = [
                    [self._name(name, where), self.encode(part, f"{where}.{name}")]
                    for name, part in parts.items()
                ]
            node["transient"] = sorted(value._non_persistent_buffers_set)
            state = {name: part for name, part in state.items() if name not in _TORCH_OWN}
        # Sorted, as the document is: a loaded model is saved to the same bytes.
        node["state"] = {
            self._name(name, where): self.encode(part, f"{where}.{name}")
            for name, part in sorted(state.items())
        }
        return node

    def _name(self, name: str, where: str) -> str:
        if not _is_name(name):
            raise ModelFolderError(f"{where} has an attribute called {name!r}; rename it.")
        return name

    def _callable(self, value: Any, where: str) -> dict[str, Any]:
        path = path_of(value)
        if not is_callable_allowed(value, self.trusted):
            raise ModelFolderError(
                f"{where} is the callable {path}, and a model folder holds no code. Give it a name at the top of an "
                f"importable module and save and load with trusted=['package.module:name'], or use a built-in choice."
            )
        found = find(path, self.trusted)
        if found is not value:
            raise ModelFolderError(f"{where} is a callable that is not what {path} leads to.")
        return {"is": "callable", "path": path}

    def _estimator(self, value: Any, where: str) -> dict[str, Any]:
        try:
            data = self._dump_estimator(value)
        except ModelFolderError as error:
            raise ModelFolderError(f"{where} ({type(value).__name__}): {error}") from error
        node = {"is": "estimator", "number": len(self.estimators)}
        self.estimators.append(data)
        return self._remember(value, node)

    def _dtype(self, dtype: np.dtype[Any], where: str) -> str:
        name = dtype.newbyteorder("<").str
        if not (NUMERIC.fullmatch(name) or TEXT.fullmatch(name)):
            raise ModelFolderError(f"{where} has the type {dtype}, which a model folder cannot hold.")
        return name

    def _array(self, array: npt.NDArray[Any], where: str) -> dict[str, Any]:
        if type(array) is not np.ndarray:
            raise ModelFolderError(f"{where} is a {type(array).__name__}; only plain arrays can be saved.")
        name = self._dtype(array.dtype, where)
        if TEXT.fullmatch(name):
            items = array.ravel().tolist()
            if array.dtype.kind == "S":
                items = [item.decode("latin-1") for item in items]
            return {
                "is": "array",
                "dtype": name,
                "shape": list(array.shape),
                "items": self._items(items, where),
            }
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        order = _axes_in_memory(array.strides)
        array = np.ascontiguousarray(array.transpose(order)).reshape([array.shape[k] for k in order])
        if array.dtype.kind in "mM":
            array = array.view(np.int64)
        elif array.dtype.kind == "c":
            array = array.view(np.float32 if array.dtype.itemsize == 8 else np.float64)
        return {"is": "array", "dtype": name, "key": self._store(array), "order": order}

    def _tensor(self, tensor: torch.Tensor, where: str) -> dict[str, Any]:
        kind = "parameter" if type(tensor) is nn.Parameter else "tensor"
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise ModelFolderError(f"{where} is a {type(tensor).__name__}, which a model folder cannot hold.")
        if tensor.is_quantized or tensor.is_complex():
            raise ModelFolderError(
                f"{where} is a tensor of {tensor.dtype}, which a model folder cannot hold."
            )
        order = _axes_in_memory(tensor.stride())
        plain = tensor.detach().cpu().permute(order).contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.bfloat16:
            plain = plain.view(torch.int16)
        return {
            "is": kind,
            "dtype": name,
            "key": self._store(plain.numpy()),
            "order": order,
            "grad": bool(tensor.requires_grad and tensor.is_leaf),
        }

    def _store(self, array: npt.NDArray[Any]) -> str:
        key = str(len(self.arrays))
        self.arrays[key] = array
        return key

    def _random(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, np.random.RandomState):
            return {
                "is": "random",
                "of": "RandomState",
                "state": self.encode(value.get_state(legacy=False), where),
            }
        state = value.bit_generator.state
        if state["bit_generator"] not in BIT_GENERATORS:
            raise ModelFolderError(f"{where} is a generator of an unknown kind, {state['bit_generator']}.")
        return {"is": "random", "of": "Generator", "state": self.encode(state, where)}


def _axes_in_memory(strides: tuple[int, ...]) -> list[int]:
    """Axes from the one of the largest stride: in that order a dense array is contiguous.

    The last bits of a matrix product depend on the layout of its factors, so the layout is kept.
    """
    return sorted(range(len(strides)), key=lambda k: -abs(strides[k]))


class Decoder:
    """Turn trees into objects.

    Parameters
    ----------
    arrays : dict of str to ndarray
        Values of arrays and tensors.
    trusted : collection of str
        Import paths that are allowed beside those of `_allowed`.
    load_estimator : callable
        Returns the scikit-learn estimator of a number.
    """

    def __init__(
        self,
        arrays: dict[str, npt.NDArray[Any]],
        trusted: Collection[str],
        load_estimator: Callable[[int], Any],
    ) -> None:
        self._arrays, self.trusted, self._load_estimator = arrays, trusted, load_estimator
        self._objects: dict[int, Any] = {}
        # One object for each key: what was shared is shared again.
        self._made: dict[tuple[str, str], Any] = {}
        self._estimators: dict[int, Any] = {}
        self._depth = 0

    def decode(self, node: Any) -> Any:
        """Object of a tree.

        Raises
        ------
        ModelFolderError
            If the tree is not one that `Encoder` makes.
        """
        if node is None or type(node) in (bool, int, float, str):
            return node
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise ModelFolderError(f"The tree of objects is deeper than {MAX_DEPTH}.")
            if type(node) is list:
                return [self.decode(item) for item in node]
            kind = node.get("is") if type(node) is dict else None
            make = self._makers.get(kind) if isinstance(kind, str) else None
            if make is None:
                raise ModelFolderError(
                    f"The tree of objects has a node of an unknown kind, {str(kind)[:40]!r}."
                )
            return make(self, node)
        finally:
            self._depth -= 1

    def _items(self, node: dict[str, Any], count: int | None = None) -> list[Any]:
        items = node["items"]
        if type(items) is not list or (count is not None and len(items) != count):
            raise ModelFolderError(f"A {node['is']} in the tree of objects is malformed.")
        return [self.decode(item) for item in items]

    def _dict(self, node: dict[str, Any]) -> dict[Any, Any]:
        return {key: value for key, value in self._items(node)}  # noqa: C416 -- refuses what is no pair

    def _float(self, node: dict[str, Any]) -> float:
        if node["value"] not in ("nan", "inf", "-inf"):
            raise ModelFolderError("A float in the tree of objects is malformed.")
        return float(node["value"])

    def _range(self, node: dict[str, Any]) -> range:
        return range(*self._items(node, 3))

    def _slice(self, node: dict[str, Any]) -> slice:
        return slice(*self._items(node, 3))

    def _partial(self, node: dict[str, Any]) -> functools.partial[Any]:
        function, arguments, keywords = self._items(node, 3)
        if node["items"][0].get("is") not in ("callable", "partial"):
            raise ModelFolderError("A partial in the tree of objects is malformed.")
        return functools.partial(function, *arguments, **keywords)

    def _number(self, node: dict[str, Any]) -> Any:
        return self.decode(node["of"])[()]

    def _stored(self, node: dict[str, Any]) -> tuple[npt.NDArray[Any], list[int]]:
        """Values of an array or a tensor, and the places of its axes."""
        array, order = self._arrays[node["key"]], node["order"]
        if type(order) is not list or sorted(order) != list(range(len(order))):
            raise ModelFolderError("An array in the tree of objects is malformed.")
        return array, [order.index(k) for k in range(len(order))]

    def _array(self, node: dict[str, Any]) -> npt.NDArray[Any]:
        name = node["dtype"]
        if type(name) is not str or not (NUMERIC.fullmatch(name) or TEXT.fullmatch(name)):
            raise ModelFolderError(f"An array in the tree of objects has the type {str(name)[:40]!r}.")
        dtype = np.dtype(name)
        if TEXT.fullmatch(name):
            return self._text(node, dtype)
        made = self._made.get((node["key"], name))
        if made is None:
            array, places = self._stored(node)
            stored = {"m": "<i8", "M": "<i8", "c": f"<f{dtype.itemsize // 2}"}.get(dtype.kind, name)
            if array.dtype != np.dtype(stored) or array.ndim != len(places):
                raise ModelFolderError(f"The values of an array of {name} are of {array.dtype}.")
            made = array.view(dtype).transpose(places)
            self._made[node["key"], name] = made
        return made

    def _text(self, node: dict[str, Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        shape, items = node["shape"], self._items(node)
        if (
            type(shape) is not list
            or not all(type(size) is int and size >= 0 for size in shape)
            or len(items) != math.prod(shape)
            or max(8, dtype.itemsize) * len(items) > MAX_TEXT_BYTES
        ):
            raise ModelFolderError("An array of strings in the tree of objects is malformed.")
        array = np.empty(len(items), dtype=object)
        for k, item in enumerate(items):
            array[k] = item.encode("latin-1") if dtype.kind == "S" else item
        return array.astype(dtype, copy=False).reshape(shape)

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        name, is_parameter = node["dtype"], node["is"] == "parameter"
        made: torch.Tensor | None = self._made.get((node["key"], node["is"]))
        if made is None:
            array, places = self._stored(node)
            tensor = torch.from_numpy(array)
            if name == "bfloat16" and tensor.dtype == torch.int16:
                tensor = tensor.view(torch.bfloat16)
            if str(tensor.dtype) != f"torch.{name}" or tensor.ndim != len(places):
                raise ModelFolderError(f"The values of a tensor of {str(name)[:40]} are of {tensor.dtype}.")
            tensor = tensor.permute(places)
            grad = node["grad"] is True
            made = nn.Parameter(tensor, requires_grad=grad) if is_parameter else tensor.requires_grad_(grad)
            self._made[node["key"], node["is"]] = made
        return made

    def _dtype(self, node: dict[str, Any]) -> Any:
        name = node["name"]
        if node["of"] == "torch":
            found = getattr(torch, name) if type(name) is str and re.fullmatch(r"[a-z0-9]+", name) else None
            if isinstance(found, torch.dtype):
                return found
        elif type(name) is str and (NUMERIC.fullmatch(name) or TEXT.fullmatch(name)):
            return np.dtype(name)
        raise ModelFolderError(f"The tree of objects names a type {str(name)[:40]!r}.")

    def _device(self, node: dict[str, Any]) -> torch.device:
        return torch.device(node["name"])

    def _random(self, node: dict[str, Any]) -> Any:
        state = self.decode(node["state"])
        inner = state["state"] if state["bit_generator"] == "MT19937" else state
        # Positions in a buffer, which numpy takes as they come.
        if not (0 <= int(inner.get("pos", 0)) <= 624 and 0 <= int(inner.get("buffer_pos", 0)) <= 4):
            raise ModelFolderError("A random generator in the tree of objects is malformed.")
        if node["of"] == "RandomState":
            random = np.random.RandomState(0)
            random.set_state(state)
            return random
        if node["of"] != "Generator" or state["bit_generator"] not in BIT_GENERATORS:
            raise ModelFolderError("A random generator in the tree of objects is malformed.")
        bits = getattr(np.random, state["bit_generator"])(0)
        bits.state = state
        return np.random.Generator(bits)

    def _callable(self, node: dict[str, Any]) -> Any:
        found = find(node["path"], self.trusted)
        if not is_callable_allowed(found, self.trusted):
            raise ModelFolderError(f"The folder names {node['path']} as a callable, which it must not be.")
        return found

    def _estimator(self, node: dict[str, Any]) -> Any:
        number = node["number"]
        if number not in self._estimators:
            self._estimators[number] = self._load_estimator(number)
        return self._estimators[number]

    def _same(self, node: dict[str, Any]) -> Any:
        if node["id"] not in self._objects:
            raise ModelFolderError("The tree of objects refers to an object that it has not described.")
        return self._objects[node["id"]]

    def _object(self, node: dict[str, Any]) -> Any:
        cls = find(node["class"], self.trusted)
        is_module = node["is"] == "module"
        if (
            not isinstance(cls, type)
            or not is_class_allowed(cls, self.trusted)
            or is_module != issubclass(cls, nn.Module)
        ):
            raise ModelFolderError(f"The folder has an object of {node['class']}, which it must not have.")
        made: Any = object.__new__(cls)
        self._objects[node["id"]] = made
        if is_module:
            nn.Module.__init__(made)
            self._fill_module(made, node)
        state = dict(self._named(node["state"].items()))
        if is_module and not _TORCH_OWN.isdisjoint(state):
            raise ModelFolderError(f"The attributes of a {node['class']} are not its own.")
        if ATTRIBUTE in state:
            if not isinstance(state[ATTRIBUTE], MetadataRequest):
                raise ModelFolderError(f"The requests of a {node['class']} for metadata are something else.")
            name_owner(state[ATTRIBUTE], cls.__name__)
        # Into the dictionary: neither properties nor `__setattr__` of the class run.
        vars(made).update(_new_parameters(cls))
        vars(made).update(state)
        return made

    def _fill_module(self, module: nn.Module, node: dict[str, Any]) -> None:
        parts = {kind: dict(self._named(node[kind])) for kind in ("parameters", "buffers", "modules")}
        kinds = {"parameters": nn.Parameter, "buffers": torch.Tensor, "modules": nn.Module}
        for kind, named in parts.items():
            if not all(part is None or isinstance(part, kinds[kind]) for part in named.values()):
                raise ModelFolderError(f"The {kind} of a {node['class']} are something else.")
            getattr(module, f"_{kind}").update(named)
        module._non_persistent_buffers_set.update(
            name for name in node["transient"] if name in parts["buffers"]
        )
        module.training = node["training"] is True

    def _named(self, pairs: Any) -> Iterator[tuple[str, Any]]:
        for name, part in pairs:
            # (Modules in a sequence are called 0, 1, ...)
            if type(name) is not str or not _is_name(name):
                raise ModelFolderError(f"An object has an attribute called {str(name)[:40]!r}.")
            yield name, self.decode(part)

    _makers: dict[str, Callable[[Decoder, dict[str, Any]], Any]]


def _new_parameters(cls: type) -> dict[str, Any]:
    """Parameters of an estimator or component at their defaults.

    A folder that was written before a class had a parameter does not tell its value. Its default is to do what was
    done without it.
    """
    if not issubclass(cls, BaseEstimator):
        return {}
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


Decoder._makers = {
    "array": Decoder._array,
    "callable": Decoder._callable,
    "device": Decoder._device,
    "dict": Decoder._dict,
    "dtype": Decoder._dtype,
    "estimator": Decoder._estimator,
    "float": Decoder._float,
    "frozenset": lambda decoder, node: frozenset(decoder._items(node)),
    "module": Decoder._object,
    "number": Decoder._number,
    "object": Decoder._object,
    "parameter": Decoder._tensor,
    "partial": Decoder._partial,
    "random": Decoder._random,
    "range": Decoder._range,
    "requests": lambda decoder, node: requests_from_plain(node["of"]),
    "same": Decoder._same,
    "set": lambda decoder, node: set(decoder._items(node)),
    "slice": Decoder._slice,
    "tensor": Decoder._tensor,
    "tuple": lambda decoder, node: tuple(decoder._items(node)),
}
