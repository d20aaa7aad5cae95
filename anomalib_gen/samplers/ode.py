r"""Solvers of dx/dt = f(x, t) over a grid of times, rising or falling.

With h the step from t to t + h (negative where the grid falls) and one evaluation for each k,

    euler:  x' = x + h k_1,                          k_1 = f(x, t)                                  error O(h)
    heun:   x' = x + h / 2 (k_1 + k_2),              k_2 = f(x + h k_1, t + h)                      error O(h^2)
    rk4:    x' = x + h / 6 (k_1 + 2 k_2 + 2 k_3 + k_4),
            k_2 = f(x + h / 2 k_1, t + h / 2),   k_3 = f(x + h / 2 k_2, t + h / 2),   k_4 = f(x + h k_3, t + h)
                                                                                                    error O(h^4)

(Hairer, Norsett, Wanner 1993, doi:10.1007/978-3-540-78862-1, section II.1.) Their steps do not depend on the rows, so
each row's solution is its own. An adaptive solver chooses steps by the error over the whole batch: it is for sampling,
not for scoring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from anomalib_gen._runtime import check_shape, scoring_dtype
from anomalib_gen.samplers._chains import SamplerInfo, as_rows
from anomalib_gen.samplers._grids import Counted, check_grid, walk

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``field(x: (B, *E), t: (B,)) -> (B, *E)``, the velocity of rows."""
ODE_METHODS = ("euler", "heun", "rk4")


@torch.no_grad()
def solve_ode(
    field: Field,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    method: str = "heun",
    thin: int | None = None,
    verbose: int = 0,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Solve dx/dt = field(x, t) with the steps of a grid.

    Parameters
    ----------
    field : callable
        ``field(x: (B, *E), t: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows at the first time.
    grid : Tensor
        ``(n_steps + 1,)``, times in the order in which they are passed, strictly rising or falling.
    method : {"euler", "heun", "rk4"}, default="heun"
        Of order 1, 2 and 4, with 1, 2 and 4 evaluations a step.
    thin : int, optional
        Keep every `thin`-th state in ``info.samples``; the default keeps none.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    x : Tensor
        ``(B, *E)``, rows at the last time. A move that would not be finite is not made.
    info : SamplerInfo
        With ``step_size`` the length of each step.
    """
    if method not in ODE_METHODS:
        raise ValueError(f"method={method!r} is unknown. Known: {', '.join(map(repr, ODE_METHODS))}.")
    grid = check_grid(grid, thin)
    counted = Counted(field)
    times = grid.tolist()

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return check_shape(counted(x, x.new_full((len(x),), t)), x.shape, "field").detach()

    def step(k: int, x: torch.Tensor) -> torch.Tensor:
        t, end = times[k], times[k + 1]
        h = end - t
        k_1 = velocity(x, t)
        if method == "euler":
            return x + h * k_1
        if method == "heun":
            return x + 0.5 * h * (k_1 + velocity(x + h * k_1, end))
        middle = t + 0.5 * h
        k_2 = velocity(x + 0.5 * h * k_1, middle)
        k_3 = velocity(x + 0.5 * h * k_2, middle)
        k_4 = velocity(x + h * k_3, end)
        return x + h / 6 * (k_1 + 2 * (k_2 + k_3) + k_4)

    return walk(step, as_rows(x), grid, counted, thin=thin, verbose=verbose, label=f"ODE ({method})")


@torch.no_grad()
def solve_ode_adaptively(
    field: Field,
    x: torch.Tensor,
    grid: torch.Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    thin: int | None = None,
) -> tuple[torch.Tensor, SamplerInfo]:
    """Solve dx/dt = field(x, t) with steps as long as a tolerance allows (Dormand and Prince's method of order 5).

    The steps are chosen by the error over all rows, so that a row's solution changes with the rows beside it, within
    the tolerance. Take it for sampling; for a score, which must be the row's own, take `solve_ode`.

    Parameters
    ----------
    field : callable
        ``field(x: (B, *E), t: (B,)) -> (B, *E)``.
    x : Tensor
        ``(B, *E)``, rows at the first time.
    grid : Tensor
        Strictly rising or falling. The solution goes from the first to the last; the times between are where states
        can be kept.
    rtol, atol : float, default=1e-5
        Tolerance of a step, relative to the rows and absolute.
    thin : int, optional
        Keep the state at every `thin`-th time after the first in ``info.samples``; the default keeps none.

    Returns
    -------
    x : Tensor
        ``(B, *E)``, rows at the last time.
    info : SamplerInfo
        With the evaluations that were needed, and no step sizes.

    Raises
    ------
    FloatingPointError
        If the tolerance cannot be met with any step, as where the field is not finite.

    References
    ----------
    Dormand, J. R., Prince, P. J. (1980). A family of embedded Runge-Kutta formulae. Journal of Computational and
    Applied Mathematics 6(1). doi:10.1016/0771-050X(80)90013-3.
    """
    from torchdiffeq import odeint

    grid = check_grid(grid, thin)
    if thin is None:
        grid = grid[[0, -1]]
    counted = Counted(field)
    exact = scoring_dtype(x.device)
    times = grid.to(device=x.device, dtype=exact)
    try:
        states = odeint(
            lambda t, x: check_shape(counted(x, t.to(x).expand(len(x))), x.shape, "field"),
            as_rows(x),
            times,
            rtol=rtol,
            atol=atol,
            method="dopri5",
            options={"dtype": exact},
        )
    except AssertionError as error:
        raise FloatingPointError(
            f"No step between the times {float(grid[0])} and {float(grid[-1])} meets rtol={rtol} and atol={atol}: "
            f"{error}. Is the field finite?"
        ) from error
    return states[-1], SamplerInfo(
        n_evaluations=counted.calls,
        step_size=(),
        divergences=torch.zeros(len(x), dtype=torch.long, device=x.device),
        samples=states[thin::thin] if thin is not None else None,
    )
