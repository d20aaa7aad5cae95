"""Matching of images whose parts may move, and its share in what stored images say."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from anomalib_gen.models import matching
from anomalib_gen.models.matching import STIFFNESS, matching_distances, shapes_of, unmatched
from anomalib_gen.models.memory import ImageMemory


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def strokes(*boxes, size=28):
    """An image with bright boxes, each (top, left, bottom, right)."""
    image = torch.zeros(1, 1, size, size)
    for top, left, bottom, right in boxes:
        image[..., top:bottom, left:right] = 1.0
    return image


def distance(x, y):
    return float(matching_distances(shapes_of(x), shapes_of(y)[:, None]))


def by_hand(x, y, reach, stiffness=0.0):
    """Equation 5, term by term."""
    _, h, w = x.shape

    def at(g, i, j):
        return g[:, i, j] if 0 <= i < h and 0 <= j < w else torch.zeros(2)

    around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    moves = [(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)]
    places = [(i, j) for i in range(h) for j in range(w)]

    def error(p, t):
        differences = [at(x, p[0] + a, p[1] + b) - at(y, p[0] + a + t[0], p[1] + b + t[1]) for a, b in around]
        return sum(float(d.square().sum()) for d in differences) / 9

    errors = {p: {t: error(p, t) for t in moves} for p in places}
    if stiffness == 0:
        return sum(min(errors[p].values()) for p in places)
    there = {p: sum(float(at(x, p[0] + a, p[1] + b).square().sum()) for a, b in around) / 9 for p in places}
    moved = {p: np.array(min(moves, key=lambda t: (errors[p][t], t[0] ** 2 + t[1] ** 2))) for p in places}
    total = 0.0
    for p in places:
        near = [q for q in places if max(abs(q[0] - p[0]), abs(q[1] - p[1])) <= 3]
        mean = sum(there[q] * moved[q] for q in near) / sum(there[q] for q in near)
        total += min(
            errors[p][t] + stiffness * there[p] * float(((np.array(t) - mean) ** 2).sum()) for t in moves
        )
    return total


@pytest.mark.parametrize("stiffness", [0.0, 0.3])
@pytest.mark.parametrize(
    ("size", "reach"), [((6, 6), 1), ((5, 9), 1), ((1, 4), 1), ((21, 2), 2), ((1, 28), 2)]
)
def test_distances_are_those_of_the_definition(size, reach, stiffness):
    x, y = (shapes_of(noise(1, 1, *size, seed=seed)) for seed in (0, 1))
    there, back = unmatched(x, y, stiffness=stiffness)
    assert float(there.sum()) == pytest.approx(by_hand(x[0], y[0], reach, stiffness), rel=1e-5)
    assert float(back.sum()) == pytest.approx(by_hand(y[0], x[0], reach, stiffness), rel=1e-5)
    assert float(matching_distances(x, y[:, None], stiffness=stiffness)) == pytest.approx(
        max(float(there.sum()), float(back.sum()))
    )


def test_what_moves_together_costs_nothing_and_what_comes_apart_costs_more():
    texture = F.pad(noise(1, 1, 16, 16), [6] * 4)
    moved = shapes_of(texture.roll((2, -1), dims=(2, 3)))
    assert float(matching_distances(shapes_of(texture), moved[:, None], stiffness=STIFFNESS)) < 1e-4
    # Two halves of a stroke that move apart.
    apart = strokes((7, 6, 14, 9), (14, 10, 21, 13))
    line = strokes((7, 8, 21, 11))
    free, stiff = (
        float(matching_distances(shapes_of(line), shapes_of(apart)[:, None], stiffness=k)) for k in (0, 0.1)
    )
    assert stiff > 1.1 * free
    images = shapes_of(torch.from_numpy(load_digits().images[:40] / 16.0).unsqueeze(1))
    free, stiff = (matching_distances(images[:20], images[20:, None], stiffness=k) for k in (0, 0.1))
    assert (stiff >= free - 1e-6).all()
    shifted = shapes_of((texture * 7 + 3).roll((0, 1), dims=(2, 3)))
    assert all((part >= 0).all() for part in unmatched(shapes_of(texture), shifted, stiffness=STIFFNESS))


def test_blank_images_match():
    blank = torch.zeros(1, 2, 8, 8)
    assert float(matching_distances(blank, blank[:, None], stiffness=0.1)) == 0


def test_shapes_are_gradients_of_the_channel_in_which_they_are_longest():
    images = noise(2, 3, 7, 5)
    padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    sobel = np.outer([1, 2, 1], [-1, 0, 1])
    expected = np.zeros((2, 2, 7, 5))
    for n, i, j in np.ndindex(2, 7, 5):
        windows = padded[n, :, i : i + 3, j : j + 3]
        found = [[(window * sobel).sum(), (window * sobel.T).sum()] for window in windows]
        expected[n, :, i, j] = max(found, key=np.linalg.norm)
    expected /= np.sqrt((expected**2).sum((1, 2, 3), keepdims=True) + 0.04**2)
    np.testing.assert_allclose(shapes_of(images), expected, atol=1e-6)


def test_an_image_matches_itself_moved_brighter_and_with_more_contrast():
    x = strokes((8, 8, 20, 11), (8, 8, 11, 20))
    assert distance(x, x) == 0
    assert distance(x, x.roll((2, -1), dims=(2, 3))) < 1e-6
    assert distance(x, 3 * x + 1) < 1e-3
    assert distance(x, x.roll((5, 0), dims=(2, 3))) > 0.1
    # The parts may move apart from one another.
    apart = strokes((9, 6, 21, 9), (7, 10, 10, 22))
    assert distance(x, apart) < 0.2 * distance(x, strokes((8, 17, 20, 20), (17, 8, 20, 20)))


def test_too_much_and_too_little_both_count():
    less = strokes((8, 8, 20, 11))
    more = strokes((8, 8, 20, 11), (4, 20, 24, 23))
    there, back = (part.sum() for part in unmatched(shapes_of(more), shapes_of(less)))
    assert there > 2 * back  # of the stroke that only the first has
    assert distance(less, more) == pytest.approx(distance(more, less))
    assert distance(less, more) > 0.3


def test_strokes_that_are_nowhere_near_one_another_are_at_least_one_apart():
    left, right = strokes((4, 2, 24, 5)), strokes((4, 22, 24, 25))
    assert 1 <= distance(left, right) <= 2
    # An empty image leaves all of the other unmatched, and nothing is left of it.
    assert distance(left, torch.zeros(1, 1, 28, 28)) == pytest.approx(1, abs=1e-4)


def test_large_images_are_compared_at_32_pixels():
    assert shapes_of(noise(2, 3, 200, 100)).shape == (2, 2, 32, 16)
    assert shapes_of(noise(2, 1, 32, 20)).shape == (2, 2, 32, 20)
    assert shapes_of(noise(1, 1, 1, 90)).shape == (1, 2, 1, 32)
    large = F.interpolate(noise(1, 1, 32, 32), scale_factor=3)
    torch.testing.assert_close(shapes_of(large), shapes_of(noise(1, 1, 32, 32)))


def test_flat_images_have_no_shape():
    assert torch.equal(shapes_of(torch.full((1, 1, 8, 8), 3.0)), torch.zeros(1, 2, 8, 8))
    assert float(shapes_of(torch.full((1, 1, 8, 8), 1e15)).abs().max()) == 0


@pytest.mark.parametrize("size", [(12, 12), (7, 5)])
@pytest.mark.parametrize("stiffness", [0.0, 0.1])
def test_distances_do_not_depend_on_the_pairs_beside(monkeypatch, stiffness, size):
    x, y = shapes_of(noise(5, 1, *size)), shapes_of(noise(35, 1, *size, seed=1)).unflatten(0, (5, 7))
    found = matching_distances(x, y, stiffness=stiffness)
    monkeypatch.setattr(matching, "pairs_per_block", lambda shapes, stiffness: 2)
    assert torch.equal(matching_distances(x, y, stiffness=stiffness), found)
    alone = matching_distances(x[2:3], y[2:3, 4:5], stiffness=stiffness)
    assert torch.equal(alone, found[2:3, 4:5])
    assert matching_distances(x[:0], y[:0], stiffness=stiffness).shape == (0, 7)


def test_matching_has_half_of_the_weight_among_stored_images():
    images = torch.from_numpy(load_digits().images[:150] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:100]])
    asked = images[100:]
    surprise = memory.surprise(asked)
    expected = surprise[:6].mean(0) / 2 + (surprise[6] + surprise[7]) / 4
    torch.testing.assert_close(memory.anomaly(asked), expected)
    assert sum(memory.weights) == pytest.approx(1)
    memory.view_share = 0.2  # as an older model may have it
    expected = 0.2 * surprise[:6].mean(0) + 0.4 * (surprise[6] + surprise[7])
    torch.testing.assert_close(memory.anomaly(asked), expected)
    torch.testing.assert_close(copy.deepcopy(memory).anomaly(asked), expected)


def expected_matches(shapes, asked, stored):
    """Root of the mean distance of the three best, and the ten best."""
    pairs = shapes[asked], shapes[None, stored].expand(len(asked), len(stored), 2, 8, 8)
    ten = matching_distances(*pairs).sort(1).indices[:, :10]
    distances, order = matching_distances(*pairs, stiffness=STIFFNESS).gather(1, ten).sort(1)
    return distances[:, :3].mean(1).sqrt().double(), stored[ten.gather(1, order)]


def test_the_best_matches_among_the_nearest_count():
    images = torch.from_numpy(load_digits().images[:120] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:30]])  # fewer than the neighbours asked for: all are candidates
    shapes = shapes_of(images.unflatten(1, (1, 8, 8)))
    view = memory.coordinates(images[:30])[-1].float().double()
    spacings = torch.cdist(view, view).fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close(memory.spacings.double(), spacings, rtol=1e-5, atol=0)
    found = memory.residuals(images[100:])
    distance, ten = expected_matches(shapes, torch.arange(100, 120), torch.arange(30))
    torch.testing.assert_close(found[6], distance)
    torch.testing.assert_close(found[7], distance / spacings[ten].mean(1).sqrt())
    left_out = memory.residuals(images[4:5], exclude=torch.tensor([4]))
    others = torch.from_numpy(np.delete(np.arange(30), 4))
    distance, ten = expected_matches(shapes, torch.tensor([4]), others)
    torch.testing.assert_close(left_out[6], distance)
    torch.testing.assert_close(left_out[7], distance / spacings[ten].mean(1).sqrt())
    assert float(memory.residuals(images[4:5])[6]) < float(left_out[6])


def test_copies_of_a_stored_image_count_once_in_spacings():
    images = torch.from_numpy(load_digits().images[:60] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:40]])
    once = memory.spacings
    memory.remember([torch.cat([images[:40], images[:20], images[:20]])])
    assert torch.equal(memory.spacings, torch.cat([once, once[:20], once[:20]]))
    memory.remember([images[:1].expand(5, 64)])
    assert torch.equal(memory.spacings, torch.ones(5))
    assert torch.isfinite(memory.residuals(images)).all()
    # Almost a copy.
    memory.remember([torch.cat([images[:40], images[:1] + 1e-9])])
    assert float(memory.spacings.min()) == pytest.approx(0.1 * float(once[1:].mean()), rel=0.05)


def test_a_stored_image_matches_itself_and_has_a_blank_map():
    images = torch.from_numpy(load_digits().images[:60] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:1].expand(3, 64)])
    assert float(memory.residuals(images[:1])[6]) == 0
    assert torch.equal(memory.unmatched_pixels(images[:1]), torch.zeros(1, 8, 8, dtype=torch.float64))


def test_maps_find_what_is_odd():
    sound = torch.stack([strokes((8, 8, 20, 11 + k % 2)).flatten() for k in range(20)])
    odd = strokes((8, 8, 20, 11), (4, 20, 10, 23)).flatten()[None]
    memory = ImageMemory((1, 28, 28))
    memory.remember([sound])
    maps = memory.unmatched_pixels(odd)[0]
    assert maps.shape == (28, 28)
    assert maps[2:12, 18:25].sum() > 0.6 * maps.sum()
    # What is missing shows where it should have been.
    less = strokes((8, 8, 12, 11)).flatten()[None]
    maps = memory.unmatched_pixels(less)[0]
    assert maps[12:22, 6:14].sum() > 0.6 * maps.sum()


def test_maps_are_of_the_matches_that_the_anomaly_has():
    # Out in the tails single precision gives another image than the one stored.
    images = 4 * noise(40, 64)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images])
    maps = memory.unmatched_pixels(images[:4])
    assert maps.dtype == torch.float32
    assert torch.equal(maps, memory.unmatched_pixels(images[:4].double()).float())


@pytest.mark.parametrize("n_residuals", [6, 7, 8])
def test_maps_are_the_mean_of_both_ways_over_the_matches(monkeypatch, n_residuals):
    images = torch.from_numpy(load_digits().images[:40] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.reference = memory.reference[:n_residuals]
    memory.remember([images[:30]])
    shapes = shapes_of(images.unflatten(1, (1, 8, 8)))
    asked = torch.arange(30, 40)
    stiffness = STIFFNESS if n_residuals == 8 else 0.0
    if stiffness:
        best = expected_matches(shapes, asked, torch.arange(30))[1][:, :3]
    else:
        best = (
            matching_distances(shapes[asked], shapes[None, :30].expand(10, 30, 2, 8, 8))
            .sort(1)
            .indices[:, :3]
        )
    pairs = [unmatched(shapes[asked], shapes[k], stiffness=stiffness) for k in best.T]
    expected = torch.stack([part for pair in pairs for part in pair]).mean(0).double()
    torch.testing.assert_close(memory.unmatched_pixels(images[30:]), expected)
    found = memory.unmatched_pixels(images[30:])
    monkeypatch.setattr("anomalib_gen.models.memory.pairs_per_block", lambda shapes, stiffness: 3)
    assert torch.equal(memory.unmatched_pixels(images[30:]), found)


def test_maps_of_large_images_have_their_size():
    images = noise(6, 3 * 40 * 64)
    memory = ImageMemory((3, 40, 64))
    memory.remember([images])
    assert memory.unmatched_pixels(images[:2]).shape == (2, 40, 64)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_stored_images_are_enough(n):
    images = torch.from_numpy(load_digits().images[:9] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:n]])
    found = memory.anomaly(images)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("n_residuals", "share"), [(6, 0.0), (7, 0.5)])
def test_models_saved_before_score_as_they_did(n_residuals, share):
    images = torch.from_numpy(load_digits().images[:120] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:100]])
    views = memory.surprise(images[100:])[:6]
    # Before images were matched, and when each place moved on its own.
    memory.reference = memory.reference[:n_residuals]
    memory.remember([images[:100]])
    matching = 0.0
    if n_residuals == 7:
        y, stored = memory.coordinates(images[100:])[-1], memory.views[-1].double()
        near = torch.cdist(y, stored).topk(50, largest=False).indices
        shapes = shapes_of(images.unflatten(1, (1, 8, 8)))
        distances = matching_distances(shapes[100:], shapes[near]).sort(1).values
        torch.testing.assert_close(
            memory.residuals(images[100:])[6], distances[:, :3].mean(1).sqrt().double()
        )
        matching = memory.surprise(images[100:])[6]
    torch.testing.assert_close(memory.surprise(images[100:])[:6], views)
    expected = (1 - share) * views.mean(0) + share * matching
    torch.testing.assert_close(memory.anomaly(images[100:]), expected)
    loaded = ImageMemory((1, 8, 8))
    state = memory.state_dict()
    del state["spacings"]  # they had none
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded.anomaly(images[100:]), expected)
    loaded.remember([images[100:]], keep=True)
    assert loaded.reference.shape == (n_residuals, 120)
    assert loaded.unmatched_pixels(images[:2]).shape == (2, 8, 8)
