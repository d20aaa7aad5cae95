"""Solvers of ordinary differential equations: known solutions, orders of convergence, and whose solution it is."""

import math

import pytest
import torch

from anomalib_gen.paths import PATHS, VariancePreserving
from anomalib_gen.samplers import solve_ode, solve_ode_adaptively
from anomalib_gen.samplers.ode import ODE_METHODS

ORDERS = {"euler": 1, "heun": 2, "rk4": 4}
EVALUATIONS = {"euler": 1, "heun": 2, "rk4": 4}
each_method = pytest.mark.parametrize("method", ODE_METHODS)


def times(start, end, n):
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(x, t):
    """dx/dt = cos(t) x (1 - x), whose solution is 1 / (1 + (1 / x_0 - 1) exp(sin t_0 - sin t))."""
    return t.cos().unsqueeze(1) * x * (1 - x)


def logistic_solution(x, start, end):
    return 1 / (1 + (1 / x - 1) * math.exp(math.sin(start) - math.sin(end)))


def observed_order(error, n):
    """Slope of log error over log steps."""
    return math.log2(error(n) / error(2 * n))


@each_method
@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.5)])
def test_order_on_a_known_solution(method, start, end):
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).unsqueeze(1)
    truth = logistic_solution(x, start, end)

    def error(n):
        return float((solve_ode(logistic, x, times(start, end, n), method=method)[0] - truth).abs().max())

    assert observed_order(error, 40) == pytest.approx(ORDERS[method], abs=0.1)
    assert error(40) < 10.0 ** -(ORDERS[method] + 1)


@each_method
@pytest.mark.parametrize("name", ["vp", "linear", "edm"])
def test_order_on_the_probability_flow_of_a_gaussian(method, name):
    """Along the flow of N(0, v) the row keeps its place: x / sqrt(alpha^2 v + sigma^2) is constant."""
    path, v, x = PATHS[name](), 0.3, rows(6, 2)
    # A range in which no step is long for the equation.
    start, end = (2.0, 0.5) if name == "edm" else (0.6, 0.2)

    def denoise(y, level):
        return (v / (v + level.square())).unsqueeze(1) * y

    def width(t):
        t = torch.tensor(t, dtype=torch.float64)
        return (path.alpha(t).square() * v + path.sigma(t).square()).sqrt()

    def error(n):
        solution, _ = solve_ode(path.velocity(denoise), x, times(start, end, n), method=method)
        return float((solution - x * width(end) / width(start)).abs().max())

    assert observed_order(error, 40) == pytest.approx(ORDERS[method], abs=0.15)


@each_method
def test_there_and_back(method):
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = times(0, 1, 400).square()
    there, _ = solve_ode(logistic, x, grid, method=method)
    back, _ = solve_ode(logistic, there, grid.flip(0), method=method)
    torch.testing.assert_close(back, x, rtol=0, atol={"euler": 3e-3, "heun": 3e-6, "rk4": 1e-11}[method])


@each_method
def test_what_is_reported(method):
    calls = []

    def field(x, t):
        assert t.shape == (4,)
        assert t.dtype == x.dtype == torch.float32
        calls.append(float(t[0]))
        return -x

    x, info = solve_ode(field, torch.ones(4, 2, 3, 3), torch.tensor([0.0, 0.1, 0.4]), method=method, thin=1)
    assert x.shape == (4, 2, 3, 3)
    assert x.dtype == torch.float32
    assert info.n_evaluations == len(calls) == 2 * EVALUATIONS[method]
    assert info.step_size == pytest.approx((0.1, 0.3))
    assert info.samples.shape == (2, 4, 2, 3, 3)
    assert torch.equal(info.samples[-1], x)
    assert info.divergences.tolist() == [0] * 4
    assert solve_ode(field, x, torch.tensor([0.0, 0.1]), method=method)[1].samples is None


@each_method
def test_a_row_s_solution_is_its_own(method):
    x = rows(20, 3)
    field = lambda x, t: torch.sin(3 * x) + t.unsqueeze(1)  # noqa: E731
    together, _ = solve_ode(field, x, times(0, 1, 7), method=method)
    alone, _ = solve_ode(field, x[3:4], times(0, 1, 7), method=method)
    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=1e-15)


