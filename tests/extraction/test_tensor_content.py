"""The content of tensors that are not dense, or hold other tensors, is found where it is.

Without the rule of Note [Wrapper subclasses] many of these tests end the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from torch import nn

import contentnets
from asking import ask
from contentnets import ITEM, Int8
from kept import kept
from layertap import load
from layertap.engine import Engine
from layertap.extraction import measure
from layertap.extraction.code_identity import code_identity
from layertap.extraction.plan_cache import fingerprint
from layertap.extraction.state import Snapshot
from layertap.extraction.state.equality import equal
from layertap.models import LoadedModel, ModelSpec, hf_source, load_model
from layertap.models.tensor_content import is_wrapper, plain_tensors
from layertap.selection import Capture, Extractor
from oracle import outputs_of

OUTPUT = Capture.OUTPUT
NETS = ["quantised", "rescales", "requantises", "graph", "compressed", "spectral"]


def loaded(net: str) -> LoadedModel:
    return load_model(ModelSpec(f"contentnets:{net}", item_shape=ITEM))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with the nets whose values are compared."""
    with closing(Engine(plan_cache=kept())) as made:
        for net in NETS:
            made.load(ModelSpec(f"contentnets:{net}", item_shape=ITEM))
        yield made


def test_what_is_a_wrapper() -> None:
    """A subclass with memory is none, nor is a parameter; what a wrapper holds is in plain view."""

    class Named(torch.Tensor):
        pass

    inner = Int8.of(torch.rand(3, 2))
    assert is_wrapper(inner)
    assert is_wrapper(nn.Parameter(inner, requires_grad=False))
    assert [each.dtype for each in plain_tensors(inner)] == [torch.int8, torch.float32]
    for plain in (torch.rand(2), nn.Parameter(torch.rand(2)), torch.rand(2).as_subclass(Named)):
        assert not is_wrapper(plain)
        assert [each is plain for each in plain_tensors(plain)] == [True]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("layer", ["first", "last"])
@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.AUTO])
def test_values_are_those_of_a_fresh_module(engine, net, layer, extractor) -> None:
    """Bit for bit, in the second request too, although the passes of two nets change a weight."""
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    (right,) = outputs_of(getattr(contentnets, net)(), x, layer)
    for _ in range(2):
        got = ask(engine, net, layer, x, extractor)[layer]
        assert torch.equal(torch.from_numpy(got), right)


def test_no_program_holds_such_weights() -> None:
    """TORCHSCRIPT and EXPORT refuse the model and name the class; HOOK and FX serve it."""
    entry = measure(loaded("quantised")).entry("first")
    for extractor in (Extractor.TORCHSCRIPT, Extractor.EXPORT):
        assert not entry.serves(extractor, OUTPUT)
        assert "class Int8, whose operations run in Python" in entry.refusal(extractor)
    assert entry.serves(Extractor.HOOK, OUTPUT)
    assert entry.serves(Extractor.FX, OUTPUT)


def test_layers_behind_such_an_activation_are_not_compiled() -> None:
    """The activation itself can't be sent; what is computed before it is compiled as usual."""
    catalogue = measure(loaded("quantises_activations"))
    assert catalogue.entry("first").serves(Extractor.TORCHSCRIPT, OUTPUT)
    assert "Int8, which holds other tensors" in catalogue.entry("rounds").refusal(Extractor.HOOK)
    last = catalogue.entry("last")
    assert last.serves(Extractor.HOOK, OUTPUT)
    assert "computes with Int8, a class of tensors" in last.refusal(Extractor.TORCHSCRIPT)


def test_parameters_are_no_such_class() -> None:
    """torch names Parameter among the classes of an operation where one is copied."""
    assert measure(loaded("copies_layer")).entry("last").serves(Extractor.TORCHSCRIPT, OUTPUT)


@pytest.mark.parametrize("net", ["rescales", "requantises"])
def test_writes_to_what_a_wrapper_holds_are_undone(net) -> None:
    """They are seen in the tensors that it holds and in its attributes."""
    module = getattr(contentnets, net)()
    scale = module.middle.weight.scale.clone()
    snapshot = Snapshot(module)
    module(torch.rand(2, 6))
    changes = snapshot.deep_undo()
    assert [(change.path, change.reason) for change in changes] == [("middle.weight.scale", "")]
    assert torch.equal(module.middle.weight.scale, scale)


