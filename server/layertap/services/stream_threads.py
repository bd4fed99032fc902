"""Serves streams of items, in every protocol.

Note [Threads of a stream]
    In synchronous gRPC, the thread of a stream's RPC sends, and a second thread reads, as both
    block. The items of all streams share one pool of threads, which parse, wait for a compute
    thread and encode, as the threads of unary calls do. Nothing polls. When the RPC of a stream
    ends, gRPC's callback cancels the items in flight and gRPC wakes the reader, so that all threads
    are done with the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial

import grpc

from layertap.errors import OverloadedError
from layertap.services.error_codes import code_of
from layertap.services.item_window import ItemWindow
from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams
from layertap.services.status import public_error
from layertap.threads import WorkerThreads

__all__ = ["StreamThreads", "Take"]

ITEM_THREADS = 32
"""Maximum number of items, of all streams, that are parsed or wait for a compute thread at once."""

Take = Callable[[bytes, float | None], Callable[[], object] | None]
"""Takes (an item's message, its stream's remaining seconds) and puts the item into the window.

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
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        """Yield the replies of one stream.

        Args:
            window: The items of the stream that are in flight.
            take: Puts an item into the window.
            messages: The stream's items.
            context: The stream's RPC.

        Raises:
            LayertapError: If the stream may not begin, or can't continue.
        """
        with self._streams.opened(window):
            # If this is False, the stream has already ended, and gRPC will not call the callback.
            if not context.add_callback(window.close):
                window.close()
            # The reader and the items run in this call's context, so that log records have the
            # request's id. gRPC wakes the reader when the stream ends.
            read = partial(copy_context().run, self._read, window, take, messages, context)
            if self._readers.submit_if_free(read) is None:
                raise OverloadedError("no thread is free to read another stream; try again later")
            yield from window.replies()

    def _read(
        self,
        window: ItemWindow,
        take: Take,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> None:
        try:
            while window.wait_for_room() and (message := next(messages, None)) is not None:
                answer = take(message, context.time_remaining())
                if answer is not None:
                    self._items.submit(copy_context().run, answer)
                # Both may be large, and the next message may take long to arrive.
                del message, answer
            window.end()
        except grpc.RpcError:
            window.close()  # The stream was cancelled, or its client disconnected.
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error))
            window.end(public_error(error))
