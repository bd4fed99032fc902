"""The engine takes on what it can serve, and refuses the rest at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from asking import request_for
from layertap import Extractor, errors
from layertap.engine import Call, Engine, Limits
from layertap.models import ModelSpec
from tinynets import ITEM

X = np.random.default_rng(0).random((1, *ITEM), dtype=np.float32)
REQUEST = request_for("residual", "layer1", X)


class Gate:
    """Holds every forward pass of a model until it is opened."""

    def __init__(self, engine: Engine, net: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        engine.host(net).model.module.register_forward_pre_hook(self._hold)

    def _hold(self, *_: object) -> None:
        self.reached.set()
        assert self.open.wait(60)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine with room for three requests and for two replies of layer1."""
    engine = Engine(Limits(pending=3, pending_bytes=5000))
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


def test_one_request_too_many_is_refused_at_once() -> None:
    """Those that were admitted are answered; once they are, the next is admitted."""
    engine = Engine(Limits(pending=3))
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    gate = Gate(engine, "residual")
    with ThreadPoolExecutor(3) as pool:
        admitted = [pool.submit(engine.extract, REQUEST, Call()) for _ in range(3)]
        while engine.pending < 3:
            threading.Event().wait(0.002)
        with pytest.raises(errors.OverloadedError, match="queue full: 3 requests are waiting"):
            engine.extract(REQUEST, Call())
        gate.open.set()
        assert all(done.result(60).message for done in admitted)
    assert engine.pending == 0
    assert engine.extract(REQUEST, Call()).message
    engine.close()


def test_a_refused_request_gives_its_place_back(engine) -> None:
    """Bad input, unknown layers and dead calls are no longer pending once they are refused."""
    for _ in range(4):
        with pytest.raises(errors.LayerNotFoundError):
            engine.extract(request_for("residual", "nothing", X), Call())
        with pytest.raises(errors.DeadlineExceededError):
            engine.extract(REQUEST, Call(timeout=0))
    assert engine.pending == 0
    assert engine.pending_bytes == 0


def test_replies_count_until_their_call_ends(engine) -> None:
    """Replies that are not sent yet fill the budget; the next is refused before it is allocated."""
    calls = [Call(), Call()]
    size = max(len(engine.extract(REQUEST, call).message) for call in calls)
    assert engine.pending_bytes == 2 * size
    with pytest.raises(errors.OverloadedError, match=f"{size} bytes beside {2 * size}.*limit is 5"):
        engine.extract(REQUEST, Call())
    calls.pop()
    gc.collect()
    assert engine.pending_bytes == size
    assert engine.extract(REQUEST, Call()).message


def test_a_request_that_nobody_waits_for_leaves_the_queue(engine) -> None:
    """Its deadline passes behind a long pass: it is dropped, and its place is free at once."""
    gate = Gate(engine, "residual")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.extract, REQUEST, Call())
        assert gate.reached.wait(60)
        with pytest.raises(errors.DeadlineExceededError):
            engine.extract(REQUEST, Call(timeout=0.05))
        assert engine.pending == 1
        gate.open.set()
        assert running.result(60).message


@pytest.mark.parametrize(
    "extractor", [Extractor.HOOK, Extractor.FX, Extractor.CHILDREN, Extractor.LAYER_GETTER]
)
def test_a_pass_is_given_up_between_layers(engine, extractor) -> None:
    """A caller that goes away while its pass runs ends the pass: the deep layers never run."""
    module = engine.host("residual").model.module
    call, ran = Call(), []
    module.avgpool.register_forward_hook(lambda *_: ran.append("avgpool"))
    engine.extract(request_for("residual", "avgpool", X, extractor), Call())  # Builds the plan.
    assert ran
    ran.clear()
    module.conv1.register_forward_hook(lambda *_: call.cancel())
    with pytest.raises(errors.CancelledError):
        engine.extract(request_for("residual", "avgpool", X, extractor), call)
    engine.extract(request_for("residual", "layer1", X), Call())  # Behind the pass.
    assert ran == []
