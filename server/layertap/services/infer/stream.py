"""``ModelStreamInfer``: many requests over one stream, answered in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from layertap.engine import Call, Reservation
from layertap.errors import LayertapError
from layertap.services.data_plane import DataPlane
from layertap.services.item_window import Answer, OrderedWindow
from layertap.services.stream_threads import StreamThreads

__all__ = ["AnswerItem", "InferStream", "RefuseItem"]

AnswerItem = Callable[[bytes, Call, Reservation, grpc.ServicerContext], Answer]
"""Answers one item, with the reason if it fails; called from many threads."""

RefuseItem = Callable[[bytes, LayertapError], Answer]
"""Answers one item that is not run, with the reason."""


class InferStream:
    """Serves the streams.

    Args:
        plane: Counts the bytes of the items.
        places: Maximum number of items of one stream in flight.
        threads: Serves the streams.
        answer: Answers an item.
        refuse: Answers an item whose bytes would exceed the limit.
    """

    def __init__(
        self,
        plane: DataPlane,
        places: int,
        threads: StreamThreads,
        answer: AnswerItem,
        refuse: RefuseItem,
    ) -> None:
        self._plane = plane
        self._places = places
        self._threads = threads
        self._answer = answer
        self._refuse = refuse

    def serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer the items of one stream."""
        window = OrderedWindow(self._places)

        def take(message: bytes, remaining: float | None) -> Callable[[], None] | None:
            place = window.admit(remaining)
            if place is None:
                return None
            try:
                received = self._plane.receive(len(message))
            except LayertapError as error:
                place.answer(self._refuse(message, error))
                return None
            return lambda: place.answer(self._answer(message, place.call, received, context))

        yield from self._threads.serve(window, take, messages, context)
