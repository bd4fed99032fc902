"""The number of calls of one kind is limited; a call that ends in any way makes room."""

from __future__ import annotations

import pytest

from layertap.errors import OverloadedError
from layertap.services.bounded_calls import BoundedCalls


def test_one_too_many_is_refused_until_another_ends() -> None:
    """The error names the limit; a failed call makes room too."""
    calls = BoundedCalls(1, "calls watch health")

    def fail() -> None:
        with calls.opened():
            with pytest.raises(OverloadedError, match="^1 calls watch health, the most allowed$"):
                calls.opened().__enter__()
            assert calls.open == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert calls.open == 0
    with calls.opened():
        assert calls.open == 1


def test_a_refused_call_takes_no_place() -> None:
    """If the caller's own function raises, its error is passed on and nothing is counted."""

    def refuse(text: str) -> None:
        raise LookupError(text)

    calls = BoundedCalls(0, "calls ask")
    with pytest.raises(LookupError, match="0 calls ask"), calls.opened(refuse):
        pytest.fail("it was let in")
    assert calls.open == 0
