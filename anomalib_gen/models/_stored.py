"""Modules that hold rows: tensors whose sizes are known only once there are rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import nn

from anomalib_gen._runtime import scoring_dtype


class Stored(nn.Module):
    """A module whose buffers are replaced, never changed in place.

    So copies of a model share them, and a change of the model's precision leaves them as they are: only the device
    follows. A state with buffers of other sizes can be loaded.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        memo[id(self)] = other
        for name, value in self._buffers.items():
            other.register_buffer(name, value)
        return other

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            assert value is not None
            device = getattr(self, name).device
            dtype = scoring_dtype(device) if value.dtype == torch.float64 else value.dtype
            setattr(self, name, value.to(device=device, dtype=dtype))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


def even_choice(n_rows: int, most: int, *, with_last: bool = False) -> torch.Tensor:
    """Positions ``(min(n_rows, most),)`` of rows in order, as far apart as they can all be.

    The first row is among them or, of a stream that should go on, the last.
    """
    n = min(n_rows, most)
    positions = torch.arange(n) * n_rows // n
    return n_rows - 1 - positions.flip(0) if with_last else positions


def row_keys(x: torch.Tensor) -> torch.Tensor:
    """Keys ``(B,)`` of rows ``(B, *E)``, equal for rows that are equal in float32.

    They are sums of the bits of the values, each multiplied by an odd number of its own, modulo 2^64: exact, so that
    they depend on neither the device nor the rows beside. Different rows share a key with a probability of 2^-40 at
    most.
    """
    # (Adding zero makes one zero of two.)
    bits = (x.flatten(1).float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
    factors = [_odd_factor(k) for k in range(bits.shape[1])]
    return (bits * torch.tensor(factors, dtype=torch.int64, device=x.device)).sum(1)


@cache
def _odd_factor(k: int) -> int:
    """The k-th number of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), odd, as a signed integer."""
    z = (k + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z = (z ^ z >> 31) | 1
    return z - 2**64 if z >= 2**63 else z
