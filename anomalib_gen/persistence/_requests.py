"""Which metadata an estimator asks for (`set_fit_request` and its like), as plain data.

Scikit-learn keeps them as objects, ``{method: {parameter: request}}`` in essence, that also point back to the estimator
they are of. That owner is for its messages only, which take the name of a class as well: a name makes no circle.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils.metadata_routing import MetadataRequest

from anomalib_gen.persistence._errors import ModelFolderError

ATTRIBUTE = "_metadata_request"
"""Where an estimator keeps its requests, if it was given any."""


def requests_to_plain(request: MetadataRequest, where: str) -> dict[str, dict[str, bool | str | None]]:
    """Requests by method and parameter; `where` is their place, for messages.

    Raises
    ------
    ModelFolderError
        If a request is none that `requests_from_plain` would read.
    """
    plain = {name: dict(part.requests) for name, part in _methods(request).items() if part.requests}
    if not all(map(_are_requests, plain.values())):
        raise ModelFolderError(f"{where} has a request of metadata that a model folder cannot hold.")
    return plain


def requests_from_plain(plain: Any) -> MetadataRequest:
    """Turn what `requests_to_plain` gave back into requests, which have no owner yet.

    Raises
    ------
    ModelFolderError
        If it is something else.
    """
    request = MetadataRequest(owner=None)
    methods = _methods(request)
    if type(plain) is not dict or not all(
        name in methods and _are_requests(requests) for name, requests in plain.items()
    ):
        raise ModelFolderError("A request of metadata in the tree of objects is malformed.")
    for name, requests in plain.items():
        methods[name].requests.update(requests)
    return request


def name_owner(request: MetadataRequest, owner: str) -> None:
    """Let requests name the class of their owner."""
    for part in (request, *_methods(request).values()):
        part.owner = owner


def without_circles(estimator: Any) -> Any:
    """An estimator of scikit-learn, or a copy of it where requests point back to their owners."""
    if not any(True for _ in _with_requests(estimator, set())):
        return estimator
    estimator = copy.deepcopy(estimator)
    for part in _with_requests(estimator, set()):
        name_owner(getattr(part, ATTRIBUTE), type(part).__name__)
    return estimator


def _methods(request: MetadataRequest) -> dict[str, Any]:
    return {name: part for name, part in vars(request).items() if name != "owner"}


def _are_requests(requests: Any) -> bool:
    return type(requests) is dict and all(
        type(name) is str
        and name.isidentifier()
        and (alias is None or type(alias) is bool or (type(alias) is str and alias.isidentifier()))
        for name, alias in requests.items()
    )


def _with_requests(value: Any, seen: set[int]) -> Iterator[Any]:
    """All estimators within one that have requests."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BaseEstimator):
        if isinstance(getattr(value, ATTRIBUTE, None), MetadataRequest):
            yield value
        parts = list(vars(value).values())
    else:
        parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, list | tuple):
        for part in parts:
            yield from _with_requests(part, seen)
