"""Ways in which captured activations are wrong: the naive way compared with layertap's.

Each test keeps the naive implementation and shows that it is wrong, so that it would fail with that
one in our place.
"""

from __future__ import annotations

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import tinynets
from batches import batch_for, key_for
from devices import needs_cuda
from layertap.engine import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.reply import host_array
from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction import CapturePoint, Plan, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.proof import collect
from layertap.extraction.symbolic import trace
from layertap.extraction.verify import same
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from oracle import inputs_of, outputs_of
from tinynets import ITEM

# Upstream prefers torch.export; the traces of these tests are the naive way.
torch_jit_is_deprecated = pytest.mark.filterwarnings("ignore")


def point(path: str, capture: Capture = Capture.OUTPUT, call: int = 0) -> CapturePoint:
    return CapturePoint(PointKind.MODULE, path, capture, call)


def ours(
    model: LoadedModel, extractor: Extractor, x: torch.Tensor, *points: CapturePoint
) -> list[torch.Tensor]:
    """Return what a proven plan captures."""
    made = plan(model, extractor, *points)
    return collect(made.built, points, batch_for(made, x))


def plan(model: LoadedModel, extractor: Extractor, *points: CapturePoint) -> Plan:
    builder = PlanBuilder(model, Taps(model.module), measure(model))
    return builder.build(extractor, PassSpec(tuple(points)), key_for(model, ITEM))


def naive_hook(net: nn.Module, x: torch.Tensor, path: str) -> torch.Tensor:
    """Keep what the hook receives, as most tutorials do."""
    kept: list[torch.Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda m, i, o: kept.append(o))
    net(x.clone())
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.FX, Extractor.LAYER_GETTER])
def test_hazard_01_later_in_place_operations(load_net, extractor) -> None:
    """A kept reference shows the in-place ReLU's result; layertap returns what was returned."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    truth = outputs_of(model.module, x, "bn1")[0]
    names = {"bn1": "bn1", "layer1": "layer1"}
    naive = {
        Extractor.HOOK: lambda: naive_hook(model.module, x, "bn1"),
        Extractor.FX: lambda: create_feature_extractor(model.module, names)(x.clone())["bn1"],
        Extractor.LAYER_GETTER: lambda: IntermediateLayerGetter(model.module, names)(x.clone())[
            "bn1"
        ],
    }
    assert not torch.equal(naive[extractor](), truth)
    bn1, _ = ours(model, extractor, x, point("bn1"), point("layer1"))
    assert torch.equal(bn1, truth)


def test_hazard_02_inputs_in_a_forward_hook(load_net) -> None:
    """After an in-place module its input is overwritten; layertap captures it before."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    truth = inputs_of(model.module, x, "relu")[0]
    kept: list[torch.Tensor] = []
    handle = model.module.relu.register_forward_hook(
        lambda m, args, o: kept.append(args[0].clone())
    )
    model.module(x.clone())
    handle.remove()
    assert not torch.equal(kept[0], truth)
    assert torch.equal(ours(model, Extractor.HOOK, x, point("relu", Capture.INPUT))[0], truth)


