"""The catalogue contains what happened when the model ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layertap.errors import LayerNotFoundError, ModelLoadError
from layertap.extraction import Catalogue, LayerEntry, PointKind, measure
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.passes import KeptState
from layertap.models import InputSpec, LoadedModel, ModelSpec, Signature, load_model
from layertap.selection import Capture, Extractor
from oddnets import script
from tinynets import ITEM

OUTPUT, INPUT = Capture.OUTPUT, Capture.INPUT


def names(catalogue: Catalogue, extractor: Extractor, capture: Capture = OUTPUT) -> set[str]:
    return {entry.name for entry in catalogue if entry.serves(extractor, capture)}


def test_shapes_and_geometry(load_net) -> None:
    """A layer has the measured shapes of both sides, and its layout."""
    entry = measure(load_net("residual")).entry("layer2")
    assert (entry.type, entry.calls) == ("Sequential", 1)
    assert entry.geometry == Geometry(Layout.CHANNELS_FIRST, channels=16, height=4, width=4)
    dims = entry.specs[OUTPUT].dims
    assert [(dim.size, dim.batch) for dim in dims] == [
        (1, True),
        (16, False),
        (4, False),
        (4, False),
    ]
    assert entry.specs[INPUT].shape(3) == (3, 8, 8, 8)
    assert entry.specs[OUTPUT].dtype is torch.float32


def test_order_is_that_of_execution(load_net) -> None:
    """Entries are in the order in which modules began to run, parents before children."""
    order = [entry.name for entry in measure(load_net("residual"))]
    assert order[:4] == ["conv1", "bn1", "relu", "layer1"]
    assert order.index("layer1") < order.index("layer1.0.conv1") < order.index("layer2")


def test_further_calls_are_numbered(load_net) -> None:
    """The second call of a module is a separate entry, named as by torchvision."""
    catalogue = measure(load_net("residual"))
    assert catalogue.entry("layer1.0.relu").calls == 2
    assert catalogue.entry("layer1.0.relu_1").points[OUTPUT].call == 1


def test_children_and_layer_getter_serve_until_the_walk_breaks(load_net) -> None:
    """The walk ends at the flatten, which is not a child; the reason says so."""
    catalogue = measure(load_net("residual"))
    served = {"conv1", "bn1", "relu", "layer1", "layer2", "avgpool"}
    assert names(catalogue, Extractor.CHILDREN) == served
    assert names(catalogue, Extractor.LAYER_GETTER) == served
    assert "fc" in catalogue.entry("fc").refusal(Extractor.CHILDREN)
    assert "top-level" in catalogue.entry("layer1.0").refusal(Extractor.CHILDREN)


def test_fx_serves_modules_and_nodes(load_net) -> None:
    """FX serves every module and the operations between them; no other kind serves those."""
    catalogue = measure(load_net("residual"))
    modules = {
        entry.name for entry in catalogue if entry.kind is PointKind.MODULE and not entry.is_result
    }
    assert modules <= names(catalogue, Extractor.FX)
    node = catalogue.entry(
        "layer1.0.iadd" if "layer1.0.iadd" in catalogue.entries else "layer1.0.add"
    )
    assert node.kind is PointKind.NODE
    assert node.served_by(OUTPUT) == [Extractor.FX]


def test_fx_finds_modules_whose_names_end_in_numbers(load_net) -> None:
    """torchvision calls norm_2 `norm_1`; FX still returns the right value for either name."""
    catalogue = measure(load_net("numbered"))
    assert {"norm_1", "norm_2", "relu", "relu_1"} <= names(catalogue, Extractor.FX)


def test_fx_is_refused_where_its_value_is_wrong(load_net) -> None:
    """A graph without an in-place statement serves nothing that depends on the statement."""
    catalogue = measure(load_net("unassigned_in_place"))
    assert not catalogue.entry("head").serves(Extractor.FX, OUTPUT)
    assert "differs" in catalogue.entry("head").refusal(Extractor.FX)
    assert catalogue.entry("head").serves(Extractor.HOOK, OUTPUT)


def test_an_untraceable_model_is_served_by_hooks(load_net) -> None:
    """Without a symbolic graph FX says why it can't serve, and HOOK can."""
    entry = measure(load_net("branching")).entry("second")
    assert "traced" in entry.refusal(Extractor.FX)
    assert entry.serves(Extractor.HOOK, OUTPUT)


