r"""One-dimensional distributions small enough to keep: a staircase of some hundred values.

A sample x_1 ... x_n has the distribution function F_n(x) = #{x_i <= x} / n. Where it has few different values, they are
kept with their counts and nothing is lost. Of others N order statistics are kept, those of the ranks

    r_i = ceil((i - 1/2) n / N),    i = 1 ... N,

whose staircase F~ counts #{i : (i - 1/2) n / N <= k} = floor(k N / n + 1/2) at the k-th smallest value, so that

    sup_x |F~(x) - F_n(x)| <= 1 / (2 N)                                                                 (resolution)

whatever the sample: no random subset of N values is as close.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_VALUES = 1024
"""Values kept of a distribution: it is then within 0.0005 of what it was."""


MAX_COUNT = 2**53
"""Rows that a description may claim to have: whole numbers beyond are none in floating point."""


@dataclass(frozen=True)
class Distribution:
    """A staircase.

    Attributes
    ----------
    values : ndarray of shape (n_values,)
        Different finite values, ascending.
    counts : ndarray of shape (n_values,)
        Of each, whole numbers; their sum is `n` only where nothing was left out.
    n : int
        Size of the sample that it stands for.
    resolution : float
        How far its distribution function may be from that of the sample.
    """

    values: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    n: int
    resolution: float = 0.0

    @classmethod
    def of(cls, sample: Any, max_values: int = MAX_VALUES) -> Distribution:
        """Distribution of the finite values of a sample.

        Parameters
        ----------
        sample : array-like of shape (n,)
        max_values : int, default=1024
            Different values that are kept.

        Returns
        -------
        Distribution
        """
        x = np.asarray(sample, dtype=np.float64).ravel()
        x = np.sort(x[np.isfinite(x)])
        values, counts = np.unique(x, return_counts=True)
        if len(values) <= max_values:
            return cls(values, counts.astype(np.int64), len(x))
        ranks = np.ceil((np.arange(1, max_values + 1) - 0.5) * (len(x) / max_values)).astype(np.int64)
        values, counts = np.unique(x[ranks - 1], return_counts=True)
        return cls(values, counts.astype(np.int64), len(x), 1 / (2 * max_values))

    def cdf(self, x: Any, side: str = "right") -> npt.NDArray[np.float64]:
        """Share of values up to x; with ``side="left"`` below x.

        Parameters
        ----------
        x : array-like
        side : {"right", "left"}, default="right"

        Returns
        -------
        ndarray
            0 of an empty distribution.
        """
        mass = np.concatenate([[0], np.cumsum(self.counts)])
        found = mass[np.searchsorted(self.values, np.asarray(x, dtype=np.float64), side=side)]  # type: ignore[call-overload]
        return np.asarray(found / max(1, mass[-1]), dtype=np.float64)

    def quantile(self, u: Any) -> npt.NDArray[np.float64]:
        """Smallest kept value with a share of at least u up to it.

        Parameters
        ----------
        u : array-like of numbers from 0 to 1

        Returns
        -------
        ndarray

        Raises
        ------
        ValueError
            If the distribution is empty.
        """
        if not len(self.values):
            raise ValueError("An empty distribution has no quantiles.")
        mass = np.cumsum(self.counts)
        # (As a share: 0.1 + 0.2 of ten values are three of them.)
        place = np.searchsorted(mass / mass[-1], np.asarray(u, dtype=np.float64) - 1e-12, side="left")
        return np.asarray(self.values[np.minimum(place, len(mass) - 1)], dtype=np.float64)

    def sample(self) -> npt.NDArray[np.float64]:
        """The kept values, each as often as it counts.

        Returns
        -------
        ndarray of shape (counts.sum(),)
        """
        return np.repeat(self.values, self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON.

        Returns
        -------
        dict
        """
        return {
            "values": self.values.tolist(),
            "counts": self.counts.tolist(),
            "n": self.n,
            "resolution": self.resolution,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Distribution:
        """Distribution of `to_dict`.

        Parameters
        ----------
        document : mapping

        Returns
        -------
        Distribution

        Raises
        ------
        ValueError
            If it is none.
        """
        values = np.asarray(document["values"], dtype=np.float64)
        counts = np.asarray(document["counts"])
        n, resolution = document["n"], document["resolution"]
        if (
            values.ndim != 1
            or values.shape != counts.shape
            or (len(counts) and (counts.dtype.kind != "i" or counts.min() < 1))
            or not np.isfinite(values).all()
            or (np.diff(values) <= 0).any()
            or type(n) is not int
            or not len(values) <= n <= MAX_COUNT
            or not 0 <= resolution < 1
        ):
            raise ValueError("a distribution is malformed")
        return cls(values, counts.astype(np.int64), n, float(resolution))
