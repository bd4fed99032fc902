"""Equality with the reference is exact if possible, and relative otherwise."""

from __future__ import annotations

import math

import torch

from layertap.extraction.verify import difference, same


def test_equal_tensors_differ_by_nothing() -> None:
    """The same values, including NaN and infinity, differ by 0."""
    value = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert same(value, value.clone())
    assert difference(value, value.clone()) == 0.0


def test_the_error_is_relative_to_the_largest_magnitude() -> None:
    """An error of 0.1 with a value of 100 is one thousandth."""
    assert math.isclose(
        difference(torch.tensor([100.0, 1.1]), torch.tensor([100.0, 1.0])), 1e-3, rel_tol=1e-4
    )


def test_shape_dtype_and_non_finite_values_must_agree() -> None:
    """Other shapes, dtypes, places of NaN or signs of infinity are an infinite difference."""
    one = torch.ones(2)
    assert difference(one, torch.ones(1, 2)) == math.inf
    assert difference(one, one.double()) == math.inf
    assert difference(torch.tensor([1.0, math.nan]), one) == math.inf
    assert difference(torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0])) == math.inf
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


def test_anything_but_zero_differs_from_zeros() -> None:
    """If the reference is all zeros, no error is small."""
    assert difference(torch.tensor([1e-9]), torch.tensor([0.0])) == math.inf
