"""Pixel metrics against counts by hand."""

import numpy as np
import pytest

from anomalib_gen.benchmark.pixels import aupro, pixel_auroc


def two_regions():
    masks = np.zeros((1, 10, 10), dtype=bool)
    masks[0, :4, :4] = True
    masks[0, 8, 8] = True
    return masks


def test_perfect_and_blind_maps():
    masks = two_regions()
    assert pixel_auroc(masks, masks) == aupro(masks, masks) == 1
    constant = np.zeros(masks.shape)
    assert pixel_auroc(masks, constant) == 0.5
    # A map that tells nothing follows the diagonal.
    assert aupro(masks, constant) == pytest.approx(0.15)
    assert aupro(masks, -masks.astype(float)) == 0


def test_regions_count_alike_whatever_their_size():
    masks = two_regions()
    large, small = np.zeros(masks.shape), np.zeros(masks.shape)
    large[0, :4, :4] = 1
    small[0, 8, 8] = 1
    # One of two regions is found at once; the other comes with all the sound pixels.
    expected = 0.5 + 0.5 * 0.15
    assert aupro(masks, large) == pytest.approx(expected)
    assert aupro(masks, small) == pytest.approx(expected)
    assert pixel_auroc(masks, large) > pixel_auroc(masks, small)


def test_corners_connect():
    masks = np.zeros((1, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 0] = True
    maps = np.zeros(masks.shape)
    maps[0, 3, 0] = 1
    assert aupro(masks, maps) == pytest.approx(0.5 + 0.5 * 0.15)


def test_random_maps_are_at_chance():
    rng = np.random.default_rng(0)
    masks = rng.random((20, 16, 16)) < 0.05
    maps = rng.random(masks.shape)
    assert pixel_auroc(masks, maps) == pytest.approx(0.5, abs=0.05)
    assert aupro(masks, maps) == pytest.approx(0.15, abs=0.03)
    assert aupro(masks, maps, max_fpr=1.0) == pytest.approx(0.5, abs=0.05)


def test_what_comes_in_at_the_end_of_the_range_does_not_count():
    """Of ten sound pixels three lie above the region, so that its pixels are found where FPR is 0.3 already."""
    masks = np.zeros((1, 1, 12), dtype=bool)
    masks[..., :2] = True
    maps = np.zeros(masks.shape)
    maps[..., 0], maps[..., 1], maps[..., 2:5] = 4, 2, 3
    assert aupro(masks, maps, max_fpr=3 / 10) == pytest.approx(0.5)
    assert aupro(masks, maps, max_fpr=1.0) == pytest.approx(0.3 * 0.5 + 0.7)
    assert aupro(masks, -masks.astype(float), max_fpr=1.0) == 0


def test_bad_input_is_refused():
    masks = two_regions()
    for other, message in (
        (masks[:, :5], "one shape"),
        (np.full(masks.shape, np.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            aupro(masks, other)
    with pytest.raises(ValueError, match="some pixels and not all"):
        pixel_auroc(np.zeros((1, 3, 3), bool), np.zeros((1, 3, 3)))
    with pytest.raises(ValueError, match="max_fpr"):
        aupro(masks, masks, max_fpr=0)
