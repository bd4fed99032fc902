"""Values that are not kept whole are still told apart from every other value."""

from __future__ import annotations

import pytest
import torch

from layertap.extraction import kept_values
from layertap.extraction.kept_values import KeptValues
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.survey import survey_hooks
from layertap.models import ModelSpec, load_model

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


@pytest.fixture
def digests(monkeypatch) -> None:
    """No value is kept whole, unless it is small."""
    monkeypatch.setattr(kept_values, "WHOLE_BYTES", 0)


def values(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(7, 100_003, generator=generator) * 200).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 262_143, 262_144, 700_020])
def test_one_changed_element_is_seen(digests, dtype, place) -> None:
    """Wherever it is, although only some elements are kept."""
    value = values(dtype)
    kept = KeptValues().keep(value)
    assert kept.whole is None
    assert kept.same(value.clone())
    assert kept.difference(value) == 0.0
    value.view(-1)[place] += 1
    assert not kept.same(value)


def test_exchanged_elements_are_seen(digests) -> None:
    """Also between two pieces of the checksum."""
    value = values(torch.float32)
    kept = KeptValues().keep(value)
    for one, other in ((3, 4), (5, 5 + (1 << 18))):
        flat = value.clone().view(-1)
        flat[[one, other]] = flat[[other, one]]
        assert not kept.same(flat.view_as(value))


def test_shape_and_dtype_count(digests) -> None:
    """Equal bytes of another shape or dtype are another value."""
    value = values(torch.float32)
    kept = KeptValues().keep(value)
    assert not kept.same(value.T)
    assert not kept.same(value.view(torch.int32))
    assert kept.difference(value.T) == float("inf")


def test_zeros_of_both_signs_are_equal_and_nan_is_not_finite(digests) -> None:
    """As in a comparison of whole values."""
    value = values(torch.float32)
    value[0] = 0.0
    kept = KeptValues().keep(value)
    value[0] = -0.0
    assert kept.same(value)
    assert kept.finite
    value[3, 5] = float("nan")
    nan = KeptValues().keep(value)
    assert not nan.finite
    assert nan.same(value)


def test_two_digests_are_compared(digests) -> None:
    """By what is kept of both."""
    value = values(torch.float32)
    one, same = KeptValues().keep(value), KeptValues().keep(value.clone())
    assert one.equals(same)
    assert not one.equals(KeptValues().keep(value + 1))


def test_a_survey_keeps_no_more_than_the_bound(monkeypatch) -> None:
    """Whatever the model's size, the whole values of one pass take no more than allowed."""
    most = 1 << 20
    monkeypatch.setattr(kept_values, "WHOLE_BYTES", most)
    model = load_model(ModelSpec("resnet18", weights="random", item_shape=(3, 128, 128)))
    kept = survey_hooks(model, ordinary_batch(model, 1), keep_values=True).values.values()
    large = [v.whole.nbytes for v in kept if v.whole is not None
             and v.whole.numel() > kept_values.SMALL]  # fmt: skip
    assert 0 < sum(large) <= most
    assert any(v.whole is None for v in kept)
