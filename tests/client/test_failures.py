"""gRPC statuses are converted back to the exceptions that the server raised, with their fields."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from layertap import errors
from layertap.client.failures import error_from_item, error_from_rpc
from layertap.services.caller import Caller
from layertap.services.grpc_adapter.handlers import unary
from layertap.services.public_errors import public_error
from layertap.v1.feature_service_pb2 import ExtractStreamError
from layertap.wire.messages import ERROR_IMAGE_METADATA_KEY, ERROR_METADATA_KEY

REWORDED = "this release of gRPC words it differently: change layertap/client/failures.py"


class Waiting(grpc.GenericRpcHandler):
    """Doesn't answer until it is released, apart from one method that fails."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.released = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return a handler for the method that was called."""
        if details.method == "/a/Fails":
            return unary(self._fail)
        return grpc.unary_unary_rpc_method_handler(self._wait)

    def _wait(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.begun.release()
        self.released.wait(30)
        return b""

    def _fail(self, message: bytes, caller: Caller) -> bytes:
        raise errors.InvalidInputError("got nothing", image=7)


@pytest.fixture
def waiting() -> Waiting:
    """How the server treats calls."""
    return Waiting()


@pytest.fixture
def address(waiting: Waiting) -> Iterator[str]:
    """A server that accepts messages of up to 100 bytes."""
    options = [("grpc.max_receive_message_length", 100)]
    server = grpc.server(ThreadPoolExecutor(4), handlers=[waiting], options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    waiting.released.set()
    server.stop(None).wait()


def test_a_call_that_this_process_cancels_is_its_own_doing(waiting: Waiting, address: str) -> None:
    """cancel() raises CancelledError, distinguished from the server's by gRPC's own sign."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/a/B").future(b"", timeout=30)
        assert waiting.begun.acquire(timeout=30)
        call.cancel()
        assert call.details() == "Locally cancelled by application!", REWORDED
        assert type(error_from_rpc(call)) is errors.CancelledError


def test_a_channel_that_this_process_closes_is_its_own_doing(
    waiting: Waiting, address: str
) -> None:
    """close() ends a call in another thread with CancelledError."""
    channel = grpc.insecure_channel(address)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(channel.unary_unary("/a/B"), b"", timeout=30)
        assert waiting.begun.acquire(timeout=30)
        channel.close()
        error = asked.exception(30)
    assert isinstance(error, grpc.RpcError)
    assert error.details() == "Channel closed!", REWORDED
    assert type(error_from_rpc(error)) is errors.CancelledError


def test_a_message_that_is_too_large_is_no_overload(address: str) -> None:
    """A message over gRPC's limit raises InvalidInputError, because a retry could not succeed."""
    with (
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/a/B")(bytes(1000), timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details(), REWORDED
    assert type(error_from_rpc(caught.value)) is errors.InvalidInputError


def test_the_image_that_is_wrong_is_a_field(address: str) -> None:
    """An error about one image has the image's index, and a text without it."""
    with (
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/a/Fails")(b"", timeout=30)
    error = error_from_rpc(caught.value)
    assert isinstance(error, errors.InvalidInputError)
    assert (str(error), error.image, error.detail) == ("images[7]: got nothing", 7, "got nothing")


class Failed(grpc.RpcError):
    """An error with any metadata, such as another kind of server may send."""

    def __init__(self, image: str) -> None:
        self._image = image

    def code(self) -> grpc.StatusCode:
        """Return the status."""
        return grpc.StatusCode.INVALID_ARGUMENT

    def details(self) -> str:
        """Return the text."""
        return "wrong"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata."""
        kind = (ERROR_METADATA_KEY, "InvalidInputError")
        return (kind, (ERROR_IMAGE_METADATA_KEY, self._image))


@pytest.mark.parametrize("image", ["", "x", "-1", "9" * 5000])
def test_an_index_that_is_none_is_left_out(image: str) -> None:
    """Metadata that is not an index gives an error without index, and never hides the error."""
    error = error_from_rpc(Failed(image))
    assert isinstance(error, errors.InvalidInputError)
    assert (str(error), error.image) == ("wrong", None)


def test_an_item_has_the_field_too() -> None:
    """The error of a stream's item has the index, including 0; if absent it is None."""
    wrong = {"code": 3, "kind": "InvalidInputError", "message": "images[0]: got nothing"}
    error = error_from_item(ExtractStreamError(image=0, **wrong))
    assert isinstance(error, errors.InvalidInputError)
    assert (error.image, error.detail) == (0, "got nothing")
    error = error_from_item(ExtractStreamError(**wrong))
    assert isinstance(error, errors.InvalidInputError)
    assert error.image is None


def test_a_text_that_is_cut_keeps_its_fields() -> None:
    """Shortening a long text does not remove any field."""
    error = public_error(errors.InvalidInputError("x" * 9000, image=3))
    assert isinstance(error, errors.InvalidInputError)
    assert len(str(error)) < 3000
    assert error.image == 3
