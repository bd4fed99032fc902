"""Hostile requests of the Open Inference Protocol are refused before they are expensive."""

from __future__ import annotations

import pytest
from google.protobuf import wrappers_pb2

from layertap.errors import DecodeError
from layertap.inference import grpc_service_pb2 as pb
from layertap.wire.infer_messages import decode_infer_request, encode_infer_error


@pytest.mark.parametrize("message", [b"\x0a", b"\x2a\x02\x0a\x05", b"\x0a\x01\xff"])
def test_malformed_requests_are_refused(message: bytes) -> None:
    """Truncated fields and texts that are not UTF-8 raise DecodeError."""
    with pytest.raises(DecodeError):
        decode_infer_request(message)


def nested(*fields: int, count: int, inner: bytes) -> bytes:
    """Return ``count`` times ``inner`` in a submessage within submessages, the outermost first."""
    message = inner * count
    for field in reversed(fields):
        size = wrappers_pb2.UInt64Value(value=len(message)).SerializeToString()[1:]
        message = bytes([field << 3 | 2]) + size + message
    return message


@pytest.mark.parametrize(
    ("fields", "inner"),
    [
        ((5,), b"\x22\x00"),  # inputs, parameters
        ((5, 5), b"\x42\x00"),  # inputs, contents, bytes_contents
        ((6,), b"\x12\x00"),  # outputs, parameters
    ],
)
def test_inner_lists_that_would_cost_a_parser_dearly_are_refused(
    fields: tuple[int, ...], inner: bytes
) -> None:
    """The total number of two-byte entries inside inputs and outputs is limited too."""
    decode_infer_request(nested(*fields, count=65_536, inner=inner))
    half = nested(*fields, count=32_769, inner=inner)
    with pytest.raises(DecodeError, match="more than 65536"):
        decode_infer_request(half + half)


def test_a_failed_item_tells_its_id() -> None:
    """The reply to a failed item has the text and the id, and no outputs."""
    reply = pb.ModelStreamInferResponse.FromString(encode_infer_error("7", "no"))
    assert (reply.error_message, reply.infer_response.id) == ("no", "7")
    assert not reply.infer_response.outputs
