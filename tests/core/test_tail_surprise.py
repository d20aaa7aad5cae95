"""Surprise among reference values: exact where the distribution is known, and in order everywhere."""

import math

import numpy as np
import pytest
import torch

from anomalib_gen.models.tail import tail_surprise


def test_the_body_is_minus_the_log_of_the_empirical_tail():
    reference = torch.arange(
        1.0, 1000.0, dtype=torch.float64
    )  # 999 values: the i-th has a tail of 1 - i / 1000
    values = torch.tensor([1.0, 250.0, 500.0, 900.0, 0.5], dtype=torch.float64)
    expected = [-math.log1p(-i / 1000) for i in (1, 250, 500)]
    found = tail_surprise(values, reference)
    np.testing.assert_allclose(found[:3], expected, rtol=5e-3)
    # The 90 % quantile of 1, ..., 999 is 899.2; just beyond it the tail has begun.
    assert float(found[3]) == pytest.approx(math.log(10) + math.log1p(0.8 / 50.3), rel=1e-3)
    assert float(found[4]) == pytest.approx(float(found[0]) / 2)  # half way down to zero


def test_an_exponential_distribution_has_its_own_value_as_surprise():
    n = 200_000
    levels = torch.arange(1, n, dtype=torch.float64) / n
    reference = -torch.log1p(-levels)  # exact quantiles
    values = torch.tensor([0.1, 0.5, 1.0, 2.0, 2.3], dtype=torch.float64)
    np.testing.assert_allclose(tail_surprise(values, reference), values, rtol=2e-3)
    # Beyond, it starts with the same slope and then flattens: log 10 + log(1 + excess / 1).
    far = tail_surprise(torch.tensor([2.3025851 + 0.01, 102.3025851], dtype=torch.float64), reference)
    np.testing.assert_allclose(far - math.log(10), [math.log(1.01), math.log(101)], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [0.0, -3.0, 40.0])
def test_order_is_kept_and_units_do_not_matter(shift):
    generator = torch.Generator().manual_seed(0)
    reference = (torch.rand(3, 50, generator=generator, dtype=torch.float64) + shift).sort(dim=1).values
    values = torch.cat([reference[0], reference[0, -1] + torch.logspace(-6, 300, 50, dtype=torch.float64)])
    surprise = tail_surprise(values.expand(3, -1), reference)
    assert torch.isfinite(surprise).all()
    assert bool((surprise[0].diff() > 0).all())
    if shift >= 0:
        np.testing.assert_allclose(
            tail_surprise(7 * values.expand(3, -1), 7 * reference), surprise, rtol=1e-9
        )


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_equal_reference_values_give_finite_surprises(constant):
    reference = torch.full((20,), constant, dtype=torch.float64)
    surprise = tail_surprise(
        torch.tensor([constant, constant + 1, constant + 2], dtype=torch.float64), reference
    )
    assert torch.isfinite(surprise).all()
    assert surprise[0] < surprise[1] < surprise[2]


def test_a_single_reference_value_is_enough():
    surprise = tail_surprise(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0]))
    assert torch.isfinite(surprise).all()
    assert bool((surprise.diff() > 0).all())
