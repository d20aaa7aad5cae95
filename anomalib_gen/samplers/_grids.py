"""What solvers on a grid of times share: the loop, and what they report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anomalib_gen.samplers._chains import SamplerInfo, check_steps, progress, stack, where_rows


class Counted:
    """A callable that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        self.calls += 1
        return self.function(*args)


def check_grid(grid: torch.Tensor, thin: int | None = None, *, falling: bool = False) -> torch.Tensor:
    """Return a grid of times as float64 on the CPU; refuse one that does not go strictly one way.

    Times, and all that a path makes of them, are numbers common to all rows: they are exact and cost nothing there.
    """
    grid = torch.as_tensor(grid).detach().to(device="cpu", dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or not bool(grid.isfinite().all()):
        raise ValueError(f"grid must be at least two finite times, got shape {tuple(grid.shape)}.")
    steps = grid.diff()
    if not (bool((steps < 0).all()) or (not falling and bool((steps > 0).all()))):
        raise ValueError(
            "grid must fall strictly, from noise to data: path.grid(n_steps).flip(0)."
            if falling
            else "grid must rise or fall strictly."
        )
    check_steps(len(steps), thin)
    return grid


def walk(
    step: Callable[[int, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    grid: torch.Tensor,
    counted: Counted,
    *,
    last: Callable[[torch.Tensor], torch.Tensor] | None = None,
    thin: int | None,
    verbose: int,
    label: str,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Walk along a grid: ``step(k, x)`` leads from ``grid[k]`` to ``grid[k + 1]``, and `last` ends it.

    A move that would not be finite is not made, row by row.
    """
    steps = grid.diff()
    divergences = torch.zeros(len(x), dtype=torch.long, device=x.device)
    samples = []

    def moved(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        nonlocal divergences
        finite = new.flatten(1).isfinite().all(1)
        divergences = divergences + ~finite
        return where_rows(finite, new, old)

    for k in progress(range(len(steps)), verbose, label):
        x = moved(step(k, x), x)
        if thin is not None and (k + 1) % thin == 0:
            samples.append(x)
    if last is not None:
        x = moved(last(x), x)
    return x, SamplerInfo(
        n_evaluations=counted.calls,
        step_size=tuple(steps.abs().tolist()),
        divergences=divergences,
        samples=stack(samples, x) if thin is not None else None,
    )
