"""Streams are counted over all services, and all of them end when the server drains."""

from __future__ import annotations

import pytest

from layertap.errors import OverloadedError, UnavailableError
from layertap.services.item_window import OrderedWindow, UnorderedWindow
from layertap.services.open_streams import OpenStreams


def test_one_too_many_is_refused_until_another_ends() -> None:
    """Windows of either kind count, and a stream that ended makes room."""
    streams = OpenStreams(2)
    with streams.opened(UnorderedWindow(1)):
        with (
            streams.opened(OrderedWindow(1)),
            pytest.raises(OverloadedError, match="2 streams are open"),
            streams.opened(OrderedWindow(1)),
        ):
            pass
        with streams.opened(OrderedWindow(1)) as window:
            assert window.wait_for_room()
        assert not window.wait_for_room()


def test_draining_ends_what_is_open_and_refuses_more() -> None:
    """An open window takes no more items, and no new window is opened."""
    streams = OpenStreams(2)
    with streams.opened(OrderedWindow(1)) as window:
        streams.drain()
        assert not window.wait_for_room()
        with pytest.raises(UnavailableError, match="shutting down"):
            next(window.replies())
    with (
        pytest.raises(UnavailableError, match="shutting down"),
        streams.opened(UnorderedWindow(1)),
    ):
        pass
