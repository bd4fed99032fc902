"""Every name of a layer gives the value that hooks on a fresh model see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import asking
import namednets
from kept import kept
from layertap import Extractor, Features, LayerSelection, errors
from layertap.engine import Call, Engine, ExtractionRequest, Inputs
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView
from oracle import outputs_of

ITEM = (3, 16, 16)
EXTRACTORS = [Extractor.AUTO, Extractor.HOOK, Extractor.TORCHSCRIPT]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine for all tests; see ``load``."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


def images() -> torch.Tensor:
    return torch.rand((2, *ITEM), generator=torch.Generator().manual_seed(0))


def load(engine: Engine, net: str, item_shape: tuple[int, ...] = ITEM) -> torch.nn.Module:
    """Load a net unless a test before has; return a fresh one."""
    if net not in {host.model.name for host in engine.hosts()}:
        engine.load(ModelSpec(f"namednets:{net}", item_shape=item_shape))
    return getattr(namednets, net)()


def check(engine: Engine, net: str, layer: str, extractor: Extractor, right: torch.Tensor) -> None:
    x = images()
    got = asking.ask(engine, net, layer, x, extractor)[layer]
    np.testing.assert_allclose(got, right.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("layer", ["layer0", "layer1", "layer0.0", "base.2"])
def test_every_name_of_a_module(engine, layer, extractor) -> None:
    """A module that can be reached by two paths is served under both."""
    fresh = load(engine, "two_names")
    module = dict(fresh.named_modules(remove_duplicate=False))[layer]
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    fresh(images())
    check(engine, "two_names", layer, extractor, seen[0])


def test_two_names_at_once(engine) -> None:
    """A request may contain both names of one layer."""
    load(engine, "two_names")
    got = asking.ask(engine, "two_names", ["layer1", "base.2"], images())
    np.testing.assert_array_equal(got["layer1"], got["base.2"])


@pytest.mark.parametrize("net", ["functions", "recursive", "two_names"])
def test_the_models_own_result(engine, net) -> None:
    """The reserved name gives the model's result."""
    check(engine, net, "output", Extractor.HOOK, load(engine, net)(images()))


def test_the_result_under_another_name(engine) -> None:
    """If a child has the reserved name, the name is the child's, and the result has another."""
    fresh = load(engine, "taken")
    right = fresh(images())["logits"]
    check(engine, "taken", "model_output.logits", Extractor.AUTO, right)
    check(engine, "taken", "output", Extractor.AUTO, right / 2)
    (_, second) = outputs_of(fresh, images(), "conv")
    check(engine, "taken", "conv@1", Extractor.AUTO, second)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_members_that_are_called_like_children(engine, extractor) -> None:
    """A member and a child with the same name have their own values."""
    fresh = load(engine, "joined")
    ((first, second),) = outputs_of(fresh, images(), "encoder")
    check(engine, "joined", "encoder[0]", extractor, first)
    check(engine, "joined", "encoder[1]", extractor, second)
    check(engine, "joined", "encoder.0", extractor, outputs_of(fresh, images(), "encoder.0")[0])


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_attention_weights(engine, extractor) -> None:
    """They equal what the module returns on request, and the pass is not changed."""
    fresh = load(engine, "attends", (5, 8))
    x = torch.rand((2, 5, 8), generator=torch.Generator().manual_seed(0))
    right: list[torch.Tensor] = []
    attention = fresh.layer.self_attn

    def ask(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        right.append(module.forward(*args, need_weights=True, average_attn_weights=False)[1])

    handle = attention.register_forward_hook(ask)
    fresh(x)
    handle.remove()
    asked = ["layer.self_attn.attention_weights", "fused"]
    got = asking.ask(engine, "attends", asked, x, extractor)
    np.testing.assert_allclose(got[asked[0]], right[0].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["fused"], fresh(x).numpy(), rtol=1e-4, atol=1e-6)


def test_weights_that_do_not_exist_are_refused_with_the_reason(engine) -> None:
    """The error says why fused attention has none, and what to do."""
    load(engine, "attends", (5, 8))
    x = torch.rand(2, 5, 8)
    with pytest.raises(errors.ExtractorUnsupportedError, match="fused attention.*build it that"):
        asking.ask(engine, "attends", "fused.attention_weights", x)


@pytest.mark.parametrize("key", namednets.OddKeys.KEYS)
def test_odd_names_of_modules(engine, key) -> None:
    """A name from the catalogue selects that layer, whatever characters it contains."""
    fresh = load(engine, "odd_keys")
    x = images().numpy()
    view = TensorView("", of_array(x), x.shape, memoryview(x.tobytes()))
    chosen = (LayerSelection(f"heads.{key}"),)
    reply = engine.extract(
        ExtractionRequest("odd_keys", Inputs((view,)), chosen, form=NativeForm), Call()
    )
    got = Features(reply.payload)
    assert list(got) == [f"heads.{key}"]
    right = fresh(images())[key]
    np.testing.assert_allclose(got[f"heads.{key}"], right.numpy(), rtol=1e-4, atol=1e-5)
    text = "heads." + key.replace("=", r"\=").replace(":", r"\:")
    assert asking.ask(engine, "odd_keys", text, images()).keys() == got.keys()
