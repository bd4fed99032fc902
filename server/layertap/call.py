"""The deadline and cancellation state of one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from layertap.errors import CancelledError, DeadlineExceededError, LayertapError

__all__ = ["AbandonedError", "Call", "abandoning", "result_in_time"]

R = TypeVar("R")

_LEFT = "the client cancelled the call or disconnected"


class Call:
    """The deadline and cancellation state of one request. Safe between threads.

    Args:
        timeout: Seconds until the caller stops waiting; None for no limit. Values over
            ``threading.TIMEOUT_MAX`` mean no limit too; gRPC gives one for calls without deadline.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.started_ns = time.perf_counter_ns()
        endless = timeout is None or timeout > threading.TIMEOUT_MAX
        self._expires = None if endless else time.monotonic() + (timeout or 0.0)
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: list[_Cancelling] = []

    def remaining(self) -> float | None:
        """Return the seconds left, never below 0; None for no limit."""
        return None if self._expires is None else max(0.0, self._expires - time.monotonic())

    def limit(self, timeout: float) -> None:
        """Move the deadline to at most this many seconds from now."""
        if timeout <= threading.TIMEOUT_MAX:
            expires = time.monotonic() + timeout
            with self._lock:
                self._expires = expires if self._expires is None else min(self._expires, expires)

    def cancel(self) -> None:
        """Record that the caller has left, and run the actions given to ``cancelling``."""
        with self._lock:
            self._cancelled = True
            blocks, self._on_cancel = self._on_cancel, []
        for block in blocks:
            block.action()

    def cancelling(self, action: Callable[[], object]) -> _Cancelling:
        """Return a block during which ``action`` is called if the caller leaves.

        If the caller has left already, it is called at once. After the block, the call refers to
        neither the action nor what the action refers to.
        """
        return _Cancelling(self, action)

    def check(self) -> None:
        """Raise CancelledError or DeadlineExceededError if the caller no longer waits."""
        if self._cancelled:
            raise CancelledError(_LEFT)
        if self.remaining() == 0.0:
            raise DeadlineExceededError("the deadline passed while the request was queued")


class _Cancelling:
    """The block of ``Call.cancelling``.

    It is a class, not a generator, because a generator's frame would be in the traceback of an
    error. The error would then refer to the action, which may in turn refer to the error.
    """

    __slots__ = ("_call", "action")

    def __init__(self, call: Call, action: Callable[[], object]) -> None:
        self._call = call
        self.action = action

    def __enter__(self) -> None:
        with self._call._lock:
            if not self._call._cancelled:
                self._call._on_cancel.append(self)
                return
        self.action()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._call._lock:
            if self in self._call._on_cancel:
                self._call._on_cancel.remove(self)


class AbandonedError(BaseException):
    """Ends a forward pass for which no caller waits any more.

    It is a BaseException because it passes through the model's own forward, which may catch
    Exception.

    Attributes:
        reason: Why the last caller stopped waiting.
    """

    def __init__(self, reason: LayertapError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def abandoning(calls: Sequence[Call]) -> Callable[[], None]:
    """Return a function that raises AbandonedError once no call waits; for use between layers."""

    def check() -> None:
        for call in calls:
            try:
                call.check()
            except LayertapError as error:
                # Without the traceback, which refers to this frame and so to the error itself.
                reason = error.with_traceback(None)
            else:
                return
        raise AbandonedError(reason)

    return check


def result_in_time(future: Future[R], call: Call, late: str) -> R:
    """Wait for a future's result, at most until the deadline of a call.

    Args:
        future: The future. It is cancelled if the caller has left, and for no other reason.
        call: The call that waits.
        late: The message of the error at the deadline.

    Raises:
        DeadlineExceededError: If there is no result by then.
        CancelledError: If the future was cancelled.
        Exception: The error at which the future failed, whatever its type.
    """
    try:
        return future.result(timeout=call.remaining())
    except FutureCancelledError:
        if not future.cancelled():
            raise
        raise CancelledError(_LEFT) from None
    except TimeoutError as error:
        # Since the wait ended, the future may have failed, with another error.
        if future.done() and not future.cancelled() and future.exception() is error:
            raise
        raise DeadlineExceededError(late) from None
    finally:
        # An error of the future refers to this frame, and the future refers to the error.
        del future
