"""A stream's messages are Extract's with an id, and their tensors are decoded in place too."""

from __future__ import annotations

import numpy as np
import pytest

from layertap.errors import DecodeError
from layertap.selection import Extractor
from layertap.services.native_form import encode_reply_head
from layertap.timings import Timings
from layertap.v1 import feature_service_pb2 as pb
from layertap.v1 import tensor_pb2
from layertap.wire.messages import decode_reply, encode_request
from layertap.wire.stream_messages import (
    decode_stream_reply,
    decode_stream_request,
    encode_stream_error,
    id_field,
    id_of,
)
from layertap.wire.tensors import SharedSlice, encode_message

IDS = [0, 1, 127, 2**32, 2**64 - 1]


@pytest.mark.parametrize(
    ("plain", "streamed"),
    [
        (pb.ExtractRequest, pb.ExtractStreamRequest),
        (pb.ExtractResponse, pb.ExtractStreamResponse),
    ],
)
def test_extracts_fields_keep_their_numbers(plain, streamed) -> None:
    """Each field of Extract's messages is in the stream's with its number, kind and type."""
    theirs = streamed.DESCRIPTOR.fields_by_number
    for number, field in plain.DESCRIPTOR.fields_by_number.items():
        twin = theirs[number]
        assert (twin.name, twin.type, twin.is_repeated) == (
            field.name,
            field.type,
            field.is_repeated,
        )
        assert twin.message_type is field.message_type
    assert all(number >= 16 for number in set(theirs) - set(plain.DESCRIPTOR.fields_by_number))


@pytest.mark.parametrize("number", IDS)
def test_an_id_has_one_size(number) -> None:
    """The reply's layout, which is made before its id is known, is right for each id."""
    assert len(id_field(number)) == len(id_field(1))
    assert pb.ExtractStreamResponse.FromString(id_field(number)).id == number


@pytest.mark.parametrize("number", IDS)
def test_requests_come_apart_in_place(number) -> None:
    """A request's tensor is a view of its bytes, and its small fields are parsed by protobuf."""
    x = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4)
    given = pb.ExtractStreamRequest(id=number, model="m", timeout_ns=5)
    message = encode_request(given, [("x", x)])
    request, [tensor] = decode_stream_request(message)
    assert (request.id, request.model, request.timeout_ns) == (number, "m", 5)
    assert np.shares_memory(tensor.array(), np.frombuffer(message, np.uint8))
    assert np.array_equal(tensor.array(), x)
    stock = pb.ExtractStreamRequest.FromString(message)
    assert (stock.id, stock.inputs[0].name, stock.inputs[0].data) == (number, "x", x.tobytes())


def test_replies_come_apart_in_place() -> None:
    """A reply's tensors are aligned views of its bytes; it can be read as Extract's reply too."""
    x = np.arange(10_000, dtype=np.float32)
    head = encode_reply_head(Extractor.HOOK, Timings(1, 2, 3, 4)) + id_field(9)
    message = encode_message([("a", x)], field=1, head=head)
    reply, (tensor,) = decode_stream_reply(message)
    assert (reply.id, reply.HasField("error"), reply.timings.total_ns) == (9, False, 4)
    assert np.shares_memory(tensor.array(), np.frombuffer(message, np.uint8))
    plain, (same,) = decode_reply(message)
    assert plain.timings.total_ns == 4
    assert np.array_equal(same.array(), x)


def test_errors_are_replies() -> None:
    """A failed item's reply has its id, the status's number, the class and the text."""
    reply, tensors = decode_stream_reply(encode_stream_error(0, 5, "NotFoundError", "no such"))
    assert (reply.id, reply.HasField("id"), tensors) == (0, True, [])
    assert (reply.error.code, reply.error.kind, reply.error.message) == (
        5, "NotFoundError", "no such",
    )  # fmt: skip


def test_the_id_of_a_bad_tensor_can_be_read() -> None:
    """The id is read even if a tensor contradicts itself, but not from malformed bytes."""
    bad = pb.ExtractStreamRequest(id=7, inputs=[tensor_pb2.Tensor(dtype=1, shape=[2], data=b"x")])
    message = bad.SerializeToString()
    with pytest.raises(DecodeError):
        decode_stream_request(message)
    assert id_of(message) == 7
    for unreadable in (b"\xff\xff\xff", message[:-1]):
        with pytest.raises(DecodeError):
            id_of(unreadable)
    with pytest.raises(DecodeError):
        decode_stream_reply(b"\xff\xff\xff")


@pytest.mark.parametrize("list_of", ["images", "texts", "audio", "layers"])
def test_the_id_is_found_without_what_would_cost_dearly(list_of: str) -> None:
    """Fields whose number was refused are not parsed to find the id."""
    many = pb.ExtractStreamRequest(id=7).SerializeToString()
    batches = {
        "images": [pb.ImageBatch(images=[b""] * 70_000)],
        "texts": [pb.TextBatch(texts=[""] * 70_000)],
        "audio": [pb.AudioBatch(audio=[b""] * 70_000)],
        "layers": [pb.LayerSelection()] * 70_000,
    }
    many += pb.ExtractStreamRequest(**{list_of: batches[list_of]}).SerializeToString()
    with pytest.raises(DecodeError, match="more than 65536 fields"):
        decode_stream_request(many)
    if list_of == "layers":
        with pytest.raises(DecodeError, match="more than 65536 fields"):
            id_of(many)
    else:
        assert id_of(many) == 7


def test_inputs_go_by_name_and_by_place() -> None:
    """Of several inputs one is in the message and one in shared memory, each with its name."""
    ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), np.bool_)
    place = SharedSlice(3, 1 << 40, 64, mask.nbytes)
    message = encode_request(
        pb.ExtractStreamRequest(id=7), [("ids", ids), ("mask", mask)], [None, place]
    )
    request, tensors = decode_stream_request(message)
    found = {tensor.name: tensor for tensor in tensors}
    assert (request.id, sorted(found)) == (7, ["ids", "mask"])
    assert np.array_equal(found["ids"].array(), ids)
    assert (found["mask"].at, found["mask"].shape) == (place, (2, 3))
    assert found["mask"].dtype.name == "bool"
