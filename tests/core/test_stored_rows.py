"""Stored rows in three coordinates: residuals that agree with the closed-form denoisers, and ranks with their law."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch

from anomalib_gen import DiffusionDetector, _runtime
from anomalib_gen.models import KernelDenoiser, LocalLinearDenoiser, Memory
from anomalib_gen.models import memory as module
from anomalib_gen.models._stored import even_choice, row_keys
from anomalib_gen.networks import compress_tails
from anomalib_gen.paths import EDM

PATH = EDM()


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(rows):
    memory = Memory(rows.shape[1])
    memory.remember(rows.split(97))
    return memory


def test_tails_are_expanded_and_far_rows_stay_apart():
    z = torch.tensor([[-40.0], [0.3], [7.0], [1e12]], dtype=torch.float64)
    standard, arsinh, _ = stored(draw(30, 1)).coordinates(compress_tails(z)[0])
    torch.testing.assert_close(standard, z)
    torch.testing.assert_close(arsinh, z.asinh())
    far = stored(draw(30, 1)).coordinates(torch.tensor([[38.0], [45.0], [714.0]], dtype=torch.float64))
    assert torch.isfinite(torch.stack(list(far))).all()
    assert bool((far[1].diff(dim=0) > 0).all())


def test_rows_come_back_as_they_were_given():
    rows = draw(300, 4)
    memory = stored(rows)
    assert len(memory) == 300
    torch.testing.assert_close(memory.rows[0].double(), rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(memory.rows[1].double(), rows.asinh(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [300, 5000])
def test_rank_coordinates_are_normal_scores(n):
    rows = draw(n, 2).exp()  # skewed: the ranks do not care
    y = stored(rows).coordinates(rows)[2]
    expected = scipy.stats.norm.ppf(scipy.stats.rankdata(rows.numpy(), axis=0) / (n + 1))
    np.testing.assert_allclose(y, expected, atol=0.02)
    np.testing.assert_allclose(y[:, 0].std(), 1.0, atol=0.02)


def test_ties_share_their_midrank_and_values_beyond_the_ends_stand_out():
    rows = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    y = (
        stored(rows)
        .coordinates(torch.tensor([[0.0], [1.0], [-5.0], [4.0]], dtype=torch.float64))[2]
        .flatten()
    )
    n = 4
    midranks = [1.5, 3.5, 0.0, 4.0]  # of equal values the mean of the ranks, counted from their lower edges
    expected = scipy.stats.norm.ppf([(r + 0.5) / (n + 1) for r in midranks])
    expected += [
        0,
        0,
        -np.log(5),
        np.log(3),
    ]  # 4 and 2 beyond the ends, which are a cell of the grid beyond the values
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_ranks_of_a_gaussian_go_on_with_the_slope_that_they_have_within():
    """Its normal scores are its standardised values."""
    memory = stored(draw(20_000, 1))
    end = float(memory.knots[0, -1])
    z = torch.tensor([[-1.0], [0.5], [2.0], [end], [end + 1e-3], [end + 99]], dtype=torch.float64)
    y = memory.coordinates(compress_tails(z)[0])[2]
    torch.testing.assert_close(y[:4], z[:4], rtol=0, atol=0.3)
    beyond = (y[4:] - y[3]).flatten()
    torch.testing.assert_close(
        beyond, torch.tensor([1e-3, np.log(100)], dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("skewed", [False, True])
def test_what_lies_beyond_is_the_more_surprising_the_farther_out(skewed):
    """In every coordinate, and as long as doubles tell it from what lies less far out."""
    rows = draw(500, 2).exp() if skewed else draw(500, 2)
    out = torch.tensor([6.0, 10.0, 100.0, 1e4, 1e8], dtype=torch.float64)
    for x in (torch.stack([out, out * 0], dim=1), torch.stack([-out, out], dim=1)):
        surprise = stored(compress_tails(rows)[0]).surprise(compress_tails(10 * x)[0])
        assert bool((surprise.diff(dim=1) > 0).all())


def test_a_constant_column_has_a_place_for_what_is_new():
    y = (
        stored(torch.zeros(50, 1, dtype=torch.float64))
        .coordinates(torch.tensor([[0.0], [3.0], [-3.0]], dtype=torch.float64))[2]
        .flatten()
    )
    assert float(y[0]) == pytest.approx(0.0, abs=1e-6)
    assert y[1] > 2
    assert y[2] < -2


def test_residuals_are_those_of_the_closed_form_denoisers():
    rows, queries = draw(400, 3), 1.5 * draw(20, 3, seed=1)
    memory = stored(rows)
    found = memory.residuals(queries)
    for v, y in enumerate(memory.coordinates(queries)):
        kernel = KernelDenoiser(memory.rows[v], PATH, n_neighbors=module.KERNEL_NEIGHBORS)
        level = memory.bandwidths[v].expand(20)
        torch.testing.assert_close(found[v], (y - kernel.denoise(y, level)).norm(dim=1))
        linear = LocalLinearDenoiser(memory.rows[v], PATH, n_neighbors=20, shrinkage=0.3)
        torch.testing.assert_close(
            found[3 + v], linear.distance(y, torch.full((20,), module.LEAST_VARIANCE**0.5))
        )


def test_a_row_that_is_left_out_is_as_if_it_were_not_stored():
    rows = draw(60, 2)
    memory = stored(rows)
    without = copy.deepcopy(memory)
    without.rows = torch.cat([memory.rows[:, :7], memory.rows[:, 8:]], dim=1)
    torch.testing.assert_close(
        memory.residuals(rows[7:8], exclude=torch.tensor([7])), without.residuals(rows[7:8])
    )


def test_new_normal_rows_are_as_surprising_as_left_out_ones():
    memory = stored(draw(2000, 3))
    surprise = memory.surprise(draw(4000, 3, seed=1))
    # The surprise of what follows the law of the reference is exponential up to its 90 % quantile.
    share = (surprise > np.log(10)).double().mean(1)
    np.testing.assert_allclose(share, 0.1, atol=0.025)
    np.testing.assert_allclose(surprise.median(1).values, np.log(2), atol=0.08)


def test_copies_of_a_row_do_not_shrink_the_bandwidth():
    rows = draw(200, 2)
    assert float(stored(rows).bandwidths[0]) == pytest.approx(float(stored(rows.repeat(3, 1)).bandwidths[0]))


def test_more_rows_are_added_or_take_the_place_of_others(monkeypatch):
    memory = stored(draw(30, 2))
    memory.remember([draw(20, 2, seed=1)], keep=True)
    assert len(memory) == 50
    memory.remember([draw(10, 2, seed=2)])
    assert len(memory) == 10
    monkeypatch.setattr(module, "MAX_STORED_ROWS", 25)
    memory.remember([draw(60, 2)])
    assert len(memory) == 25
    # A full memory takes a single new row, in place of the oldest.
    oldest = memory.rows[0, 1:].clone()
    memory.remember([torch.full((1, 2), 0.25, dtype=torch.float64)], keep=True)
    torch.testing.assert_close(memory.rows[0, :-1], oldest)
    assert memory.rows[0, -1].tolist() == [0.25, 0.25]
    assert even_choice(60, 25).diff().unique().tolist() == [2, 3]
    assert even_choice(3, 25).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(4,), (1, 8, 8)])
def test_wide_rows_are_fewer(shape, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(190, *shape))
    per_row = 12 if len(shape) == 1 else 64 + 2 * 108
    monkeypatch.setattr(module, "MAX_STORED_VALUES", 50 * per_row)
    monkeypatch.setattr(
        _runtime, "scoring_block_rows", lambda *_: 7
    )  # blocks of another size than the choice
    detector = DiffusionDetector(
        denoiser="closed-form", validation_fraction=0.0, random_state=0, device="cpu"
    )
    memory = detector.fit(rows).model_.memory
    assert memory.capacity == 50
    assert len(memory) == 50
    monkeypatch.setattr(module, "MAX_STORED_VALUES", 2**29)
    every = detector.fit(rows).model_.memory.rows
    torch.testing.assert_close(memory.rows[0], every[0, even_choice(190, 50)])


def test_copies_share_what_is_stored_and_can_be_told_anew_apart():
    memory = stored(draw(30, 2))
    other = copy.deepcopy(memory)
    assert other.rows is memory.rows
    other.remember([draw(10, 2)])
    assert (len(other), len(memory)) == (10, 30)


def test_a_state_goes_into_an_empty_memory_and_precision_stays():
    memory = stored(draw(30, 2)).double()
    assert (memory.rows.dtype, memory.reference.dtype) == (torch.float32, torch.float64)
    empty = Memory(2)
    empty.load_state_dict(memory.state_dict())
    x = draw(5, 2, seed=3)
    torch.testing.assert_close(empty.surprise(x), memory.surprise(x), rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_rows_are_enough(n):
    memory = stored(draw(n, 2))
    assert torch.isfinite(memory.surprise(draw(5, 2, seed=1))).all()


def test_equal_rows_alone_are_enough():
    memory = stored(torch.ones(40, 2, dtype=torch.float64))
    surprise = memory.surprise(torch.tensor([[1.0, 1.0], [2.0, 1.0], [5.0, 1.0]], dtype=torch.float64))
    assert torch.isfinite(surprise).all()
    assert bool((surprise[0].diff() > 0).all())


def test_keys_tell_rows_apart_and_are_alike_for_equal_ones():
    grid = torch.cartesian_prod(torch.arange(40.0), torch.arange(40.0), torch.arange(10.0))
    assert len(row_keys(grid).unique()) == len(grid)
    assert len(row_keys(draw(20_000, 3)).unique()) == 20_000
    x = draw(50, 3).float()
    torch.testing.assert_close(row_keys(x.double()), row_keys(x), rtol=0, atol=0)
    torch.testing.assert_close(row_keys(x)[7:9], row_keys(x[7:9]), rtol=0, atol=0)
    assert int(row_keys(torch.tensor([[0.0, 1.0]]))) == int(row_keys(torch.tensor([[-0.0, 1.0]])))
