"""Interventions equal hand-written hooks on a module of the test's own, in plain PyTorch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import editnets
import gradnets
import layertap
import statefulnets
from gradient_oracle import changed, not_in_place, with_gradients
from layertap import Intervention, LocalModel, Operation, errors
from layertap.extraction import edit_plan
from layertap.extraction.containers import replaced
from layertap.extraction.points import PointKind
from layertap.intervention import parse_interventions
from layertap.selection import Capture
from tinynets import ITEM

Hook = Callable[[Any], Any]

NETS: dict[str, tuple[tuple[int, ...], str]] = {
    "editnets:resnet18": (editnets.IMAGE, "float32"),
    "editnets:mobilenet": (editnets.IMAGE, "float32"),
    "editnets:bert": (editnets.IDS, "int64"),
    "editnets:gpt2": (editnets.IDS, "int64"),
    "editnets:concatenates": (gradnets.IMAGE, "float32"),
    "editnets:rolls": (gradnets.IMAGE, "float32"),
    "editnets:hidden": (gradnets.IMAGE, "float32"),
    "gradnets:tiny_vit": (editnets.IMAGE, "float32"),
    "gradnets:residual": (gradnets.IMAGE, "float64"),
    "gradnets:splits": (gradnets.IMAGE, "float64"),
    "gradnets:batch_second": (gradnets.IMAGE, "float64"),
    "gradnets:coupled": (gradnets.IMAGE, "float64"),
    "gradnets:last": (gradnets.IMAGE, "float32"),
    "gradnets:ignores": (gradnets.IMAGE, "float64"),
}


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], LocalModel]]:
    """Load a net once for the whole file."""
    loaded: dict[str, LocalModel] = {}

    def one(net: str) -> LocalModel:
        if net not in loaded:
            shape, dtype = NETS[net]
            # A kept catalogue has one object for all equal specs; a test below tells them apart.
            loaded[net] = layertap.load(
                net, item_shape=shape, input_dtype=dtype, device="cpu", plan_cache="off"
            )
        return loaded[net]

    yield one
    for model in loaded.values():
        model.close()


@cache
def fresh(net: str) -> nn.Module:
    """Return a module that layertap has never seen."""
    file, _, name = net.partition(":")
    module: nn.Module = getattr({"editnets": editnets, "gradnets": gradnets}[file], name)()
    return module.eval()


def batch(net: str, size: int = 3) -> torch.Tensor:
    shape, dtype = NETS[net]
    generator = torch.Generator().manual_seed(1)
    if dtype == "int64":
        return torch.randint(1, 64, (size, *shape), generator=generator)
    return torch.randn(size, *shape, generator=generator).to(getattr(torch, dtype))


def values(net: str, x: torch.Tensor, paths: list[str]) -> dict[str, torch.Tensor]:
    """Return what modules return for the last time, with whatever hooks there are."""
    found: dict[str, torch.Tensor] = {}
    module = fresh(net)

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            found[path] = (out[0] if isinstance(out, tuple) else out).clone()

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        with torch.no_grad():
            module(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found


V, W = torch.linspace(-1, 1, 64), torch.linspace(-1, 2, 32)
SPOT = torch.arange(8.0).reshape(2, 2, 2)


def edited(**places: Any) -> Callable[[Callable[[torch.Tensor], Any]], Hook]:
    """Return a maker of hooks that change a copy of a value in an index."""
    index = places["at"]

    def make(change: Callable[[torch.Tensor], Any]) -> Hook:
        def hook(value: Any) -> Any:
            if isinstance(value, tuple):
                return (hook(value[0]), *value[1:])
            value = value.clone()
            value[index] = change(value[index])
            return value

        return hook

    return make


everything = edited(at=...)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def along(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return the component of the last dimension along a direction."""
    return (x @ unit(vector))[..., None] * unit(vector)


def channels_last(change: Callable[[torch.Tensor], torch.Tensor]) -> Hook:
    return lambda x: change(x.movedim(1, -1)).movedim(-1, 1)


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


R, M, T = "editnets:resnet18", "editnets:mobilenet", "gradnets:tiny_vit"
B, G, L = "editnets:bert", "editnets:gpt2", "gradnets:last"
BLOCK = "encoder.layers.encoder_layer_0"
HEAD = "encoder.layer.0.attention.self"

