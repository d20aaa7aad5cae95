"""A fitted model over many rows: blocks in, one number per row out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from anomalib_gen import _runtime
from anomalib_gen._scaling import Standardizer

IMAGES_PER_BLOCK = 64
"""Images scored at once at most."""
ROWS_PER_BLOCK = 512
"""Rows of tables scored at once at most on a CPU. Of larger blocks the allocator may give the activations' memory back
to the system and ask for it again at every layer, which takes as long as the layer does."""
LEAST_ROWS = 256
"""Rows for which a thread is worth its start."""
CELL_PAIRS = 1
"""Pairs of points of each cell over which the likelihood of discrete images is averaged."""


@_runtime.within_quota()
def score_in_blocks(
    model: nn.Module,
    anomaly: Any,
    X: npt.NDArray[Any],
    *,
    scaler: Standardizer,
    seed: int,
    device: torch.device,
) -> npt.NDArray[np.float64]:
    """Anomaly of each row of X, ``(n,)``; a density is turned into one in the units of X.

    Where the rows are discrete (``model.cell > 0``), an anomaly in nats is the mean over points of their cells, the
    same for all rows. Of minus a log-density it is, by Jensen's inequality, at least minus the log-probability of the
    cell (Theis et al. 2016, arXiv:1511.01844, equation 4).

    Raises
    ------
    FloatingPointError
        If a row gets NaN; the message names the first.
    """
    dtype = _runtime.event_dtype(X.shape[1:], device)
    block_rows, n_threads = _blocks_and_threads(len(X), int(np.prod(X.shape[1:])), X.shape[1:], device)
    if X.ndim > 2:
        # Blocks are padded to their full size, and one image is often all there is.
        block_rows = min(block_rows, IMAGES_PER_BLOCK)
    cell = float(getattr(model, "cell", 0.0)) if anomaly.in_nats else 0.0
    # (What compares images in float64 has no rounding that would show; where the device has no float64, it has.)
    padded = not getattr(anomaly, "in_float64", False) or _runtime.scoring_dtype(device) != torch.float64

    def score(rows: slice) -> npt.NDArray[np.float64]:
        z, log_dets = scaler.transform_with_log_dets(X[rows])
        n = len(z)
        if dtype == torch.float32:
            limit = float(np.finfo(np.float32).max)
            if padded:
                # One shape for every block: in float32 a kernel's rounding depends on the shape.
                z = np.resize(z, (block_rows, *z.shape[1:]))
            z = np.clip(z, -limit, limit)
        # An anomaly that takes gradients leaves inference mode by itself (samplers.score_of does).
        with torch.inference_mode():
            x = torch.from_numpy(z).to(device=device, dtype=dtype)
            # The same noise for every block, so that a row's score does not depend on its place.
            parts = []
            for offset in cell_points(x, cell, seed):
                a = anomaly(model, x if offset is None else x + offset, _runtime.scoring_generator(seed))
                parts.append(a[:n].cpu().double().numpy())
        found = parts[0] if len(parts) == 1 else np.mean(parts, axis=0)
        return found - log_dets if anomaly.in_nats else found

    values = np.concatenate(
        list(_runtime.in_threads(score, _runtime.row_blocks(len(X), block_rows), n_threads))
    )
    if np.isnan(values).any():
        raise FloatingPointError(
            f"The model gives NaN for row {int(np.flatnonzero(np.isnan(values))[0])}. "
            "Its weights are damaged or its transform is not defined there; fit it again."
        )
    return values


def cell_points(x: torch.Tensor, cell: float, seed: int) -> list[torch.Tensor] | list[None]:
    """Points of cells of that width as offsets from their middle, in pairs u and -u; None alone for no cells."""
    if cell == 0:
        return [None]
    generator = _runtime.scoring_generator(seed)
    points: list[torch.Tensor] = []
    for _ in range(CELL_PAIRS):
        u = torch.rand(tuple(x.shape[1:]), generator=generator, dtype=torch.float64).to(x)
        points += [cell * (u - 0.5), cell * (0.5 - u)]
    return points


@_runtime.within_quota()
def map_in_blocks(
    model: nn.Module,
    function: Callable[[Any, torch.Tensor], torch.Tensor],
    X: npt.NDArray[Any],
    *,
    shape: tuple[int, ...],
    scaler: Standardizer | None,
    device: torch.device,
) -> npt.NDArray[np.float64]:
    """``function(model, x)`` of blocks of rows, scaled first if there is a scaler; ``(n, *shape)``."""
    event_shape = X.shape[1:] if X.ndim > 2 else shape
    dtype = _runtime.event_dtype(event_shape, device)
    limit = torch.finfo(dtype).max
    size = int(max(np.prod(X.shape[1:]), np.prod(shape)))
    block_rows, n_threads = _blocks_and_threads(len(X), size, event_shape, device)

    def call(rows: slice) -> npt.NDArray[np.float64]:
        z = np.asarray(X[rows], dtype=np.float64) if scaler is None else scaler.transform(X[rows])
        # Not in inference mode, the caller's included: `function` may take gradients.
        with torch.inference_mode(False), torch.no_grad():
            x = torch.from_numpy(np.clip(z, -limit, limit)).to(device=device, dtype=dtype)
            return function(model, x).cpu().double().numpy()

    blocks = _runtime.row_blocks(len(X), block_rows)
    values = list(_runtime.in_threads(call, blocks, n_threads))
    return np.concatenate(values) if values else np.empty((0, *shape))


def _blocks_and_threads(
    n_rows: int, event_size: int, event_shape: tuple[int, ...], device: torch.device
) -> tuple[int, int]:
    """Rows of a block at most, and the threads that blocks are shared out among: no more than have some to do.

    Rows of tables alone are shared out, and on a CPU: operations on images are long, and in float32 their last digits
    depend on how they are shared. Blocks do not depend on the number of threads: in float64, too, the last digit of a
    score may depend on the rows beside it, and a run that goes on elsewhere is to end with the same bytes.
    """
    block_rows = _runtime.scoring_block_rows(event_size, device)
    if device.type != "cpu" or len(event_shape) > 1:
        return block_rows, 1
    share = -(-n_rows // _runtime.MOST_THREADS)
    block_rows = min(block_rows, ROWS_PER_BLOCK, max(LEAST_ROWS, share))
    return block_rows, max(1, min(_runtime.scoring_threads(), -(-n_rows // block_rows)))


@contextmanager
def naming_what_lacks(
    argument: str, part: Any, model: nn.Module, *, continued: bool = False
) -> Iterator[None]:
    """Turn the error about a method that a model lacks into one about the part that asked for it, a TypeError.

    A model that is trained on (`continued`) may be one of other parameters than those that the detector has by now.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:  # the latter from one that takes other arguments
        raise TypeError(
            f"{argument}={part!r} does not work with {type(model).__name__}: {error}. "
            "Choose one that uses what this model provides"
            + (", or fit anew with warm_start=False, which makes another model." if continued else ".")
        ) from error


