"""Converts the methods of a service to handlers for gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from layertap import errors
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.error_codes import code_of
from layertap.services.grpc_adapter.caller import caller_of
from layertap.services.grpc_adapter.compression import compress_replies
from layertap.services.grpc_adapter.statuses import STATUS, error_metadata
from layertap.services.methods import Handler, Methods, StreamHandler, UnaryMethod
from layertap.services.public_errors import public_error

__all__ = ["aborting", "refusing", "service", "stream", "unary"]


def service(name: str, methods: Methods) -> grpc.GenericRpcHandler:
    """Return a service's handlers for ``grpc.Server.add_generic_rpc_handlers``.

    Args:
        name: The full name of the service.
        methods: Its methods by name.
    """
    handlers = {
        key: unary(method.handler, to_owner=method.to_owner)
        if isinstance(method, UnaryMethod)
        else stream(method.handler)
        for key, method in methods.items()
    }
    return grpc.method_handlers_generic_handler(name, handlers)


def unary(handler: Handler, *, to_owner: bool = False) -> grpc.RpcMethodHandler:
    """Return a handler for gRPC that converts each exception to a status.

    Args:
        handler: Answers the calls.
        to_owner: Whether callers may read about the operator's files (``public_error``).
    """
    return grpc.unary_unary_rpc_method_handler(_guarded(handler, to_owner=to_owner))


def refusing(handler: Callable[[Caller], NoReturn]) -> Callable[..., bytes]:
    """Return a behaviour for gRPC that refuses a call of any kind.

    Use it as the behaviour of a stream (``grpc.stream_stream_rpc_method_handler``), because gRPC
    calls that before it reads a message. The message of a unary call may have hundreds of MiB.

    Args:
        handler: Raises the reason.
    """
    return _guarded(lambda message, caller: handler(caller))


def stream(handler: StreamHandler) -> grpc.RpcMethodHandler:
    """Return a stream's handler for gRPC that converts each exception to a status."""

    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        caller = caller_of(context)
        try:
            compress_replies(context)
            yield from handler(_received(messages), caller)
        except Exception as error:  # noqa: BLE001 - as for unary calls
            _abort(context, public_error(error), caller)

    return grpc.stream_stream_rpc_method_handler(handle)


def aborting(context: grpc.ServicerContext) -> Callable[[str], object]:
    """Return a function that ends an RPC with RESOURCE_EXHAUSTED; for handlers without a guard."""
    return lambda text: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)


def _guarded(handler: Handler, *, to_owner: bool = False) -> Callable[..., bytes]:
    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        caller = caller_of(context)
        try:
            compress_replies(context)
            answer = handler(message, caller)
        except Exception as error:  # noqa: BLE001 - the last line of defence; it is logged in full
            _abort(context, public_error(error, to_owner=to_owner), caller)
        return answer if isinstance(answer, bytes) else _sent(answer, context)

    return handle


def _sent(answer: Answer, context: grpc.ServicerContext) -> bytes:
    """Return the message of a reply, and release its bytes once the RPC has ended.

    If the client reads slowly, that is later than the end of the handler.
    """
    # If this is False, the RPC has already ended, and gRPC will not call the callback.
    if not context.add_callback(answer.release):
        answer.release()
    return answer.message


def _received(messages: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from messages
    except grpc.RpcError:
        raise errors.CancelledError("the client cancelled the call or disconnected") from None


def _abort(context: grpc.ServicerContext, error: errors.LayertapError, caller: Caller) -> NoReturn:
    context.set_trailing_metadata(error_metadata(error, caller.request_id))
    context.abort(STATUS[code_of(error)], str(error))
    raise AssertionError("abort always raises")