CASES: dict[str, tuple[str, str, Intervention | str, Hook, list[str]]] = {
    "zero a channel": (
        R, "layer1", "layer1:channel=3:zero", edited(at=(slice(None), 3))(lambda x: 0.0),
        ["layer1", "layer4", "fc"],
    ),
    "zero channels, an index list and a range": (
        R, "layer2", Intervention.zero("layer2", channel=[1, -1, range(4, 9, 2)]),
        edited(at=(slice(None), [1, 127, 4, 6, 8]))(lambda x: 0.0), ["layer3", "fc"],
    ),
    "set a square of the grid": (
        R, "layer1", "layer1:channel=5,2:y=1..3:x=-1:set=2.5",
        edited(at=(slice(None), [[5], [2]], [[1, 2]], 7))(lambda x: 2.5), ["layer1", "fc"],
    ),
    "an in-place module": (
        R, "bn1", "bn1:scale=-0.5", everything(lambda x: x * -0.5), ["bn1", "layer1", "fc"],
    ),
    "in-place activations": (
        M, "features.0.2", "features.0.2:channel=0..8:scale=3",
        edited(at=(slice(None), slice(0, 8)))(lambda x: x * 3), ["features.1", "classifier"],
    ),
    "mean over the grid": (
        M, "features.4", Intervention.mean("features.4", ("y", "x"), channel=[2, 7]),
        edited(at=(slice(None), [2, 7]))(lambda x: x.mean((2, 3), keepdim=True)),
        ["features.4", "classifier"],
    ),
    "mean over the batch": (
        R, "layer4", Intervention.mean("layer4", "item"),
        everything(lambda x: x.mean(0, keepdim=True)), ["layer4", "fc"],
    ),
    "mean over channels by number": (
        R, "layer4", Intervention.mean("layer4", 0, dims={1: 0}),
        edited(at=(slice(None), slice(None), 0))(lambda x: x.mean(1, keepdim=True)), ["fc"],
    ),
    "clamp": (
        R, "layer3", Intervention.clamp("layer3", high=0.5), everything(lambda x: x.clamp(max=0.5)),
        ["layer3", "fc"],
    ),
    "add a vector of channels": (
        R, "layer1", Intervention.add("layer1", V, factor=0.5, item=1),
        edited(at=1)(lambda x: x + 0.5 * V[:, None, None]), ["layer1", "fc"],
    ),
    "replace the selected part": (
        R, "layer4.0.conv1",
        Intervention.replace("layer4.0.conv1", SPOT[:, :1, :1], channel=[4, 6]),
        edited(at=(slice(None), [4, 6]))(lambda x: SPOT[None, :, :1, :1]), ["layer4", "fc"],
    ),
    "replace for each item": (
        R, "avgpool",
        Intervention.replace("avgpool", SPOT[:, :, :1, None], channel=[4, 6], item=[2, 0]),
        edited(at=([[2], [0]], [[4, 6]]))(lambda x: SPOT[:, :, :1, None]), ["fc"],
    ),
    "patch from another item": (
        R, "layer2", Intervention.patch("layer2", 2, item=0, channel=range(60)),
        lambda x: torch.cat([torch.cat([x[2:, :60], x[:1, 60:]], 1), x[1:]]), ["layer2", "fc"],
    ),
    "project out a direction of channels": (
        R, "layer1", Intervention.project_out("layer1", V),
        channels_last(lambda x: x - along(x, V)), ["layer1", "fc"],
    ),
    "keep a direction of channels": (
        R, "layer1", Intervention.project_keep("layer1", V), channels_last(lambda x: along(x, V)),
        ["layer1", "fc"],
    ),
    "cap a direction of tokens": (
        T, BLOCK, Intervention.cap(BLOCK, W, low=-0.1, high=0.2, token=0),
        edited(at=(slice(None), 0))(
            lambda x: x + ((x @ unit(W)).clamp(-0.1, 0.2) - x @ unit(W))[:, None] * unit(W)
        ), ["encoder", "heads"],
    ),
    "noise": (
        R, "layer1", Intervention.noise("layer1", 0.3, seed=4, channel=[1, 2]),
        edited(at=(slice(None), [1, 2]))(lambda x: x + 0.3 * noise((2, 8, 8), 4)),
        ["layer1", "fc"],
    ),
    "the patches of a vision transformer": (
        T, BLOCK, f"{BLOCK}:y=1,3:x=0..2:zero",
        edited(at=(slice(None), [5, 6, 13, 14]))(lambda x: 0.0), [BLOCK, "heads"],
    ),
    "the class token": (
        T, BLOCK, f"{BLOCK}:token=0:scale=2", edited(at=(slice(None), 0))(lambda x: x * 2),
        ["encoder", "heads"],
    ),
    "channels last": (
        L, "mix", Intervention.zero("mix", channel=[1, 4], y=0),
        edited(at=(slice(None), 0, slice(None), [1, 4]))(lambda x: 0.0), ["mix", "fc"],
    ),
    "tokens of BERT": (
        B, "encoder.layer.0", "encoder.layer.0:token=-1,2:noise=0.5,3",
        edited(at=(slice(None), [11, 2]))(lambda x: x + 0.5 * noise((2, 32), 3)),
        ["encoder.layer.1", "pooler"],
    ),
    "heads of BERT": (
        B, f"{HEAD}", Intervention.zero(f"{HEAD}.0", head=[0, 3], heads=4),
        edited(at=(..., [*range(8), *range(24, 32)]))(lambda x: 0.0), ["encoder.layer.1", "pooler"],
    ),
    "steer GPT-2": (
        G, "transformer.h.1", Intervention.add("transformer.h.1*", W, factor=4, token=-1),
        edited(at=(slice(None), -1))(lambda x: x + 4 * W), ["transformer.h.2", "lm_head"],
    ),
    "project out of GPT-2": (
        G, "transformer.h.0.mlp", Intervention.project_out("transformer.h.0.mlp", W),
        everything(lambda x: x - along(x, W)), ["transformer.h.2", "lm_head"],
    ),
    "the batch second": (
        "gradnets:batch_second", "lstm", Intervention.scale("lstm.0", 2.0, item=1, dims={0: 3}),
        edited(at=(3, 1))(lambda x: x * 2), ["head"],
    ),
}  # fmt: skip


def named(model: LocalModel, path: str) -> str:
    """Return a layer's name: of modules that return a tuple, that of its first member."""
    return path if path in model.layers and model.layers[path].values else f"{path}.0"


