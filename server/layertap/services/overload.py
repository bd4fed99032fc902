"""Rejects extractions when the server is full, cheaply and at a limited rate.

Note [A retry storm]
    A rejected call costs the server about as much as an admitted one, except for the forward pass:
    gRPC reads its message, and a thread parses it. 256 callers that retried at once were rejected
    1,300 times per second. This took CPU time from the forward passes: they got 11 answers per
    second, while 8 callers got 40. Three measures protect the admitted calls:

    - A call is rejected before its message is read if as many as allowed are already being
      received, waiting or running. The data that the client has sent stays unread.
    - A few rejections per second are sent at once, so that an occasional rejected caller can try
      another server. Further rejections are delayed. A caller can't retry while it waits for its
      rejection, so the server controls the rate of retries. A delayed call has no thread and does
      not count as pending. Once the queue is half empty, each call that ends releases two delayed
      rejections, so that no caller waits for an idle server.
    - A rejection says when to retry (``grpc-retry-pushback-ms``, gRFC A6), with a random time for
      each call, so that callers that respect it don't retry together.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc

from layertap.engine import Engine
from layertap.errors import OverloadedError
from layertap.services.caller import Caller
from layertap.services.error_codes import code_of
from layertap.services.grpc_handlers import refusing
from layertap.services.observer import Observer
from layertap.threads import run_in

__all__ = ["HeldRefusals", "Overload"]

P = ParamSpec("P")
R = TypeVar("R")

AT_ONCE = 20
"""Refusals a second that are sent at once."""

HELD_SECONDS = 1.0
"""How long the others are held back."""

RELEASED = 2
"""Held refusals that are sent for each call that ends while the queue is less than half full."""

HELD = 1024
"""Refusals that may be held at once; one more is sent at once. Each may keep what the client has
sent of its message, 64 KiB unless the connection is fast and far."""

RECEIVE_SECONDS = 1.0
"""How long a call whose message has not arrived yet takes a place. A client that sends nothing, or
very slowly, must not keep others out; its call is still served once its message is there."""

_METHODS = ("/layertap.v1.FeatureService/Extract", "/inference.GRPCInferenceService/ModelInfer")


class HeldRefusals(ThreadPoolExecutor):
    """Runs refusals, each at once or a while later; one thread for all of them.

    It is a ThreadPoolExecutor because gRPC lets a handler bring its own threads only as one
    (``layertap.threads.run_in``).

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(1)
        self._clock = clock
        self._changed = threading.Condition()
        # Those to be sent now; and those that are held, with the time of each, which only grows.
        self._due: deque[Callable[[], object]] = deque()
        self._held: deque[tuple[float, Callable[[], object]]] = deque()
        self._allowed = float(AT_ONCE)
        self._counted = clock()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="layertap-refusals", daemon=True)

    def start(self) -> None:
        """Start the thread. Until then refusals wait."""
        self._thread.start()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a refusal at once, if there were few in the last second; else in a while."""
        future: Future[R] = Future()

        def refuse() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the future's owner gets it
                future.set_exception(error)

        with self._changed:
            if self._at_once():
                self._due.append(refuse)
            else:
                self._held.append((self._clock() + HELD_SECONDS, refuse))
            self._changed.notify()
        return future

    def release(self, count: int) -> None:
        """Send some of the refusals that are held at once, the oldest first."""
        with self._changed:
            for _ in range(min(count, len(self._held))):
                self._due.append(self._held.popleft()[1])
            self._changed.notify()

    def drain(self) -> None:
        """Send at once what is held, and hold nothing any more: the server stops."""
        with self._changed:
            self._draining = True
            self.release(len(self._held))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Send at once what is held, and end the thread.

        Args:
            wait: Whether to wait for that.
            cancel_futures: Without effect: each refusal is sent.
        """
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        if wait and self._thread.is_alive():
            self._thread.join()

    def _at_once(self) -> bool:
        """Return whether the next refusal is to be sent at once, and count it."""
        now = self._clock()
        self._allowed = min(float(AT_ONCE), self._allowed + (now - self._counted) * AT_ONCE)
        self._counted = now
        if self._draining or len(self._held) >= HELD:
            return True
        if self._allowed < 1.0:
            return False
        self._allowed -= 1.0
        return True

    def _run(self) -> None:
        while (refuse := self._next()) is not None:
            refuse()
            del refuse

    def _next(self) -> Callable[[], object] | None:
        """Wait for the next refusal that is due; None once there are none and never will be."""
        with self._changed:
            while not self._due:
                if self._held and (seconds := self._held[0][0] - self._clock()) <= 0:
                    return self._held.popleft()[1]
                if self._closed and not self._held:
                    return None
                self._changed.wait(seconds if self._held else None)
            return self._due.popleft()


class Overload(grpc.ServerInterceptor):  # type: ignore[misc] # gRPC has no types
    """Refuses extractions before their message is read, where the engine's queue is full.

    This check is an estimate, as it also counts calls whose message is still being received. It may
    let a few calls too many through; the engine's admission makes the final decision.

    Args:
        engine: The engine.
        observer: Notified of each refusal.
        clock: Returns seconds.

    Attributes:
        refusals: Sends the refusals; to be started with the server and shut down after it.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refusals = HeldRefusals(clock)
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # Calls whose message is awaited, in the order in which they came, and when each gives up
        # its place; and calls whose handler runs.
        self._awaited: dict[int, float] = {}
        self._running = 0

        def refuse(caller: Caller) -> NoReturn:
            error = OverloadedError(
                f"queue full: {engine.limits.pending} requests are waiting, the most allowed"
            )
            observer.failed("", code_of(error), caller)
            raise error

        self._refusal = grpc.stream_stream_rpc_method_handler(
            run_in(self.refusals, refusing(refuse))
        )

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Pass a call on and count it, or return what refuses it."""
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method not in _METHODS:
            return handler
        number = self._begin()
        if number is None:
            return self._refusal
        return grpc.unary_unary_rpc_method_handler(
            self._counted(number, handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _begin(self) -> int | None:
        """Take a place for a call that is to be received; return None if there is none."""
        now = self._clock()
        with self._lock:
            while self._awaited and next(iter(self._awaited.values())) < now:
                # Its client has left, or is slow.
                del self._awaited[next(iter(self._awaited))]
            if self._under_way() >= self._engine.limits.pending:
                return None
            number = next(self._numbers)
            self._awaited[number] = now + RECEIVE_SECONDS
            return number

    def _under_way(self) -> int:
        """Return how many calls are being received, wait or run. For holders of the lock."""
        # The engine counts items of streams as well, but no call before it is parsed.
        return max(self._running, self._engine.pending) + len(self._awaited)

    def _counted(self, number: int, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def run(message: Any, context: grpc.ServicerContext) -> Any:
            with self._lock:
                self._awaited.pop(number, None)
                self._running += 1
            try:
                return behaviour(message, context)
            finally:
                with self._lock:
                    self._running -= 1
                    half_empty = 2 * self._under_way() < self._engine.limits.pending
                if half_empty:
                    self.refusals.release(RELEASED)

        return run
