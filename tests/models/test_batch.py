from __future__ import annotations

import pytest
import torch

from layertap.models import Batch


def batch(size: int = 3) -> Batch:
    """Return a batch of two inputs, in which every element of an item is the item's index."""
    index = torch.arange(size)
    return Batch({"x": index.float().view(size, 1, 1).repeat(1, 2, 3), "ids": index.view(size, 1)})


def test_all_tensors_are_cut_at_the_same_items() -> None:
    """A part has the same items of every input, and the parts together are the whole batch."""
    whole = batch()
    first, rest = whole.narrow(0, 1), whole.narrow(1, 2)
    assert (whole.size, first.size, rest.size) == (3, 1, 2)
    assert rest["x"][:, 0, 0].tolist() == rest["ids"][:, 0].tolist() == [1, 2]
    joined = Batch.cat([first, rest])
    assert list(joined) == ["x", "ids"]
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    swapped = Batch.cat([rest, first])
    assert swapped["ids"][:, 0].tolist() == swapped["x"][:, 0, 0].tolist() == [1, 2, 0]


def test_batches_of_one_key_differ_in_size_only() -> None:
    """The key contains name, item shape and dtype; a change of any of them changes the key."""
    key = batch().key
    assert key == batch(5).key
    assert hash(key) == hash(batch(5).key)
    x, ids = batch()["x"], batch()["ids"]
    others = [
        {"y": x, "ids": ids},
        {"x": x[..., :2], "ids": ids},
        {"x": x.double(), "ids": ids},
        {"x": x},
    ]
    for other in others:
        assert Batch(other).key != key


def test_a_clone_shares_no_memory() -> None:
    """If a model writes into the clone, the batch is unchanged."""
    whole = batch()
    copy = whole.clone()
    for tensor in copy.values():
        tensor.zero_()
    assert whole["x"].sum() > 0
    assert whole["ids"].sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen(bad: float) -> None:
    """This holds for any floating-point input; a sum that overflows is not such a number."""
    whole = batch()
    assert whole.is_finite
    assert Batch({"x": torch.full((2, 4), 60_000.0, dtype=torch.float16)}).is_finite
    whole["x"][2, 1, 2] = bad
    assert not whole.is_finite


def test_the_only_tensor_is_the_only_one() -> None:
    """Code for one input raises if there are several."""
    x = torch.ones(1, 2)
    assert Batch({"x": x}).only is x
    with pytest.raises(ValueError, match="too many values"):
        _ = batch().only
