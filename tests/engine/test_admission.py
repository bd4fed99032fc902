"""The engine admits what it can serve, and refuses everything else at once."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

import oddnets
from asking import request_for
from kept import kept
from layertap import Extractor, LayerSelection, Reduction, errors
from layertap.engine import Call, Engine, ExtractionRequest, ImageFiles, Inputs, Limits
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from tinynets import ITEM

X = np.random.default_rng(0).random((1, *ITEM), dtype=np.float32)
REQUEST = request_for("chain", "layer1", X)


class Gate:
    """Blocks every forward pass of a model until it is opened."""

    def __init__(self, engine: Engine, net: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        engine.host(net).model.module.register_forward_pre_hook(self._hold)

    def _hold(self, *_: object) -> None:
        self.reached.set()
        assert self.open.wait(60)


class Kept(np.ndarray):
    """An array that supports weak references."""


def encoded(width: int, height: int) -> bytes:
    """Return a PNG file of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Turn the garbage collector off during each test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine with room for three requests and for two replies of layer1."""
    engine = Engine(Limits(pending=3, pending_bytes=5000), plan_cache=kept())
    engine.load(ModelSpec("tinynets:chain", item_shape=ITEM))
    yield engine
    engine.close()


def test_one_request_too_many_is_refused_at_once() -> None:
    """Admitted requests are answered; after that the next one is admitted."""
    engine = Engine(Limits(pending=3), plan_cache=kept())
    engine.load(ModelSpec("tinynets:chain", item_shape=ITEM))
    gate = Gate(engine, "chain")
    with ThreadPoolExecutor(3) as pool:
        admitted = [pool.submit(engine.extract, REQUEST, Call()) for _ in range(3)]
        while engine.pending < 3:
            threading.Event().wait(0.002)
        with pytest.raises(errors.OverloadedError, match="queue full: 3 requests are waiting"):
            engine.extract(REQUEST, Call())
        gate.open.set()
        assert all(done.result(60).payload for done in admitted)
    assert engine.pending == 0
    assert engine.extract(REQUEST, Call()).payload
    engine.close()


def test_a_refused_request_gives_its_place_back(engine) -> None:
    """Requests with bad input, unknown layers or ended calls are not pending after a refusal."""
    for _ in range(4):
        with pytest.raises(errors.LayerNotFoundError):
            engine.extract(request_for("chain", "nothing", X), Call())
        with pytest.raises(errors.DeadlineExceededError):
            engine.extract(REQUEST, Call(timeout=0))
    assert engine.pending == 0
    assert engine.pending_bytes == 0


def test_replies_count_until_they_are_released(engine, no_gc) -> None:
    """Replies that are not sent yet fill the budget; the next is refused before it is allocated."""
    replies = [engine.extract(REQUEST, Call()) for _ in range(2)]
    size = len(replies[0].payload)
    assert engine.pending_bytes == 2 * size
    with pytest.raises(errors.OverloadedError, match=f"{size} bytes, and {2 * size}.*limit is 5"):
        engine.extract(REQUEST, Call())
    for _ in range(2):  # Again and again if one likes.
        replies[0].release()
        assert engine.pending_bytes == size
    engine.extract(REQUEST, Call()).release()
    replies[1].release()
    assert engine.pending_bytes == 0


def test_a_reply_that_nobody_released_counts_until_it_is_dropped(engine, no_gc) -> None:
    """The finalizer needs no garbage collector: the reply is in no reference cycle."""
    reply = engine.extract(REQUEST, Call())
    assert engine.pending_bytes == len(reply.payload)
    del reply
    assert engine.pending_bytes == 0


def test_a_request_is_let_go_when_it_is_answered(engine, no_gc) -> None:
    """Neither the call nor the reply keeps the request's array alive."""
    x = X.copy().view(Kept)
    alive = weakref.ref(x)
    call, request = Call(), request_for("chain", "layer1", x)
    del x
    reply = engine.extract(request, call)
    del request
    assert alive() is None
    assert (len(reply.payload) > 0, call.remaining()) == (True, None)


def test_received_bytes_count_as_replies_do(engine) -> None:
    """A request that leaves no room for its reply is refused, and its bytes are given back."""
    with engine.reserve(4000) as received:
        assert engine.pending_bytes == 4000
        with pytest.raises(errors.OverloadedError, match=r"reply would take \d+ bytes, and 40"):
            engine.extract(REQUEST, Call(), received=received)
        with pytest.raises(errors.OverloadedError, match="request takes 2000 bytes, and 4000"):
            engine.reserve(2000)
        assert engine.pending_bytes == 4000
    assert engine.pending_bytes == 0
    with pytest.raises(ValueError, match="was released"):
        received.take(1)


