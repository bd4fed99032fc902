"""What kinds other than HOOK can't follow in a model is detected, and reported in words."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction import CapturePoint, Catalogue, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.chance import Generators
from layertap.extraction.pass_spec import PassSpec
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from tinynets import ITEM

OUTPUT = Capture.OUTPUT


def loaded(net: str) -> LoadedModel:
    return load_model(ModelSpec(f"proofnets:{net}", item_shape=ITEM))


def measured(net: str) -> Catalogue:
    return measure(loaded(net))


def compile_layers(net: str, layers: str) -> None:
    model = loaded(net)
    builder = PlanBuilder(model, Taps(model.module), measure(model))
    points = [CapturePoint(PointKind.MODULE, layer) for layer in layers.split()]
    builder.build(Extractor.TORCHSCRIPT, PassSpec(tuple(points)), model.signature.key)


def test_layers_behind_a_python_function_are_not_claimed_for_torchscript() -> None:
    """The catalogue names the function; earlier layers are compiled as usual."""
    catalogue = measured("calls_function")
    assert catalogue.entry("conv").serves(Extractor.TORCHSCRIPT, OUTPUT)
    out = catalogue.entry("out")
    assert not out.serves(Extractor.TORCHSCRIPT, OUTPUT)
    assert not out.serves(Extractor.TORCHSCRIPT, Capture.INPUT)
    assert "Swish, a Python autograd.Function" in out.refusal(Extractor.TORCHSCRIPT)
    assert out.serves(Extractor.HOOK, OUTPUT)


@pytest.mark.parametrize(
    ("net", "layers", "reason"),
    [
        ("plain_norm", "body.3 body.4", r"its program fails \(RuntimeError: mkldnn_batch_norm"),
        ("per_item", "out", r"its program fails \(RuntimeError: Expected 2 elements in a list"),
        ("repeats", "out", r"at batch size 1 its shape is \[2, 5, 4\], the model's is \[1, 5, 4\]"),
        ("calls_function", "out", "Swish"),
        ("picks", "head", "topk"),
    ],
)
def test_a_refusal_names_its_cause(net, layers, reason) -> None:
    """A program that raises, has a wrong shape or can't be made is refused with the reason."""
    with pytest.raises(ExtractorUnsupportedError, match=reason):
        compile_layers(net, layers)


def test_random_layers_are_left_to_hooks_and_noted() -> None:
    """After random numbers two passes differ, so only the model itself can be right."""
    catalogue = measured("noisy")
    assert catalogue.entry("first").serves(Extractor.TORCHSCRIPT, OUTPUT)
    last = catalogue.entry("last")
    assert last.served_by(OUTPUT) == [Extractor.HOOK]
    for extractor in (Extractor.TORCHSCRIPT, Extractor.FX, Extractor.CHILDREN):
        assert "random numbers" in last.refusal(extractor)
    assert any("random numbers" in note and "'last'" in note for note in catalogue.notes)


def test_arguments_that_are_never_given_are_noted() -> None:
    """Users read which arguments of forward keep their defaults."""
    assert any("mask, scale" in note for note in measured("optional_arguments").notes)
    assert measured("picks").notes == ()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(1),
        random.random,
        np.random.rand,
    ],
    ids=["torch", "random", "numpy"],
)
def test_each_global_generator_is_watched(draw) -> None:
    """A single use of any of them is detected, and stays detected."""
    generators = Generators(torch.device("cpu"))
    torch.zeros(3).sum()
    assert not generators.moved()
    draw()
    assert generators.moved()
    assert generators.moved()


def test_layers_that_follow_from_a_discontinuous_pick_are_not_compiled() -> None:
    """Rows selected by topk are refused; the scores that it compares are compiled."""
    catalogue = measured("picks")
    assert catalogue.entry("score").serves(Extractor.TORCHSCRIPT, OUTPUT)
    head = catalogue.entry("head")
    assert not head.serves(Extractor.TORCHSCRIPT, OUTPUT)
    assert not head.serves(Extractor.TORCHSCRIPT, Capture.INPUT)
    assert "topk" in head.refusal(Extractor.TORCHSCRIPT)
    assert head.serves(Extractor.FX, OUTPUT)


def test_a_look_at_values_is_noted() -> None:
    """For example a mask that is dropped if it is all ones: other input may take another branch."""
    [note] = [note for note in measured("drops_mask").notes if "branches on values" in note]
    assert "'last'" in note


def test_a_model_that_can_not_be_traced_symbolically_says_why() -> None:
    """The reason has the model's own message, not only the error's class."""
    reason = measured("drops_mask").entry("last").refusal(Extractor.FX)
    assert "can't be traced symbolically: TraceError: symbolically traced variables" in reason


def test_modules_that_run_for_some_inputs_only_are_noted_and_served_by_hooks() -> None:
    """Each expert is in the catalogue, whichever the sample selected; the note names both."""
    catalogue = measured("experts")
    for name in ("low", "high"):
        entry = catalogue.entry(name)
        assert entry.served_by(OUTPUT) == [Extractor.HOOK]
        assert "only for some inputs" in entry.refusal(Extractor.TORCHSCRIPT)
    assert catalogue.entry("high").specs[OUTPUT].dynamic
    assert any("'high', 'low'" in note for note in catalogue.notes)
    assert catalogue.entry("conv").serves(Extractor.TORCHSCRIPT, OUTPUT)
