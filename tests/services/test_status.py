"""Every error has a status, and nothing internal leaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from layertap import errors
from layertap.services.error_codes import CODES, ErrorCode, code_of
from layertap.services.status import STATUS, guarded, public_error


def subclasses(kind: type) -> list[type]:
    return [sub for child in kind.__subclasses__() for sub in (child, *subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(errors.LayertapError), ids=lambda kind: kind.__name__)
def test_every_error_is_mapped(kind) -> None:
    """An error class without a code of its own or of a base below the root is a mistake."""
    assert isinstance(STATUS[code_of(kind("why"))], grpc.StatusCode)


def test_an_unmapped_error_is_found() -> None:
    """A new branch of the tree that nobody mapped is an error, not a default."""
    unmapped = type("PlantedError", (errors.LayertapError,), {})
    with pytest.raises(KeyError):
        code_of(unmapped("why"))


def test_every_error_is_public_and_drawn() -> None:
    """The tree at the top of the file has every class, and so has __all__."""
    for kind in (errors.LayertapError, *subclasses(errors.LayertapError)):
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in errors.__all__
            assert kind.__name__ in errors.__doc__
    assert set(CODES) <= set(subclasses(errors.LayertapError))


def test_the_unexpected_is_internal_and_keeps_its_text(caplog) -> None:
    """An unexpected exception becomes INTERNAL with a request id; its text stays in the log."""

    def explode(message: bytes, context: grpc.ServicerContext) -> bytes:
        raise RuntimeError("secret path /etc/shadow")

    handler = grpc.unary_unary_rpc_method_handler(guarded(explode))
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Service", {"Call": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(grpc.RpcError) as failure,
        ):
            channel.unary_unary("/test.Service/Call")(b"")
    finally:
        server.stop(0)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.value.details()
    request_id = failure.value.details().rsplit(" ", 1)[-1]
    assert request_id in caplog.text
    assert "secret" in caplog.text


def test_want_of_memory_is_no_fault_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """A MemoryError, wherever it was raised, is RESOURCE_EXHAUSTED: it may be gone in a while."""
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert code_of(caught.value) is ErrorCode.RESOURCE_EXHAUSTED
    told = public_error(caught.value)
    assert isinstance(told, errors.OverloadedError)
    assert "out of memory" in str(told)
    assert "out of memory" in caplog.text