@pytest.mark.long
def test_what_images_are_decoded_to_counts() -> None:
    """The files, their pixels and the batch count; above the limit all of it is given back."""
    with closing(Engine(Limits(pending_bytes=1 << 20), plan_cache=kept())) as engine:
        engine.load(ModelSpec("squeezenet1_1", weights="random"))
        files = [encoded(64, 64) for _ in range(2)]
        layers = (LayerSelection("classifier.3", reduction=Reduction.GLOBAL_AVERAGE_POOL),)
        request = ExtractionRequest(
            "squeezenet1_1", Inputs(images=(ImageFiles(files),)), layers, form=NativeForm
        )
        with pytest.raises(errors.OverloadedError, match="the request takes 1204224 bytes"):
            engine.extract(request, Call())
        assert engine.pending_bytes == 0
        request = ExtractionRequest(
            "squeezenet1_1", Inputs(images=(ImageFiles(files[:1]),)), layers, form=NativeForm
        )
        with engine.reserve(0) as received:
            engine.extract(request, Call(), received=received).release()
            assert received.nbytes == len(files[0]) + 3 * 224 * 224 * 4
        assert engine.pending_bytes == 0


def test_a_pass_that_runs_on_keeps_its_bytes(engine, no_gc) -> None:
    """If a caller's deadline passes during a pass, its bytes count until the pass ends."""
    gate = Gate(engine, "chain")
    with engine.reserve(100) as received, pytest.raises(errors.DeadlineExceededError):
        engine.extract(REQUEST, Call(timeout=1.0), received=received)
    assert gate.reached.is_set()
    assert engine.pending_bytes > 2000
    gate.open.set()
    for _ in range(1000):
        if not engine.pending_bytes:
            break
        threading.Event().wait(0.01)
    assert engine.pending_bytes == 0


def test_a_pass_that_finds_its_shapes_dynamic_reserves_once(engine, no_gc) -> None:
    """The bytes of the predicted reply are given back before those of the real one are reserved."""
    engine.load(ModelSpec("oddnets:marked", item_shape=ITEM))
    predicted = engine.extract(request_for("marked", "stretch", X), Call())
    size = len(predicted.payload)
    predicted.release()
    assert 2 * size < 5000 < 3 * size
    x = X.copy()
    x[0, 0, 0, 0] = oddnets.MARK
    reply = engine.extract(request_for("marked", "stretch", x), Call())
    assert engine.pending_bytes == len(reply.payload) > 1.9 * size
    reply.release()
    assert engine.pending_bytes == 0


@pytest.mark.parametrize("outcome", ["answered", "unknown layer", "late", "failed", "expired"])
def test_a_request_leaves_no_garbage(engine, no_gc, outcome) -> None:
    """However a request ends, it leaves nothing for the garbage collector."""
    engine.load(ModelSpec("tinynets:raises", item_shape=ITEM))
    # HOOK: AUTO would compile beside the requests, and torch's tracing does leave garbage.
    request = request_for("chain", "layer1", X, Extractor.HOOK)

    def ask() -> None:
        match outcome:
            case "answered":
                engine.extract(request, Call()).release()
            case "unknown layer":
                engine.extract(request_for("chain", "nothing", X, Extractor.HOOK), Call())
            case "late":
                engine.extract(request, Call(timeout=0))
            case "failed":
                engine.extract(request_for("raises", "head", X + 1e6, Extractor.HOOK), Call())
            case "expired":
                engine.extract(request, Call(timeout=1e-4))

    for _ in range(20):
        with suppress(errors.LayertapError):
            ask()
    gc.collect()
    for _ in range(20):
        with suppress(errors.LayertapError):
            ask()
    engine.extract(request, Call()).release()  # Behind every pass.
    assert gc.collect() < 20


def test_a_request_that_nobody_waits_for_leaves_the_queue(engine) -> None:
    """If its deadline passes behind a long pass, it is dropped, and its place is free at once."""
    gate = Gate(engine, "chain")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.extract, REQUEST, Call())
        assert gate.reached.wait(60)
        with pytest.raises(errors.DeadlineExceededError):
            engine.extract(REQUEST, Call(timeout=0.05))
        assert engine.pending == 1
        gate.open.set()
        assert running.result(60).payload


@pytest.mark.parametrize(
    "extractor", [Extractor.HOOK, Extractor.FX, Extractor.CHILDREN, Extractor.LAYER_GETTER]
)
def test_a_pass_is_given_up_between_layers(engine, extractor) -> None:
    """If the caller leaves during its pass, the pass ends, and the deep layers never run."""
    module = engine.host("chain").model.module
    call, ran = Call(), []
    module.layer2.register_forward_hook(lambda *_: ran.append("layer2"))
    engine.extract(request_for("chain", "layer2", X, extractor), Call())  # Builds the plan.
    assert ran
    ran.clear()
    module.conv1.register_forward_hook(lambda *_: call.cancel())
    with pytest.raises(errors.CancelledError):
        engine.extract(request_for("chain", "layer2", X, extractor), call)
    engine.extract(request_for("chain", "layer1", X), Call())  # Behind the pass.
    assert ran == []