def test_hazard_03_a_hook_that_returns_replaces(load_net) -> None:
    """A hook that returns its copy changes the model's result; layertap changes nothing."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    truth = model.module(x.clone())
    handle = model.module.layer1.register_forward_hook(lambda m, i, o: o.clone().zero_())
    assert not torch.equal(model.module(x.clone()), truth)
    handle.remove()
    fc, _ = ours(model, Extractor.HOOK, x, point("fc"), point("layer1"))
    assert torch.equal(fc, truth)


def test_hazard_04_a_parent_and_its_last_child_in_fx(load_net) -> None:
    """torchvision returns one of two names for one node; layertap returns both."""
    model, x = load_net("residual"), torch.randn(2, *ITEM)
    naive = create_feature_extractor(model.module, ["layer1", "layer1.1", "layer1.1.relu_1"])
    assert len(naive(x.clone())) < 3
    points = (point("layer1"), point("layer1.1"), point("layer1.1.relu", call=1))
    truth = outputs_of(model.module, x, "layer1")[0]
    assert all(torch.equal(value, truth) for value in ours(model, Extractor.FX, x, *points))


def test_hazard_04_names_that_end_in_numbers_in_fx(load_net) -> None:
    """torchvision's `norm_1` is the module norm_2; layertap returns the module with that name."""
    model, x = load_net("numbered"), torch.randn(2, *ITEM)
    truth = outputs_of(model.module, x, "norm_1")[0]
    naive = create_feature_extractor(model.module, ["norm_1"])(x.clone())["norm_1"]
    assert not torch.equal(naive, truth)
    assert torch.equal(ours(model, Extractor.FX, x, point("norm_1"))[0], truth)


def test_hazard_05_unassigned_in_place_statements_in_fx(load_net) -> None:
    """Dead-code elimination drops `y.relu_()` and the value is wrong; layertap refuses."""
    model, x = load_net("unassigned_in_place"), torch.randn(2, *ITEM)
    naive = create_feature_extractor(model.module, ["head"])(x.clone())["head"]
    assert not torch.equal(naive, outputs_of(model.module, x, "head")[0])
    with pytest.raises(ExtractorUnsupportedError, match="differs"):
        plan(model, Extractor.FX, point("head"))


def test_hazard_06_hooks_per_request_race(load_net) -> None:
    """Hooks registered per request on a shared model see other requests; layertap's don't."""
    model = load_net("residual")
    taps = Taps(model.module)
    inputs = [torch.full((1, *ITEM), float(i)) for i in range(8)]
    truth = [outputs_of(model.module, x, "conv1")[0] for x in inputs]
    gate = threading.Barrier(8)

    def naive(i: int) -> bool:
        kept: list[torch.Tensor] = []
        handle = model.module.conv1.register_forward_hook(lambda m, a, o: kept.append(o.clone()))
        gate.wait()  # All are registered: what a busy server comes to sooner or later.
        with torch.inference_mode():
            model.module(inputs[i].clone())
        gate.wait()
        handle.remove()
        return len(kept) == 1 and torch.equal(kept[0], truth[i])

    def tapped(i: int) -> bool:
        kept: list[torch.Tensor] = []
        gate.wait()
        with torch.inference_mode():
            taps.run(
                model.forward, batch_for(model, inputs[i].clone()), [point("conv1")],
                lambda _, value: kept.append(value.clone()),
            )  # fmt: skip
        return len(kept) == 1 and torch.equal(kept[0], truth[i])

    with ThreadPoolExecutor(8) as pool:
        assert not all(pool.map(naive, range(8)))
        assert all(pool.map(tapped, range(8)))


