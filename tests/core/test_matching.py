"""Matching of images whose parts may move, and its share in what stored images say."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from anomalib_gen.models import matching
from anomalib_gen.models.matching import matching_distances, shapes_of, unmatched
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


def by_hand(x, y, reach):
    """Equation 2, term by term."""
    _, h, w = x.shape

    def at(g, i, j):
        return g[:, i, j] if 0 <= i < h and 0 <= j < w else torch.zeros(2)

    total = 0.0
    around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    moves = [(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)]
    for i in range(h):
        for j in range(w):
            total += min(
                sum(
                    float((at(x, i + a, j + b) - at(y, i + a + s, j + b + t)).square().sum())
                    for a, b in around
                )
                for s, t in moves
            )
    return total / 9


@pytest.mark.parametrize(
    ("size", "reach"), [((6, 6), 1), ((5, 9), 1), ((1, 4), 1), ((21, 2), 2), ((1, 28), 2)]
)
def test_distances_are_those_of_the_definition(size, reach):
    x, y = (shapes_of(noise(1, 1, *size, seed=seed)) for seed in (0, 1))
    there, back = unmatched(x, y)
    assert float(there.sum()) == pytest.approx(by_hand(x[0], y[0], reach), rel=1e-5)
    assert float(back.sum()) == pytest.approx(by_hand(y[0], x[0], reach), rel=1e-5)
    assert float(matching_distances(x, y[:, None])) == pytest.approx(
        max(float(there.sum()), float(back.sum()))
    )


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


def test_distances_do_not_depend_on_the_pairs_beside(monkeypatch):
    x, y = shapes_of(noise(5, 1, 12, 12)), shapes_of(noise(35, 1, 12, 12, seed=1)).unflatten(0, (5, 7))
    found = matching_distances(x, y)
    monkeypatch.setattr(matching, "values_per_block", lambda device: 2 * 2 * 144)
    assert torch.equal(matching_distances(x, y), found)
    assert torch.equal(matching_distances(x[2:3], y[2:3, 4:5]), found[2:3, 4:5])
    assert matching_distances(x[:0], y[:0]).shape == (0, 7)


def test_matching_has_half_of_the_weight_among_stored_images():
    images = torch.from_numpy(load_digits().images[:150] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:100]])
    asked = images[100:]
    surprise = memory.surprise(asked)
    torch.testing.assert_close(memory.anomaly(asked), surprise[:6].mean(0) / 2 + surprise[6] / 2)
    assert sum(memory.weights) == pytest.approx(1)


def test_the_best_matches_among_the_nearest_count():
    images = torch.from_numpy(load_digits().images[:120] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:30]])  # fewer than the neighbours asked for: all are candidates
    shapes = shapes_of(images.unflatten(1, (1, 8, 8)))
    all_of_them = matching_distances(shapes[100:], shapes[None, :30].expand(20, 30, 2, 8, 8))
    expected = all_of_them.sort(1).values[:, :3].mean(1).sqrt()
    torch.testing.assert_close(memory.residuals(images[100:])[6], expected.double())
    left_out = memory.residuals(images[4:5], exclude=torch.tensor([4]))[6]
    others = all_of_them.new_tensor(np.delete(np.arange(30), 4)).long()
    expected = matching_distances(shapes[4:5], shapes[None, others]).sort(1).values[:, :3].mean(1).sqrt()
    torch.testing.assert_close(left_out, expected.double())
    assert float(memory.residuals(images[4:5])[6]) < float(left_out)


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


def test_models_saved_before_images_were_matched_score_as_they_did():
    images = torch.from_numpy(load_digits().images[:120] / 4.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:100]])
    before = memory.surprise(images[100:])[:6]
    memory.reference = memory.reference[:6]
    torch.testing.assert_close(memory.surprise(images[100:]), before)
    torch.testing.assert_close(memory.anomaly(images[100:]), before.mean(0))
    loaded = ImageMemory((1, 8, 8))
    loaded.load_state_dict(memory.state_dict())
    torch.testing.assert_close(loaded.anomaly(images[100:]), before.mean(0))
    loaded.remember([images[100:]], keep=True)
    assert loaded.reference.shape == (6, 120)
    assert loaded.unmatched_pixels(images[:2]).shape == (2, 8, 8)
