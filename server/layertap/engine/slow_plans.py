"""Builds plans that take long, one after another, while the requests for them wait.

A package of native code takes seconds to minutes to compile. A request that names such an
extractor waits for that. If its deadline passes first, the building goes on, so that a later
request finds the plan.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from layertap.call import Call, result_in_time
from layertap.errors import LayertapError, UnavailableError
from layertap.threads import start_thread

__all__ = ["SlowPlans"]

K = TypeVar("K")

_log = logging.getLogger(__name__)


class SlowPlans(Generic[K]):
    """Builds what requests wait for, on a thread that is started for the first of them.

    Args:
        build_steps: Builds a plan, given a key and an example, and yields between the steps. It
            runs on the thread of this object, so it must send each step to a compute thread itself.
    """

    def __init__(self, build_steps: Callable[[K, Any], Iterator[None]]) -> None:
        self._build_steps = build_steps
        self._lock = threading.Lock()
        self._wanted: SimpleQueue[tuple[K, Any] | None] = SimpleQueue()
        self._building: dict[K, Future[None]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wait_for(self, key: K, example: Any, call: Call) -> None:
        """Return once a plan is built; requests for one key wait for the same building.

        Args:
            key: What the plan is for.
            example: What the building needs of this request, such as its batch.
            call: The deadline and cancellation state of the request.

        Raises:
            LayertapError: The error of the building.
            DeadlineExceededError, CancelledError: If the caller no longer waits.
            UnavailableError: After ``close``.
        """
        with self._lock:
            if self._closed.is_set():
                raise UnavailableError("the server is shutting down")
            building = self._building.get(key)
            if building is None:
                building = self._building[key] = Future()
                self._wanted.put((key, example))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="layertap-slow-plans", daemon=True
                )
                start_thread(self._thread)
        # A future of its own: to cancel it must not cancel the building.
        mine: Future[None] = Future()
        building.add_done_callback(lambda done: _pass_on(done, mine))
        try:
            with call.cancelling(mine.cancel):
                late = "the deadline passed while the layer set was compiled, which goes on"
                result_in_time(mine, call, late)
        finally:
            mine.cancel()

    def close(self) -> None:
        """Give up what is being built, refuse what waits, and end the thread."""
        with self._lock:
            self._closed.set()
            thread = self._thread
        if thread is not None:
            self._wanted.put(None)
            thread.join()
        for building in self._building.values():
            building.set_exception(UnavailableError("the server is shutting down"))
        self._building.clear()

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            key, example = wanted
            del wanted
            error: BaseException | None = None
            try:
                for _ in self._build_steps(key, example):
                    if self._closed.is_set():
                        return
            except LayertapError as raised:
                error = type(raised)(str(raised))  # Its traceback would keep the example alive.
            except Exception as raised:  # noqa: BLE001 - passed on to the requests that wait
                _log.exception("a plan can't be built")
                error = raised.with_traceback(None)
            del example
            with self._lock:
                building = self._building.pop(key)
            if error is None:
                building.set_result(None)
            else:
                building.set_exception(error)


def _pass_on(done: Future[None], mine: Future[None]) -> None:
    if not mine.set_running_or_notify_cancel():
        return
    error = done.exception()
    if error is None:
        mine.set_result(None)
    else:
        mine.set_exception(error)