@pytest.mark.parametrize(
    ("net", "write"),
    [
        ("quantised", lambda net: net.middle.weight.data_[0, 0].add_(1)),
        ("graph", lambda net: net.neighbours.values()[0].add_(1)),
        ("compressed", lambda net: net.neighbours.col_indices()[0].add_(1)),
        ("spectral", lambda net: net.phases.conj_physical_()),
        ("packed", lambda net: (net.scales[1000].mul_(2), net.pack())),
    ],
)
def test_the_fingerprint_follows_the_content(net, write) -> None:
    """Equal weights have equal fingerprints; one other number makes another one."""
    one, same, other = loaded(net), loaded(net), loaded(net)
    write(other.module)
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    assert code_identity(one.module) == code_identity(same.module)


def test_a_weight_that_hides_its_content_is_like_no_other() -> None:
    """Rather measured again than taken for another one; it is served all the same."""
    assert fingerprint(loaded("opaque")) != fingerprint(loaded("opaque"))
    assert measure(loaded("opaque")).entry("last").serves(Extractor.HOOK, OUTPUT)


@pytest.mark.parametrize(
    ("net", "node", "reason"),
    [
        ("graph", "neighbours", "a sparse tensor"),
        ("compressed", "neighbours", "a sparse tensor"),
        ("spectral", "fft_rfft", "complex64"),
        ("spectral", "modes", "complex64"),
    ],
)
def test_nodes_that_cannot_be_sent_are_not_claimed(net, node, reason) -> None:
    """The catalogue says why, and claims the nodes behind them."""
    catalogue = measure(loaded(net))
    assert reason in catalogue.entry(node).refusal(Extractor.FX)
    assert catalogue.entry("last").serves(Extractor.FX, OUTPUT)


def test_what_a_wrapper_holds_besides_tensors_belongs_to_the_code() -> None:
    """A kept catalogue is not used for a model whose weights have another attribute.

    Nor is it if a wrapper that is no parameter holds another number.
    """
    nets = [contentnets.quantised() for _ in range(4)]
    for net in nets:
        net.middle.weight.steps = 127
        vars(net)["held"] = Int8.of(torch.ones(1, 2))
    nets[2].middle.weight.steps = 63
    nets[3].held.data_[0, 0] += 1
    one, same, *others = map(code_identity, nets)
    assert one == same
    assert one not in others


def test_wrappers_are_equal_if_what_they_hold_is() -> None:
    """A pass that assigns an equal one has changed nothing; torch can't compare them."""
    weight = torch.rand(3, 2)
    assert equal(Int8.of(weight), Int8.of(weight))
    assert not equal(Int8.of(weight), Int8.of(weight * 2))


def test_weights_are_copied_out_of_their_files() -> None:
    """The memory of a Hugging Face model is its own, also that of what its weights hold."""
    net = contentnets.quantised()
    # Other tensors of the same memory, so that it is not used again.
    mapped = [each.detach() for tensor in net.parameters() for each in plain_tensors(tensor)]
    places = [each.data_ptr() for each in mapped]
    right = net.middle(torch.ones(1, 5))
    hf_source._own_memory(net)
    owned = [each.data_ptr() for tensor in net.parameters() for each in plain_tensors(tensor)]
    assert not set(places) & set(owned)
    assert torch.equal(net.middle(torch.ones(1, 5)), right)


def test_gradients_go_through_such_weights() -> None:
    """The gradient is that of autograd on a fresh module; what autograd keeps is counted."""
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    with load("contentnets:quantised", item_shape=ITEM) as model:
        got = model.extract(x, ["first:gradient"], objective="output[1]")
    with torch.inference_mode(False), torch.enable_grad():
        net = contentnets.quantised()
        before = net.first(x.clone()).detach().requires_grad_()
        net.last(net.middle(before.relu()))[:, 1].sum().backward()
    assert torch.equal(got["first:gradient"], before.grad)
