"""Selections: their syntax, what globs match, and how long that takes."""

from __future__ import annotations

import random
import re
import time

import pytest

from layertap.errors import InvalidInputError
from layertap.selection import Capture, Glob, LayerSelection, Reduction

NAMES = ["", ".", "a", "b", "ab", "a.b", "aa.b", "ab.ab", "a.a.a", "layer1.0.conv1", "layer1x0"]


def by_expression(glob: str, name: str) -> bool:
    """Match with a regular expression, which is right but may take forever."""
    signs = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", glob)
    expression = "".join(signs.get(part) or re.escape(part) for part in parts)
    return re.fullmatch(expression, name) is not None


def test_globs_match_what_their_regular_expression_matches() -> None:
    """For thousands of short globs, including runs of stars, both agree on every name."""
    made = random.Random(0)
    for _ in range(4000):
        glob = "".join(made.choices("ab.*?", k=made.randrange(7)))
        for name in NAMES:
            assert Glob(glob).matches(name) == by_expression(glob, name), (glob, name)


@pytest.mark.parametrize("glob", ["**?" * 20 + "z", "*a" * 30 + "z", "*" * 64 + "z"])
def test_no_glob_takes_long(glob) -> None:
    """A regular expression would try this glob in more ways than there are seconds."""
    began = time.monotonic()
    assert not Glob(glob).matches("a" * 200)
    assert time.monotonic() - began < 5


def test_a_glob_longer_than_any_name_costs_nothing() -> None:
    """It can't match, and is not laid out to find that out."""
    began = time.monotonic()
    assert not Glob("?*" * 2_000_000).matches("layer1")
    assert time.monotonic() - began < 30


def test_names_do_as_well_as_members() -> None:
    """A side or reduction may be a text, in either case; an unknown one is an error."""
    selection = LayerSelection("a", capture="input", reduction="FLATTEN")
    assert selection == LayerSelection("a", Capture.INPUT, reduction=Reduction.FLATTEN)
    assert isinstance(selection.reduction, Reduction)
    with pytest.raises(InvalidInputError, match="reduction: got 'mean', expected one of none, glo"):
        LayerSelection("a", reduction="mean")
    with pytest.raises(InvalidInputError, match="capture: got None, expected one of output, input"):
        LayerSelection("a", capture=None)


@pytest.mark.parametrize(
    ("text", "layer", "capture", "alias"),
    [
        ("a", "a", Capture.OUTPUT, ""),
        ("a:input=b", "a", Capture.INPUT, "b"),
        (r"h.a\=b", "h.a=b", Capture.OUTPUT, ""),
        (r"h.x\:input:input=c=d", "h.x:input", Capture.INPUT, "c=d"),
        (r"h.\\=e", "h.\\", Capture.OUTPUT, "e"),
        (r"h.\s", r"h.\s", Capture.OUTPUT, ""),
    ],
)
def test_a_backslash_makes_a_sign_part_of_the_name(text, layer, capture, alias) -> None:
    """After a backslash, a colon or an equals sign belongs to the layer's name."""
    assert LayerSelection.parse(text) == LayerSelection(layer, capture, alias)


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("a:reduce=flatten", LayerSelection("a", reduction="flatten")),
        ("a:dtype=float16=b", LayerSelection("a", alias="b", dtype="float16")),
        (
            "a.*:input:reduce=tokens:dtype=bfloat16=b:c=d",
            LayerSelection("a.*", "input", "b:c=d", "tokens", "bfloat16"),
        ),
        ("a:dtype=float32:output", LayerSelection("a", dtype="float32")),
        (r"a\:reduce\=flatten", LayerSelection("a:reduce=flatten")),
        ("a=b:reduce=flatten", LayerSelection("a", alias="b:reduce=flatten")),
    ],
)
def test_options_of_one_layer(text: str, selection: LayerSelection) -> None:
    """A reduction and a dtype may follow the layer in any order; the rest is the alias."""
    assert LayerSelection.parse(text) == selection


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "=a",
            "a=",
            ":input",
            "a:both",
            r"a\::both",
            "a:input:output",
            "a:reduce",
            "a:reduce=",
        ),
        *("a:reduce=mean", "a:dtype=int8", "a:dtype=float16:dtype=float32", "a:", "a:input:"),
    ],
)
def test_texts_that_are_no_selections(text) -> None:
    """A text without a layer, without an alias after ``=``, or with an unknown side is refused."""
    with pytest.raises(InvalidInputError, match=r"layer: got|reduce: got"):
        LayerSelection.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "layer1",
        "avgpool:input=before",
        r"heads.a\=b\:c\+d\\=x=y:z",
        "layer4:grad_cam:map=resized",
        "layer3:reduce=global_average_pool:dtype=float16=pooled",
        "layer2+layer3:around=3=patches",
        "layer2+layer3.0:input:reduce=flatten:around=5:pool=7x1",
        "layer2:resize=28x14",
        "layer2:eigen_cam",
        "layer2:input_gradient",
    ],
)
def test_a_selection_is_its_text(text: str) -> None:
    """What ``parse`` reads is written again in the same way."""
    assert LayerSelection.parse(text).text == text


def test_several_layers_are_one_selection() -> None:
    """Plus signs separate the names of layers, unless there is a backslash in front."""
    selection = LayerSelection.parse(r"a.b+c\+d+e:around=3")
    assert selection.layers == ("a.b", "c+d", "e")
    assert selection.name_for("a.b") == "a.b+c+d+e"
    assert LayerSelection.parse("a+b:gradient").name_for("a") == "a+b:gradient"