@pytest.mark.parametrize("case", CASES)
def test_an_operation_equals_a_plain_hook(case: str, load: Callable[[str], LocalModel]) -> None:
    """Every requested layer has the bits that a hand-written hook on a fresh module gives."""
    net, path, intervention, hook, asked = CASES[case]
    model, x = load(net), batch(net)
    layers = {named(model, each): each for each in asked}
    found = model.extract(x, layers, interventions=intervention)
    with changed(fresh(net), path, 0, hook, before=False):
        expected = values(net, x, asked)
    plain = values(net, x, asked)
    assert any(not torch.equal(expected[each], plain[each]) for each in asked)
    sums = any(word in case for word in ("direction", "project", "mean"))
    tolerance = 1e-5 if sums else 0.0
    for each in asked:
        difference = (found[each] - expected[each]).abs().max()
        assert difference <= tolerance * expected[each].abs().max(), each
    assert found.extractor == "hook"
    assert found["interventions.calls"].tolist() == [1]


def changeable(model: LocalModel) -> list[str]:
    """Return the layers whose output can be changed, by the catalogue."""
    return [
        entry.name
        for entry in model.host.catalogue
        if entry.calls
        and entry.kind is PointKind.MODULE
        and (spec := entry.specs.get(Capture.OUTPUT)) is not None
        and spec.dtype.is_floating_point
        and spec.batch_axis is not None
        and not entry.same_as
        and not entry.name.endswith("attention_weights")
    ]


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, marks=[pytest.mark.long] if net == "editnets:mobilenet" else [])
        for net in sorted(NETS)
    ],
)
def test_the_identity_changes_no_bit(net: str, load: Callable[[str], LocalModel]) -> None:
    """Scaling every layer by 1 gives the bits of a request without interventions."""
    model, x = load(net), batch(net)
    names = changeable(model)
    if net == "gradnets:ignores":
        names.remove("relu")  # Nothing depends on what it returns.
    if net == "editnets:hidden":
        names.remove("side")
    if net == "gradnets:batch_second":
        names = [name for name in names if "lstm.1" not in name]  # Its last state is not used.
    plain = model.extract(x, names, extractor="hook")
    found = model.extract(x, names, interventions=[Intervention.scale(n, 1.0) for n in names])
    assert len(names) > 2
    assert all(torch.equal(found[name], plain[name]) for name in names)
    assert found["interventions.changed"].tolist() == [0] * len(names)
    assert torch.equal(*found["interventions.norm"].T)


@pytest.mark.parametrize("net", ["editnets:hidden", "gradnets:ignores"])
def test_an_intervention_without_effect_is_refused(
    net: str, load: Callable[[str], LocalModel]
) -> None:
    """A layer on which nothing depends can't be changed, even if it runs before what is asked."""
    path = {"editnets:hidden": "side", "gradnets:ignores": "relu"}[net]
    with pytest.raises(errors.InvalidInputError, match="no requested layer .* depends on"):
        load(net).extract(batch(net), "fc", interventions=f"{path}:zero")


