"""Closed-form denoisers against brute force, mixtures in closed form, and the Gaussians they become in the limit."""

import copy
import io
import json
import math
import subprocess
import sys

import pytest
import torch

from anomalib_gen.models import (
    GaussianMixtureEnergy,
    KernelDenoiser,
    LocalLinearDenoiser,
    ScoreDenoiser,
    empirical,
    nearest_rows,
    neighbor_scale,
    neighbors,
)
from anomalib_gen.paths import EDM, PATHS

EXACT = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def levels(x, *values):
    """Cycle through the given levels over the rows of x."""
    return torch.tensor(values, dtype=x.dtype).repeat(len(x) // len(values) + 1)[: len(x)]


def kernel(rows, **parameters):
    return KernelDenoiser(rows, EDM(), dtype=EXACT, **parameters)


def local(rows, **parameters):
    return LocalLinearDenoiser(rows, EDM(), dtype=EXACT, **parameters)


def gaussian(mean, covariance):
    """The exact denoiser of a normal."""
    factor = torch.linalg.cholesky(covariance)
    return ScoreDenoiser(
        GaussianMixtureEnergy(torch.zeros(1, dtype=EXACT), mean.unsqueeze(0), factor.unsqueeze(0)), EDM()
    )


def brute_force(x, rows):
    """Squared distances in order, and positions: equal distances by position."""
    return (x.unsqueeze(1) - rows).square().sum(2).sort(dim=1, stable=True)


MODELS = {
    "kernel": lambda rows: kernel(rows),
    "kernel of 7": lambda rows: kernel(rows, n_neighbors=7),
    "local": lambda rows: local(rows, n_neighbors=7),
    "local, many neighbours": lambda rows: local(rows, n_neighbors=30, shrinkage=0.0),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop over them runs more than once."""
    monkeypatch.setattr(neighbors, "VALUES_PER_BLOCK", 2**13)
    for module in (neighbors, empirical):
        monkeypatch.setattr(module, "ROWS_PER_BLOCK", 700)


# Neighbours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 60, 2999, 3000])
@pytest.mark.parametrize("d", [1, 4, 20])
def test_neighbours_are_those_of_brute_force(k, d, small_blocks):
    x, rows = normal(20 if k < 100 else 3, d), normal(3000, d, seed=1).float()
    found, expected = nearest_rows(x, rows, k), brute_force(x, rows.double())
    assert torch.equal(found.positions, expected.indices[:, :k])
    torch.testing.assert_close(found.squared, expected.values[:, :k], rtol=1e-13, atol=0)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_equal_distances_go_by_position(k, small_blocks):
    # A grid with many copies of each point: nearly every distance is shared by dozens of rows.
    rows = torch.randint(0, 4, (3000, 3), generator=torch.Generator().manual_seed(0))
    x = torch.cat([rows[:30], rows[:30] + 0.5]).double()
    found, expected = nearest_rows(x, rows.float(), k), brute_force(x, rows.double())
    assert torch.equal(found.positions, expected.indices[:, :k])
    for i in (0, 17, 59):
        assert torch.equal(nearest_rows(x[i : i + 1], rows.float(), k).positions, found.positions[i : i + 1])


@pytest.mark.parametrize("size", [714.0, 1e5])
def test_distances_do_not_cancel(size, small_blocks):
    # Through |x|^2 - 2 x y + |y|^2 nothing would be left of distances so small.
    centre = size * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=EXACT)
    x, rows = centre + 1e-7 * normal(10, 4), centre + 1e-7 * normal(2000, 4, seed=1)
    found, expected = nearest_rows(x, rows, 6), brute_force(x, rows)
    assert torch.equal(found.positions, expected.indices[:, :6])
    torch.testing.assert_close(found.squared, expected.values[:, :6], rtol=1e-12, atol=0)


def test_what_is_proposed_is_searched_again_only_without_proof(monkeypatch):
    x, rows, searched = normal(50, 5), normal(5000, 5, seed=1), []
    search = neighbors._search_directly
    monkeypatch.setattr(
        neighbors, "_search_directly", lambda q, *rest: searched.append(len(q)) or search(q, *rest)
    )
    nearest_rows(x, rows, 5)
    assert searched == []
    nearest_rows(x, torch.cat([rows, rows[:1].expand(100, -1)]), 5)
    assert searched == []
    nearest_rows(torch.cat([x, rows[:1]]), torch.cat([rows, rows[:1].expand(100, -1)]), 5)
    assert searched == [1]


@pytest.mark.parametrize("n", [40, 2000])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_leaving_a_row_out_is_searching_without_it(n, k):
    rows = normal(n, 3)
    rows[3] = rows[1]
    x, exclude = (
        rows[:10] + 0.2 * normal(10, 3, seed=1) * (torch.arange(10) % 2).unsqueeze(1),
        torch.arange(10),
    )
    exclude[4] = n - 1  # a row that is probably no neighbour
    found = nearest_rows(x, rows, k, exclude=exclude)
    for i, e in enumerate(exclude.tolist()):
        rest = torch.cat([torch.arange(e), torch.arange(e + 1, n)])
        expected = nearest_rows(x[i : i + 1], rows[rest], k)
        assert torch.equal(found.positions[i], rest[expected.positions[0]])
        assert torch.equal(found.squared[i], expected.squared[0])


def test_impossible_searches_are_refused():
    x, rows = normal(2, 3), normal(5, 3)
    with pytest.raises(ValueError, match="n_neighbors=6 is not between 1 and the 5 rows"):
        nearest_rows(x, rows, 6)
    with pytest.raises(ValueError, match="n_neighbors=5 is not between 1 and the 4 rows"):
        nearest_rows(x, rows, 5, exclude=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one position for each of the 2 rows"):
        nearest_rows(x, rows, 1, exclude=torch.tensor([0]))
    with pytest.raises(ValueError, match="one position for each of the 2 rows"):
        nearest_rows(x, rows, 1, exclude=torch.tensor([True, False]))
    for exclude in ([0, 5], [-1, 0]):
        with pytest.raises(ValueError, match="positions from 0 to 4"):
            nearest_rows(x, rows, 1, exclude=torch.tensor(exclude))
    assert nearest_rows(x[:0], rows, 2, exclude=torch.empty(0, dtype=torch.int64)).positions.shape == (0, 2)


# The bandwidth --------------------------------------------------------------------------------------------


def test_scale_of_a_grid_is_its_spacing():
    grid = 0.3 * torch.cartesian_prod(*[torch.arange(5, dtype=EXACT)] * 3)
    assert neighbor_scale(grid) == pytest.approx(0.3 / math.sqrt(3), rel=1e-12)
    copies = torch.cat([grid, grid, grid[:40]])
    assert neighbor_scale(copies) == pytest.approx(0.3 / math.sqrt(3), rel=1e-12)
    assert neighbor_scale(grid.reshape(-1, 1, 3, 1)) == pytest.approx(0.3 / math.sqrt(3))


def test_scale_of_uniform_rows_is_known():
    # Nearest distances on a line of N uniform points are exponential with rate 2 N: mean square 1 / (2 N^2).
    n = 20_000
    rows = torch.rand((n, 1), generator=torch.Generator().manual_seed(0), dtype=EXACT)
    assert neighbor_scale(rows) == pytest.approx(math.sqrt(0.5) / n, rel=0.08)


def test_scale_of_a_few_rows_by_hand():
    rows = torch.tensor([[0.0], [1.0], [3.0], [100.0]])  # nearest at 1, 1, 2, 97
    assert neighbor_scale(rows) == pytest.approx(math.sqrt((1 + 1 + 4 + 97**2) / 4), rel=1e-6)


def test_scale_is_never_zero():
    assert neighbor_scale(torch.ones(10, 2)) == 1.0


# The kernel form ------------------------------------------------------------------------------------------


def test_kernel_denoiser_is_the_posterior_mean_over_rows(small_blocks):
    rows, x = normal(2000, 3), 2 * normal(30, 3, seed=1)
    level = levels(x, 0.05, 0.4, 3.0)
    weights = (-0.5 * (x.unsqueeze(1) - rows).square().sum(2) / level.unsqueeze(1).square()).softmax(1)
    model = kernel(rows)
    torch.testing.assert_close(model.denoise(x, level), weights @ rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernel(rows, n_neighbors=2000).denoise(x, level), model.denoise(x, level))


def test_kernel_denoiser_is_that_of_a_mixture_of_points():
    rows, x = normal(50, 2), 2 * normal(20, 2, seed=1)
    points = 1e-7 * torch.eye(2, dtype=EXACT).expand(50, 2, 2)
    mixture = GaussianMixtureEnergy(torch.zeros(50, dtype=EXACT), rows, points)
    level = levels(x, 0.1, 0.5, 2.0)
    model = kernel(rows)
    for name, path in PATHS.items():
        truth = ScoreDenoiser(mixture, path())
        ours = KernelDenoiser(rows, path(), dtype=EXACT)
        t = path().time(levels(x, 0.3, 0.9))
        for field in ("x0", "eps", "v", "score", "velocity"):
            expected = getattr(truth.predict(x, t), field).detach()
            torch.testing.assert_close(
                getattr(ours.predict(x, t), field), expected, rtol=1e-6, atol=1e-6, msg=name
            )
    torch.testing.assert_close(
        model.log_density(x, level), -mixture.energy(x, level).detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("n_neighbors", [None, 8])
@pytest.mark.parametrize("left_out", [False, True])
def test_score_is_the_gradient_of_log_prob(n_neighbors, left_out, small_blocks):
    rows, x = normal(2000, 3), normal(12, 3, seed=1).requires_grad_()
    exclude = torch.arange(12) if left_out else None
    level, model = levels(x, 0.3, 1.0), kernel(rows, n_neighbors=n_neighbors)
    log_density = model.log_density(x, level, exclude=exclude)
    (by_autograd,) = torch.autograd.grad(log_density.sum(), x)
    score = (model.denoise(x, level, exclude=exclude) - x).detach() / level.square().unsqueeze(1)
    torch.testing.assert_close(by_autograd, score, rtol=1e-9, atol=1e-9)
    if not left_out:
        torch.testing.assert_close(model.score(x, level).detach(), score)
    x = x.detach()
    for j, step in enumerate(1e-6 * torch.eye(3, dtype=EXACT)):
        up, down = (model.log_density(x + sign * step, level, exclude=exclude) for sign in (1, -1))
        torch.testing.assert_close((up - down) / 2e-6, score[:, j], rtol=1e-5, atol=1e-5)


def test_the_derivative_of_the_denoiser_is_the_posterior_covariance():
    # s^2 dD/dx = Cov[x_0 | x], so the denoiser's divergence is known: likelihoods along the path need it.
    rows, x, s = normal(200, 2), normal(4, 2, seed=1), 0.6
    model = kernel(rows)
    weights = (-0.5 * torch.cdist(x, rows).square() / s**2).softmax(1)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: model.denoise(row.unsqueeze(0), torch.full((1,), s, dtype=EXACT))[0], x[i]
        )
        covariance = torch.cov(rows.T, aweights=weights[i], correction=0)
        torch.testing.assert_close(s**2 * jacobian, covariance, rtol=1e-8, atol=1e-10)


def test_kernel_density_integrates_to_one():
    rows = normal(30, 2)
    axis = torch.linspace(-6, 6, 241, dtype=EXACT)
    grid = torch.cartesian_prod(axis, axis)
    model, exclude = kernel(rows), torch.full((len(grid),), 3)
    for left_out in (None, exclude):
        mass = model.log_density(grid, levels(grid, 0.4), exclude=left_out).exp().sum() * 0.05**2
        assert mass.item() == pytest.approx(1, abs=1e-6)


def test_limits_of_the_kernel_denoiser():
    rows, x = normal(500, 4), 2 * normal(20, 4, seed=1)
    nearest = rows[brute_force(x, rows).indices[:, 0]]
    for model in (kernel(rows), kernel(rows, n_neighbors=5)):
        torch.testing.assert_close(model.denoise(x, levels(x, 1e-4)), nearest)
    torch.testing.assert_close(
        kernel(rows).denoise(x, levels(x, 1e7)), rows.mean(0).expand(20, -1), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_one_stored_row_is_the_answer_to_everything(name):
    row, x = normal(1, 3), 3 * normal(6, 3, seed=1)
    model = MODELS[name](row)
    torch.testing.assert_close(model.denoise(x, levels(x, 0.01, 1.0, 50.0)), row.expand(6, -1))


def test_many_normal_rows_give_the_denoiser_of_the_normal():
    mean = torch.tensor([0.5, -1.0], dtype=EXACT)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=EXACT)
    rows = mean + normal(100_000, 2) @ torch.linalg.cholesky(covariance).mT
    x = mean + normal(12, 2, seed=1)
    level = levels(x, 0.5, 1.0, 2.0)
    expected = gaussian(mean, covariance).denoise(x, level).detach()
    torch.testing.assert_close(kernel(rows).denoise(x, level), expected, rtol=0, atol=0.02)
    log_density = -gaussian(mean, covariance).model.energy(x, level).detach()
    torch.testing.assert_close(kernel(rows).log_density(x, level), log_density, rtol=0, atol=0.03)


def test_truncation_is_within_its_bound():
    rows, x, k = normal(3000, 3), normal(40, 3, seed=1), 50
    full, truncated = kernel(rows), kernel(rows, n_neighbors=k)
    squared = brute_force(x, rows).values
    reach = (x.unsqueeze(1) - rows).norm(dim=2).amax(1)
    for s, largest in ((neighbor_scale(rows), 1e-3), (0.3, 10.0)):
        level = levels(x, s)
        bound = (3000 - k) * torch.exp(-0.5 * (squared[:, k - 1] - squared[:, 0]) / s**2)
        shift = (full.denoise(x, level) - truncated.denoise(x, level)).norm(dim=1)
        assert (shift <= 2 * reach * bound + 1e-12).all()
        assert shift.median() < largest
        lost = full.log_density(x, level) - truncated.log_density(x, level)
        assert (lost > -1e-12).all()
        assert (lost <= bound + 1e-12).all()


# The local-linear form ------------------------------------------------------------------------------------


def test_local_linear_over_all_rows_is_the_denoiser_of_their_normal():
    rows, x = normal(300, 3) @ normal(3, 3, seed=2) + 1, 2 * normal(20, 3, seed=1)
    level = levels(x, 0.01, 0.5, 3.0)
    model = local(rows, n_neighbors=300, shrinkage=0.0)
    expected = gaussian(rows.mean(0), torch.cov(rows.T, correction=0)).denoise(x, level).detach()
    torch.testing.assert_close(model.denoise(x, level), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "d"), [(5, 12), (12, 5), (8, 8), (1, 3)])
def test_local_linear_is_the_denoiser_of_the_neighbours_normal(k, d):
    rows, x, shrinkage = normal(200, d), normal(9, d, seed=1), 0.3
    level = levels(x, 0.2, 1.0, 4.0)
    model = local(rows, n_neighbors=k, shrinkage=shrinkage)
    index = brute_force(x, rows).indices
    for i in range(len(x)):
        near = rows[index[i, :k]]
        mean = near.mean(0)
        covariance = (near - mean).T @ (near - mean) / k
        covariance += shrinkage * covariance.trace() / d * torch.eye(d, dtype=EXACT)
        noisy = covariance + level[i] ** 2 * torch.eye(d, dtype=EXACT)
        v = x[i] - mean
        expected = mean + covariance @ torch.linalg.solve(noisy, v)
        torch.testing.assert_close(model.denoise(x, level)[i], expected, rtol=1e-9, atol=1e-10)
        # The square of the distance is (l + s^2) times the Mahalanobis distance.
        isotropic = level[i] ** 2 + covariance.trace() / d * shrinkage / (1 + shrinkage)
        expected = (isotropic * v @ torch.linalg.solve(noisy, v)).sqrt()
        torch.testing.assert_close(model.distance(x, level)[i], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("k", "shrinkage"), [(20, 0.3), (10, 1.0), (4, 0.0)])
@pytest.mark.parametrize("d", [3, 30])
def test_distance_is_the_residual_of_a_ridge_regression_on_neighbours(k, shrinkage, d):
    rows, x = normal(500, d), normal(15, d, seed=1)
    level = levels(x, math.sqrt(1e-5) if shrinkage else 0.1)
    model = local(rows, n_neighbors=k, shrinkage=shrinkage)
    distance, clean = model.distance(x, level), model.denoise(x, level)
    near = rows[brute_force(x, rows).indices[:, :k]]
    v = x - near.mean(1)
    Z = (near - near.mean(1, keepdim=True)) / math.sqrt(k)
    G = Z @ Z.mT
    c = shrinkage * G.diagonal(dim1=1, dim2=2).sum(1) / d + level.square()
    Zv = (Z @ v.unsqueeze(2)).squeeze(2)
    ridge = G + c.reshape(-1, 1, 1) * torch.eye(k, dtype=EXACT)
    formula = (v.square().sum(1) - (Zv * torch.linalg.solve(ridge, Zv)).sum(1)).sqrt()
    torch.testing.assert_close(distance, formula, rtol=1e-8, atol=1e-10)
    # The least of |v - Z^T w|^2 + c |w|^2, as least squares with k more equations.
    design = torch.cat([Z.mT, c.sqrt().reshape(-1, 1, 1) * torch.eye(k, dtype=EXACT).expand(15, k, k)], dim=1)
    target = torch.cat([v, torch.zeros(15, k, dtype=EXACT)], dim=1).unsqueeze(2)
    left = target - design @ torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(distance, left.flatten(1).norm(dim=1), rtol=1e-8, atol=1e-10)
    # What the denoiser leaves, seen along v.
    along = (v * (x - clean)).sum(1) * c / level.square()
    torch.testing.assert_close(distance.square(), along, rtol=1e-6, atol=1e-9)


def test_limits_of_the_local_linear_denoiser():
    rows, x, k = normal(300, 6), normal(10, 6, seed=1), 4
    near = rows[brute_force(x, rows).indices[:, :k]]
    mean = near.mean(1)
    torch.testing.assert_close(local(rows, n_neighbors=k).denoise(x, levels(x, 1e7)), mean)
    # Without noise: the row itself, or, if the neighbours' span is all that is known, the foot on it.
    torch.testing.assert_close(local(rows, n_neighbors=k).denoise(x, levels(x, 1e-7)), x)
    foot = local(rows, n_neighbors=k, shrinkage=0.0).denoise(x, levels(x, 1e-6))
    span = (near[:, 1:] - near[:, :1]).mT
    expected = near[:, 0] + (span @ torch.linalg.lstsq(span, (x - near[:, 0]).unsqueeze(2)).solution).squeeze(
        2
    )
    torch.testing.assert_close(foot, expected, rtol=1e-6, atol=1e-6)


def test_equal_neighbours_are_a_point():
    rows = torch.ones(30, 3, dtype=EXACT)
    x = normal(5, 3)
    model = local(rows)
    torch.testing.assert_close(model.denoise(x, levels(x, 0.1)), rows[:5])
    torch.testing.assert_close(model.distance(x, levels(x, 0.1)), (x - 1).norm(dim=1))


# What all of them keep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_leaving_a_row_out_is_a_model_without_it(name, small_blocks):
    rows = normal(1000, 3)
    rows[5] = rows[2]  # a copy stays in sight
    exclude = torch.tensor([0, 2, 5, 701, 999, 999])
    x = rows[exclude]
    x[-1] += 1
    level = levels(x, 0.1, 0.7)
    model = MODELS[name](rows)
    found = model.denoise(x, level, exclude=exclude)
    for i, e in enumerate(exclude.tolist()):
        without = MODELS[name](torch.cat([rows[:e], rows[e + 1 :]]))
        torch.testing.assert_close(
            found[i], without.denoise(x[i : i + 1], level[i : i + 1])[0], rtol=1e-12, atol=1e-12
        )
        other = "distance" if "local" in name else "log_density"
        torch.testing.assert_close(
            getattr(model, other)(x, level, exclude=exclude)[i],
            getattr(without, other)(x[i : i + 1], level[i : i + 1])[0],
            rtol=1e-12,
            atol=1e-12,
        )
    with pytest.raises(ValueError, match="only stored row cannot be left out"):
        MODELS[name](rows[:1]).denoise(x[:1], level[:1], exclude=torch.tensor([0]))
    with pytest.raises(ValueError, match="positions from 0 to 999"):
        model.denoise(x, level, exclude=exclude + 1)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("kind", ["dense", "grid", "far"])
def test_a_row_s_value_depends_on_that_row_alone(name, kind):
    rows, x = normal(2000, 4), normal(65, 4, seed=1)
    if kind == "grid":
        rows, x = rows.round(), x.round()
    if kind == "far":
        x = 700 * x.sign()
    level, model = levels(x, 0.05, 1.0), MODELS[name](rows)
    with torch.inference_mode():
        together = model.denoise(x, level)
        assert torch.equal(together, model.denoise(x, level))
        order = torch.arange(len(x)).flip(0)
        torch.testing.assert_close(
            model.denoise(x[order], level[order])[order], together, rtol=1e-9, atol=1e-9
        )
        for i in (0, 1, 64):
            alone = model.denoise(x[i : i + 1], level[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)
        assert model.denoise(x[:0], level[:0]).shape == (0, 4)


@pytest.mark.parametrize("name", list(MODELS))
def test_far_rows_leave_a_residual_that_grows(name):
    rows = normal(1000, 4)
    rows[0] = 714.0  # one stored row is as far as rows can be
    model = MODELS[name](rows)
    direction = torch.tensor([[1.0, -1.0, 0.3, -0.2]], dtype=EXACT)
    x = torch.linspace(6, 714, 60, dtype=EXACT).unsqueeze(1) * direction
    for s in (0.002, 0.05, 1.0, 80.0):
        residual = (x - model.denoise(x, levels(x, s))).norm(dim=1)
        assert residual.isfinite().all()
        assert (residual.diff() > 0).all()
        if "local" not in name:
            log_density = model.log_density(x, levels(x, s))
            assert log_density.isfinite().all()
            assert (log_density.diff() < 0).all()
        else:
            assert (model.distance(x, levels(x, s)).diff() > 0).all()


@pytest.mark.parametrize("name", list(MODELS))
def test_events_of_any_shape(name):
    rows, x = normal(60, 12), normal(7, 12, seed=1)
    level = levels(x, 0.5)
    images = MODELS[name](rows.reshape(60, 3, 2, 2))
    expected = MODELS[name](rows).denoise(x, level)
    torch.testing.assert_close(images.denoise(x.reshape(7, 3, 2, 2), level), expected.reshape(7, 3, 2, 2))
    assert images.score(x.reshape(7, 3, 2, 2), level).shape == (7, 3, 2, 2)


def test_rows_stay_as_compact_as_they_were_stored():
    rows, x = normal(100, 3), normal(5, 3, seed=1)
    for dtype in (torch.float32, torch.float16):
        model = KernelDenoiser(rows, EDM(), dtype=dtype)
        stored = model.rows.clone()
        moved = copy.deepcopy(model).double().half().to("cpu", torch.float64)
        assert moved.rows.dtype == dtype
        assert torch.equal(moved.rows, stored)
        level = levels(x, 0.3)
        # Rows are rounded, the arithmetic is not; results come in the precision of the queries.
        expected = kernel(stored.double()).denoise(x, level)
        torch.testing.assert_close(moved.denoise(x, level), expected, rtol=1e-12, atol=1e-12)
        assert model.denoise(x.float(), level.float()).dtype == torch.float32
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = KernelDenoiser(torch.zeros_like(rows), EDM(), dtype=dtype)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other.rows, stored)
    rows_before = rows.clone()
    model = kernel(rows)
    rows += 1
    assert torch.equal(model.rows, rows_before)


def test_impossible_models_are_refused():
    rows = normal(5, 3)
    with pytest.raises(ValueError, match=r"shape \(N, \*E\) with N >= 1"):
        kernel(rows[:0])
    with pytest.raises(ValueError, match=r"shape \(N, \*E\) with N >= 1"):
        kernel(rows[0])
    with pytest.raises(ValueError, match="n_neighbors must be at least 1"):
        local(rows, n_neighbors=0)
    with pytest.raises(ValueError, match="shrinkage must not be negative"):
        local(rows, shrinkage=-0.1)
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        KernelDenoiser(rows, EDM(), dtype=torch.int64)


# A million rows -------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, threading, time
import psutil, torch
from anomalib_gen.models import KernelDenoiser, LocalLinearDenoiser, nearest_rows
from anomalib_gen.paths import EDM

torch.set_num_threads(1)
process = psutil.Process()
generator = torch.Generator().manual_seed(0)
rows = torch.randn((1_000_000, 10), generator=generator)
x = torch.randn((2000, 10), generator=generator, dtype=torch.float64)
level = torch.full((2000,), 0.3, dtype=torch.float64)
models = {
    "kernel": (KernelDenoiser(rows, EDM(), n_neighbors=50), 2000),
    "local": (LocalLinearDenoiser(rows, EDM()), 200),
    "all rows": (KernelDenoiser(rows, EDM()), 100),
}
grid = rows.round()
for model, _ in models.values():  # libraries load on first use
    type(model)(rows[:1000], EDM()).denoise(x[:5], level[:5])
peak, done, figures = 0, threading.Event(), {}

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

threading.Thread(target=watch).start()
with torch.inference_mode():
    for name, (model, n) in models.items():
        before = peak = process.memory_info().rss
        start = time.perf_counter()
        clean = model.denoise(x[:n], level[:n])
        figures[name] = {"bytes": peak - before, "seconds": time.perf_counter() - start}
        assert clean.isfinite().all()
    before = peak = process.memory_info().rss
    start = time.perf_counter()
    found = nearest_rows(x[:100].round(), grid, 20)  # without proof, so every one is searched again
    figures["grid"] = {"bytes": peak - before, "seconds": time.perf_counter() - start}
done.set()
for i in range(0, 100, 25):
    exact = (x[i] - rows.double()).square().sum(1).sort(stable=True)
    assert torch.equal(nearest_rows(x[i : i + 1], rows, 50).positions[0], exact.indices[:50])
    exact = (x[i].round() - grid.double()).square().sum(1).sort(stable=True)
    assert torch.equal(found.positions[i], exact.indices[:20])
print(json.dumps(figures))
"""


@pytest.mark.slow
def test_a_million_rows_take_memory_for_a_block():
    pytest.importorskip("psutil")
    printed = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    figures = json.loads(printed.stdout)
    print(figures)
    # The distances of 2,000 queries to all rows would be 16 GB.
    assert all(found["bytes"] < 120e6 for found in figures.values())
