"""Components: small named parts (objectives, anomalies, paths) with parameters and without `fit`.

A component stores its constructor arguments unchanged, so that `repr`, `clone` and nested parameters such as
``set_params(anomaly__n_noise=4)`` work as for any scikit-learn object. What a component learns from a model
(an entropy, say) is set by `prepare` on a clone, under names with a trailing underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sklearn.base import BaseEstimator, clone


class Component(BaseEstimator):
    """A part of a detector that has parameters but is never fitted to data by itself."""


C = TypeVar("C", bound=Component)


def resolve_component(
    value: str | C | None, *, known: Mapping[str, type[C]], argument: str, default: Callable[[], C]
) -> C:
    """Turn a detector's argument into a component of its own.

    Parameters
    ----------
    value : str, Component or None
        A name is shorthand for that component with its defaults; None takes `default`; an object is cloned,
        so that what it learns never lands on the user's object.
    known : mapping of str to type
        The names that the argument accepts.
    argument : str
        The argument's name, for the message.
    default : callable
        Makes the component that None stands for.

    Raises
    ------
    ValueError
        If a name is unknown; the message lists the known ones.
    TypeError
        If the value is neither a name nor a component, or a name where there are none.
    """
    if value is None:
        return default()
    names = ", ".join(repr(name) for name in sorted(known))
    if isinstance(value, str) and value in known:
        return known[value]()
    if isinstance(value, str) and known:
        raise ValueError(f"{argument}={value!r} is unknown. Known names: {names}; or pass an object.")
    if not isinstance(value, Component) or not callable(value):
        if not known:
            raise TypeError(f"{argument} must be a component, got {value!r}.")
        raise TypeError(
            f"{argument} must be a name or a component, got {type(value).__name__!r}. Known names: {names}."
        )
    component: Any = clone(value)
    return component
