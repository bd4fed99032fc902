"""The services in Ray's gRPC proxies. It runs in each proxy, without PyTorch.

Note [What a proxy changes]
    Ray's proxy hands a call's message and metadata to a replica, and the replica's reply, status
    and trailing metadata back. Messages pass as bytes, without being parsed. Ray does not hand on
    the deadline, so it travels as metadata. A replica reports its errors itself, always with
    ``layertap-error``; any other error is Ray's own. Ray calls it INTERNAL if a replica died, and
    quotes Ray's exception, with names of its processes. Here such a call ends with UNAVAILABLE, as
    it does without a proxy. It has no ``layertap-error``, by which clients see that the call may
    have been begun, and that it is for them to decide whether to repeat it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc

from layertap.errors import LayertapError, OverloadedError, UnavailableError
from layertap.grpc_health import health_pb2
from layertap.services.caller import REQUEST_ID_KEY, request_id_from
from layertap.services.grpc_adapter.statuses import error_metadata
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import ERROR_METADATA_KEY, REPLY_COMPRESSION_KEY

__all__ = ["FEATURES", "HEALTH", "TIME_LEFT_KEY", "add_to_server"]

# Ray's own logger, so that its files have these records too.
_log = logging.getLogger("ray.serve")

_FEATURES = feature_service_pb2.DESCRIPTOR.services_by_name["FeatureService"]
FEATURES = _FEATURES.full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

TIME_LEFT_KEY = "layertap-time-left"
"""The metadata with the seconds that a call has left when it reaches the proxy."""

_SERVICES: dict[str, dict[str, bool]] = {
    FEATURES: {each.name: each.server_streaming for each in _FEATURES.methods},
    # Without Watch, which would occupy a replica for as long as the client likes.
    HEALTH: {"Check": False},
}
"""The services; each method with whether it is a stream in both directions."""

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

_Metadata = Sequence[tuple[str, Any]]
_Unary = Callable[[bytes, Any], Awaitable[bytes]]
_Stream = Callable[[Any, Any], AsyncIterator[bytes]]


def add_to_server(servicer: object, server: Any) -> None:
    """Add the services to a gRPC proxy: an entry of Ray Serve's ``grpc_servicer_functions``.

    Args:
        servicer: Ignored; Ray gives an object without use.
        server: The proxy's server.
    """
    for name, methods in _SERVICES.items():
        server.add_generic_rpc_handlers((_Handlers(name, methods),))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # gRPC has no types
    """The handlers of a service, which Ray replaces by its own; they are wrapped here.

    Ray reads and replaces ``_method_handlers``, the attribute of gRPC's own class for this.
    """

    def __init__(self, service: str, methods: Mapping[str, bool]) -> None:
        self._method_handlers: dict[str, grpc.RpcMethodHandler] = {
            f"/{service}/{name}": grpc.stream_stream_rpc_method_handler(_replaced)
            if is_stream
            else grpc.unary_unary_rpc_method_handler(_replaced)
            for name, is_stream in methods.items()
        }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method; None if it is another service's."""
        method = handler_call_details.method
        handler = self._method_handlers.get(method)
        if handler is None:
            return None
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream, method))
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, method))


def _replaced(message: object, context: object) -> bytes:
    raise AssertionError("Ray replaces this")


def _unary(inner: _Unary, method: str) -> _Unary:
    """Wrap Ray's handler of a unary method."""

    async def handle(message: bytes, context: Any) -> bytes:
        reply = await inner(message, _Context(context))
        _restate(method, context)
        if any(key == REPLY_COMPRESSION_KEY for key, _ in _metadata(context)):
            # With the initial metadata, gRPC's asyncio server says how it compresses. If it sends
            # them together with a unary reply, as it does otherwise, it leaves that out.
            await context.send_initial_metadata(())
        return reply

    return handle


def _stream(inner: _Stream, method: str) -> _Stream:
    """Wrap Ray's handler of a stream."""

    async def handle(messages: Any, context: Any) -> AsyncIterator[bytes]:
        async for reply in inner(messages, _Context(context)):
            # The message with which a replica reports an error has the status only.
            if not _code(context):
                yield reply
        _restate(method, context)

    return handle


class _Context:
    """gRPC's context as Ray is given it.

    It has one more entry of metadata: the time that the call has left. Ray sets the compression
    with each message of a stream, and gRPC accepts it with the first only, so the others are left
    out here.

    Args:
        context: gRPC's own context.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._compression: grpc.Compression | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> _Metadata:
        """Return the metadata of the call."""
        metadata = _metadata(self._context)
        left = self._context.time_remaining()
        return metadata if left is None else (*metadata, (TIME_LEFT_KEY, repr(left)))

    def set_compression(self, compression: grpc.Compression) -> None:
        """Have the messages of the call compressed."""
        if self._compression is None:
            self._compression = compression
            self._context.set_compression(compression)


def _metadata(context: Any) -> _Metadata:
    return tuple((key, value) for key, value in context.invocation_metadata() or ())


def _code(context: Any) -> int:
    """Return the number of the status that is set; 0 for none or OK."""
    code = context.code() or 0
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code)


def _restate(method: str, context: Any) -> None:
    """Set the status that a call without a proxy would have, if it ended with an error of Ray's."""
    code = _CODES[_code(context)]
    ours = any(key == ERROR_METADATA_KEY for key, _ in context.trailing_metadata() or ())
    if code is grpc.StatusCode.OK or ours:
        return
    request_id = request_id_from(
        value for key, value in _metadata(context) if key == REQUEST_ID_KEY
    )
    _log.warning("request %s: %s from Ray: %s", request_id, code.name, context.details())
    metadata: _Metadata = ((REQUEST_ID_KEY, request_id),)
    if code is grpc.StatusCode.INTERNAL:
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(
            f"the replica that had the request was lost; see the log for request {request_id}"
        )
    elif error := _equal(code, method, _text(context.details())):
        if isinstance(error, UnavailableError):
            context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(str(error))
        metadata = error_metadata(error, request_id)
    context.set_trailing_metadata(metadata)


def _equal(code: grpc.StatusCode, method: str, text: str) -> LayertapError | None:
    """Return the error of layertap that means the same; None if there is none."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadedError(f"queue full: {text}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(text)
    if code is grpc.StatusCode.NOT_FOUND and method.startswith(f"/{HEALTH}/"):
        # The application may still be starting, so a client that waits for it should keep waiting.
        return UnavailableError(text)
    return None


def _text(details: str | bytes | None) -> str:
    return details.decode("utf-8", "replace") if isinstance(details, bytes) else details or ""
