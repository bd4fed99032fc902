"""Models that branch on values of their input have one compiled plan for each way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import guardnets
from asking import ask, request_for
from kept import kept
from layertap import Extractor, errors
from layertap.batching import BatchPolicy
from layertap.engine import Engine, HostOptions, Limits
from layertap.engine.host import plan_maker
from layertap.engine.promotion import PROMOTE_AFTER
from layertap.extraction.guards import GuardTree
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from layertap.selection import Capture
from oracle import outputs_of
from together import Together, asking

IMAGE = (3, 6, 6)
TEXT = (8,)
PATIENCE = 60


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(Limits(), threads=1, plan_cache=kept())
    yield engine
    engine.close()


def load(engine: Engine, net: str, item: tuple[int, ...] = IMAGE) -> nn.Module:
    """Load a net, and return another one of the same weights for the oracle."""
    engine.load(ModelSpec(f"guardnets:{net}", item_shape=item))
    return getattr(guardnets, net)()


def images(seed: int, scale: float = 1.0, shift: float = 0.0, items: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((items, *IMAGE)) * scale + shift).astype(np.float32)


def texts(seed: int, *lengths: int, left: bool = False) -> np.ndarray:
    """Return token ids, one item for each length, padded with 0 at the right or at the left."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, guardnets.ROWS, (len(lengths), *TEXT))
    for row, length in zip(ids, lengths, strict=True):
        row[(slice(0, TEXT[0] - length) if left else slice(length, None))] = 0
    return ids


def error_of(
    engine: Engine, net: nn.Module, name: str, x: np.ndarray, extractor: Extractor
) -> float:
    features = ask(engine, name, "head", x, extractor)
    expected = outputs_of(net, torch.from_numpy(x), "head")[0]
    return difference(features.torch()["head"], expected)


SIGNS = [images(s, 0.1, shift, items) for s, (shift, items) in enumerate(
    [(0.5, 1), (-0.5, 2), (0.5, 2), (-0.5, 1), (0.2, 5), (-0.2, 5), (0.5, 3), (-0.3, 3)]
)]  # fmt: skip
NESTED = [images(s, scale, shift) for s, (scale, shift) in enumerate(
    [(0.1, 0), (3, 0), (0.1, 2), (3, 1), (0.2, 0), (0.1, 3), (4, 0)]
)]  # fmt: skip
MEANS = [images(s, 0.1, shift, items) for s, (shift, items) in enumerate(
    [(0.5, 1), (0.1, 2), (0.3, 4), (-0.5, 1), (0.2, 4)]
)]  # fmt: skip
TEXTS = [
    texts(0, 8), texts(1, 8, 8), texts(2, 8, 5), texts(3, 3), texts(4, 3, 8, left=True),
    texts(5, 8, 8, 8), texts(6, 1, 2, 3), texts(7, 8, 8, 8, 8, 8), texts(8, 2, 8, 7, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "item", "batches"),
    [
        ("sign", IMAGE, SIGNS),
        ("nested", IMAGE, NESTED),
        ("threshold", IMAGE, MEANS),
        ("written", IMAGE, SIGNS),
        ("own_input", IMAGE, MEANS),
        ("words", TEXT, TEXTS),
        ("plain_words", TEXT, TEXTS),
    ],
)
def test_each_way_is_served_by_a_compiled_plan_of_its_own(engine, name, item, batches) -> None:
    """TORCHSCRIPT gives what the model gives, whichever way its code goes, in any order."""
    net = load(engine, name, item)
    head = engine.host(name).catalogue.entry("head")
    assert head.serves(Extractor.TORCHSCRIPT, Capture.OUTPUT), head.refusal(Extractor.TORCHSCRIPT)
    for x in (*batches, *reversed(batches)):
        error = error_of(engine, net, name, x, Extractor.TORCHSCRIPT)
        assert error <= COMPILED_TOLERANCE[torch.float32]


def test_a_guard_that_tells_the_wrong_outcome_would_give_wrong_values(engine, monkeypatch) -> None:
    """The test above can fail: with a guard that always finds the first outcome, it does."""
    net = load(engine, "sign")
    for x in SIGNS:
        assert error_of(engine, net, "sign", x, Extractor.TORCHSCRIPT) < 1e-4
    true = GuardTree.outcome
    monkeypatch.setattr(GuardTree, "outcome", lambda tree, x: true(tree, x) and ("True",))
    errors_now = [error_of(engine, net, "sign", x, Extractor.TORCHSCRIPT) for x in SIGNS]
    assert max(errors_now) > 0.1


def until_promoted(engine: Engine, net: nn.Module, name: str, x: np.ndarray) -> int:
    """Ask until the compiled plan answers; return how many answers HOOK gave."""
    expected = outputs_of(net, torch.from_numpy(x), "head")[0]
    ends, hooked = time.monotonic() + PATIENCE, 0
    while time.monotonic() < ends:
        features = ask(engine, name, "head", x)
        assert difference(features.torch()["head"], expected) < 1e-4
        if features.extractor is Extractor.TORCHSCRIPT:
            return hooked
        hooked += 1
    raise AssertionError("never promoted")


def test_each_outcome_is_promoted_by_itself(engine) -> None:
    """HOOK serves an outcome until a plan for it was compiled; the other outcome's never does."""
    net = load(engine, "sign")
    positive, negative = SIGNS[2], SIGNS[1]
    assert until_promoted(engine, net, "sign", positive) >= PROMOTE_AFTER - 1
    assert ask(engine, "sign", "head", negative).extractor is Extractor.HOOK
    assert until_promoted(engine, net, "sign", negative) >= PROMOTE_AFTER - 2
    assert ask(engine, "sign", "head", positive).extractor is Extractor.TORCHSCRIPT


