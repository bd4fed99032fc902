"""A window counts the bytes of its replies until gRPC has sent them, or the stream has ended."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from layertap.engine import Call, Reservation
from layertap.engine.admission import Admission
from layertap.errors import UnavailableError
from layertap.services.answer import Answer
from layertap.services.item_window import ItemWindow, OrderedWindow, UnorderedWindow

Give = Callable[[bytes], object]


@pytest.fixture
def budget() -> Iterator[Admission]:
    """The budget for the replies; the garbage collector is off."""
    gc.disable()
    yield Admission(1, 1000)
    gc.enable()


@pytest.fixture(params=[UnorderedWindow, OrderedWindow])
def window(request: pytest.FixtureRequest) -> ItemWindow:
    """A window of either kind, with four places."""
    return request.param(4)


@pytest.fixture
def give(window: ItemWindow, budget: Admission) -> Give:
    """Admit an item and answer it with bytes that count."""
    numbers = count()
    # Kept, so that no finalizer gives back what the window should have released.
    reservations: list[Reservation] = []

    def answer(message: bytes) -> None:
        reservations.append(budget.reserve("the reply takes", len(message)))
        reply = Answer(message, reservations[-1])
        if isinstance(window, UnorderedWindow):
            number = next(numbers)
            window.admit(number, Call())
            window.answer(number, reply)
        else:
            place = window.admit(Call())
            assert place is not None
            place.answer(reply)

    return answer


def test_bytes_are_released_when_the_yield_is_resumed(window, give, budget) -> None:
    """A reply counts while it is sent; asking for the next one means that it was sent."""
    give(b"123")
    give(b"4567")
    assert budget.bytes == 7
    replies = window.replies()
    assert next(replies) == b"123"
    assert budget.bytes == 7
    assert next(replies) == b"4567"
    assert budget.bytes == 4
    window.end(UnavailableError("over"))
    with pytest.raises(UnavailableError, match="over"):
        next(replies)
    assert budget.bytes == 0


def test_bytes_are_released_when_the_stream_ends(window, give, budget) -> None:
    """Closing releases waiting replies and the one being sent, even if the sender stops."""
    give(b"123")
    give(b"4567")
    replies = window.replies()
    next(replies)
    window.close()
    assert budget.bytes == 0
    assert list(replies) == []


def test_bytes_are_released_when_the_sender_is_dropped(window, give, budget) -> None:
    """gRPC drops the iterator of a cancelled call: the reply being sent is released."""
    give(b"123")
    replies = window.replies()
    next(replies)
    del replies
    assert budget.bytes == 0


def test_a_late_answer_is_released_at_once(budget) -> None:
    """An item that is answered after the end of its stream keeps nothing."""
    stream, ordered = UnorderedWindow(1), OrderedWindow(1)
    stream.admit(1, Call())
    place = ordered.admit(Call())
    assert place is not None
    stream.close()
    ordered.close()
    for answer in (lambda reply: stream.answer(1, reply), place.answer):
        reservation: Reservation = budget.reserve("the reply takes", 5)
        answer(Answer(b"12345", reservation))
        assert (budget.bytes, reservation.nbytes) == (0, 0)
