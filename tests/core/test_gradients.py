"""Histograms of gradients, and memories of images that have them as coordinates."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from anomalib_gen import DiffusionDetector, load
from anomalib_gen.models import gradients
from anomalib_gen.models.gradients import ORIENTATIONS, gradient_histograms, without_contrast
from anomalib_gen.models.memory import ImageMemory, Memory, make_memory

SIGNED, ALL = 2 * ORIENTATIONS, 3 * ORIENTATIONS


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ramp(angle, side=24):
    """An image whose gradient has length 1 and one direction everywhere."""
    down, across = torch.meshgrid(*2 * [torch.arange(side, dtype=torch.float64)], indexing="ij")
    return (0.5 * (math.cos(angle) * across + math.sin(angle) * down))[None, None]


@pytest.mark.parametrize("direction", [0, 4, 9, 17])
def test_a_ramp_has_one_direction(direction):
    inner = gradient_histograms(ramp(2 * math.pi * direction / SIGNED))[0, :, 1:-1, 1:-1]
    expected = torch.zeros(ALL, dtype=torch.float64)
    expected[direction] = expected[SIGNED + direction % ORIENTATIONS] = 1.0
    torch.testing.assert_close(inner, expected[:, None, None].expand_as(inner))


def test_between_two_directions_both_have_their_share():
    inner = gradient_histograms(ramp(2 * math.pi * 3.25 / SIGNED))[0, :SIGNED, 2, 2]
    expected = torch.zeros(SIGNED, dtype=torch.float64)
    expected[3], expected[4] = 0.75, 0.25
    torch.testing.assert_close(inner, expected)


def test_a_turn_by_half_turns_directions_and_cells():
    x = noise(3, 1, 20, 28)
    turned = gradient_histograms(x.flip(2, 3))
    there = gradient_histograms(x).flip(2, 3)
    torch.testing.assert_close(turned[:, :SIGNED], there[:, :SIGNED].roll(ORIENTATIONS, 1))
    torch.testing.assert_close(turned[:, SIGNED:], there[:, SIGNED:])


def test_a_negative_has_the_same_orientations():
    x = noise(3, 2, 16, 16)
    torch.testing.assert_close(gradient_histograms(-x)[:, SIGNED:], gradient_histograms(x)[:, SIGNED:])
    assert (gradient_histograms(-x)[:, :SIGNED] - gradient_histograms(x)[:, :SIGNED]).abs().max() > 0.1


def test_brightness_does_not_count_and_contrast_only_once():
    x = noise(4, 1, 16, 16)
    found = gradient_histograms(x)
    torch.testing.assert_close(gradient_histograms(x + 3.0), found)
    torch.testing.assert_close(gradient_histograms(5.0 * x), 5.0 * found)
    torch.testing.assert_close(without_contrast(5.0 * found), without_contrast(found), rtol=1e-3, atol=1e-5)
    norms = without_contrast(found)[:, SIGNED:].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=0)


def test_a_flat_image_has_none():
    found = gradient_histograms(torch.full((2, 3, 8, 8), 0.7))
    assert (found == 0).all()
    assert (without_contrast(found) == 0).all()


def test_the_channel_with_the_longest_gradient_counts():
    weak, strong = 0.3 * noise(2, 1, 12, 12), 30 * noise(2, 1, 12, 12, seed=1)
    mixed = gradient_histograms(torch.cat([weak, strong], dim=1))
    torch.testing.assert_close(mixed, gradient_histograms(strong), rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((8, 8), (2, 2)),
        ((28, 28), (7, 7)),
        ((32, 20), (8, 5)),
        ((33, 13), (8, 3)),
        ((256, 8), (8, 2)),
        ((3, 9), (1, 2)),
    ],
)
def test_every_size_has_cells(size, cells):
    found = gradient_histograms(noise(70, 1, *size))
    assert found.shape == (70, ALL, *cells)
    torch.testing.assert_close(gradient_histograms(noise(70, 1, *size)[65:66]), found[65:66])


def test_large_images_are_looked_at_few_at_once(monkeypatch):
    seen, directions = [], gradients._directions
    monkeypatch.setattr(gradients, "_directions", lambda x: seen.append(x.shape) or directions(x))
    x = noise(5, 1, 128, 200)
    found = gradient_histograms(x)
    assert max(2 * ORIENTATIONS * shape[0] * shape[2] * shape[3] for shape in seen) <= 2**20
    torch.testing.assert_close(found[4:], gradient_histograms(x[4:]))
    seen.clear()
    gradient_histograms(noise(130, 1, 8, 8))
    assert [shape[0] for shape in seen] == [64, 64, 2]
    # One image with more than a block's values still goes.
    assert gradient_histograms(noise(2, 1, 300, 300)).shape == (2, ALL, 8, 8)


def test_no_images_have_no_histograms():
    assert gradient_histograms(noise(0, 1, 8, 8)).shape == (0, ALL, 2, 2)
    memory = ImageMemory((1, 8, 8))
    memory.remember([noise(20, 64)])
    assert memory.surprise(noise(0, 64)).shape == (8, 0)


def test_what_holds_images_is_told_from_what_holds_rows():
    assert type(make_memory((5,))) is Memory
    assert type(make_memory((1, 8, 8))) is ImageMemory


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images / 16 * 255).astype(np.uint8)[:, None], data.target


def test_the_memory_of_images(digits):
    images = torch.from_numpy(digits[0][:150] / 100.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:60], images[60:100]])
    assert len(memory) == 100
    assert [view.shape for view in memory.views] == [(100, 64), (100, 108), (100, 108)]
    for stored, computed in zip(memory.views, memory.coordinates(images[:100]), strict=True):
        torch.testing.assert_close(stored, computed.float())
    memory.remember([images[100:]], keep=True)
    assert len(memory) == 150
    fresh = ImageMemory((1, 8, 8))
    fresh.remember([images])
    torch.testing.assert_close(memory.residuals(images[:5] + 0.1), fresh.residuals(images[:5] + 0.1))
    same = copy.deepcopy(memory)
    assert same.rows.data_ptr() == memory.rows.data_ptr()
    assert torch.equal(same.surprise(images[:5] + 0.1), memory.surprise(images[:5] + 0.1))
    # Each image is its own nearest one, unless it is left out.
    assert (memory.residuals(images[:9]) < memory.residuals(images[:9], exclude=torch.arange(9))).all()


@pytest.mark.parametrize("far", [60.0, 100.0, math.inf])
def test_pixels_of_any_size_can_be_stored(far):
    images = noise(40, 64)
    images[3, 5] = far  # with compressed tails: exp(far - 5) deviations or so
    memory = ImageMemory((1, 8, 8))
    memory.remember([images])
    assert all(torch.isfinite(view).all() for view in memory.views)
    assert torch.isfinite(memory.reference).all()
    assert (memory.residuals(images[3:4]) < memory.residuals(images[3:4], exclude=torch.tensor([3]))).all()
    memory.remember([noise(5, 64, seed=1)], keep=True)
    assert torch.isfinite(memory.surprise(noise(5, 64, seed=2))).all()


def test_pixels_see_brightness_and_gradients_do_not(digits):
    images = torch.from_numpy(digits[0][:100] / 100.0).flatten(1)
    memory = ImageMemory((1, 8, 8))
    memory.remember([images[:90]])
    plain, bright = memory.residuals(images[90:]), memory.residuals(images[90:] + 2.0)
    assert (bright[[0, 3]] > plain[[0, 3]] + 5).all()
    torch.testing.assert_close(bright[[1, 2, 4, 5]], plain[[1, 2, 4, 5]])


def test_the_closed_form_tells_an_unknown_digit(digits, tmp_path):
    images, labels = digits
    train = images[(labels != 4)][:800]
    test, y = images[1000:], labels[1000:]
    detector = DiffusionDetector(denoiser="closed-form", random_state=0, device="cpu").fit(train)
    scores = detector.score_samples(test)
    pixels = DiffusionDetector(denoiser="closed-form", random_state=0, device="cpu")
    pixels.fit(train.reshape(len(train), -1))
    found = roc_auc_score(y == 4, -scores)
    assert found > 0.9
    assert found > roc_auc_score(y == 4, -pixels.score_samples(test.reshape(len(test), -1)))
    np.testing.assert_array_equal(detector.score_samples(test[40:41]), scores[40:41])
    detector.save(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").score_samples(test), scores)
