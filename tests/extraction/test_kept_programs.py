"""Programs for fewer layers are parts of one for more, and as right as programs of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batches import batch_for, key_for
from layertap.engine import Engine
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure, plan_builder
from layertap.extraction.base import Values
from layertap.extraction.kinds import torchscript
from layertap.extraction.kinds.torchscript import CHANNELS_LAST
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import Plan
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.proof import collect
from layertap.extraction.prover import Prover
from layertap.extraction.script_parts import part_of
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import Batch, LoadedModel, ModelSpec
from layertap.selection import Capture, Extractor, LayerSelection
from oracle import outputs_of
from tinynets import ITEM, residual

PATHS = ("layer1", "layer2", "avgpool")
PLENTY = 1 << 30


def spec(*paths: str) -> PassSpec:
    return PassSpec(tuple(CapturePoint(PointKind.MODULE, path) for path in paths))


def program(net: nn.Module, *paths: str) -> torch.jit.ScriptModule:
    """Trace one pass of a net that returns what some of its modules return, and freeze it."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen: dict[str, torch.Tensor] = {}
            handles = [
                self.net.get_submodule(path).register_forward_hook(
                    lambda module, args, value, path=path: seen.update({path: value.clone()})
                )
                for path in paths
            ]
            self.net(x.clone())
            for handle in handles:
                handle.remove()
            return tuple(seen[path] for path in paths)

    return torch.jit.freeze(torch.jit.trace(Returns().eval(), torch.rand(2, *ITEM)))


def kinds(part: torch.jit.ScriptModule) -> list[str]:
    return sorted(node.kind() for node in part.graph.nodes())


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


@pytest.mark.parametrize("indexes", [[0], [1], [2], [2, 0], [0, 1, 2], [1, 1]])
def test_a_part_returns_what_the_whole_does(indexes: list[int]) -> None:
    """Bit for bit, in the order that is asked for, although ReLUs write in place behind layers."""
    net = residual()
    whole = program(net, *PATHS)
    part = part_of(whole, indexes)
    x = torch.rand(3, *ITEM)
    expected = [outputs_of(net, x, PATHS[index])[0] for index in indexes]
    for each in (part(x), torch.jit.optimize_for_inference(part)(x)):
        assert len(each) == len(indexes)
        assert all(difference(a, b) <= 1e-6 for a, b in zip(each, expected, strict=True))
    assert torch.equal(whole(x)[indexes[0]], part_of(whole, indexes)(x)[0])


@pytest.mark.parametrize("path", PATHS)
def test_a_part_does_no_more_than_a_program_of_its_own(path: str) -> None:
    """What only the other layers need is left out, writes in place too."""
    net = residual()
    part = part_of(program(net, *PATHS), [PATHS.index(path)])
    own = program(net, path)
    assert kinds(part) == kinds(own)


class WritesLater(nn.Module):
    """The second layer writes into what the first one returned, and the third one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x - 0.5)
        self.second(y)
        return self.third(y * 2)


def test_a_write_that_a_later_value_needs_stays() -> None:
    """A value behind a write in place whose own result nobody uses."""
    net = WritesLater().eval()
    part = part_of(program(net, "first", "third"), [1])
    x = torch.rand(2, *ITEM)
    assert torch.equal(part(x)[0], (x - 0.5).relu() * 2)
    (first,) = part_of(program(net, "first", "third"), [0])(x)
    assert torch.equal(first, x - 0.5)


def test_another_form_is_refused() -> None:
    """A program that has its weights in attributes, or returns one tensor."""
    net = residual()
    with pytest.raises(ValueError, match="frozen program that returns a tuple"):
        part_of(torch.jit.trace(net, torch.rand(2, *ITEM)), [0])


def test_parts_share_weights_and_are_freed() -> None:
    """A part has no copy of a weight, and leaves nothing when it goes."""
    whole = program(residual(), *PATHS)

    def weights(of: torch.jit.ScriptModule) -> set[int]:
        nodes = of.graph.findAllNodes("prim::Constant")
        values = [node.output().toIValue() for node in nodes]
        return {v.data_ptr() for v in values if isinstance(v, torch.Tensor) and v.numel() > 100}

    part = part_of(whole, [2])
    assert weights(part)
    assert weights(part) <= weights(whole)
    gone = weakref.ref(part)
    del part
    gc.collect()
    assert gone() is None


class Starts:
    """Starts builders on one folder, and counts what each of them traces."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.traced = 0
        trace = torchscript.trace_taps

        def counted(*args: object, **options: object) -> torch.jit.ScriptModule:
            self.traced += 1
            return trace(*args, **options)

        monkeypatch.setattr(torchscript, "trace_taps", counted)

    def build(self, model: LoadedModel, sets: Sequence[PassSpec], facts: str = "f") -> list[Plan]:
        """Build kept plans like a process that has just started."""
        self.traced = 0
        builder = PlanBuilder(
            model, Taps(model.module), measure(model), PlanCache(self.folder, PLENTY), facts=facts
        )
        key = key_for(model, ITEM)
        with builder.kept.sharing():
            return [builder.build(Extractor.TORCHSCRIPT, each, key, keep=True) for each in sets]

    def files(self, suffix: str) -> int:
        return len(list(self.folder.glob(f"*{suffix}")))


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(tmp_path, monkeypatch)