def test_hazard_07_symbolic_tracing_beside_a_forward_pass(load_net) -> None:
    """torchvision's tracing affects other running models; layertap waits until none runs."""
    served = load_net("residual").module
    tampered: list[str] = []

    class Traced(nn.Module):
        """A model whose tracing lets another model run in the middle."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(meanwhile).result()
            return self.conv(x)

    def meanwhile() -> None:
        if nn.Module.__call__ is not call:
            tampered.append("Module.__call__")
        with torch.inference_mode():
            try:
                served(torch.rand(1, *ITEM))
            except Exception as error:  # noqa: BLE001 - whatever the patched call does to it
                tampered.append(type(error).__name__)

    call = nn.Module.__call__
    create_feature_extractor(Traced(), ["conv"])
    assert "Module.__call__" in tampered

    # On the compute threads a request is answered before a trace or after it.
    compute = ComputeThreads(instances=2, intra_op=1)
    expected = outputs_of(served, torch.ones(1, *ITEM), "fc")[0]
    tracing = load_net("residual")
    with ThreadPoolExecutor(9) as pool:
        traces = pool.submit(lambda: [compute.run(partial(trace, tracing), Call()) for _ in "abc"])
        answers = [
            pool.submit(compute.run, lambda: served(torch.ones(1, *ITEM)), Call())
            for _ in range(24)
        ]
        assert all(torch.equal(answer.result(), expected) for answer in answers)
        assert len(traces.result()) == 3
    compute.close()


def test_hazard_08_modules_that_never_run(load_net) -> None:
    """A hook on a module that never runs silently returns nothing; layertap says so."""
    model = load_net("silent")
    kept: list[torch.Tensor] = []
    handle = model.module.aux.register_forward_hook(lambda m, a, o: kept.append(o))
    model.module(torch.rand(1, *ITEM))
    handle.remove()
    assert kept == []
    entry = measure(model).entry("aux")
    assert entry.calls == 0
    assert all("never runs" in entry.refusal(each) for each in entry.support)


def test_hazard_09_modules_that_run_several_times(load_net) -> None:
    """A dict by module name keeps the last call only; layertap numbers the calls."""
    model, x = load_net("residual"), torch.randn(1, *ITEM)
    kept: dict[str, torch.Tensor] = {}
    relu = model.module.get_submodule("layer1.0.relu")
    handle = relu.register_forward_hook(lambda m, a, o: kept.update(relu=o.clone()))
    model.module(x.clone())
    handle.remove()
    first, second = outputs_of(model.module, x, "layer1.0.relu")
    assert not torch.equal(kept["relu"], first)
    points = (point("layer1.0.relu"), point("layer1.0.relu", call=1))
    assert all(map(torch.equal, ours(model, Extractor.HOOK, x, *points), (first, second)))


def test_hazard_10_values_that_are_no_tensors(load_net) -> None:
    """`output[0]` loses the rest of a tuple; layertap names every member."""
    catalogue = measure(load_net("containers"))
    assert {"pair.0", "pair.1.0", "named.low", "named.high"} <= set(catalogue.entries)
    assert catalogue.entry("pair").served_by(Capture.OUTPUT) == []


def test_hazard_11_train_mode() -> None:
    """A model left in training mode is random; layertap uses evaluation mode."""
    net = tinynets.residual().train()
    x = torch.rand(4, *ITEM)
    assert not torch.equal(net(x.clone()), tinynets.residual()(x.clone()))
    model = load_model(ModelSpec("tinynets:training", item_shape=ITEM))
    assert not any(module.training for module in model.module.modules())
    assert torch.equal(model.forward(batch_for(model, x.clone())), tinynets.residual()(x.clone()))


@torch_jit_is_deprecated
def test_hazard_12_traces_bake_the_shape(load_net) -> None:
    """A trace with a constant size is wrong for others; layertap tests two batch sizes."""
    model = load_net("bakes_batch")
    x = torch.rand(3, *ITEM)
    naive = torch.jit.trace(model.module, torch.rand(1, *ITEM), check_trace=False)
    assert naive(x.clone()).shape != model.module(x.clone()).shape
    with pytest.raises(ExtractorUnsupportedError, match="TORCHSCRIPT"):
        plan(model, Extractor.TORCHSCRIPT, point("tail"))


@torch_jit_is_deprecated
def test_hazard_13_optimising_first_loses_the_layers(load_net) -> None:
    """A frozen program has no module to hook; layertap adds taps first and optimises last."""
    model, x = load_net("residual"), torch.randn(1, *ITEM)
    frozen = torch.jit.freeze(torch.jit.trace(model.module, x.clone()).eval())
    assert [name for name, _ in frozen.named_modules() if name] == []
    (bn1,) = ours(model, Extractor.TORCHSCRIPT, x, point("bn1"))
    assert torch.allclose(bn1, outputs_of(model.module, x, "bn1")[0], atol=1e-5)


@torch_jit_is_deprecated
def test_hazard_14_the_first_calls_of_a_program_compile(load_net) -> None:
    """A new program's first call only profiles it; layertap's never are on the CPU."""

    def profiling() -> bool:
        return "prim::profile" in str(torch.jit.last_executed_optimized_graph())

    model, x = load_net("residual"), torch.rand(1, *ITEM)
    traced = torch.jit.trace(model.module, x.clone(), check_trace=False)
    naive = torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
    naive(x.clone())
    assert profiling()
    builder = PlanBuilder(model, Taps(model.module), measure(model))
    pass_spec = PassSpec((point("layer1"),))
    built = builder.construct(Extractor.TORCHSCRIPT, pass_spec, batch_for(model, x))
    graphs = set()
    for batch in (1, 3, 1, 8):  # A batch size that it hasn't met is no new specialisation either.
        built.run(batch_for(model, torch.rand(batch, *ITEM)), lambda index, value: None)
        assert not profiling()
        graphs.add(str(torch.jit.last_executed_optimized_graph()))
    assert len(graphs) == 1


@pytest.mark.long
@torch_jit_is_deprecated  # torch._dynamo imports code that uses it
def test_hazard_15_hooks_added_after_torch_compile(load_net) -> None:
    """Hooks added to a compiled model never fire; layertap's are on the model that runs."""
    model, x = load_net("lone"), torch.rand(1, *ITEM)
    torch._dynamo.reset()
    compiled = torch.compile(model.module, backend="eager")
    compiled(x.clone())
    kept: list[torch.Tensor] = []
    handle = model.module.layer1.register_forward_hook(lambda m, a, o: kept.append(o))
    compiled(x.clone())
    handle.remove()
    torch._dynamo.reset()
    assert kept == []
    served = load_model(ModelSpec("tinynets:compiled", item_shape=ITEM))
    truth = outputs_of(model.module, x, "layer1")[0]
    # Measured once, because torch.compile compiles a pass with other hooks again.
    catalogue = measure(served)
    layer = point(next(e.name for e in catalogue if e.name.endswith("layer1")))
    builder = PlanBuilder(served, Taps(served.module), catalogue)
    built = builder.build(Extractor.HOOK, PassSpec((layer,)), key_for(served, ITEM)).built
    (value,) = collect(built, [layer], batch_for(served, x))
    assert torch.allclose(value, truth, atol=1e-6)


