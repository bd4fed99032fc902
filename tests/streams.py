"""Shared by the tests of streams: items, a raw stream, and an observer that counts."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue

import grpc
import numpy as np

from gatednets import HELD
from layertap.engine import Extraction
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode
from layertap.v1 import feature_service_pb2, tensor_pb2
from tinynets import ITEM

GATED_ITEM = (3, 4, 4)


def item(number: int, x: np.ndarray | None = None, **changes: object) -> object:
    """Return a request for residual's layer1 of a batch of its own."""
    x = np.full((1, *ITEM), number % 7, np.float32) if x is None else x
    fields: dict[str, object] = {
        "model": "residual",
        "inputs": [tensor_pb2.Tensor(dtype=1, shape=x.shape, data=x.tobytes())],
        "layers": [feature_service_pb2.LayerSelection(layer="layer1")],
        "extractor": "EXTRACTOR_HOOK",
        "id": number,
    }
    return feature_service_pb2.ExtractStreamRequest(**{**fields, **changes})


def held_item(number: int, **changes: object) -> object:
    """Return a request that waits at the gate."""
    conv = [feature_service_pb2.LayerSelection(layer="conv")]
    x = np.full((1, *GATED_ITEM), HELD, np.float32)
    return item(number, x, model="gated", layers=conv, **changes)


class RawStream:
    """One stream by generated stubs only; messages may be bytes that are no request at all."""

    def __init__(self, channel: grpc.Channel, timeout: float | None = 60) -> None:
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        method = channel.stream_stream(
            "/layertap.v1.FeatureService/ExtractStream",
            response_deserializer=feature_service_pb2.ExtractStreamResponse.FromString,
        )
        self.call = method(iter(self._outgoing.get, None), timeout=timeout)

    def send(self, *messages: object) -> None:
        for message in messages:
            raw = message if isinstance(message, bytes) else message.SerializeToString()
            self._outgoing.put(raw)

    def half_close(self) -> None:
        self._outgoing.put(None)

    def read(self) -> feature_service_pb2.ExtractStreamResponse:
        return next(self.call)

    def rest(self) -> list[feature_service_pb2.ExtractStreamResponse]:
        """Half-close, and return what comes until the end."""
        self.half_close()
        return list(self.call)

    def failure(self) -> grpc.StatusCode:
        """Return what the stream ends with instead of another reply."""
        try:
            reply = next(self.call)
        except grpc.RpcError as error:
            self.half_close()
            return error.code()
        except StopIteration:
            return grpc.StatusCode.OK
        raise AssertionError(f"a reply came: {reply.id}")


class Counting:
    """An observer that tests may wait for.

    Attributes:
        ends: How many extractions ended in each way, such as ``"residual OK"``.
        callers: Who sent them.
    """

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.callers: list[Caller] = []
        self._changed = threading.Condition()

    def succeeded(self, model: str, extraction: Extraction, caller: Caller) -> None:
        self._count(f"{model} OK", caller)

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        self._count(f"{model} {code.name}", caller)

    def wait(self, end: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends[end] >= count, 60), self.ends

    def _count(self, end: str, caller: Caller) -> None:
        with self._changed:
            self.ends[end] += 1
            self.callers.append(caller)
            self._changed.notify_all()


def eventually(what: Callable[[], bool]) -> None:
    """Wait for something that sends no notification."""
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


def readers() -> list[threading.Thread]:
    """Return the threads that read a stream now; idle ones of the pools don't count."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("layertap-stream-reader") and _reads(thread.ident)
    ]


def _reads(ident: int | None) -> bool:
    frame = sys._current_frames().get(ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_read" and "stream_threads" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
