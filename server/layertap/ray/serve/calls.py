"""Calls as a replica gets them from Ray: their caller, and how they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError as FutureCancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layertap import errors
from layertap.call import Call
from layertap.ray.serve.proxy import TIME_LEFT_KEY
from layertap.services.caller import REQUEST_ID_KEY, Caller
from layertap.services.error_codes import code_of
from layertap.services.grpc_adapter.caller import caller_from
from layertap.services.grpc_adapter.statuses import STATUS, error_metadata

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

__all__ = ["Failure", "Reply", "caller_of", "check_size", "messages_of"]


@dataclass(frozen=True, slots=True)
class Reply:
    """A serialized reply, in the form that Ray wants: like a message of protobuf.

    Attributes:
        message: The serialized reply.
    """

    message: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        """Return the serialized reply."""
        return self.message


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call failed.

    Attributes:
        error: The error as it may leave the server.
    """

    error: errors.LayertapError

    def report(self, context: RayServegRPCContext, caller: Caller) -> Reply:
        """Set the status of a call, and return the empty message with which Ray sends it.

        An exception would lose the metadata, and Ray would log it with its trace.
        """
        context.set_code(STATUS[code_of(self.error)])
        context.set_details(str(self.error))
        context.set_trailing_metadata(list(error_metadata(self.error, caller.request_id)))
        return Reply(b"")


def caller_of(context: RayServegRPCContext) -> Caller:
    """Return the caller of a call, and put the id of the request into the trailing metadata."""
    metadata = context.invocation_metadata()
    caller = caller_from(
        metadata,
        Call(_seconds_left(metadata)),
        transport="ray",
        peer=context.peer(),
        # Also a proxy on this machine may have got the call from another one.
        local=False,
        peer_identities=context.peer_identities(),  # type: ignore[arg-type] # they are several
    )
    context.set_trailing_metadata([(REQUEST_ID_KEY, caller.request_id)])
    return caller


def _seconds_left(metadata: list[tuple[str, Any]]) -> float | None:
    """Return what the proxy measured, whose entry is the last one; None for no deadline."""
    values = [value for key, value in metadata if key == TIME_LEFT_KEY]
    return float(values[-1]) if values else None


def messages_of(
    stream: gRPCInputStream[bytes],
    loop: asyncio.AbstractEventLoop,
    call: Call,
    most_bytes: int,
) -> Iterator[bytes]:
    """Yield the messages of a stream in a thread of its own.

    Args:
        stream: The stream, which belongs to the loop.
        loop: The event loop.
        call: The state of the stream's call.
        most_bytes: The limit of one message.

    Raises:
        CancelledError: When the caller leaves.
        InvalidInputError: If a message is larger than the limit.
    """
    while True:
        coming = asyncio.run_coroutine_threadsafe(_next(stream), loop)
        with call.cancelling(coming.cancel):
            try:
                message = coming.result()
            except FutureCancelledError:
                message = None
        if message is None:
            if stream.is_cancelled() or coming.cancelled():
                raise errors.CancelledError("the client cancelled the call or disconnected")
            return
        check_size(message, most_bytes)
        yield message
        del message


async def _next(stream: gRPCInputStream[bytes]) -> bytes | None:
    return await anext(stream, None)


def check_size(message: bytes, most_bytes: int) -> None:
    """Raise InvalidInputError if a message is larger than the limit, which Ray does not check."""
    if len(message) > most_bytes:
        raise errors.InvalidInputError(
            f"request: got {len(message)} bytes, expected at most {most_bytes} (request_mib)"
        )
