from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import torch

import exactnets
from layertap.wire.messages import decode_reply
from recording import FOLDER, channel, natives, pixels, replies

NAMES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def opened() -> Iterator[grpc.Channel]:
    """A channel to a server with the models of the recording."""
    with channel() as opened:
        yield opened


@pytest.fixture(scope="module")
def answers(opened: grpc.Channel) -> dict[str, bytes]:
    """The replies of the current code."""
    return replies(opened)


def test_every_request_has_a_recorded_reply(answers: dict[str, bytes]) -> None:
    """No request was added without its reply, and no reply is left over."""
    assert sorted(answers) == NAMES
    assert set(natives()) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_replies_are_the_recorded_bytes(name: str, answers: dict[str, bytes]) -> None:
    """A reply has the recorded bytes, apart from its timings."""
    assert answers[name] == (FOLDER / name).read_bytes()


def test_the_recording_is_right() -> None:
    """The recorded values are those of the module."""
    _, [recorded] = decode_reply((FOLDER / "one").read_bytes())
    with torch.no_grad():
        own = exactnets.image().conv1(torch.from_numpy(pixels(2)))
    assert (recorded.array() == own.numpy()).all()
