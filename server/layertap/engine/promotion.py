"""Promotion: work for what is requested often, such as compiling, while requests are served.

Compiling must happen on a compute thread, where the program will run, and takes as long as a few
forward passes. So it is divided into steps, and other requests run between them.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from layertap.errors import LayertapError
from layertap.threads import start_thread

__all__ = ["PROMOTE_AFTER", "Promoter"]

K = TypeVar("K")

PROMOTE_AFTER = 4
"""A layer set is compiled when it has been requested this many times without a compiled plan."""

MAX_COUNTED = 256

_log = logging.getLogger(__name__)


class Promoter(Generic[K]):
    """Counts the requests for each key, such as a layer set, and works for those of many requests.

    Args:
        steps: Does the work for a key, given what was noted, and yields between the steps. It runs
            on the promoter's own thread, so it must send each step to a compute thread itself.
    """

    def __init__(self, steps: Callable[[K, Any], Iterator[None]]) -> None:
        self._steps = steps
        self._counts: OrderedDict[K, int] = OrderedDict()
        self._wanted: SimpleQueue[tuple[K, Any] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="layertap-promoter", daemon=True)
        start_thread(self._thread)

    def note(
        self, key: K, example: Callable[[], Any] = lambda: None, *, after: int = PROMOTE_AFTER
    ) -> None:
        """Count one request; the one with the number ``after`` starts the work.

        Args:
            key: What the request was for.
            example: Returns what the work needs of this request, such as its batch. It is kept
                until the work ends.
            after: How many requests there must be.
        """
        with self._lock:
            count = self._counts.pop(key, 0) + 1
            self._counts[key] = count
            if len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
        if count == after:
            self._wanted.put((key, example()))

    def close(self) -> None:
        """Give up the work and end the thread."""
        self._closed.set()
        self._wanted.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            try:
                for _ in self._steps(*wanted):
                    if self._closed.is_set():
                        return
            except LayertapError as error:
                _log.info("not promoted: %s", error)
            except Exception:  # noqa: BLE001 - one failure must not end the thread; it is logged
                _log.exception("promotion failed")
            finally:
                del wanted  # Or its example would stay until the next one comes.