def test_modules_that_never_run_are_listed_last(load_net) -> None:
    """A module that no forward pass calls is listed, served by no kind, and says so."""
    catalogue = measure(load_net("silent"))
    assert [(e.name, e.calls) for e in catalogue if e.kind is PointKind.MODULE][-2:] == [
        ("aux", 0),
        ("read", 0),
    ]
    assert catalogue.entry("aux").served_by(OUTPUT) == []
    assert "never runs" in catalogue.entry("aux").refusal(Extractor.HOOK)


def test_members_of_containers_are_entries(load_net) -> None:
    """Tuples and dicts that a module returns or receives are split by index and key."""
    catalogue = measure(load_net("containers"))
    hooked = names(catalogue, Extractor.HOOK)
    assert {"pair.0", "pair.1.0", "named.low", "named.high"} <= hooked
    assert "pair.0" in catalogue.entry("pair").refusal(Extractor.HOOK)
    assert {"add.0", "add.other"} <= names(catalogue, Extractor.HOOK, INPUT)


def test_tokens_and_the_fused_transformer_path(load_net) -> None:
    """The parts of a transformer layer run one by one, although torch could fuse them."""
    catalogue = measure(load_net("tokens"))
    assert catalogue.entry("encoder.linear1").calls == 1
    assert catalogue.entry("encoder.self_attn.out_proj").calls == 0


def test_a_model_that_writes_into_its_batch_is_known(load_net) -> None:
    """Measuring finds out whether a model overwrites its input."""
    assert measure(load_net("writes_input")).mutates_input
    assert not measure(load_net("residual")).mutates_input


def test_content_dependent_shapes_are_dynamic(load_net) -> None:
    """An output whose size depends on the content is marked, and not predicted."""
    assert measure(load_net("dynamic")).entry("pick").specs[OUTPUT].dynamic