def test_declared_layers_have_a_plan_for_each_outcome_that_samples_show(engine) -> None:
    """A masked model answers by compiled plans at once, with padding and without."""
    net = load(engine, "plain_words", TEXT)
    host = engine.host("plain_words")
    host.declare(host_selections("head"))
    for x in TEXTS:
        features = ask(engine, "plain_words", "head", x)
        assert features.extractor is Extractor.TORCHSCRIPT
        expected = outputs_of(net, torch.from_numpy(x), "head")[0]
        assert difference(features.torch()["head"], expected) < 1e-4


def host_selections(*names: str):
    return request_for("", list(names), np.zeros((1, 1), np.float32)).selections


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("computed", "much faster than the pass"),
        ("in_numpy", "NumPy"),
        ("scaled", "different for each sample"),
    ],
)
def test_layers_without_a_guard_are_refused_in_the_catalogue(engine, name, words) -> None:
    """What no guard can tell, and what differs for each input, is HOOK's; the reason is named."""
    net = load(engine, name)
    assert words in engine.host(name).catalogue.entry("head").refusal(Extractor.TORCHSCRIPT)
    with pytest.raises(errors.ExtractorUnsupportedError, match=words):
        ask(engine, name, "head", SIGNS[0], Extractor.TORCHSCRIPT)
    for x in SIGNS:
        assert error_of(engine, net, name, x, Extractor.AUTO) == 0


def test_a_model_that_looks_at_something_else_while_it_is_traced_is_refused(engine) -> None:
    """Its trace depends on what the guard does not ask; no plan is made of it."""
    net = load(engine, "deceives")
    with pytest.raises(errors.ExtractorUnsupportedError, match="while it is recorded"):
        ask(engine, "deceives", "head", SIGNS[0], Extractor.TORCHSCRIPT)
    for x in (*SIGNS, images(3, 2.0, -1.0)):
        assert error_of(engine, net, "deceives", x, Extractor.AUTO) == 0


def test_outcomes_of_unbounded_variety_do_not_make_plans_without_bound(engine, monkeypatch) -> None:
    """As many outcomes as are kept have a plan; every other length is served by HOOK."""
    monkeypatch.setattr(plan_maker, "MAX_OUTCOMES", 3)
    net = load(engine, "longest", (16,))
    host = engine.host("longest")
    served: set[int] = set()
    for length in range(1, 9):
        x = np.random.default_rng(length).integers(1, guardnets.ROWS, (2, 16))
        x[:, length:] = 0
        with suppress(errors.ExtractorUnsupportedError):
            assert error_of(engine, net, "longest", x, Extractor.TORCHSCRIPT) < 1e-4
            served.add(length)
        assert error_of(engine, net, "longest", x, Extractor.AUTO) < 1e-4
    assert 1 < len(served) <= 3
    assert len([key for key in host.plans._built if key.outcome]) == len(served)


def test_input_with_nan_is_not_compiled_for(engine) -> None:
    """A compiled plan never gets NaN, so a look for NaN has no plan where there is some."""
    net = load(engine, "cleans")
    x = images(0)
    assert error_of(engine, net, "cleans", x, Extractor.TORCHSCRIPT) < 1e-4
    x[0, 0, 0] = np.nan
    with pytest.raises(errors.ExtractorUnsupportedError, match="NaN or infinity"):
        ask(engine, "cleans", "head", x, Extractor.TORCHSCRIPT)
    features = ask(engine, "cleans", "head", x)
    assert features.extractor is Extractor.HOOK
    assert torch.equal(features.torch()["head"], outputs_of(net, torch.from_numpy(x), "head")[0])


def test_requests_of_other_outcomes_never_share_a_pass(engine) -> None:
    """Padding in one request changes nothing for one without: each has a pass of its outcome."""
    layers = host_selections("head")
    options = HostOptions(batching=BatchPolicy(max_size=8))
    spec = ModelSpec("guardnets:plain_words", item_shape=TEXT)
    engine.load(spec, layers, options=options)
    net = guardnets.plain_words()
    batches = [texts(0, 8), texts(1, 8, 8), texts(2, 5), texts(3, 8, 3), texts(4, 8)]
    # Those without padding, and those with padding.
    assert at_once(engine, "plain_words", batches, net).shared == [3, 3, 2, 2, 3]


def test_a_joined_batch_of_another_outcome_is_not_run(engine) -> None:
    """Each request is of one outcome, and all of them together are not: each runs alone."""
    layers = host_selections("head")
    options = HostOptions(batching=BatchPolicy(max_size=8))
    engine.load(ModelSpec("guardnets:many", item_shape=IMAGE), layers, options=options)
    net = guardnets.many()
    small = [images(s, 0.1, 0.5, 1) for s in range(3)]
    assert at_once(engine, "many", small, net).shared == [1, 1, 1]


def at_once(engine: Engine, name: str, batches: list[np.ndarray], net: nn.Module) -> Together:
    """Ask for all batches while the compute thread is held, and check every answer."""
    together = Together(engine, asking(engine, name, "head", batches, Extractor.TORCHSCRIPT))
    for x, values in zip(batches, together.values(), strict=True):
        expected = outputs_of(net, torch.from_numpy(x), "head")[0]
        assert difference(values["head"], expected) < 1e-4
    return together
