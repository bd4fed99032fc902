"""Server reflection, for tools that call the services without .proto files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.descriptors import POOL
from layertap.grpc_reflection import reflection_pb2 as pb
from layertap.grpc_reflection import reflection_v1alpha_pb2
from layertap.services.bounded_calls import BoundedCalls
from layertap.services.grpc_adapter.handlers import aborting

__all__ = ["REFLECTIONS", "Reflection"]

REFLECTIONS = 16
"""Maximum number of open calls. A call takes milliseconds, unless its caller leaves it open."""

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name["ServerReflection"].full_name
    for module in (pb, reflection_v1alpha_pb2)
)


class Reflection:
    """Serves ``grpc.reflection.v1`` and ``v1alpha``, whose messages have the same encoding.

    The number of open calls is bounded, because each keeps one of the server's threads.

    Args:
        service_names: The full names of the server's other services.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = sorted({*service_names, *_SERVICES})
        self._open = BoundedCalls(REFLECTIONS, "calls ask for reflection")

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Return the handlers of both services."""
        method = grpc.stream_stream_rpc_method_handler(
            self.describe, response_serializer=pb.ServerReflectionResponse.SerializeToString
        )
        return tuple(
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
            for name in _SERVICES
        )

    def describe(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerReflectionResponse]:
        """Answer each request of a call."""
        with self._open.opened(aborting(context)):
            for message in messages:
                try:
                    request = pb.ServerReflectionRequest.FromString(message)
                except ProtobufDecodeError:
                    text = "request: got bytes that are not a valid ServerReflectionRequest"
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
                yield pb.ServerReflectionResponse(
                    valid_host=request.host, original_request=request, **self._answer(request)
                )

    def _answer(self, request: pb.ServerReflectionRequest) -> dict[str, Any]:
        """Return the field of the response that answers a request."""
        kind = request.WhichOneof("message_request")
        if kind is None:
            text = "request: got none of the fields of message_request"
            return _error(grpc.StatusCode.INVALID_ARGUMENT, text)
        if kind == "list_services":
            services = [pb.ServiceResponse(name=name) for name in self._names]
            return {"list_services_response": pb.ListServiceResponse(service=services)}
        find = _FINDERS[kind]
        try:
            return find(getattr(request, kind))
        except KeyError:
            return _error(grpc.StatusCode.NOT_FOUND, f"{kind}: not found")


def _by_name(name: str) -> dict[str, Any]:
    return _files(POOL.FindFileByName(name))


def _by_symbol(name: str) -> dict[str, Any]:
    try:
        return _files(POOL.FindFileContainingSymbol(name))
    except KeyError:
        # The pool finds services but not their methods, which tools such as ghz ask for.
        return _files(POOL.FindMethodByName(name).containing_service.file)


def _by_extension(extension: pb.ExtensionRequest) -> dict[str, Any]:
    extended = POOL.FindMessageTypeByName(extension.containing_type)
    found = POOL.FindExtensionByNumber(extended, extension.extension_number)
    return _files(POOL.FindFileContainingSymbol(found.full_name))


def _extension_numbers(name: str) -> dict[str, Any]:
    numbers = [each.number for each in POOL.FindAllExtensions(POOL.FindMessageTypeByName(name))]
    response = pb.ExtensionNumberResponse(base_type_name=name, extension_number=sorted(numbers))
    return {"all_extension_numbers_response": response}


_FINDERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "file_by_filename": _by_name,
    "file_containing_symbol": _by_symbol,
    "file_containing_extension": _by_extension,
    "all_extension_numbers_of_type": _extension_numbers,
}


def _files(file: FileDescriptor) -> dict[str, Any]:
    """Return the answer with a file and everything that it imports, each once."""
    needed: dict[str, bytes] = {}

    def add(each: FileDescriptor) -> None:
        if each.name not in needed:
            needed[each.name] = each.serialized_pb
            for imported in each.dependencies:
                add(imported)

    add(file)
    response = pb.FileDescriptorResponse(file_descriptor_proto=list(needed.values()))
    return {"file_descriptor_response": response}


def _error(code: grpc.StatusCode, text: str) -> dict[str, Any]:
    return {"error_response": pb.ErrorResponse(error_code=code.value[0], error_message=text)}
