"""Measurements decide which plans share passes, and values stay those that were promised."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import sharenets
from asking import ask, request_for
from layertap import Extractor, LayerSelection
from layertap.batching import BatchPolicy
from layertap.engine import Call, Engine, HostOptions, describe, sharing
from layertap.engine.sharing import Decision
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from layertap.settings.definition import build
from oracle import outputs_of
from sharenets import ITEM
from together import Together

pytestmark = pytest.mark.long

AUTO = BatchPolicy(sharing="auto")
PATIENCE = 40


@pytest.fixture(params=[1, 2])
def engine(request) -> Iterator[Engine]:
    """An engine as in latency mode, and one as in throughput mode."""
    engine = Engine(threads=1, instances=request.param)
    yield engine
    engine.close()


def load(engine: Engine, net: str, *declared: str, policy: BatchPolicy = AUTO, again=False) -> None:
    spec = ModelSpec(f"sharenets:{net}", net, item_shape=ITEM)
    layers = [LayerSelection.parse(layer) for layer in declared]
    take = engine.replace if again else engine.load
    take(spec, layers, options=HostOptions(batching=policy))


def notes(engine: Engine, net: str) -> str:
    return "\n".join(describe(engine.host(net)).notes)


def items(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((count, 1, *ITEM), dtype=np.float32))


def at_once(engine: Engine, net: str, extractor: Extractor = Extractor.AUTO) -> set[int]:
    """Let six callers ask twelve times each; return how many requests shared their passes.

    Their values are compared with the net's own.
    """
    module, batches = getattr(sharenets, net)(), items(6)
    right = [outputs_of(module, torch.from_numpy(x), "conv")[0] for x in batches]

    def call(n: int) -> set[int]:
        together = set()
        for _ in range(12):
            extraction = engine.extract(request_for(net, "conv", batches[n], extractor), Call())
            together.add(extraction.together)
        values = ask(engine, net, "conv", batches[n], extractor).torch()["conv"]
        assert difference(values, right[n]) <= COMPILED_TOLERANCE[torch.float32]
        return together

    with ThreadPoolExecutor(len(batches)) as pool:
        return set().union(*pool.map(call, range(len(batches))))


def test_declared_layers_share_passes_where_that_is_faster(engine) -> None:
    """The decision is made before the model is served, and is in its description."""
    load(engine, "steady", "conv")
    assert "requests for conv by HOOK share passes: shared passes gave " in notes(engine, "steady")
    assert max(at_once(engine, "steady")) > 1


def test_declared_layers_run_alone_where_that_is_faster(engine) -> None:
    """No request of theirs shares a pass, though the limit allows eight items."""
    load(engine, "quadratic", "conv")
    assert "requests for conv by HOOK run alone: shared passes gave " in notes(engine, "quadratic")
    assert at_once(engine, "quadratic") == {1}


@pytest.mark.parametrize(("net", "decided"), [("steady", "share"), ("quadratic", "run alone")])
def test_other_layers_are_measured_once_their_requests_meet(engine, net, decided) -> None:
    """A plan that was not declared runs alone until then, beside the measurement too."""
    load(engine, net)
    ask(engine, net, "conv", items(1)[0], Extractor.HOOK)
    assert notes(engine, net) == ""
    ends, seen = time.monotonic() + PATIENCE, set()
    while not notes(engine, net) and time.monotonic() < ends:
        before = not notes(engine, net)
        together = at_once(engine, net, Extractor.HOOK)
        seen |= together if before and not notes(engine, net) else set()
    assert seen <= {1}
    assert f"requests for conv by HOOK {decided}" in notes(engine, net)
    assert (max(at_once(engine, net, Extractor.HOOK)) > 1) is (net == "steady")


def test_a_lone_caller_causes_no_measurement(engine) -> None:
    """Requests that never meet have nothing to gain, and are not slowed down by a measurement."""
    load(engine, "steady")
    for _ in range(12):
        ask(engine, "steady", "conv", items(1)[0], Extractor.HOOK)
    assert engine.host("steady").sharing._promoter._counts == {}
    assert notes(engine, "steady") == ""


@pytest.mark.parametrize("policy", [BatchPolicy(8), BatchPolicy(8, sharing="off"), BatchPolicy()])
def test_nothing_is_measured_unless_that_is_asked_for(engine, policy) -> None:
    """With ``on`` all requests share passes up to the limit, with ``off`` none."""
    load(engine, "quadratic", "conv", policy=policy)
    assert notes(engine, "quadratic") == ""
    assert (max(at_once(engine, "quadratic")) > 1) is (policy.most > 1)


def test_items_that_depend_on_each_other_are_not_measured(engine) -> None:
    """Their requests run alone whatever would be faster."""
    spec = ModelSpec("batchnets:mixes", item_shape=(3, 16, 16))
    layers = [LayerSelection.parse("tail")]
    engine.load(spec, layers, options=HostOptions(batching=AUTO))
    assert "passes" not in "\n".join(engine.host("mixes").sharing.notes)


def test_a_new_version_begins_with_the_former_decision(engine, monkeypatch) -> None:
    """A close measurement then changes nothing, so versions do not alternate."""
    load(engine, "steady", "conv")
    close = [1.0, 1.01] * 10
    ratios, taken = iter(close), []

    def of(once, before) -> Decision:
        taken.append(before)
        return whole(lambda shared: next(ratios) if shared else 1.0, before)

    whole = Decision.of
    monkeypatch.setattr(Decision, "of", of)
    load(engine, "steady", "conv", again=True)
    assert taken == [True]
    assert "share passes" in notes(engine, "steady")


def test_turns_alternate_which_way_is_first() -> None:
    """Otherwise a machine that becomes slower would favour one way in every turn."""
    ways: list[bool] = []

    def once(shared: bool) -> float:
        ways.append(shared)
        return 2.0 if shared else 1.0

    decision = Decision.of(once, None)
    assert ways == [False, True, True, False, False, True]
    assert decision == Decision(shared=True, ratios=(2.0, 2.0, 2.0))
    assert str(decision) == (
        "share passes: shared passes gave 2.00 times as many items per second as single ones "
        "(2.00 to 2.00 in 3 turns)"
    )


@pytest.mark.parametrize("end", [lambda engine: engine.unload("steady"), Engine.close])
def test_an_unloaded_model_is_not_measured_on(monkeypatch, end) -> None:
    """Neither a model that is unloaded nor an engine that closes waits for a measurement's end."""
    monkeypatch.setattr(sharing, "TURN_SECONDS", 10 * PATIENCE)
    engine = Engine(threads=1)
    load(engine, "steady")
    ends = time.monotonic() + PATIENCE
    while not measuring() and time.monotonic() < ends:
        at_once(engine, "steady", Extractor.HOOK)
    assert measuring()
    ending = threading.Thread(target=end, args=[engine], daemon=True)
    ending.start()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert not measuring()
    engine.close()