def test_hazard_16_exporting_with_a_batch_of_one(load_net) -> None:
    """A program exported with one item refuses two; layertap proves plans with both."""
    model = load_net("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A specialised dimension is warned of, then refused.
        one = torch.export.export(
            model.module, (torch.rand(1, *ITEM),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        ).module()
    with pytest.raises(Exception, match="(?i)shape|size|guard"):
        one(torch.rand(2, *ITEM))
    built = plan(model, Extractor.TORCHSCRIPT, point("layer1")).built
    for batch in (1, 2, 5):
        (value,) = collect(built, [point("layer1")], batch_for(model, torch.rand(batch, *ITEM)))
        assert len(value) == batch


@needs_cuda
def test_hazard_17_copies_that_are_not_finished() -> None:
    """A non-blocking copy is garbage until the stream has finished; layertap waits."""
    model = load_model(ModelSpec("tinynets:residual", item_shape=ITEM), "cuda")
    x = torch.rand(64, *ITEM, device="cuda")
    truth = outputs_of(model.module, x, "layer1")[0].cpu()
    early = torch.zeros_like(truth).pin_memory()
    torch.cuda._sleep(200_000_000)  # The device is busy, as it is when a network has run.
    early.copy_(outputs_of(model.module, x, "layer1")[0], non_blocking=True)
    assert not torch.equal(early, truth)
    torch.cuda.synchronize()
    sent: list[torch.Tensor] = []
    built = plan(model, Extractor.HOOK, point("layer1")).built
    torch.cuda._sleep(200_000_000)
    built.run(
        batch_for(model, x),
        lambda index, value: sent.append(torch.from_numpy(host_array(value).copy())),
    )
    assert torch.equal(sent[0], truth)


def test_hazard_18_gradients_by_module_hooks() -> None:
    """A module's backward hook refuses an in-place ReLU; layertap needs no gradients."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        net = tinynets.residual()
        handle = net.layer1.register_full_backward_hook(lambda m, i, o: None)
        with pytest.raises(RuntimeError, match="view"):
            nn.Sequential(net.layer1, nn.ReLU(inplace=True))(
                torch.rand(1, 8, 8, 8)
            ).sum().backward()
        handle.remove()
    model = load_model(ModelSpec("tinynets:residual", item_shape=ITEM))
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    (value,) = ours(model, Extractor.HOOK, torch.rand(1, *ITEM), point("layer1"))
    assert not value.requires_grad


def test_hazard_19_hooks_and_tensors_that_stay(load_net) -> None:
    """A failed forward pass leaves a naive hook behind; layertap's taps then capture nothing."""
    model = load_net("raises")
    taps = Taps(model.module)
    large = torch.full((1, *ITEM), 1e6)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="secret"):
            taps.run(
                model.forward, batch_for(model, large.clone()), [point("head")], lambda i, v: None
            )
    assert len(model.module.head._forward_hooks) == 1
    taps.close()
    assert not any(module._forward_hooks for module in model.module.modules())


def test_hazard_20_views_of_what_is_overwritten() -> None:
    """A captured view changes with its base; layertap copies it when it is captured."""
    model = load_model(ModelSpec("tinynets:returns_view", item_shape=ITEM))
    x = torch.rand(2, *ITEM)
    truth = outputs_of(model.module, x, "view")[0]
    assert not torch.equal(naive_hook(model.module, x, "view"), truth)
    assert torch.equal(ours(model, Extractor.HOOK, x, point("view"))[0], truth)


def test_hazard_21_models_that_can_not_be_traced_symbolically(load_net) -> None:
    """FX raises in the middle of tracing; layertap says so beforehand, and HOOK serves."""
    model, x = load_net("branching"), torch.rand(2, *ITEM)
    with pytest.raises(Exception, match="control flow"):
        create_feature_extractor(model.module, ["second"])
    entry = measure(model).entry("second")
    assert "traced symbolically" in entry.refusal(Extractor.FX)
    truth = outputs_of(model.module, x, "second")[0]
    assert same(ours(model, Extractor.HOOK, x, point("second"))[0], truth)


def test_hazard_22_inputs_that_fail_late(load_net) -> None:
    """A wrong channel count fails inside a convolution; layertap refuses with the right shape."""
    model = load_net("residual")
    with pytest.raises(RuntimeError, match="weight"):
        model.module(torch.rand(1, 4, 16, 16))
    with pytest.raises(InvalidInputError, match=r"expected \[B, 3, H, W\]"):
        model.signature.main.check((1, 4, 16, 16), "float32")


@torch_jit_is_deprecated
def test_programs_survive_being_saved(load_net) -> None:
    """Layers inside a TorchScript file can be captured, although torch refuses hooks there."""
    made = torch.jit.trace(load_net("residual").module, torch.rand(1, *ITEM))
    buffer = io.BytesIO()
    torch.jit.save(made, buffer)
    buffer.seek(0)
    program: Any = torch.jit.load(buffer)
    with pytest.raises(RuntimeError, match="not supported"):
        program.layer1.register_forward_hook(lambda m, a, o: None)
    x = torch.rand(1, *ITEM)
    seen: list[torch.Tensor] = []
    Taps(program).run(program, x, [point("layer1")], lambda i, value: seen.append(value.clone()))
    assert torch.equal(seen[0], outputs_of(tinynets.residual(), x, "layer1")[0])
