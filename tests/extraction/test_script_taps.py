"""Layers inside a TorchScript file are captured like those of the eager model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from batches import batch_for
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.proof import collect
from layertap.extraction.verify import same
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from oracle import inputs_of, outputs_of
from tinynets import ITEM, residual


@pytest.fixture(params=["traced", "scripted"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    """The residual net as a TorchScript file, loaded the way a server loads it."""
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated upstream, its files are not.
        net = residual()
        if request.param == "traced":
            made = torch.jit.trace(net, torch.rand(2, *ITEM))
        else:
            made = torch.jit.script(net)
        torch.jit.save(made, path)
    return load_model(ModelSpec(str(path), item_shape=ITEM))


def point(path: str, capture: Capture = Capture.OUTPUT, call: int = 0) -> CapturePoint:
    return CapturePoint(PointKind.MODULE, path, capture, call)


def test_every_layer_of_the_eager_model_is_there(program, load_net) -> None:
    """The program's catalogue has the eager model's modules, calls, dtypes and shapes."""
    eager = {
        (e.name, e.calls, e.type, tuple(e.specs.items()))
        for e in measure(load_net("residual"))
        if e.kind is PointKind.MODULE
    }
    assert {(e.name, e.calls, e.type, tuple(e.specs.items())) for e in measure(program)} == eager


def test_values_are_those_at_that_moment(program) -> None:
    """Outputs before an in-place ReLU, inputs and further calls equal the eager reference."""
    net, x = residual(), torch.randn(3, *ITEM)
    points = [
        point("bn1"),
        point("layer1.0.relu", call=1),
        point("layer1.1.bn2"),
        point("avgpool", Capture.INPUT),
    ]
    plan = PlanBuilder(program, Taps(program.module), measure(program)).build(
        Extractor.HOOK, PassSpec(tuple(points)), program.signature.key
    )
    expected = [
        outputs_of(net, x, "bn1")[0],
        outputs_of(net, x, "layer1.0.relu")[1],
        outputs_of(net, x, "layer1.1.bn2")[0],
        inputs_of(net, x, "avgpool")[0],
    ]
    values = collect(plan.built, points, batch_for(plan, x))
    for value, reference in zip(values, expected, strict=True):
        assert same(value, reference)


def test_the_program_stops_after_the_last_capture(program) -> None:
    """A pass that ends early returns its captures, and the program can run again."""
    x = torch.randn(1, *ITEM)
    taps = Taps(program.module)
    before = program.module(x.clone())
    seen: list[int] = []
    given = batch_for(program, x.clone())
    taps.run(program.forward, given, [point("conv1")], lambda i, value: seen.append(i))
    assert seen == [0]
    assert torch.equal(program.module(x.clone()), before)


def test_walks_serve_a_program_as_well(program) -> None:
    """CHILDREN and LAYER_GETTER call the program's children; FX and TORCHSCRIPT say why not."""
    entry = measure(program).entry("layer1")
    assert entry.served_by(Capture.OUTPUT) == [
        Extractor.HOOK,
        Extractor.LAYER_GETTER,
        Extractor.CHILDREN,
    ]
    assert "TorchScript" in entry.refusal(Extractor.FX)
    assert "HOOK" in entry.refusal(Extractor.TORCHSCRIPT)


class AroundChildren(nn.Module):
    """Clamps between its children, which a walk over them would not do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).clamp(-1e6, 1e6))


def test_walks_end_where_a_program_does_more(tmp_path: Path) -> None:
    """A walk reaches the children before an operation of the program itself, and no later ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(AroundChildren()), tmp_path / "net.pt")
    catalogue = measure(load_model(ModelSpec(str(tmp_path / "net.pt"), item_shape=ITEM)))
    first, second = (
        catalogue.entry(name).served_by(Capture.OUTPUT) for name in ("first", "second")
    )
    assert Extractor.CHILDREN in first
    assert Extractor.CHILDREN not in second


class HoldsOneTwice(nn.Module):
    """Calls a program itself, and calls another program that calls the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.program = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()))
        self.outer = torch.jit.script(nn.Sequential(self.program, nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.program(x))


def holds_one_twice() -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HoldsOneTwice()


def test_a_program_inside_another_is_found_at_its_first_path() -> None:
    """Its second call belongs to the same layer as its first one, as that of any module does."""
    model = load_model(ModelSpec(f"{__name__}:holds_one_twice", item_shape=ITEM))
    assert {"program", "program_1", "program.1", "program.1_1", "outer.1"} <= {
        entry.name for entry in measure(model)
    }
    net, x = holds_one_twice().eval(), torch.randn(3, *ITEM)
    points = [point("program"), point("program", call=1), point("outer.1")]
    plan = PlanBuilder(model, Taps(model.module), measure(model)).build(
        Extractor.HOOK, PassSpec(tuple(points)), model.signature.key
    )
    first = net.program(x)
    values = collect(plan.built, points, batch_for(plan, x))
    for value, right in zip(values, (first, net.program(first), net(x)), strict=True):
        assert same(value, right)


class HoldsTrace(nn.Module):
    """Holds a program that ran when it was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.program = torch.jit.trace(nn.Sequential(nn.Tanh(), nn.ReLU()), torch.rand(1, *ITEM))
        self.unused = torch.jit.script(nn.Sequential(nn.Tanh()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.program(x)


def holds_trace() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HoldsTrace()


def test_layers_that_cannot_be_seen_say_why() -> None:
    """torch keeps the compiled form of a program that ran, without our operators."""
    catalogue = measure(load_model(ModelSpec(f"{__name__}:holds_trace", item_shape=ITEM)))
    assert Extractor.HOOK in catalogue.entry("program").served_by(Capture.OUTPUT)
    for name in ("program.0", "program.1"):
        assert "torch.jit.load" in catalogue.entry(name).refusal(Extractor.HOOK)
    assert "never runs" in catalogue.entry("unused.0").refusal(Extractor.HOOK)
