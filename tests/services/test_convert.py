"""Descriptions tell what was measured, and what was tried and refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from asking import ask
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.services.convert import description_to_proto
from layertap.v1 import catalogue_pb2
from processes import layertap
from serving import running_server
from tinynets import ITEM

TORCHSCRIPT = catalogue_pb2.EXTRACTOR_TORCHSCRIPT
OUTPUT, INPUT = catalogue_pb2.CAPTURE_OUTPUT, catalogue_pb2.CAPTURE_INPUT


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine()
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


def refuse(engine: Engine, *layers: str) -> None:
    """Have the program of some layers refused: on an id that no embedding has it fails."""
    ids = np.array([[0, 1, 2, 9]])
    chosen = [LayerSelection.parse(layer) for layer in layers]
    with pytest.raises(errors.ExtractorUnsupportedError, match="the model itself did not"):
        ask(engine, "catches", chosen, ids, Extractor.TORCHSCRIPT)


@pytest.fixture
def catches(engine) -> Engine:
    """An engine that serves a model that clamps such ids, as its program does not."""
    engine.load(ModelSpec("proofnets:catches", item_shape=(4,)))
    return engine


def test_plans_that_were_refused_are_described(catches) -> None:
    """A layer whose program was refused says so, and so does each set that it was in."""
    refuse(catches, "head", "embed:input")
    refuse(catches, "head")
    description = description_to_proto(catches.host("catches"))
    refused = {tuple(plan.layers): plan for plan in description.refused_plans}
    assert set(refused) == {("embed:input", "head"), ("head",)}
    plan = refused["head",]
    assert (plan.extractor, list(plan.inputs[0].shape)) == (TORCHSCRIPT, [4])
    assert "TORCHSCRIPT can't serve" in plan.reason
    layers = {layer.name: layer for layer in description.layers}
    assert verdicts(layers["head"]) == {OUTPUT: (False, plan.reason), INPUT: (True, "")}
    assert verdicts(layers["embed"]) == {OUTPUT: (True, ""), INPUT: (True, "")}


def test_a_refusal_on_an_input_leaves_the_output(catches) -> None:
    """What is refused for one side of a layer is not refused for the other."""
    refuse(catches, "head:input")
    description = description_to_proto(catches.host("catches"))
    head = next(layer for layer in description.layers if layer.name == "head")
    [plan] = description.refused_plans
    assert verdicts(head) == {OUTPUT: (True, ""), INPUT: (False, plan.reason)}


def test_the_command_line_shows_refused_plans(catches) -> None:
    """`layertap layers --server` tells which sets have no program any more, and why."""
    refuse(catches, "head")
    with running_server(catches) as address:
        shown = layertap("layers", "catches", "--server", address)
    assert "refused: head at ids [B, 4]: TORCHSCRIPT can't serve" in shown.stdout


def test_the_rules_of_a_models_passes_are_described(engine) -> None:
    """Whether they may end early, run at once and be shared, and what happens to their state."""
    load(engine, "keeps_state")
    load(engine, "residual")
    model = description_to_proto(engine.host("keeps_state")).model
    assert model.pass_rules == catalogue_pb2.PassRules(
        early_stop=True, state=catalogue_pb2.KEPT_STATE_RESET
    )
    assert any("'keeper.seen'" in note for note in model.notes)
    plain = description_to_proto(engine.host("residual")).model
    assert plain.pass_rules == catalogue_pb2.PassRules(
        early_stop=True, concurrent=True, shared=True, state=catalogue_pb2.KEPT_STATE_NONE
    )
    assert not plain.notes


def test_layouts_are_described(engine) -> None:
    """Channels last and tokens are told apart from channels first, at a size that is no square."""
    load(engine, "patches", item=(3, 16, 24))
    layers = {
        layer.name: layer for layer in description_to_proto(engine.host("patches")).layers
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
