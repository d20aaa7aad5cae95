"""What the objectives ask of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any


def require(
    objective: Any,
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
) -> None:
    """Refuse an objective with a parameter that is no integer of at least 1, not positive, or negative.

    Parameters
    ----------
    objective : Component
    counts, positive, not_negative : iterable of str
        Names of its parameters.

    Raises
    ------
    ValueError
        If one of them is not finite or out of its range; the message names it.
    """
    rules: tuple[tuple[Iterable[str], str, Callable[[Any], bool]], ...] = (
        (counts, "a positive integer", lambda value: isinstance(value, Integral) and int(value) >= 1),
        (positive, "positive and finite", lambda value: 0 < value < math.inf),
        (not_negative, "finite and not negative", lambda value: 0 <= value < math.inf),
    )
    for names, wanted, holds in rules:
        for name in names:
            value = getattr(objective, name)
            if not (isinstance(value, Real) and holds(value)):
                raise ValueError(f"{name} of {objective!r} must be {wanted}, got {value!r}.")
