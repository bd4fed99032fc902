"""Every extractor's plan equals the reference, or there is no plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batches import batch_for, key_for
from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.proof import collect
from layertap.extraction.verify import COMPILED_TOLERANCE, difference, same
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from oracle import inputs_of, outputs_of
from tinynets import ITEM

EXACT = (Extractor.CHILDREN, Extractor.LAYER_GETTER, Extractor.FX, Extractor.HOOK)


def point(path: str, capture: Capture = Capture.OUTPUT, call: int = 0) -> CapturePoint:
    return CapturePoint(PointKind.MODULE, path, capture, call)


def spec(*points: CapturePoint) -> PassSpec:
    return PassSpec(points)


def builder(model: LoadedModel) -> PlanBuilder:
    return PlanBuilder(model, Taps(model.module), measure(model))


@pytest.mark.parametrize("extractor", EXACT)
@pytest.mark.parametrize("batch", [1, 3])
def test_exact_extractors_equal_the_reference_bit_for_bit(load_net, extractor, batch) -> None:
    """Values that a later in-place operation overwrites are those that the modules returned."""
    model, x = load_net("residual"), torch.randn(batch, *ITEM)
    paths = ("conv1", "bn1", "layer1", "avgpool")
    points = [point(path) for path in paths]
    plan = builder(model).build(extractor, spec(*points), key_for(model, ITEM))
    for path, value in zip(paths, collect(plan.built, points, batch_for(plan, x)), strict=True):
        assert same(value, outputs_of(model.module, x, path)[0]), path


@pytest.mark.parametrize("batch", [1, 3])
def test_torchscript_equals_the_reference_within_its_tolerance(load_net, batch) -> None:
    """The compiled program, with inputs and further calls, is close enough at other batches."""
    model, x = load_net("residual"), torch.randn(batch, *ITEM)
    points = [point("bn1"), point("layer1.0.relu", call=1), point("avgpool", Capture.INPUT)]
    plan = builder(model).build(Extractor.TORCHSCRIPT, spec(*points), key_for(model, ITEM))
    expected = [
        outputs_of(model.module, x, "bn1")[0],
        outputs_of(model.module, x, "layer1.0.relu")[1],
        inputs_of(model.module, x, "avgpool")[0],
    ]
    for value, reference in zip(
        collect(plan.built, points, batch_for(plan, x)), expected, strict=True
    ):
        assert difference(value, reference) <= COMPILED_TOLERANCE[torch.float32]


def test_torchscript_holds_nothing_behind_the_last_layer(load_net) -> None:
    """The program of layer1 has none of the later convolutions."""
    model = load_net("residual")
    plan = builder(model).build(Extractor.TORCHSCRIPT, spec(point("layer1")), key_for(model, ITEM))
    kinds = [node.kind() for node in plan.built._program.graph.nodes()]
    total = sum(isinstance(m, torch.nn.Conv2d) for m in model.module.modules())
    assert total == 8
    assert sum("conv" in kind for kind in kinds) == 5


def test_fx_runs_nothing_behind_the_last_layer(load_net) -> None:
    """Assertions on later values, which a graph keeps, don't make their layers run."""
    model, x = load_net("asserts"), torch.randn(2, *ITEM)
    plan = builder(model).build(Extractor.FX, spec(point("first")), key_for(model, ITEM))
    ran: list[nn.Module] = []
    for layer in (model.module.first, model.module.second):
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    (value,) = collect(plan.built, [point("first")], batch_for(plan, x))
    assert ran == [model.module.first]
    assert same(value, outputs_of(model.module, x, "first")[0])


def test_a_parent_and_its_last_child_are_both_served_by_fx(load_net) -> None:
    """torchvision silently drops one of two names for one node; a plan returns both."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    points = [point("layer1"), point("layer1.1"), point("layer1.1.relu", call=1)]
    plan = builder(model).build(Extractor.FX, spec(*points), key_for(model, ITEM))
    expected = outputs_of(model.module, x, "layer1")[0]
    assert all(same(value, expected) for value in collect(plan.built, points, batch_for(plan, x)))


def test_graph_nodes_are_served_by_fx(load_net) -> None:
    """The sum before a block's last ReLU is right, although the ReLU overwrites it."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    catalogue = measure(model)
    name = next(e.name for e in catalogue if e.kind is PointKind.NODE and "add" in e.type)
    points = [CapturePoint(PointKind.NODE, name)]
    plan = PlanBuilder(model, Taps(model.module), catalogue).build(
        Extractor.FX, spec(*points), key_for(model, ITEM)
    )
    (value,) = collect(plan.built, points, batch_for(plan, x))
    block = name.rpartition(".")[0]
    assert same(value, inputs_of(model.module, x, f"{block}.relu")[1])


