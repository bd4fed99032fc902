"""Named tensors become the arguments of ``forward``: by position or name, in dicts and tuples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import severalnets
from layertap.models.arguments import Arguments, parameters_of

A, B, C = (torch.full((1,), float(number)) for number in range(3))


def arguments(forward: Any) -> Arguments:
    module = nn.Module()
    module.forward = forward  # type: ignore[method-assign]
    return Arguments(tuple(parameters_of(module)))


@pytest.mark.parametrize(
    ("forward", "given", "args", "kwargs"),
    [
        (lambda x: x, {"x": A}, [A], {}),
        (lambda x: x, {"input": A}, [A], {}),
        (lambda x, y: x, {"y": B, "x": A}, [A, B], {}),
        (lambda x, y=None, z=None: x, {"x": A, "z": C}, [A], {"z": C}),
        (lambda x, y=None: x, {"x": A}, [A], {}),
        (lambda x, *, y: x, {"x": A, "y": B}, [A], {"y": B}),
        (lambda x, *rest: x, {"x": A, "left": B, "right": C}, [A, B, C], {}),
        (lambda *rest: rest, {"right": B, "left": A}, [B, A], {}),
        (lambda x, **more: x, {"x": A, "other": B}, [A], {"other": B}),
        (lambda f: f, {"f.ids": A, "f.deep.mask": B}, [{"ids": A, "deep": {"mask": B}}], {}),
        (lambda pair, z: pair, {"pair.1": B, "pair.0": A, "z": C}, [(A, B), C], {}),
    ],
)
def test_each_tensor_goes_to_its_parameter(
    forward: Any, given: dict, args: list, kwargs: dict
) -> None:
    """By position as long as no earlier argument is left out, else by name."""
    assert arguments(forward).of(given) == (args, kwargs)


def test_a_program_says_its_parameters() -> None:
    """The schema of a TorchScript program is read."""
    found = parameters_of(severalnets.scripted())
    assert [(each.name, each.required) for each in found] == [
        ("input_ids", True),
        ("attention_mask", True),
    ]


def test_what_is_no_tensor_is_told_by_its_annotation() -> None:
    """An argument annotated with bool is a constant, whether or not it has a default."""
    found = parameters_of(severalnets.NeedsFlag())
    assert [(each.name, each.constant) for each in found] == [("x", False), ("training", True)]


def test_an_adapter_makes_the_arguments() -> None:
    """The result of the factory's function is passed on unchanged."""
    given = Arguments(adapter=lambda tensors: ((tensors["a"] + tensors["b"],), {"flag": True}))
    args, kwargs = given.of({"a": A, "b": B})
    assert torch.equal(args[0], A + B)
    assert kwargs == {"flag": True}
