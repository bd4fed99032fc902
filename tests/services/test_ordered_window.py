"""The places of a stream are taken and freed in order, whatever its threads do."""

from __future__ import annotations

import threading

import pytest

from layertap.engine import Call
from layertap.errors import UnavailableError
from layertap.services.answer import Answer
from layertap.services.item_window import OrderedWindow


def test_replies_leave_in_the_order_of_the_places() -> None:
    """The second reply waits for the first."""
    window = OrderedWindow(3)
    first, second = window.admit(Call()), window.admit(Call())
    second.answer(Answer(b"2"))
    replies = window.replies()
    got: list[bytes] = []
    sender = threading.Thread(target=lambda: got.extend(replies))
    sender.start()
    first.answer(Answer(b"1"))
    window.end()
    sender.join(10)
    assert got == [b"1", b"2"]


def test_a_place_is_free_once_its_reply_was_taken() -> None:
    """There is no room while a reply is being sent; there is when the next one is requested."""
    window = OrderedWindow(1)
    assert window.wait_for_room()
    window.admit(Call()).answer(Answer(b"1"))
    replies = window.replies()
    assert next(replies) == b"1"
    room = threading.Thread(target=window.wait_for_room)
    room.start()
    room.join(0.1)
    assert room.is_alive()
    window.end()
    assert list(replies) == []
    room.join(10)
    assert not room.is_alive()


def test_the_end_answers_what_is_in_flight_and_raises_its_reason() -> None:
    """No item is admitted afterwards, and the reason is raised last."""
    window = OrderedWindow(2)
    place = window.admit(Call())
    window.end(UnavailableError("over"))
    assert window.admit(Call()) is None
    assert not window.wait_for_room()
    place.answer(Answer(b"1"))
    replies = window.replies()
    assert next(replies) == b"1"
    with pytest.raises(UnavailableError, match="over"):
        next(replies)


def test_closing_cancels_and_ends() -> None:
    """Items are cancelled, late answers are dropped, and there are no more replies."""
    window = OrderedWindow(2)
    place = window.admit(Call())
    cancelled = []
    with place.call.cancelling(lambda: cancelled.append(True)):
        window.close()
    place.answer(Answer(b"late"))
    assert cancelled == [True]
    assert list(window.replies()) == []