SKIPPED = {
    "a residual block": (R, "layer2.1", ["layer3", "fc"]),
    "an in-place activation": (R, "layer1.0.relu", ["layer1", "fc"]),
    "a transformer's layer, given by name": (B, "encoder.layer.1", ["pooler"]),
    "a layer of GPT-2": (G, "transformer.h.1", ["lm_head"]),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_module_is_skipped(case: str, load: Callable[[str], LocalModel]) -> None:
    """What is requested is that of a module in which the skipped one is an identity."""
    net, path, asked = SKIPPED[case]
    model, x = load(net), batch(net)
    layers = {named(model, each): each for each in asked}
    found = model.extract(x, layers, interventions=f"{named(model, path)}:skip")
    module = fresh(net).get_submodule(path)
    given: list[torch.Tensor] = []
    first = True

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        nonlocal first
        if not first:
            return None
        first = False
        return (given[0], *out[1:]) if isinstance(out, tuple) else given[0]

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        expected = values(net, x, asked)
    finally:
        for handle in handles:
            handle.remove()
    for each in asked:
        assert torch.equal(found[each], expected[each]), each


def test_calls_of_a_module_are_changed_one_by_one(load: Callable[[str], LocalModel]) -> None:
    """The name with a number is a later call, and a glob matches all calls."""
    net = "gradnets:residual"
    model, x = load(net), batch(net)
    for call, name in enumerate(("relu", "relu_1", "relu_2")):
        found = model.extract(x, "fc", interventions=f"{name}:channel=1:set=3")
        hook = edited(at=(slice(None), 1))(lambda value: 3.0)
        with changed(fresh(net), "relu", call, hook, before=False):
            expected = values(net, x, ["fc"])["fc"]
        assert torch.equal(found["fc"], expected)
    found = model.extract(x, "fc", interventions="relu*:channel=1:set=3")
    assert found["interventions.calls"].tolist() == [3]
    assert found["interventions.elements"].tolist() == [3 * 3 * 64]


def test_inputs_are_changed_and_read(load: Callable[[str], LocalModel]) -> None:
    """A change of what a layer is given shows in its input; what others hold of it stays."""
    net = "gradnets:residual"
    model, x = load(net), batch(net)
    zero = Intervention.zero("conv2", channel=2).of_input()
    found = model.extract(x, ["conv2:input", "shortcut", "relu", "conv2", "fc"], interventions=zero)
    plain = model.extract(x, ["shortcut", "relu", "conv2:input"], extractor="hook")
    assert torch.equal(found["shortcut"], plain["shortcut"])
    assert torch.equal(found["relu"], plain["relu"])
    assert not found["conv2:input"][:, 2].any()

    def hook(args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        given = args[0].clone()
        given[:, 2] = 0
        return (given,)

    with changed(fresh(net), "conv2", 0, hook, before=True):
        expected = values(net, x, ["conv2", "fc"])
    assert torch.equal(found["fc"], expected["fc"])
    assert torch.equal(found["conv2"], expected["conv2"])


def test_members_of_tuples_and_dicts_are_changed(load: Callable[[str], LocalModel]) -> None:
    """A member of a container has its own interventions; its neighbours stay."""
    net = "gradnets:splits"
    model, x = load(net), batch(net)
    for name, way in (("split.low", ("low",)), ("named.parts.0", ("parts", "0"))):

        def hook(value: Any, way: tuple[str, ...] = way) -> Any:
            old = value
            for key in way:
                old = (
                    getattr(old, key)
                    if isinstance(old, tuple)
                    else old[int(key) if key == "0" else key]
                )
            return replaced(value, way, old * -2)

        found = model.extract(x, ["fc", "split.high"], interventions=f"{name}:scale=-2")
        with changed(fresh(net), name.split(".")[0], 0, hook, before=False):
            expected = values(net, x, ["fc"])["fc"]
        plain = model.extract(x, ["split.high"], extractor="hook")
        assert torch.equal(found["fc"], expected)
        assert torch.equal(found["split.high"], plain["split.high"])


def test_several_interventions_are_applied_in_order(load: Callable[[str], LocalModel]) -> None:
    """Each one sees what those before it have made of the value."""
    model, x = load(R), batch(R)
    one, two = "layer1:channel=0..8:add=1", "layer1:channel=4..12:scale=3"
    found = model.extract(x, ["layer1"], interventions=[one, two])["layer1"]
    other = model.extract(x, ["layer1"], interventions=[two, one])["layer1"]
    plain = model.extract(x, ["layer1"], extractor="hook")["layer1"]
    expected, reverse = plain.clone(), plain.clone()
    expected[:, :8] += 1
    expected[:, 4:12] *= 3
    reverse[:, 4:12] *= 3
    reverse[:, :8] += 1
    assert torch.equal(found, expected)
    assert torch.equal(other, reverse)
    assert not torch.equal(found, other)


def test_other_items_and_earlier_layers_keep_their_bits(load: Callable[[str], LocalModel]) -> None:
    """A change of one item leaves the others, and whatever runs before the layer."""
    model, x = load(R), batch(R, 4)
    asked = ["layer1", "layer2", "fc"]
    found = model.extract(x, asked, interventions="layer2:item=1:noise=5")
    plain = model.extract(x, asked, extractor="hook")
    assert torch.equal(found["layer1"], plain["layer1"])
    for name in asked:
        assert torch.equal(found[name][[0, 2, 3]], plain[name][[0, 2, 3]])
    assert not torch.equal(found["fc"][1], plain["fc"][1])


def test_the_report_counts_what_has_changed(load: Callable[[str], LocalModel]) -> None:
    """Calls, elements, changed elements and norms are those of plain arithmetic."""
    model, x = load(R), batch(R)
    given = ["layer1:channel=0..2:clamp=..0.5", "layer1.*:item=0:y=0:scale=1"]
    found = model.extract(x, ["fc"], interventions=given)
    plain = model.extract(x, ["layer1"], extractor="hook")["layer1"][:, :2]
    after = plain.clamp(max=0.5)
    assert found["interventions.calls"].tolist() == [1, 2]
    assert found["interventions.elements"].tolist() == [plain.numel(), 2 * 64 * 8]
    assert found["interventions.changed"].tolist() == [int((after != plain).sum()), 0]
    assert 0 < int((after != plain).sum()) < plain.numel()
    norms = found["interventions.norm"][0]
    assert norms.tolist() == pytest.approx([float(plain.norm()), float(after.norm())], rel=1e-5)


def gradient_by_autograd(x: torch.Tensor, path: str, hook: Hook) -> torch.Tensor:
    """Return the gradient of class 2 with respect to a module's output, with a changed value."""
    kept: list[torch.Tensor] = []

    def watch(value: torch.Tensor) -> torch.Tensor:
        copied = value + 0
        copied.retain_grad()
        kept.append(copied)
        return copied

    with with_gradients():
        # Not the module of other tests, which was made in inference mode.
        module = not_in_place(gradnets.residual()).requires_grad_(True)
        with (
            changed(module, "relu", 1, hook, before=False),
            changed(module, path, 0, watch, before=False),
        ):
            module(x.clone())[:, 2].sum().backward()
    assert kept[0].grad is not None
    return kept[0].grad


OPERATIONS = {
    "relu_1:scale=-2": lambda x: x * -2,
    "relu_1:channel=1:zero": lambda x: x * torch.tensor([1, 0, 1, 1.0]).double()[:, None, None],
    "relu_1:mean=y,x": lambda x: x.mean((2, 3), keepdim=True) + 0 * x,
    "relu_1:item=0:y=0..4:add=2": lambda x: x + 2 * (torch.arange(3) == 0)[:, None, None, None]
    * (torch.arange(8) < 4)[:, None],
    "relu_1:patch=2": lambda x: x[2:] + 0 * x,
    "relu_1:clamp=0.1..0.3": lambda x: x.clamp(0.1, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("text", OPERATIONS)
@pytest.mark.parametrize("layer", ["conv1", "fc"])
def test_gradients_through_interventions(
    text: str, layer: str, load: Callable[[str], LocalModel]
) -> None:
    """The gradient of a layer before or after a changed value is that of the changed model."""
    net = "gradnets:residual"
    x = batch(net)
    found = load(net).extract(x, [f"{layer}:gradient", "fc"], objective="fc[2]", interventions=text)
    expected = gradient_by_autograd(x, layer, OPERATIONS[text])
    error = (found[f"{layer}:gradient"] - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6
    with changed(fresh(net), "relu", 1, OPERATIONS[text], before=False):
        assert torch.allclose(found["fc"], values(net, x, ["fc"])["fc"], rtol=1e-12, atol=1e-12)
    assert found["interventions.calls"].tolist() == [1]


def test_gradients_through_interventions_of_a_net_that_changes_nothing_in_place() -> None:
    """Nothing that autograd keeps of a value is overwritten by the changes that follow."""
    x = torch.randn(2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(1)).double()
    given = ["conv:channel=0..2:clamp=-0.2..0.2", "conv:clamp=-0.5..0.5"]

    def hook(value: torch.Tensor) -> torch.Tensor:
        first = value[:, :2].clamp(-0.2, 0.2)
        return torch.cat([first, value[:, 2:]], 1).clamp(-0.5, 0.5)

    with layertap.load(
        "gradnets:smooth", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    ) as model:
        found = model.extract(x, "inputs.x:gradient", objective="fc[1]", interventions=given)
    with with_gradients():
        module, leaf = gradnets.smooth(), x.clone().requires_grad_(True)
        with changed(module, "conv", 0, hook, before=False):
            (expected,) = torch.autograd.grad(module(leaf)[:, 1].sum(), leaf)
    error = (found["inputs.x:gradient"] - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6


def test_the_gradient_of_a_changed_value_is_that_of_what_the_model_goes_on_with(
    load: Callable[[str], LocalModel],
) -> None:
    """The value times the gradient has the changed value in it."""
    net = "gradnets:residual"
    model, x = load(net), batch(net)
    asked = ["conv2", "conv2:gradient", "conv2:gradient_x_activation"]
    found = model.extract(x, asked, objective="fc[1]", interventions="conv2:channel=2:set=4")
    assert (found["conv2"][:, 2] == 4).all()
    product = found["conv2"] * found["conv2:gradient"]
    assert torch.equal(found["conv2:gradient_x_activation"], product)


def test_integrated_gradients_with_interventions(load: Callable[[str], LocalModel]) -> None:
    """Every step runs with the interventions, so the gap stays small, and they count once."""
    net = "gradnets:residual"
    model, x = load(net), batch(net)
    asked = ["inputs.x:integrated_gradients"]
    noise = Intervention.noise("conv2", 0.2, item=[0, 2])
    found = model.extract(x, asked, objective="fc[1]", interventions=noise)
    value = model.extract(x, asked, objective="fc[1]")["objective.value"]
    gap = found["inputs.x:integrated_gradients.gap"]
    assert (gap.abs() < 0.05).all()
    assert not torch.equal(found["objective.value"], value)
    assert found["interventions.calls"].tolist() == [1]
    assert found["interventions.elements"].tolist() == [2 * 4 * 64]


def test_gradients_of_coupled_items_with_interventions(load: Callable[[str], LocalModel]) -> None:
    """Items that run alone have their own interventions; taking from another item is refused."""
    net = "gradnets:coupled"
    model, x = load(net), batch(net)
    factors = torch.tensor([2.0, 3.0])[:, None, None, None].expand(2, 4, 6, 6)
    added = Intervention.add("conv", factors, item=[2, 0])
    found = model.extract(x, "conv:gradient", objective="fc[1]", interventions=added)
    for item, factor in ((0, 3.0), (1, 0.0), (2, 2.0)):
        alone = model.extract(
            x[item : item + 1],
            "conv:gradient",
            objective="fc[1]",
            interventions=f"conv:add={factor}",
        )
        assert torch.equal(found["conv:gradient"][item : item + 1], alone["conv:gradient"])
    assert found["interventions.elements"].tolist() == [2 * 4 * 36]
    with pytest.raises(errors.ExtractorUnsupportedError, match="another item"):
        model.extract(x, "conv:gradient", objective="fc[1]", interventions="conv:patch=1")


SETS = {
    "behind everything": (R, "layer4", ["layer1", "layer4", "fc"]),
    "inside a residual block": (R, "layer3.0.conv1", ["layer2", "layer3", "fc"]),
    "tokens": (T, BLOCK, ["encoder", "heads"]),
    "a language model": (G, "transformer.h.0.mlp", ["transformer.h.2", "lm_head"]),
    "a model that keeps the batch size": ("editnets:concatenates", "more", ["conv", "fc"]),
    "a model that repeats rows": ("editnets:rolls", "conv", ["fc"]),
    "the batch second": ("gradnets:batch_second", "lstm.0", ["head"]),
    "items that influence each other": ("gradnets:coupled", "conv", ["act", "fc"]),
}


@pytest.mark.parametrize("case", SETS)
def test_sets_give_what_single_requests_give(case: str, load: Callable[[str], LocalModel]) -> None:
    """A request with several sets is that of all items for the first set, then for the next."""
    net, path, asked = SETS[case]
    model, x = load(net), batch(net, 2)
    layers = [named(model, each) for each in asked]
    layer = named(model, path)
    sets = [[f"{layer}:noise={0.3 * k},{k}", f"{layer}:item=1:scale={k}"] for k in (1, 2, 3)]
    together = model.extract(x, layers, interventions=sets)
    for number, given in enumerate(sets):
        alone = model.extract(x, layers, interventions=given)
        for name in layers:
            axis = 1 if net == "gradnets:batch_second" else 0
            size = alone[name].shape[axis]
            mine = together[name].narrow(axis, number * size, size)
            error = (mine - alone[name]).abs().max() / alone[name].abs().max()
            assert error < 1e-5, (name, number)
    assert together["interventions.calls"].tolist() == [1] * 6
    plan = next(plan for plan in model.host.plans._built.values() if plan.pass_spec.sets == 3)
    expands = getattr(plan.built, "expands", None)
    refusing = ("editnets:concatenates", "editnets:rolls", "gradnets:coupled")
    assert expands == (net not in refusing)


def test_rows_are_limited_by_the_values_behind_the_first_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs before the change has a single row, so its large values don't limit the sets."""
    x = batch("editnets:resnet18", 1)
    row = 10_000  # Bytes: four values of layer4 have less, and one of conv1 has more.
    monkeypatch.setattr(edit_plan, "SET_BYTES", 20 * row)
    with layertap.load("editnets:resnet18", item_shape=editnets.IMAGE, device="cpu") as model:
        runs: list[int] = []
        sets = [[f"layer4:channel={channel}:zero"] for channel in range(20)]
        alone = model.extract(x, "fc", interventions=sets[-1])["fc"]
        model.extract(x, "fc", interventions=sets)  # The trials of the plan run here.
        stem = model.host.model.module.conv1
        stem.register_forward_hook(lambda *_: runs.append(1))
        together = model.extract(x, "fc", interventions=sets)["fc"]
        assert len(runs) == 1
        torch.testing.assert_close(together[-1:], alone, rtol=1e-5, atol=1e-6)
        runs.clear()
        model.extract(x, "fc", interventions=[[f"conv1:channel={c}:zero"] for c in range(20)])
        runs.clear()
        model.extract(x, "fc", interventions=[[f"conv1:channel={c}:zero"] for c in range(20)])
        assert len(runs) > 1


@pytest.mark.parametrize(
    ("points", "present", "absent"),
    [
        ([("layer4", "output", 0)], {"layer4", "avgpool", "fc"}, {"layer3", "layer4.0.conv1"}),
        ([("layer3", "output", 0)], {"layer3", "layer4.0.conv1", "fc"}, {"layer3.0.conv1", "bn1"}),
        ([("layer3", "input", 0)], {"layer3", "layer3.0.conv1", "fc"}, {"layer2.0.conv1", "bn1"}),
        # A value inside of layer3 changes before that of layer3 does.
        (
            [("layer3", "output", 0), ("layer3.0.bn1", "output", 0)],
            {"layer3", "layer3.0.conv2", "layer4"},
            {"layer2.0.conv1"},
        ),
        # The modules around the value return after it.
        ([("layer1.0.conv2", "output", 0)], {"layer1.0", "layer1", "layer1.1.conv1"}, {"bn1"}),
    ],
)
def test_which_values_are_behind_a_change(
    load: Callable[[str], LocalModel],
    points: list[tuple[str, str, int]],
    present: set[str],
    absent: set[str],
) -> None:
    """Those of layers that begin later, of the modules around, and none from before."""
    catalogue = load("editnets:resnet18").host.catalogue
    chosen = [catalogue.entry(name).points[Capture(side)] for name, side, _ in points]
    behind = edit_plan._behind(catalogue, chosen)

    def is_there(name: str) -> bool:
        spec = catalogue.entry(name).specs[Capture.OUTPUT]
        return any(spec is each for each in behind)

    assert {name for name in present if not is_there(name)} == set()
    assert {name for name in absent if is_there(name)} == set()


def test_sets_can_patch_between_items(load: Callable[[str], LocalModel]) -> None:
    """A set that takes something from another item runs on the whole batch."""
    model, x = load(R), batch(R)
    sets = [[f"layer3:item={to}:patch={of}"] for to, of in ((0, 1), (2, 0))]
    together = model.extract(x, "fc", interventions=sets)["fc"]
    for number, given in enumerate(sets):
        alone = model.extract(x, "fc", interventions=given)["fc"]
        assert torch.equal(together[3 * number : 3 * number + 3], alone)


def test_a_value_of_whole_numbers_is_refused_when_it_comes() -> None:
    """A layer whose dtype depends on the input is changed in floating point, and refused else."""
    x, weights = torch.randn(2, *gradnets.IMAGE), torch.tensor([[1, 2, 0, 1, 2], [2, 2, 1, 1, 0]])
    with layertap.load("editnets:maybe_whole", device="cpu") as model:
        found = model.extract({"x": x}, "output", interventions="weights:scale=0.5")
        assert found["interventions.calls"].tolist() == [1]
        for change in ("weights:scale=0.5", "weights:channel=1:zero", "weights:item=0:patch=1"):
            with pytest.raises(errors.InvalidInputError, match="is int64 on this input"):
                model.extract({"x": x, "weights": weights}, "output", interventions=change)


def test_a_layer_that_did_not_run_is_an_error() -> None:
    """An intervention on a module that runs for other input only is no silent success."""
    with layertap.load("tinynets:branching", item_shape=(3, 8, 8), device="cpu") as model:
        x = torch.randn(2, 3, 8, 8)
        found = model.extract(x, "output", interventions="second:scale=2")
        assert found["interventions.calls"].tolist() == [1]
        x[0, 0, 0, 0] = float("nan")
        with pytest.raises(errors.InvalidInputError, match="did not run on this input"):
            model.extract(x, "output", interventions="second:scale=2")


REFUSED: dict[str, tuple[str, Any, str, type[errors.LayertapError]]] = {
    "no such layer": ("fc", "nix:zero", "no layer 'nix'", errors.LayerNotFoundError),
    "a glob of nothing": ("fc", "nix*:zero", "matches no layer", errors.LayerNotFoundError),
    "after what is asked": ("layer1", "layer2:zero", "runs after", errors.InvalidInputError),
    "an index out of range": (
        "fc", "layer4:channel=512:zero", "got 512, expected from -512 to 511",
        errors.InvalidInputError,
    ),
    "a range out of range": (
        "fc", "layer4:channel=0..513:zero", "got 513", errors.InvalidInputError,
    ),
    "an index twice": ("fc", "layer4:y=0,-1:zero", "twice", errors.InvalidInputError),
    "an empty range": ("fc", "layer4:channel=3..3:zero", "nothing", errors.InvalidInputError),
    "an axis that the layer lacks": (
        "fc", "layer4:token=0:zero", "channel, y, x", errors.InvalidInputError,
    ),
    "an item that the batch lacks": ("fc", "layer4:item=3:zero", "item", errors.InvalidInputError),
    "a source that the batch lacks": ("fc", "layer4:patch=3", "3 items", errors.InvalidInputError),
    "a tensor of another shape": (
        "fc", Intervention.replace("layer4", np.zeros((2, 2), np.float32)), "tensor: got",
        errors.InvalidInputError,
    ),
    "a huge tensor": (
        "fc", Intervention.replace("layer4", np.zeros(1 << 20, np.float32)), "tensor: got",
        errors.InvalidInputError,
    ),
    "a direction of another length": (
        "fc", Intervention.project_out("layer4", np.ones(7)), "direction|each channel",
        errors.InvalidInputError,
    ),
    "a skip that changes the shape": ("fc", "layer2:skip", "one shape", errors.InvalidInputError),
    "heads that don't divide": (
        "fc", Intervention.zero("layer4", head=0, heads=7), "divisor", errors.InvalidInputError,
    ),
    "heads without a number": ("fc", "layer4:head=0:zero", "heads", errors.InvalidInputError),
    "a dimension that the value lacks": (
        "fc", "layer4:dim7=0:zero", "dimension", errors.InvalidInputError,
    ),
    "one dimension twice": (
        "fc", Intervention.zero("layer4", channel=0, dims={0: 1}), "another axis",
        errors.InvalidInputError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_is_refused(case: str, load: Callable[[str], LocalModel]) -> None:
    """An intervention that can't be right is an error that says what was expected."""
    asked, given, words, kind = REFUSED[case]
    with pytest.raises(kind, match=words):
        load(R).extract(batch(R), asked, interventions=given)


def test_extractors_that_cannot_change_values_are_refused(
    load: Callable[[str], LocalModel],
) -> None:
    """A request that names another extractor than HOOK fails clearly."""
    for extractor in ("torchscript", "fx", "children", "layer_getter"):
        with pytest.raises(errors.ExtractorUnsupportedError, match="can't apply interventions"):
            load(R).extract(batch(R), "fc", interventions="layer4:zero", extractor=extractor)


def test_models_that_remember_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with state that can't be restored would show a change to later callers."""
    module = ModuleType("freshnets")
    module.cycles = lambda: statefulnets.build("Cycles")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "freshnets", module)
    with (
        layertap.load("freshnets:cycles", item_shape=ITEM, device="cpu") as model,
        pytest.raises(errors.ExtractorUnsupportedError, match="keeps state"),
    ):
        model.extract(torch.ones(1, *ITEM), "output", interventions="out:zero")


CONTRADICTIONS: dict[str, Callable[[], Any]] = {
    "NaN as the value": lambda: Intervention.set_to("a", float("nan")),
    "an infinite factor": lambda: Intervention.scale("a", float("inf")),
    "NaN in a vector": lambda: Intervention.add("a", [float("nan")]),
    "NaN as a replacement": lambda: Intervention.replace("a", [float("nan")]),
    "infinity in a direction": lambda: Intervention.project_out("a", [float("inf"), 1]),
    "a direction of zeros": lambda: Intervention.project_out("a", [0.0, 0.0]),
    "a matrix as a direction": lambda: Intervention.project_out("a", np.ones((2, 2))),
    "limits the wrong way": lambda: Intervention.clamp("a", low=1, high=0),
    "no limit": lambda: Intervention.clamp("a"),
    "no axis for a mean": lambda: Intervention.mean("a", []),
    "an unknown axis": lambda: Intervention.mean("a", "z"),
    "an unknown selection": lambda: Intervention.zero("a", chanel=3),  # type: ignore[call-arg]
    "no index": lambda: Intervention.zero("a", channel=[]),
    "half an index": lambda: Intervention.zero("a", channel=1.5),  # type: ignore[arg-type]
    "text": lambda: Intervention.parse("layer4"),
    "an unknown operation": lambda: Intervention.parse("layer4:explode"),
    "an axis twice": lambda: Intervention.parse("layer4:channel=3:channel=4:zero"),
    "a dimension twice": lambda: Intervention.parse("layer4:dim1=2:dim01=3:zero"),
    "heads twice": lambda: Intervention.parse("layer4:head=1:heads=2:heads=4:zero"),
    "the side twice": lambda: Intervention.parse("layer4:input:input:zero"),
    "a file": lambda: Intervention.parse("layer4:add=@/etc/passwd"),
    "skip of an input": lambda: Intervention.skip("a").of_input(),
    "a negative source": lambda: Intervention.patch("a", -1),
    "half an item": lambda: Intervention.patch("a", 0.5),  # type: ignore[arg-type]
    "half an item without a method": lambda: Intervention(
        "a",
        Operation.PATCH,
        source_item=0.5,  # type: ignore[arg-type]
    ),
    "half a seed": lambda: Intervention.noise("a", seed=0.5),  # type: ignore[arg-type]
    "a text as a limit": lambda: Intervention.clamp("a", low="1"),  # type: ignore[arg-type]
    "a text as another": lambda: Intervention.cap("a", [1.0], high="1"),  # type: ignore[arg-type]
    "a set beside single ones": lambda: parse_interventions(["a:zero", ["b:zero"]]),
    "an empty set": lambda: parse_interventions([["a:zero"], []]),
    "too many": lambda: parse_interventions(["a:zero"] * 1025),
    "too many sets": lambda: parse_interventions([["a:zero"]] * 257),
    "something else": lambda: parse_interventions([7]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_where_they_are_made(case: str) -> None:
    """An intervention that contradicts itself is never made."""
    with pytest.raises(errors.InvalidInputError):
        CONTRADICTIONS[case]()


def test_texts_and_methods_make_the_same_interventions() -> None:
    """Every operation that has no array can be written as a text."""
    pairs = {
        "a:zero": Intervention.zero("a"),
        "a:channel=3,-1,4..9..2:zero": Intervention.zero("a", channel=[3, -1, range(4, 9, 2)]),
        "a:input:y=..2:x=1..:set=-2.5": Intervention.set_to(
            "a", -2.5, y=slice(2), x=slice(1, None)
        ).of_input(),
        "a:mean=y,x,0": Intervention.mean("a", ["y", "x", 0]),
        "a:head=1:heads=4:scale=2": Intervention.scale("a", 2, head=1, heads=4),
        "a:dim2=5:add=0.5*2": Intervention.add("a", 2, factor=0.5, dims={2: 5}),
        "a:item=0:patch=1": Intervention.patch("a", 1, item=0),
        "a:clamp=..6": Intervention.clamp("a", high=6.0),
        "a:noise=0.5,7": Intervention.noise("a", 0.5, seed=7),
        r"b\:c:skip": Intervention.skip("b:c"),
    }
    for text, expected in pairs.items():
        found = Intervention.parse(text)
        assert copy.copy(found).summary == expected.summary, text
        assert found.summary.startswith(text.partition("=")[0]), text
    assert len({each.summary for each in pairs.values()}) == len(pairs)


def test_a_summary_is_short_and_tells_everything_apart() -> None:
    """It has the form of a text, and is another one if anything of the intervention is."""
    vector = np.linspace(-1, 1, 4)
    assert Intervention.zero("a:b", channel=[3, range(4, 9, 2)]).summary == (
        r"a\:b:channel=3,4..9..2:zero"
    )
    assert Intervention.scale("a", 0.5, y=slice(2, None)).of_input().summary == (
        "a:input:y=2..:scale factor=0.5"
    )
    different = [
        Intervention.zero("a"),
        Intervention.zero("a").of_input(),
        Intervention.zero("a", channel=1),
        Intervention.zero("a", y=1),
        Intervention.zero("a", dims={1: 1}),
        Intervention.zero("a", channel=range(1, 4)),
        Intervention.zero("a", channel=range(1, 4, 2)),
        Intervention.zero("a", channel=slice(1, None)),
        Intervention.zero("a", head=1, heads=2),
        Intervention.zero("a", head=1, heads=4),
        Intervention.set_to("a", 0.0),
        Intervention.set_to("a", -0.0),
        Intervention.clamp("a", low=0),
        Intervention.clamp("a", high=0),
        Intervention.noise("a", 1, seed=1),
        Intervention.noise("a", 1, seed=2),
        Intervention.patch("a", 0),
        Intervention.patch("a", 1),
        Intervention.mean("a", ["y", "x"]),
        Intervention.mean("a", ["y", 1]),
        Intervention.add("a", vector),
        Intervention.add("a", vector.astype(np.float32)),
        Intervention.add("a", vector, factor=2),
        Intervention.add("a", -vector),
        Intervention.replace("a", vector),
        *parse_interventions([["a:zero"], ["a:zero"]]),
    ]
    assert len({each.summary for each in different}) == len(different)
