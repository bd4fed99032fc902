"""``ModelStreamInfer``: many requests over one stream, answered in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layertap.engine import Reservation
from layertap.errors import LayertapError
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.data_plane import DataPlane
from layertap.services.item_window import OrderedWindow
from layertap.services.stream_threads import StreamThreads

__all__ = ["AnswerItem", "InferStream", "RefuseItem"]

AnswerItem = Callable[[bytes, Caller, Reservation], Answer]
"""Runs and answers one item, with an error if it fails; called from many threads."""

RefuseItem = Callable[[bytes, LayertapError], Answer]
"""Answers one item with an error, without running it."""


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

    def serve(self, messages: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        """Answer the items of one stream."""
        window = OrderedWindow(self._places)

        def take(message: bytes) -> Callable[[], None] | None:
            item = caller.of_item()
            place = window.admit(item.call)
            if place is None:
                return None
            try:
                received = self._plane.receive(len(message), item)
            except LayertapError as error:
                place.answer(self._refuse(message, error))
                return None
            return lambda: place.answer(self._answer(message, item, received))

        yield from self._threads.serve(window, take, messages, caller)