def test_an_extractor_whose_value_differs_gets_no_plan(load_net) -> None:
    """FX loses an unassigned in-place statement; the plan is refused."""
    model = load_net("unassigned_in_place")
    with pytest.raises(ExtractorUnsupportedError, match="FX can't serve layer 'head'.*differs"):
        builder(model).build(Extractor.FX, spec(point("head")), key_for(model, ITEM))


def test_an_item_shape_that_the_model_can_not_take_is_bad_input(load_net) -> None:
    """A shape on which the model itself fails is an input error, in layertap's words."""
    model = load_net("tokens")
    plans = builder(model)
    with pytest.raises(InvalidInputError, match=r"\[3, 1, 1\].*measured at x \[3, 16, 16\]"):
        plans.build(Extractor.HOOK, spec(point("encoder")), key_for(model, (3, 1, 1)))


def test_specs_are_those_of_the_item_shape(load_net) -> None:
    """A plan for larger items predicts larger values."""
    model = load_net("residual")
    larger = key_for(model, (3, 32, 32))
    plan = builder(model).build(Extractor.HOOK, spec(point("layer1")), larger)
    assert plan.specs[0].shape(4) == (4, 8, 16, 16)


def test_content_dependent_values_make_a_dynamic_plan(load_net) -> None:
    """A plan knows if it can't predict its shapes."""
    model = load_net("dynamic")
    plan = builder(model).build(Extractor.HOOK, spec(point("pick")), key_for(model, ITEM))
    assert plan.dynamic


@pytest.mark.parametrize("extractor", [Extractor.CHILDREN, Extractor.LAYER_GETTER, Extractor.FX])
@pytest.mark.parametrize("net", ["clamps", "clamps_in_place"])
def test_what_differs_on_wide_input_only_gets_no_plan(extractor, net) -> None:
    """Clamping to [0, 1] changes no random input in [0, 1), but normalised images."""
    model = load_model(ModelSpec(f"oddnets:{net}", item_shape=ITEM))
    if extractor is Extractor.FX and net == "clamps":  # Its clamp has a user, and stays.
        assert builder(model).build(extractor, spec(point("tail")), key_for(model, ITEM))
        return
    with pytest.raises(ExtractorUnsupportedError, match=f"{extractor.name} can't.*differs"):
        builder(model).build(extractor, spec(point("tail")), key_for(model, ITEM))


def test_counting_what_was_found_is_not_compiled() -> None:
    """A trace would take the branch of the example's count for every input."""
    model = load_model(ModelSpec("oddnets:sizes", item_shape=ITEM))
    with pytest.raises(ExtractorUnsupportedError, match="branches on tensor values"):
        builder(model).build(Extractor.TORCHSCRIPT, spec(point("tail")), key_for(model, ITEM))


def test_a_pass_that_must_run_to_its_end_does_so_while_it_is_traced() -> None:
    """Code that catches our exception would take its slow path, in the program and for good."""
    item = (3, 8, 8)
    source = "zoo.remembering:FallsBackForGood.build"
    model = load_model(ModelSpec(source, name="net", item_shape=item))
    plans = builder(model)
    plan = plans.build(Extractor.TORCHSCRIPT, spec(point("second")), key_for(model, item))
    assert model.module.fused
    x = torch.randn(2, *item)
    fresh = load_model(ModelSpec(source, name="net", item_shape=item))
    expected = outputs_of(fresh.module, x, "second")[0]
    (value,) = collect(plan.built, [point("second")], batch_for(plan, x))
    assert difference(value, expected) <= COMPILED_TOLERANCE[torch.float32]