SETS = [spec(*PATHS), *(spec(path) for path in PATHS)]


def check(model: LoadedModel, plans: list[Plan]) -> None:
    """Compare plans with plain hooks, at a batch size that no proof has tried."""
    x = torch.rand(5, *ITEM)
    for plan in plans:
        values = collect(plan.built, plan.points, batch_for(plan, x))
        for point, value in zip(plan.points, values, strict=True):
            reference = outputs_of(model.module, x, point.path)[0]
            assert difference(value, reference) <= COMPILED_TOLERANCE[torch.float32]


def test_one_program_serves_all_declared_sets(load_net, starts: Starts) -> None:
    """The first start traces once and stores one program; the second one traces nothing."""
    check(load_net("residual"), starts.build(load_net("residual"), SETS))
    assert (starts.traced, starts.files(".plan.pt"), starts.files(".proof")) == (1, 1, 4)
    model = load_net("residual")
    check(model, starts.build(model, SETS))
    assert (starts.traced, starts.files(".plan.pt"), starts.files(".proof")) == (0, 1, 4)


def test_the_model_runs_once_for_the_proofs_of_all_declared_sets(
    load_net, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is compared on the same batches as the whole, with the same reference values."""
    batches: list[Batch] = []
    compared: list[tuple[int, int]] = []
    truth, prove = Prover.truth, plan_builder.prove

    def noted_truth(self: Prover, pass_spec: PassSpec, x: Batch) -> Values:
        batches.append(x)
        return truth(self, pass_spec, x)

    def noted_prove(kind: Any, built: Any, points: Any, x: Batch, reference: Values) -> None:
        compared.append((len(points), x.size))
        prove(kind, built, points, x, reference)

    monkeypatch.setattr(Prover, "truth", noted_truth)
    monkeypatch.setattr(plan_builder, "prove", noted_prove)
    check(load_net("residual"), starts.build(load_net("residual"), SETS))
    sizes = [x.size for x in batches]
    assert sorted(sizes) == [1, 1, 2, 3]
    assert compared == [(len(each.points), size) for each in SETS for size in sizes]


def test_a_layer_that_is_declared_alone_later_has_a_program_of_its_own(
    load_net, starts: Starts
) -> None:
    """Without the program for all, its proof is for nothing that there is."""
    starts.build(load_net("residual"), SETS)
    model = load_net("residual")
    check(model, starts.build(model, [spec("layer1")]))
    assert (starts.traced, starts.files(".plan.pt")) == (1, 2)


@pytest.mark.parametrize("facts", ["f", pytest.param("", marks=pytest.mark.long)])
def test_a_part_that_is_wrong_is_not_served(
    load_net, starts: Starts, facts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its proof fails at the first start and at later ones, and the layer gets its own program."""
    right = torchscript.part_of

    def wrong(whole: torch.jit.ScriptModule, indexes: Sequence[int]) -> torch.jit.ScriptModule:
        part = right(whole, indexes)
        if len(indexes) == 1:
            for node in part.graph.findAllNodes("aten::relu_"):
                node.output().replaceAllUsesWith(next(iter(node.inputs())))
                node.destroy()
        return part

    starts.build(load_net("residual"), SETS, facts)
    monkeypatch.setattr(torchscript, "part_of", wrong)
    model = load_net("residual")
    check(model, starts.build(model, SETS, facts))
    assert (starts.traced, starts.files(".plan.pt")) == (3, 4)
    check(model, starts.build(load_net("residual"), SETS, facts))
    assert starts.traced == 0


def test_the_proof_of_a_part_is_for_that_part_only(tmp_path: Path) -> None:
    """Other values of the same program, and the same values of another program, are not proven."""
    cache = PlanCache(tmp_path, PLENTY)
    wholes = [cache.file("1"), cache.file("2")]
    for file, paths in zip(wholes, (PATHS, PATHS[1:]), strict=True):
        with file.storing(torchscript.KIND, program(residual(), *paths)):
            pass
    part = cache.file("3")
    part.is_part(wholes[0], [0])
    part.keep_proof("f", [1, 2])
    assert part.proven_sizes("f") == [1, 2]
    for whole, indexes in ((wholes[0], [1]), (wholes[0], [0, 1]), (wholes[1], [0])):
        part.is_part(whole, indexes)
        assert part.proven_sizes("f") == []


def weights_of(plan: Plan) -> set[int]:
    """Return the identities of the weights of a plan's optimised program."""
    graph = plan.built._program.graph
    nodes = [
        node
        for kind in ("prim::Constant", "prim::ConstantMKLDNNTensor")
        for node in graph.findAllNodes(kind)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    return {node.t("value")._cdata for node in nodes if node.t("value").numel() > 100}


def test_the_plans_of_declared_sets_share_their_weights(load_net, tmp_path: Path) -> None:
    """Finishing a program copies its weights; parts are made of the finished one."""
    model = load_net("residual")
    builder = PlanBuilder(model, Taps(model.module), measure(model), PlanCache(tmp_path, PLENTY))
    with builder.kept.sharing():
        plans = [
            builder.build(Extractor.TORCHSCRIPT, each, key_for(model, ITEM), keep=True)
            for each in SETS
        ]
    whole, *alone = plans
    for plan in alone:
        assert weights_of(plan)
        assert weights_of(plan) <= weights_of(whole)
    assert builder.kept._wider is None
    check(model, plans)


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_server_compiles_declared_layers_once(tmp_path: Path, cached: bool, monkeypatch) -> None:
    """All together and each alone, inputs too, at the first start and at the second."""
    recorded: list[object] = []
    record = PlanBuilder._recorded

    def counted(*args: Any) -> Any:
        recorded.append(args)
        return record(*args)

    monkeypatch.setattr(PlanBuilder, "_recorded", counted)
    layers = [LayerSelection("layer1"), LayerSelection("avgpool", Capture.INPUT)]
    x = torch.rand(2, *ITEM)
    expected = outputs_of(residual(), x, "layer1")[0]
    for times in (1, 1 if cached else 2):
        engine = Engine(plan_cache=PlanCache(tmp_path, PLENTY) if cached else None)
        engine.load(ModelSpec("tinynets:residual", item_shape=ITEM), layers)
        plans = list(engine.host("residual").plans._declared.values())
        assert [plan.kind.id for plan in plans] == [Extractor.TORCHSCRIPT] * 3
        (alone,) = (plan for plan in plans if plan.points == spec("layer1").points)
        (value,) = collect(alone.built, alone.points, batch_for(alone, x))
        assert difference(value, expected) <= COMPILED_TOLERANCE[torch.float32]
        engine.close()
        assert len(recorded) == times


def variant_of(plan: Plan) -> bool:
    """Return whether the value of a plan's only layer has channels last."""
    (value,) = collect(plan.built, plan.points, batch_for(plan, torch.rand(3, *ITEM)))
    return not value.is_contiguous()


def test_what_is_kept_is_of_the_usual_way_only(load_net, starts: Starts) -> None:
    """A variant takes no kept proof and no part, and leaves none for the usual way."""
    key, one, two = key_for(load_net("residual"), ITEM), spec("layer1"), spec("layer1", "layer2")
    kinds = {"extractor": Extractor.TORCHSCRIPT, "batch_key": key, "keep": True}
    starts.build(load_net("residual"), [one])
    model = load_net("residual")
    cache = PlanCache(starts.folder, PLENTY)
    builder = PlanBuilder(model, Taps(model.module), measure(model), cache, facts="f")
    with builder.kept.sharing():
        plans = [
            builder.build(pass_spec=each, variant=CHANNELS_LAST, **kinds) for each in (one, two)
        ]
        assert starts.files(".plan.pt") == starts.files(".proof") == 1
        usual = builder.build(pass_spec=spec("layer2"), **kinds)
    check(model, [*plans, usual])
    assert variant_of(plans[0])
    assert not variant_of(usual)