def dry_run(
    model: nn.Module, x: torch.Tensor, device: torch.device, *, continued: bool = False, **parts: Any
) -> None:
    """Try an `objective` or an `anomaly` on the two rows `x`, so that one that cannot work fails before training.

    Raises
    ------
    TypeError
        If one of them is of the other kind, needs what the model lacks, or does not return one number per row.
    """
    model.eval()
    for argument, part in parts.items():
        # They are called alike: an energy would be lowered everywhere, and a loss with fresh noise be a score.
        if hasattr(part, "in_nats") == (argument == "objective"):
            raise TypeError(
                f"{argument}={part!r} is an anomaly, not a loss to train by. Pass it as anomaly=."
                if argument == "objective"
                else f"{argument}={part!r} has no attribute in_nats, so it is no anomaly. A training loss goes to "
                "objective=; an anomaly of your own says with in_nats whether it is a log-density."
            )
        on_device = argument == "objective"
        generator = _runtime.make_generator(0, device) if on_device else _runtime.scoring_generator(0)
        grads = torch.enable_grad() if argument == "objective" else torch.inference_mode()
        naming = naming_what_lacks(argument, part, model, continued=continued)
        with naming, grads, _runtime.forked_rng(0, device):
            # On a copy: what a part learns or keeps from these two rows is not for later.
            trial = copy.deepcopy(part)
            if argument == "anomaly" and hasattr(trial, "prepare"):
                trial.prepare(model, [x], generator)
            values = trial(model, x, generator)
        if values.shape != (2,):
            raise TypeError(
                f"{argument}={part!r} returned a tensor of shape {tuple(values.shape)} for 2 rows; "
                "one number per row is needed."
            )
        trained = any(parameter.requires_grad for parameter in model.parameters())
        if argument == "objective" and trained and not values.requires_grad:
            raise TypeError(
                f"objective={part!r} does not work with {type(model).__name__}: its loss has no gradient. Choose one "
                "that trains this model."
            )
