"""How a stream of items is served, whatever its items are.

Note [Threads of a stream]
    In synchronous gRPC a stream holds the thread of its RPC, which sends; another one of its own
    reads, as both block. The items of all streams share one pool, whose threads parse, wait for a
    compute thread and encode, as those of unary calls do. Nothing polls. All of them end with the
    RPC: gRPC tells its end by a callback, which cancels what is in flight, and wakes the reader.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import grpc

from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams, Window
from layertap.services.status import code_of, leaving

__all__ = ["StreamThreads", "Take"]

ITEM_THREADS = 32
"""Items of all streams that are parsed or wait for a compute thread at once."""

Take = Callable[[bytes, float | None], Callable[[], object] | None]
"""Takes an item's message, and the seconds that its stream has left, into the stream's window.

Called in the order of the messages; returns what answers the item, in any thread, or None where
there is nothing more to do.
"""


class StreamThreads:
    """Serves streams of items. Safe to share between services.

    Args:
        streams: Counts the streams.
        observer: Is told of streams that could not be read.
    """

    def __init__(self, streams: OpenStreams, observer: Observer) -> None:
        self._streams = streams
        self._observer = observer
        self._items = ThreadPoolExecutor(ITEM_THREADS, thread_name_prefix="layertap-item")

    def serve(
        self,
        window: Window,
        take: Take,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        """Yield the replies of one stream.

        Args:
            window: What the stream has in flight.
            take: Takes an item.
            messages: The stream's items.
            context: Its RPC.

        Raises:
            LayertapError: Where the stream may not begin, or can't go on.
        """
        with self._streams.opened(window):
            # False: the stream has ended already, and nobody will tell us any more.
            if not context.add_callback(window.close):
                window.close()
            # In this call's context, and so are the items: what is logged tells the request.
            reader = threading.Thread(
                target=copy_context().run,
                args=(self._read, window, take, messages, context),
                name="layertap-stream-reader",
            )
            # Not to be waited for at the process's end: gRPC wakes it when the stream ends.
            reader.daemon = True
            reader.start()
            yield from window.replies()

    def close(self) -> None:
        """Let the threads go once the items that they have are done."""
        self._items.shutdown(wait=False)

    def _read(
        self,
        window: Window,
        take: Take,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> None:
        try:
            while window.wait_for_room() and (message := next(messages, None)) is not None:
                answer = take(message, context.time_remaining())
                if answer is not None:
                    self._items.submit(copy_context().run, answer)
                # They may be large, and the next ones may take long.
                del message, answer
            window.end()
        except grpc.RpcError:
            window.close()  # The stream was cancelled, or its client went away.
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error))
            window.end(leaving(error))
