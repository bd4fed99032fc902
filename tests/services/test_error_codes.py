"""Every error has a code, and no internal text leaves the server."""

from __future__ import annotations

import grpc
import pytest

from layertap import errors
from layertap.services.caller import Caller
from layertap.services.error_codes import CODES, ErrorCode, code_of
from layertap.services.grpc_adapter.handlers import unary
from layertap.services.grpc_adapter.statuses import STATUS
from layertap.services.public_errors import public_error
from serving import serving_method


def subclasses(kind: type) -> list[type]:
    return [sub for child in kind.__subclasses__() for sub in (child, *subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(errors.LayertapError), ids=lambda kind: kind.__name__)
def test_every_error_is_mapped(kind) -> None:
    """A class without a code, of its own or of a base below the root, is a mistake."""
    assert isinstance(STATUS[code_of(kind("why"))], grpc.StatusCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_a_code_has_the_name_and_number_of_grpcs(code) -> None:
    """A code has one name and one number, both for calls and for items of streams."""
    assert STATUS[code].name == code.name
    assert STATUS[code].value[0] == code.value


def test_an_unmapped_error_is_found() -> None:
    """A new class that has no code is reported as an error, and gets no default."""
    unmapped = type("PlantedError", (errors.LayertapError,), {})
    with pytest.raises(KeyError):
        code_of(unmapped("why"))


def test_every_error_is_public_and_drawn() -> None:
    """The tree at the top of the file contains every class, and so does __all__."""
    for kind in (errors.LayertapError, *subclasses(errors.LayertapError)):
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in errors.__all__
            assert kind.__name__ in errors.__doc__
    assert set(CODES) <= set(subclasses(errors.LayertapError))


def test_the_unexpected_is_internal_and_keeps_its_text(caplog) -> None:
    """An unexpected exception becomes INTERNAL with a request id; its text is only in the log."""

    def explode(message: bytes, caller: Caller) -> bytes:
        raise RuntimeError("secret path /etc/shadow")

    with serving_method(unary(explode)) as channel, pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/test.Service/Call")(b"")
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.value.details()
    request_id = failure.value.details().rsplit(" ", 1)[-1]
    assert request_id in caplog.text
    assert "secret" in caplog.text


def test_want_of_memory_is_no_fault_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """A MemoryError is always RESOURCE_EXHAUSTED, because a retry may succeed."""
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert code_of(caught.value) is ErrorCode.RESOURCE_EXHAUSTED
    told = public_error(caught.value)
    assert isinstance(told, errors.OverloadedError)
    assert "out of memory" in str(told)
    assert "out of memory" in caplog.text