def test_moves_that_are_not_finite_are_not_made():
    x = torch.tensor([[1.0], [math.inf], [2.0]], dtype=torch.float64)
    field = lambda x, t: torch.where(x == 2, math.nan, -x)  # noqa: E731
    end, info = solve_ode(field, x, times(0, 1, 5), method="euler")
    assert info.divergences.tolist() == [0, 5, 5]
    torch.testing.assert_close(end, torch.tensor([[0.8**5], [math.inf], [2.0]], dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_errors_of_adaptive_steps_follow_the_tolerance(mode):
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).unsqueeze(1)
    truth, evaluations = logistic_solution(x, 0.0, 3.0), []
    with mode():
        for tolerance in (1e-3, 1e-6, 1e-9):
            end, info = solve_ode_adaptively(
                logistic, x, torch.tensor([0.0, 3.0]), rtol=tolerance, atol=tolerance
            )
            # The tolerance is that of one step; errors of the steps add up.
            assert float((end - truth).abs().max()) < info.n_evaluations / 6 * tolerance
            assert not end.requires_grad
            evaluations.append(info.n_evaluations)
    assert evaluations[0] < evaluations[1] < evaluations[2]


def test_adaptive_steps_keep_states_on_the_grid():
    x, grid = torch.full((3, 2), 0.2), times(2.0, 0.5, 6)
    end, info = solve_ode_adaptively(logistic, x, grid, thin=2)
    assert end.dtype == torch.float32
    assert info.samples.shape == (3, 3, 2)
    assert torch.equal(info.samples[-1], end)
    for state, t in zip(info.samples, grid[2::2].tolist(), strict=True):
        torch.testing.assert_close(state, logistic_solution(x, 2.0, t), rtol=1e-4, atol=1e-4)


def test_adaptive_steps_are_those_of_the_whole_batch():
    """The reason why they are not for scoring."""
    field = lambda x, t: -x * (1 + 20 * x.square())  # noqa: E731
    grid, x = torch.tensor([0.0, 1.0]), torch.tensor([[0.1], [5.0]], dtype=torch.float64)
    _, alone = solve_ode_adaptively(field, x[:1], grid)
    _, together = solve_ode_adaptively(field, x, grid)
    assert together.n_evaluations > 2 * alone.n_evaluations


def test_mistakes_are_refused():
    x, field = rows(2, 2), lambda x, t: -x
    with pytest.raises(ValueError, match="method='rk5' is unknown"):
        solve_ode(field, x, times(0, 1, 2), method="rk5")
    for grid in ([0.0], [0.0, 1.0, 0.5], [0.0, 0.0], [0.0, math.inf], [[0.0, 1.0]]):
        for solve in (solve_ode, solve_ode_adaptively):
            with pytest.raises(ValueError, match="grid must"):
                solve(field, x, torch.tensor(grid))
    for solve in (solve_ode, solve_ode_adaptively):
        with pytest.raises(ValueError, match=r"field returned .* shape \(2, 1\) for 2 rows; shape \(2, 2\)"):
            solve(lambda x, t: -x[:, :1], x, times(0, 1, 2))
        with pytest.raises(ValueError, match=r"got torch.float64 \(2,\)"):
            solve(field, x[:, 0], times(0, 1, 2))
    with pytest.raises(ValueError, match="thin"):
        solve_ode(field, x, times(0, 1, 2), thin=0)
    with pytest.raises(FloatingPointError, match="Is the field finite"):
        solve_ode_adaptively(lambda x, t: x * math.nan, x, times(0, 1, 2))


def test_progress_is_shown_on_request(capsys):
    solve_ode(VariancePreserving().velocity(lambda y, s: y), rows(2, 2), times(1, 0.5, 3))
    assert capsys.readouterr().err == ""
    solve_ode(lambda x, t: x, rows(2, 2), times(1, 0.5, 3), verbose=1)
    assert "100%" in capsys.readouterr().err
