"""Serves streams of items, in every protocol.

Note [Threads of a stream]
    The thread of a stream's RPC sends, and a second thread reads, as both block. The items of all
    streams share one pool of threads, which parse, wait for a compute thread and encode, as the
    threads of unary calls do. Nothing polls. When the RPC of a stream ends, its call is cancelled,
    which cancels the items in flight, and the transport wakes the reader, so that all threads are
    done with the stream.
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
"""Maximum number of items, of all streams, that are parsed or wait for a compute thread at once."""

Take = Callable[[bytes], Callable[[], object] | None]
"""Takes an item's message and puts the item into the window.

It is called in the order of the messages. It returns a function that answers the item, which may
run in any thread; None if the item is answered already.
"""


class StreamThreads:
    """Serves streams of items. Safe to share between services.

    Args:
        streams: Counts the open streams.
        observer: Notified of streams that could not be read.

    Attributes:
        pools: The pools of threads that it needs. The caller must start them and shut them down.
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
            window: The items of the stream that are in flight.
            take: Puts an item into the window.
            messages: The stream's items. Raises CancelledError when the caller leaves.
            caller: Who opened the stream. The items are cancelled with its call.

        Raises:
            LayertapError: If the stream may not begin, or can't continue.
        """
        with self._streams.opened(window), caller.call.cancelling(window.close):
            # The reader and the items run in this call's context, so that log records have the
            # request's id.
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
                # Both may be large, and the next message may take long to arrive.
                del message, answer
            window.end()
        except CancelledError:
            window.close()  # The stream was cancelled, or its client disconnected.
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error), caller)
            window.end(public_error(error))
