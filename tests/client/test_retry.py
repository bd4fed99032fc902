"""A client with retries waits as long as the server says, but no longer than its timeout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from layertap import Client
from layertap.client.retry import retrying
from layertap.errors import InvalidInputError, NotFoundError, OverloadedError

PUSHBACK = "grpc-retry-pushback-ms"


class Full:
    """A call that is refused several times before it succeeds."""

    def __init__(self, refusals: int, after: float | None = None) -> None:
        self.refusals = refusals
        self.after = after
        self.timeouts: list[float | None] = []
        self.waits: list[float] = []

    def __call__(self, timeout: float | None) -> str:
        self.timeouts.append(timeout)
        if len(self.timeouts) <= self.refusals:
            error = OverloadedError("full")
            error.retry_after = self.after
            raise error
        return "answer"


def test_it_waits_as_long_as_the_server_says_and_some_more() -> None:
    """Each wait is the server's, plus a random part of up to half of it."""
    call = Full(5, after=2.0)
    assert retrying(call, 5, None, call.waits.append) == "answer"
    assert call.timeouts == [None] * 6
    assert all(2.0 <= wait <= 3.0 for wait in call.waits)
    assert len(set(call.waits)) > 1


def test_without_a_word_from_the_server_waits_double() -> None:
    """Without the server's wait, the waits grow from half a second to eight."""
    call = Full(6)
    retrying(call, 6, None, call.waits.append)
    for wait, least in zip(call.waits, (0.5, 1, 2, 4, 8, 8), strict=True):
        assert least <= wait <= least * 1.5


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
def test_it_gives_up_after_the_last_retry(retries: int, calls: int) -> None:
    """After the allowed number of retries, the last error is raised."""
    call = Full(99, after=0.0)
    with pytest.raises(OverloadedError, match="full"):
        retrying(call, retries, None, call.waits.append)
    assert len(call.timeouts) == calls
    assert len(call.waits) == retries


def test_a_wait_beyond_the_timeout_is_not_begun() -> None:
    """If the server's wait would exceed the timeout, the error is raised at once."""
    call = Full(1, after=60.0)
    with pytest.raises(OverloadedError):
        retrying(call, 3, 5.0, call.waits.append)
    assert call.waits == []


def test_a_server_that_asks_not_to_be_called_again_is_not() -> None:
    """A negative pushback ends the retries."""
    call = Full(1, after=-1.0)
    with pytest.raises(OverloadedError):
        retrying(call, 3, None, call.waits.append)
    assert len(call.timeouts) == 1


def test_other_errors_are_raised_at_once() -> None:
    """Only errors of a full server are retried."""

    def call(timeout: float | None) -> str:
        raise NotFoundError("no such model")

    with pytest.raises(NotFoundError):
        retrying(call, 3, None, lambda _: pytest.fail("it waited"))


def test_retries_below_zero_are_refused() -> None:
    """A negative number of retries raises InvalidInputError."""
    with pytest.raises(InvalidInputError, match="retries: got -1"):
        Client(retries=-1)


class Stub:
    """A server that refuses a given number of calls."""

    def __init__(self, refusals: int, pushback: str) -> None:
        self.calls: list[float] = []
        self._refusals, self._pushback = refusals, pushback
        self._server = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_unary_rpc_method_handler(self._answer)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "layertap.v1.FeatureService", {"ListModels": handler}
                ),
            )
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _answer(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls.append(time.monotonic())
        if len(self.calls) <= self._refusals:
            context.set_trailing_metadata(((PUSHBACK, self._pushback),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return b""

    def close(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[Stub]:
    stub = Stub(*request.param)
    yield stub
    stub.close()


@pytest.mark.parametrize("stub", [(2, "200")], indirect=True)
def test_a_client_obeys_a_real_servers_pushback(stub: Stub) -> None:
    """The refusal's metadata determines when the client calls again."""
    with Client(stub.address, retries=2) as client:
        assert client.list_models() == []
    first, second, third = stub.calls
    assert second - first >= 0.2
    assert third - second >= 0.2


@pytest.mark.parametrize(
    ("stub", "after"),
    [((1, "200"), 0.2), ((1, "-1"), -1.0), ((1, "soon"), -1.0)],
    indirect=["stub"],
)
def test_a_client_without_retries_says_how_long_to_wait(stub: Stub, after: float) -> None:
    """The error has the server's wait; a value that is not a number means never, as in gRPC."""
    with Client(stub.address) as client, pytest.raises(OverloadedError) as caught:
        client.list_models()
    assert caught.value.retry_after == after
