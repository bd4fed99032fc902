"""Serves streams of items, in every protocol.

Note [Threads of a stream]
    The thread of a stream's RPC sends; a second thread reads, as both block.
    The items of all streams share one pool, whose threads parse, wait for a compute thread and
    encode, as those of unary calls do. Nothing polls. All threads finish with a stream when its RPC
    ends: the caller's call is cancelled, which cancels the items in flight, and the transport wakes
    the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial

from layertap.errors import CancelledError, OverloadedError
from layertap.services.caller import Caller
from layertap.services.error_codes import code_of
from layertap.services.item_window import ItemWindow
from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams
from layertap.services.public_errors import public_error
from layertap.threads import WorkerThreads

__all__ = ["StreamThreads", "Take"]

ITEM_THREADS = 32
"""Items of all streams that are parsed or wait for a compute thread at once."""

Take = Callable[[bytes], Callable[[], object] | None]
"""Takes an item's message into the stream's window.

Called in the order of the messages; returns what answers the item, in any thread, or None if
there is nothing more to do.
"""


class StreamThreads:
    """Serves streams of items. Safe to share between services.

    Args:
        streams: Counts the streams.
        observer: Notified of streams that could not be read.

    Attributes:
        pools: The threads that it needs; its owner has to start them and shut them down.
    """

    def __init__(self, streams: OpenStreams, observer: Observer) -> None:
        self._streams = streams
        self._observer = observer
        self._items = WorkerThreads(ITEM_THREADS, "layertap-item")
        self._readers = WorkerThreads(streams.most, "layertap-stream-reader")
        self.pools = (self._items, self._readers)

    def serve(
        self,
        window: ItemWindow,
        take: Take,
        messages: Iterator[bytes],
        caller: Caller,
    ) -> Iterator[bytes]:
        """Yield the replies of one stream.

        Args:
            window: What the stream has in flight.
            take: Takes an item.
            messages: The stream's items. Raises CancelledError when the caller leaves.
            caller: Who opened the stream. The items are cancelled with its call.

        Raises:
            LayertapError: If the stream may not begin, or can't continue.
        """
        with self._streams.opened(window), caller.call.cancelling(window.close):
            # In this call's context, and so are the items: log records name its request.
            read = partial(copy_context().run, self._read, window, take, messages, caller)
            if self._readers.submit_if_free(read) is None:
                raise OverloadedError("no thread is free to read another stream; try again later")
            yield from window.replies()

    def _read(
        self,
        window: ItemWindow,
        take: Take,
        messages: Iterator[bytes],
        caller: Caller,
    ) -> None:
        try:
            while window.wait_for_room() and (message := next(messages, None)) is not None:
                answer = take(message)
                if answer is not None:
                    self._items.submit(copy_context().run, answer)
                # They may be large, and the next ones may take long.
                del message, answer
            window.end()
        except CancelledError:
            window.close()
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error), caller)
            window.end(public_error(error))
