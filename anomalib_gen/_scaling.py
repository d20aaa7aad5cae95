"""From numpy rows to the tensors that models see: scaling, blocks, and residence on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from anomalib_gen._runtime import row_blocks
from anomalib_gen.networks import TAIL_START, compress_tails, expand_tails

BLOCK_BYTES = 2**24
"""Bytes of float64 rows handled at once while passing over data on the numpy side."""
GRAIN_ROWS = 10_000
"""Rows looked at for the grid of each column."""
GRAIN_PIXELS = 1_000_000
"""Pixels looked at for the grid of images."""
RESIDENT_BYTES = 2**30
"""Training rows up to this size are kept on the CPU as one tensor; larger data are read batch by batch."""


def rows_per_block(event_size: int) -> int:
    """Rows of a numpy block of `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // (8 * max(1, event_size)))


@dataclass(frozen=True)
class Standardizer:
    """z = (x - shift) / scale, computed in float64, with shift and scale broadcast over the event.

    Attributes
    ----------
    shift, scale : ndarray
        Of the event's shape for tables (one number a column), of shape ``(1, ...)`` for images (one for all).
    log_det : float
        log |dz/dx| summed over the event: what turns a log-density of z into one of x.
    cell : float
        Width of the cells that values stand for, in the units of X: 1 for images of 8 bits, else 0.
    """

    shift: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    log_det: float
    cell: float = 0.0

    @classmethod
    def fit(
        cls,
        X: npt.NDArray[np.floating],
        rows: npt.NDArray[np.integer] | None = None,
        weights: npt.NDArray[np.float64] | None = None,
    ) -> Self:
        """Estimate shift and scale in two passes over blocks of rows.

        Parameters
        ----------
        X : ndarray of shape (n, *E)
        rows : ndarray of int, optional
            Positions to use; all if None.
        weights : ndarray, optional
            Weight of each used row.

        Notes
        -----
        The first pass takes the range, the second the moments about the range's middle in units of half the range:
        neither a large offset nor values near the end of the floating-point range spoil the result. A column
        whose range is rounding error counts as constant and gets scale 1.

        The scale of images of 8 bits is so large that no value they can take lies in the tails that are compressed
        (`networks.tails`): cells have one width everywhere.
        """
        n = len(X) if rows is None else len(rows)
        event_shape = X.shape[1:]
        axes = (0,) if len(event_shape) == 1 else tuple(range(X.ndim))
        size = int(np.prod(event_shape))
        values_per_row = 1 if len(event_shape) == 1 else size

        def blocks() -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
            for block in row_blocks(n, rows_per_block(size)):
                yield block, np.asarray(X[block] if rows is None else X[rows[block]], dtype=np.float64)

        low, high = np.asarray(np.inf), np.asarray(-np.inf)
        for _, x in blocks():
            low, high = np.minimum(low, x.min(axis=axes)), np.maximum(high, x.max(axis=axes))
        middle, half = low / 2 + high / 2, high / 2 - low / 2
        eight_bit = X.dtype == np.uint8
        eps = np.finfo(np.float64 if eight_bit else X.dtype).eps
        constant = half <= 16 * eps * np.maximum(np.abs(low), np.abs(high))
        half = np.where(constant, 1.0, half)
        mass, mean, square = 0.0, np.zeros(np.shape(middle)), np.zeros(np.shape(middle))
        for block, x in blocks():
            w = np.ones(len(x)) if weights is None else weights[block]
            w = w.reshape(-1, *([1] * len(event_shape)))
            d = (x - middle) / half
            mass += float(w.sum()) * values_per_row
            mean, square = mean + (w * d).sum(axis=axes), square + (w * d**2).sum(axis=axes)
        mean, square = mean / mass, square / mass
        spread = half * np.sqrt(np.maximum(square - mean**2, 0))
        shift = np.where(constant, middle, middle + half * mean)
        # The spread of values near the end of the range may underflow to nothing only if they are constant.
        scale = np.where(constant | (spread == 0), 1.0, spread)
        if eight_bit:
            scale = np.maximum(scale, np.maximum(shift, 255 - shift) / (TAIL_START - 0.1))
        if len(event_shape) > 1:
            shift, scale = (np.reshape(value, [1] * len(event_shape)) for value in (shift, scale))
        log_det = -float(np.log(np.broadcast_to(scale, event_shape)).sum())
        return cls(shift=shift, scale=scale, log_det=log_det, cell=float(eight_bit))

    def transform(self, X: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Standardise rows; values beyond the floating-point range saturate at its end."""
        limit = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            z = np.subtract(X, self.shift, dtype=np.float64)
            z /= self.scale
        # On blocks of rows numpy.clip takes longer than the arithmetic.
        np.minimum(z, limit, out=z)
        return np.maximum(z, -limit, out=z)

    def inverse_transform(self, Z: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Return to the units of X."""
        return np.asarray(Z, dtype=np.float64) * self.scale + self.shift

    def transform_with_log_dets(
        self, X: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.float64], float | npt.NDArray[np.float64]]:
        """Standardise rows; also log |dz/dx| of them: one number for all, or ``(n,)``."""
        return self.transform(X), self.log_det

    def transform_tensor(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardise ``(n, *E)`` differentiably; also log |dz/dx| ``(n,)``."""
        shift, scale = (
            torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (self.shift, self.scale)
        )
        return self.finish_tensor((x - shift) / scale)

    def finish_tensor(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `transform_tensor` gives for ``(x - shift) / scale``, ``(n, *E)``."""
        return z, z.new_full((len(z),), self.log_det)


@dataclass(frozen=True)
class TailedStandardizer(Standardizer):
    """Standardised rows whose values beyond five deviations are compressed (networks.tails).

    The bulk of the data stays as it is. Far out values grow like a logarithm, up to about 715 for the largest float64,
    so that nothing that is computed from them, squares and sums included, overflows.
    """

    def transform(self, X: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Standardise and compress rows."""
        return self.transform_with_log_dets(X)[0]

    def inverse_transform(self, Z: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Return to the units of X; values beyond the floating-point range saturate at its end."""
        z = expand_tails(torch.from_numpy(np.asarray(Z, dtype=np.float64)))[0].numpy()
        limit = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            return np.clip(super().inverse_transform(np.clip(z, -limit, limit)), -limit, limit)

    def transform_with_log_dets(
        self, X: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Standardise and compress rows; also log |dz/dx| of them, ``(n,)``."""
        y, log_det = compress_tails(torch.from_numpy(super().transform(X)))
        return y.numpy(), self.log_det + log_det.numpy()

    def finish_tensor(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress the tails of ``(x - shift) / scale``."""
        z, log_det = super().finish_tensor(z)
        y, log_det_tails = compress_tails(z)
        return y, log_det + log_det_tails


def column_grain(
    X: npt.NDArray[np.floating], index: npt.NDArray[np.integer], scaler: Standardizer
) -> npt.NDArray[np.float64]:
    """Width of the grid that each column's values lie on, as the deviation of uniform dequantisation.

    Values on a grid (flags, counts, rounded readings) have no density. Spread over their cells they have one, and
    noise with the deviation of a uniform over a cell, gap / sqrt(12), is the smooth form of that (Theis et al. 2016,
    arXiv:1511.01844, section 3.1). The gap is the median one between distinct values, so for a column without
    repeats it is what the sample resolves, next to nothing.

    Parameters
    ----------
    X : ndarray of shape (n, D)
    index : ndarray of int
        Positions to use; about `GRAIN_ROWS` of them, evenly spread, are looked at.
    scaler : Standardizer

    Returns
    -------
    ndarray of shape (D,)
        In standardised units; 0 for a constant column. Of images ``(n, C, H, W)``, whose pixels share one grid,
        ``(C, H, W)`` of one number.
    """
    if X.ndim > 2:
        return np.full(X.shape[1:], _pixel_grain(X, index, scaler))
    rows = index[:: max(1, len(index) // GRAIN_ROWS)]
    grain = np.zeros(X.shape[1])
    for block in row_blocks(X.shape[1], rows_per_block(len(rows))):
        Z = Standardizer(scaler.shift[block], scaler.scale[block], 0.0).transform(X[rows, block])
        for j, column in enumerate(Z.T, start=block.start):
            values = np.unique(column)
            if len(values) > 1:
                grain[j] = np.median(np.diff(values)) / np.sqrt(12)
    return grain


def _pixel_grain(X: npt.NDArray[Any], index: npt.NDArray[np.integer], scaler: Standardizer) -> float:
    """Width of the grid that all pixels lie on, as `column_grain`."""
    if scaler.cell:
        return scaler.cell / float(np.squeeze(scaler.scale)) / math.sqrt(12)
    n_images = max(1, GRAIN_PIXELS // max(1, int(np.prod(X.shape[1:]))))
    images = np.asarray(X[index[:: max(1, -(-len(index) // n_images))]])
    values = np.unique(scaler.transform(images))
    return float(np.median(np.diff(values))) / math.sqrt(12) if len(values) > 1 else 0.0


class ArrayRows:
    """Rows of a numpy array as standardised float32 tensors on a device.

    Resident on the device where they fit into the memory set aside, else cut from the array (which may be
    memory-mapped) and standardised batch by batch.

    Parameters
    ----------
    X : ndarray of shape (n, *E)
    index : ndarray of int
        Positions in `X` that these rows stand for.
    scaler : Standardizer
    device : torch.device
    weights : Tensor of shape (n,), optional
        Weight of each of these rows in the loss; all count alike if None.
    """

    def __init__(
        self,
        X: npt.NDArray[np.floating],
        index: npt.NDArray[np.integer],
        scaler: Standardizer,
        device: torch.device,
        *,
        weights: torch.Tensor | None = None,
    ) -> None:
        self._X, self._index, self._scaler, self.device = X, index, scaler, device
        self.weights = weights
        size = int(np.prod(X.shape[1:]))
        budget = RESIDENT_BYTES
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        self._resident: torch.Tensor | None = None
        if 4 * size * len(index) <= budget:
            resident = torch.empty((len(index), *X.shape[1:]), dtype=torch.float32, device=device)
            for block in row_blocks(len(index), rows_per_block(size)):
                resident[block] = self._cut(index[block])
            self._resident = resident

    def __len__(self) -> int:
        return len(self._index)

    def _cut(self, positions: npt.NDArray[np.integer]) -> torch.Tensor:
        z = self._scaler.transform(self._X[positions])
        limit = float(np.finfo(np.float32).max)
        return torch.from_numpy(np.clip(z, -limit, limit).astype(np.float32)).to(self.device)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the given positions, ``(B, *E)``."""
        if self._resident is not None:
            return self._resident.index_select(0, index.to(self.device))
        return self._cut(self._index[index.numpy()])

    def blocks(self, rows_per_block: int) -> Iterator[torch.Tensor]:
        """All rows in order."""
        for block in row_blocks(len(self), rows_per_block):
            if self._resident is not None:
                yield self._resident[block]
            else:
                yield self._cut(self._index[block])