def measuring() -> bool:
    """Return whether callers of a measurement are alive."""
    return any(thread.name.startswith("layertap-sharing") for thread in threading.enumerate())


def test_shared_values_are_within_the_tolerance(engine) -> None:
    """Requests that auto joins get what each gets alone, as for ``on``."""
    load(engine, "steady", "conv")
    batches = items(4)
    asked = [partial(engine.extract, request_for("steady", "conv", x), Call()) for x in batches]
    if threads_of(engine) > 1:
        pytest.skip("the other thread would take single requests")
    together = Together(engine, asked)
    assert together.shared == [4] * 4
    module = sharenets.steady()
    for x, values in zip(batches, together.values(), strict=True):
        alone = outputs_of(module, torch.from_numpy(x), "conv")[0]
        assert difference(values["conv"], alone) <= COMPILED_TOLERANCE[torch.float32]


def threads_of(engine: Engine) -> int:
    return engine.hosts()[0].compute.instances


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, 1),
        ({"max_batch_size": 4}, 4),
        ({"batching": "off", "max_batch_size": 4}, 1),
        ({"batching": "auto", "max_batch_size": 4}, 4),
        ({"batching": "auto"}, 8),
    ],
)
def test_the_settings_together(given, most) -> None:
    """``auto`` needs no other setting, and a limit that is set holds for it too."""
    policy = build(HostOptions, given).batching
    assert policy.most == policy.together().max_size == most
    assert policy.measured is (given.get("batching") == "auto")
    assert policy.alone().max_size == 1
