"""The texts that declare inputs."""

from __future__ import annotations

import re

import pytest

from layertap.errors import ConfigError
from layertap.settings import DeclaredInput, ModelSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int64 [sequence=16]", DeclaredInput("x", "int64", (16,), ((0, "sequence"),))),
        (
            "float32[3, H=224,W=200], optional",
            DeclaredInput("x", "float32", (3, 224, 200), ((1, "H"), (2, "W")), optional=True),
        ),
        ("bool [L=4], mask", DeclaredInput("x", "bool", (4,), ((0, "L"),), mask=True)),
        ("int64 [4], ids=30522", DeclaredInput("x", "int64", (4,), ids=30522)),
        ("int64 [4, 4], boxes=1000", DeclaredInput("x", "int64", (4, 4), boxes=1000)),
        ("float32 []", DeclaredInput("x", "float32", ())),
    ],
)
def test_a_text_says_what_an_input_is(text: str, expected: DeclaredInput) -> None:
    """Dtype, sizes, names of free sizes and options are parsed, and written in the same form."""
    found = DeclaredInput.parse("x", text)
    assert found == expected
    assert DeclaredInput.parse("x", str(found)) == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x", "int64", "inputs.x: got 'int64', expected an element type, the sizes"),
        ("x", "uint3 [4]", "inputs.x: got 'uint3 [4]'"),
        ("x", "int64 [0]", "inputs.x: got sizes [0], expected numbers"),
        ("x", "int64 [L]", "inputs.x: got sizes [L], expected numbers"),
        ("x", "int64 [4], masked", "inputs.x: got option 'masked', expected optional"),
        ("x", "int64 [4], ids=4, ids=5", "inputs.x: got option 'ids=5', expected optional, and"),
        ("x", "int64 [4], mask, ids=5", "inputs.x: got option 'ids=5', expected optional, and"),
        ("x", "int64 [4, 5], boxes=9", "inputs.x: got boxes of (4, 5), expected 4 as the last"),
        ("4x", "int64 [4]", "inputs: got the name '4x'"),
        ("a..b", "int64 [4]", "inputs: got the name 'a..b'"),
    ],
)
def test_a_malformed_text_is_refused(name: str, text: str, message: str) -> None:
    """The message names the input, what was got and what was expected."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        DeclaredInput.parse(name, text)


def test_inputs_are_declared_alone_and_for_own_code_only() -> None:
    """item_shape would repeat them; the inputs of torchvision models are known."""
    ids = DeclaredInput.parse("ids", "int64 [4]")
    optional = DeclaredInput.parse("ids", "int64 [4], optional")
    with pytest.raises(ConfigError, match="got inputs and also item_shape"):
        ModelSpec("pkg:net", inputs=(ids,), item_shape=(4,))
    with pytest.raises(ConfigError, match="the input of a torchvision model is known"):
        ModelSpec("resnet18", inputs=(ids,))
    with pytest.raises(ConfigError, match="got the first one, 'ids', as optional"):
        ModelSpec("pkg:net", inputs=(optional,))
