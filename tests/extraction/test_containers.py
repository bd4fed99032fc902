"""Containers of tensors become named tensors; everything else is ignored."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch

from layertap.extraction.containers import MAX_CONTAINER_DEPTH, flatten, pick, replaced

ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])
Boxes = namedtuple("Boxes", "low high")


@dataclass
class Output:
    logits: torch.Tensor
    count: int


def ways(value: object) -> list[str]:
    return [".".join(way) for way, _ in flatten(value)]


def test_a_tensor_is_itself() -> None:
    """A plain tensor has the empty way."""
    assert ways(ONE) == [""]


def test_members_are_named_by_index_key_and_field() -> None:
    """Tuples and lists use indices; mappings, named tuples and dataclasses use names."""
    assert ways((ONE, [TWO])) == ["0", "1.0"]
    assert ways({"out": ONE, 3: TWO}) == ["out", "3"]
    assert ways(Boxes(ONE, TWO)) == ["low", "high"]
    assert ways(Output(ONE, 3)) == ["logits"]


def test_what_is_no_tensor_yields_nothing() -> None:
    """Sizes, numbers, texts and None are not layers."""
    assert ways((torch.Size([1, 2]), 3, "x", None, True)) == []


def test_pick_finds_what_flatten_found() -> None:
    """Each way leads back to its tensor, and a wrong way to None."""
    value = {"a": (ONE, Boxes(TWO, 5)), "b": Output(TWO, 1)}
    assert all(pick(value, way) is tensor for way, tensor in flatten(value))
    assert pick(value, ("a", "7")) is None
    assert pick(value, ("a",)) is None


def test_keys_of_one_text_have_names_of_their_own() -> None:
    """They are named by their repr; keys that even have one repr are left out."""
    value = {1: ONE, "1": TWO, "x": ONE}
    assert [(way, tensor.item()) for way, tensor in flatten(value)] == [
        (("1",), 1.0),
        (("'1'",), 2.0),
        (("x",), 1.0),
    ]
    changed = replaced(value, ("'1'",), torch.tensor([3.0]))
    assert {key: tensor.item() for key, tensor in changed.items()} == {1: 1.0, "1": 3.0, "x": 1.0}
    assert ways({1: ONE, "1": ONE, "'1'": ONE}) == ["1"]


def test_endless_nesting_ends() -> None:
    """A container that contains itself causes no endless recursion."""
    loop: list[object] = [ONE]
    loop.append(loop)
    assert len(ways(loop)) == MAX_CONTAINER_DEPTH