def test_measuring_leaves_no_hook_behind(load_net) -> None:
    """The hooks of the surveys are removed, and the model is still in eval mode."""
    model = load_net("residual")
    measure(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert not any(m.training for m in model.module.modules())


@pytest.mark.parametrize("net", ["branching", "residual", "unassigned_in_place"])
def test_measuring_leaves_the_model_in_eval_mode(load_net, net) -> None:
    """A failing symbolic trace leaves torchvision's `train()` in effect; layertap restores it."""
    model = load_net(net)
    measure(model)
    assert not any(module.training for module in model.module.modules())


def test_a_model_that_can_not_run_is_a_load_error(load_net) -> None:
    """A model that fails on its own input shape is refused when it is loaded."""
    model = load_net("residual")
    model.module.fc = nn.Linear(3, 5)
    with pytest.raises(ModelLoadError, match=r"\[3, 16, 16\]"):
        measure(model)


def test_a_misspelt_layer_gets_close_matches(load_net) -> None:
    """The error for a misspelt name suggests similar names."""
    with pytest.raises(LayerNotFoundError, match="did you mean 'layer1'"):
        measure(load_net("residual")).entry("layr1")


def test_globs_stay_within_a_component_unless_doubled(load_net) -> None:
    """`*` does not cross a dot, `**` does; brackets and dots stand for themselves."""
    catalogue = measure(load_net("residual"))

    def matched(pattern: str) -> list[str]:
        return [entry.name for entry in catalogue.match(pattern)]

    assert matched("layer*") == ["layer1", "layer2"]
    assert matched("layer1.?.bn2") == ["layer1.0.bn2", "layer1.1.bn2"]
    assert set(matched("**.conv2")) == {"layer1.0.conv2", "layer1.1.conv2", "layer2.1.conv2"}
    assert matched("layer1x0") == []
    assert isinstance(catalogue.entry("fc"), LayerEntry)


def test_what_depends_on_unassigned_statements_is_not_claimed_for_fx(load_net) -> None:
    """The module whose last statement is in place, its nodes and all later ones are refused."""
    catalogue = measure(load_net("adds_positions"))
    assert catalogue.entry("stem").serves(Extractor.FX, OUTPUT)
    for name in ("positions", "head"):
        assert not catalogue.entry(name).serves(Extractor.FX, OUTPUT), name
        assert catalogue.entry(name).serves(Extractor.HOOK, OUTPUT), name
    nodes = [entry for entry in catalogue if entry.kind is PointKind.NODE]
    product = next(entry for entry in nodes if entry.name.startswith("mul"))
    assert "dead-code elimination" in product.refusal(Extractor.FX)


def test_layers_behind_a_look_at_values_are_not_claimed_for_torchscript(load_net) -> None:
    """Layers before the model asks a tensor for a number are claimed; later ones are not."""
    catalogue = measure(load_net("raises"))
    conv, head = catalogue.entry("conv"), catalogue.entry("head")
    assert conv.serves(Extractor.TORCHSCRIPT, Capture.OUTPUT)
    assert not head.serves(Extractor.TORCHSCRIPT, Capture.OUTPUT)
    assert not head.serves(Extractor.TORCHSCRIPT, Capture.INPUT)
    assert head.serves(Extractor.HOOK, Capture.INPUT)
    assert "branches on tensor values" in head.refusal(Extractor.TORCHSCRIPT)


def test_watching_for_looks_changes_no_claim() -> None:
    """FX is claimed for attention's layers, whose values differ while operations are watched."""
    spec = ModelSpec("layoutnets:small_vit", item_shape=(3, 64, 64))
    catalogue = measure(load_model(spec, "cpu"))
    assert len(names(catalogue, Extractor.FX)) > 15


@pytest.mark.parametrize("net", ["recurrent", "counts", "remembers"])
def test_what_a_model_keeps_is_seen(net) -> None:
    """In attributes, in buffers written in place, and in containers of constant length."""
    catalogue = measure(load_model(ModelSpec(f"oddnets:{net}", item_shape=ITEM)))
    assert catalogue.scope.rules.state is KeptState.RESET


def test_what_a_program_keeps_is_seen() -> None:
    """A TorchScript program has its own attributes; its statements show that it writes some."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return x * self.passes

    def kept(module: torch.jit.ScriptModule) -> KeptState:
        signature = Signature((InputSpec(ITEM, free=(1, 2), name="x"),))
        return measure(
            LoadedModel("net", "", "", module, torch.device("cpu"), signature)
        ).scope.rules.state

    assert kept(script(Keeps())) is KeptState.RESET
    assert kept(script(nn.Conv2d(3, 4, 1).eval())) is KeptState.NONE


def test_symbolic_tracing_leaves_no_symbols_behind() -> None:
    """Otherwise a model whose state depends on its state would compute with symbols."""
    model = load_model(ModelSpec("oddnets:recurrent", item_shape=ITEM))
    measure(model)
    assert type(model.module.state) is torch.Tensor
    assert model.module(torch.rand(2, *ITEM)).isfinite().all()


def test_nodes_of_a_graph_that_computes_something_else_are_not_claimed() -> None:
    """Nodes have no reference value; the graph's modules show whether it is the model's."""
    catalogue = measure(load_model(ModelSpec("oddnets:only_tensors", item_shape=ITEM)))
    assert "different values of 'conv'" in catalogue.entry("add").refusal(Extractor.FX)


def test_children_behind_a_look_at_values_are_not_claimed_for_a_walk(load_net) -> None:
    """What the code sees there may change what it passes to them."""
    catalogue = measure(load_net("raises"))
    assert catalogue.entry("conv").serves(Extractor.CHILDREN, OUTPUT)
    assert not catalogue.entry("head").serves(Extractor.CHILDREN, OUTPUT)


def test_a_model_with_sparse_tensors_is_measured() -> None:
    """They have no plain memory, so nothing here may rely on it."""
    catalogue = measure(load_model(ModelSpec("oddnets:sparse", item_shape=ITEM)))
    assert catalogue.entry("tail").serves(Extractor.HOOK, OUTPUT)
