"""Descriptions contain what was measured, and what was tried and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from kept import kept
from layertap import Client, LayerSelection
from layertap.engine import Engine, describe
from layertap.extraction import CapturePoint, Taps
from layertap.extraction.kinds import torchscript
from layertap.models import LoadedModel, ModelSpec
from layertap.selection import Capture
from layertap.v1 import catalogue_pb2
from layertap.wire.descriptions import description_to_proto
from processes import layertap
from serving import running_server
from tinynets import ITEM

TORCHSCRIPT = catalogue_pb2.EXTRACTOR_TORCHSCRIPT
OUTPUT, INPUT = catalogue_pb2.CAPTURE_OUTPUT, catalogue_pb2.CAPTURE_INPUT


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


def load(engine: Engine, net: str, *layers: str, item=ITEM) -> None:
    engine.load(ModelSpec(f"tinynets:{net}", item_shape=item), [*map(LayerSelection.parse, layers)])


def verdicts(layer: catalogue_pb2.Layer) -> dict[int, tuple[bool, str]]:
    """Return what TORCHSCRIPT serves of a layer: (served, reason) by side."""
    [support] = (s for s in layer.extractors if s.extractor == TORCHSCRIPT)
    sides = {verdict.capture: (verdict.served, verdict.reason) for verdict in support.captures}
    assert len(sides) == len(support.captures)
    return sides


Refuse = Callable[..., None]


@pytest.fixture
def refuse(engine, monkeypatch) -> Refuse:
    """Serve the residual net with declared layers, of which one side of one can't be compiled.

    Not before it is declared: what trying shows when the model is loaded is not claimed at all.
    """
    trace = torchscript.trace_taps

    def fail_for(path: str, side: Capture, *declared: str) -> None:
        load(engine, "residual")

        def fails(
            model: LoadedModel,
            taps: Taps,
            points: Sequence[CapturePoint],
            *rest: Any,
            **options: Any,
        ) -> torch.jit.ScriptModule:
            if any((point.path, point.capture) == (path, side) for point in points):
                raise RuntimeError("planted")
            return trace(model, taps, points, *rest, **options)

        monkeypatch.setattr(torchscript, "trace_taps", fails)
        engine.host("residual").declare([*map(LayerSelection.parse, declared)])

    return fail_for


def test_plans_that_were_refused_are_described(engine, refuse) -> None:
    """The description says so for a declared layer, and for each set that contains it."""
    refuse("layer2", Capture.OUTPUT, "layer2", "conv1:input")
    description = description_to_proto(describe(engine.host("residual")))
    refused = {tuple(plan.layers): plan for plan in description.refused_plans}
    assert set(refused) == {("conv1:input", "layer2"), ("layer2",)}
    plan = refused["layer2",]
    assert (plan.extractor, list(plan.inputs[0].shape)) == (TORCHSCRIPT, list(ITEM))
    assert "TORCHSCRIPT can't serve 'layer2'" in plan.reason
    assert "RuntimeError: planted" in plan.reason
    layers = {layer.name: layer for layer in description.layers}
    assert verdicts(layers["layer2"]) == {OUTPUT: (False, plan.reason), INPUT: (True, "")}
    assert verdicts(layers["conv1"]) == {OUTPUT: (True, ""), INPUT: (True, "")}


def test_a_refusal_on_an_input_leaves_the_output(engine, refuse) -> None:
    """A refusal of one side of a layer does not affect the other side."""
    refuse("layer2", Capture.INPUT, "layer2:input")
    description = description_to_proto(describe(engine.host("residual")))
    layer = next(layer for layer in description.layers if layer.name == "layer2")
    [plan] = description.refused_plans
    assert verdicts(layer) == {OUTPUT: (True, ""), INPUT: (False, plan.reason)}


def test_the_command_line_shows_refused_plans(engine, refuse) -> None:
    """`layertap layers --server` shows which sets could not be compiled, and why."""
    refuse("layer2", Capture.OUTPUT, "layer2")
    with running_server(engine) as address:
        shown = layertap("layers", "residual", "--server", address)
    assert "refused: layer2 at x [B, 3, 16, 16]: TORCHSCRIPT can't serve 'layer2'" in shown.stdout


def test_a_server_describes_a_model_as_it_is_now(engine, refuse) -> None:
    """Its description is encoded once, and again after a refusal or when the model is another."""
    load(engine, "residual")
    with running_server(engine) as address, Client(address) as client:
        first = client.describe_model("residual")
        assert client.describe_model("residual") == first
        assert not first.refused_plans
        assert client.describe_model("residual", fingerprint=True).model.fingerprint
        engine.unload("residual")
        refuse("layer2", Capture.OUTPUT, "conv1")  # It loads the net again.
        assert not client.describe_model("residual").refused_plans
        engine.host("residual").declare([LayerSelection("layer2")])
        now = client.describe_model("residual")
        (plan,) = now.refused_plans
        (layer,) = (each for each in now.layers if each.name == "layer2")
        assert verdicts(layer) == {OUTPUT: (False, plan.reason), INPUT: (True, "")}
        assert now == description_to_proto(describe(engine.host("residual")))
        assert not now.model.fingerprint
        engine.unload("residual")
        other = ModelSpec("tinynets:patches", name="residual", item_shape=(3, 16, 24))
        engine.load(other, [])
        now = client.describe_model("residual")
        assert now == description_to_proto(describe(engine.host("residual")))
        assert [layer.name for layer in now.layers] != [layer.name for layer in first.layers]


def test_the_rules_of_a_models_passes_are_described(engine) -> None:
    """The rules say if passes may end early, overlap and be shared, and what becomes of state."""
    load(engine, "keeps_state")
    load(engine, "residual")
    model = description_to_proto(describe(engine.host("keeps_state"))).model
    assert model.pass_rules == catalogue_pb2.PassRules(
        early_stop=True, state=catalogue_pb2.KEPT_STATE_RESET
    )
    assert any("'keeper.seen'" in note for note in model.notes)
    plain = description_to_proto(describe(engine.host("residual"))).model
    assert plain.pass_rules == catalogue_pb2.PassRules(
        early_stop=True, concurrent=True, shared=True, state=catalogue_pb2.KEPT_STATE_NONE
    )
    assert not plain.notes


def test_layouts_are_described(engine) -> None:
    """Channels last and tokens are distinguished from channels first, for a non-square size."""
    load(engine, "patches", item=(3, 16, 24))
    layers = {
        layer.name: layer for layer in description_to_proto(describe(engine.host("patches"))).layers
    }  # fmt: skip
    expected = {
        "patch": (catalogue_pb2.LAYOUT_CHANNELS_FIRST, 0),
        "last": (catalogue_pb2.LAYOUT_CHANNELS_LAST, 0),
        "bare": (catalogue_pb2.LAYOUT_TOKENS, 0),
        "tokens": (catalogue_pb2.LAYOUT_TOKENS, 3),
    }
    for name, (layout, front) in expected.items():
        layer = layers[name]
        assert (layer.layout, layer.front_tokens) == (layout, front), name
        assert (layer.channels, layer.reduction, list(layer.grid)) == (6, 4, [4, 6]), name
