"""Shapes at two batch sizes distinguish batch dimensions from fixed ones."""

from __future__ import annotations

import torch

from layertap.extraction.points import Dim, ValueSpec


def test_the_batch_dimension_is_the_one_that_grows() -> None:
    """A dimension that doubles with the batch is the batch's; the others are fixed."""
    spec = ValueSpec.from_batches(torch.float32, (1, 64, 7, 7), (2, 64, 7, 7))
    assert spec.dims == (Dim(1, batch=True), Dim(64), Dim(7), Dim(7))
    assert spec.shape(5) == (5, 64, 7, 7)
    assert not spec.dynamic


def test_a_dimension_may_hold_several_elements_an_item() -> None:
    """Swin folds its windows into the batch: 64 for each image."""
    spec = ValueSpec.from_batches(torch.float32, (64, 49, 96), (128, 49, 96))
    assert spec.shape(3) == (192, 49, 96)


def test_any_other_growth_is_dynamic() -> None:
    """A shape that depends on the content can't be predicted."""
    assert ValueSpec.from_batches(torch.float32, (17,), (29,)).dynamic
    assert ValueSpec.from_batches(torch.float32, (4,), (2, 4)).dynamic
    assert ValueSpec.from_batches(torch.float32, (4,), None).dynamic


def test_bytes_are_counted_for_one_item() -> None:
    """Bytes per item are those of a batch of one."""
    spec = ValueSpec.from_batches(torch.float16, (1, 64, 7, 7), (2, 64, 7, 7))
    assert spec.bytes_per_item == 64 * 7 * 7 * 2
