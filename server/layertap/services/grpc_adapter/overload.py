"""Refuses extractions when the server is full, cheaply and at a limited rate.

Note [A retry storm]
    A refused call costs the server about as much as an admitted one, except for the forward pass:
    gRPC reads its message, and a thread parses it. 256 callers that retried at once were refused
    1,300 times per second. This took CPU time from the forward passes: they got 11 answers per
    second, while 8 callers got 40. Three measures protect the admitted calls:

    - If the allowed number of calls is already being received, waiting or running, a call is
      refused before its message is read. The data that the client has sent stays unread.
    - A few refusals per second are sent at once, so that an occasional refused caller can try
      another server. Further refusals are delayed. A caller can't retry while it waits for its
      refusal, so the server controls the rate of retries. A delayed call has no thread and does not
      count as pending. Once the queue is half empty, each call that ends releases two delayed
      refusals, so that no caller waits for an idle server.
    - A refusal says when to retry (``grpc-retry-pushback-ms``, gRFC A6), with a random time for
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
from layertap.services.grpc_adapter.handlers import refusing
from layertap.services.observer import Observer
from layertap.threads import run_in

__all__ = ["HeldRefusals", "Overload"]

P = ParamSpec("P")
R = TypeVar("R")

AT_ONCE = 20
"""Refusals per second that are sent at once."""

HELD_SECONDS = 1.0
"""How long each further refusal is delayed."""

RELEASED = 2
"""Delayed refusals that are sent for each call that ends while the queue is less than half full."""

HELD = 1024
"""Maximum number of delayed refusals; further ones are sent at once. Each may keep the part of its
message that the client has sent: 64 KiB, or more on fast connections over long distances."""

RECEIVE_SECONDS = 1.0
"""How long a call whose message has not arrived yet takes a place. A client that sends slowly must
not keep others out. Its call is still served once its message has arrived."""

_METHODS = ("/layertap.v1.FeatureService/Extract", "/inference.GRPCInferenceService/ModelInfer")


class HeldRefusals(ThreadPoolExecutor):
    """Runs refusals at once or after a delay, all on one thread.

    It is a ThreadPoolExecutor because gRPC accepts nothing else as a handler's own threads
    (``layertap.threads.run_in``).

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(1)
        self._clock = clock
        self._changed = threading.Condition()
        # The refusals to send now, and the delayed ones with their times, in ascending order.
        self._due: deque[Callable[[], object]] = deque()
        self._held: deque[tuple[float, Callable[[], object]]] = deque()
        self._allowed = float(AT_ONCE)
        self._counted = clock()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="layertap-refusals", daemon=True)

    def start(self) -> None:
        """Start the thread. Refusals wait until then."""
        self._thread.start()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a refusal at once if there were few in the last second, else after a delay."""
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
        """Send some of the delayed refusals now, the oldest first."""
        with self._changed:
            for _ in range(min(count, len(self._held))):
                self._due.append(self._held.popleft()[1])
            self._changed.notify()

    def drain(self) -> None:
        """Send all delayed refusals now, and delay no more: the server is stopping."""
        with self._changed:
            self._draining = True
            self.release(len(self._held))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Send all delayed refusals now, and end the thread.

        Args:
            wait: Whether to wait until they are sent.
            cancel_futures: Has no effect: every refusal is sent.
        """
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        if wait and self._thread.is_alive():
            self._thread.join()

    def _at_once(self) -> bool:
        """Return whether to send the next refusal at once, and count it."""
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
        """Wait for the next refusal to send; return None after the last one, once closed."""
        with self._changed:
            while not self._due:
                if self._held and (seconds := self._held[0][0] - self._clock()) <= 0:
                    return self._held.popleft()[1]
                if self._closed and not self._held:
                    return None
                self._changed.wait(seconds if self._held else None)
            return self._due.popleft()


class Overload(grpc.ServerInterceptor):  # type: ignore[misc] # gRPC has no types
    """Refuses extractions before their message is read if the engine's queue is full.

    This check is an estimate, as it also counts calls whose message is still being received. It may
    let a few calls too many through; the engine's admission makes the final decision.

    Args:
        engine: The engine.
        observer: Notified of each refusal.
        clock: Returns seconds.

    Attributes:
        refusals: Sends the refusals. Start it with the server, and shut it down after the server.
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
        # Calls whose message has not arrived, in order of arrival, each with the time at which it
        # gives up its place; and the number of calls whose handler runs.
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
        """Pass a call on and count it, or refuse it."""
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
        """Take a place for a call whose message will be received; None if there is no place."""
        now = self._clock()
        with self._lock:
            while self._awaited and next(iter(self._awaited.values())) < now:
                # The call's client has left, or is slow.
                del self._awaited[next(iter(self._awaited))]
            if self._under_way() >= self._engine.limits.pending:
                return None
            number = next(self._numbers)
            self._awaited[number] = now + RECEIVE_SECONDS
            return number

    def _under_way(self) -> int:
        """Return how many calls are being received, wait or run. The caller must hold the lock."""
        # The engine also counts items of streams, but counts a call only after it was parsed.
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
