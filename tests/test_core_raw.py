"""Raw payloads are laid out and split as upb reads them, by the extension and in plain Python."""

from __future__ import annotations

from random import Random
from types import ModuleType

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from hostile import hostile_message, mutated
from layertap import _core, _pure
from layertap.inference.grpc_service_pb2 import ModelInferRequest, ModelInferResponse

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
MESSAGES = 3000
F32, F16, U8 = 1, 2, 6
RAW = 7


@cores
def test_a_built_message_is_what_upb_reads(core: ModuleType) -> None:
    """Strided, cast and empty tensors follow the head in order, with the predicted size."""
    head = ModelInferResponse(model_name="net", id="7").SerializeToString()
    wide = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    tensors = [(F16, (4, 2, 3)), (U8, (0,)), (U8, (300,))]
    layout = core.raw_layout(tensors, field=6, head_size=len(head))
    builder = core.ReplyBuilder(layout)
    builder.write(0, wide, F32)
    builder.write(1, np.empty(0, np.uint8), U8)
    builder.write(2, np.full(300, 9, np.uint8), U8)
    message = builder.finish(head)
    assert (len(message), len(layout)) == (layout.nbytes, 3)
    response = ModelInferResponse.FromString(message)
    assert (response.model_name, response.id) == ("net", "7")
    half, nothing, bytes_ = response.raw_output_contents
    assert half == wide.astype(np.float16).tobytes()
    assert (nothing, bytes_) == (b"", b"\x09" * 300)


@cores
@pytest.mark.parametrize(
    ("tensor", "field", "head_size", "match"),
    [
        ((0, (1,)), 1, 0, "dtype: got 0"),
        ((U8, (1,) * 33), 1, 0, "rank 33"),
        ((U8, (-1,)), 1, 0, "negative"),
        ((F32, (1 << 62,)), 1, 0, "overflow"),
        ((U8, ((1 << 31) - 1,)), 1, 0, "larger than"),
        ((U8, (1,)), 1, 1 << 31, "head_size"),
        ((U8, (1,)), 0, 0, "field"),
    ],
)
def test_impossible_layouts_are_refused(
    core: ModuleType, tensor: tuple, field: int, head_size: int, match: str
) -> None:
    """What no message can contain is refused before anything is allocated."""
    with pytest.raises(ValueError, match=match):
        core.raw_layout([tensor], field=field, head_size=head_size)


@cores
def test_split_returns_views(core: ModuleType) -> None:
    """Payloads are views of the received bytes; everything else is returned in order."""
    request = ModelInferRequest(model_name="net", raw_input_contents=[b"abc", b"", b"defg"])
    message = request.SerializeToString() + b"\x1a\x01x"
    rest, payloads = core.split(message, field=RAW, most=3)
    assert [bytes(payload) for payload in payloads] == [b"abc", b"", b"defg"]
    assert all(payload.obj is message and payload.readonly for payload in payloads)
    assert ModelInferRequest.FromString(rest) == ModelInferRequest(model_name="net", id="x")


@cores
def test_too_many_payloads_are_refused(core: ModuleType) -> None:
    """A hostile list of empty payloads ends at the limit, whatever follows."""
    with pytest.raises(ValueError, match="more than 2 of field 7"):
        core.split(b"\x3a\x00" * 3, field=RAW, most=2)
    with pytest.raises(ValueError, match="most: got -1"):
        core.split(b"", field=RAW, most=-1)
    with pytest.raises(TypeError):
        core.split("text", field=RAW, most=1)


@cores
def test_lists_that_would_cost_a_parser_dearly_are_refused(core: ModuleType) -> None:
    """Submessages of two bytes take a hundred bytes of memory each, so their number is limited."""
    assert core.split(b"\x2a\x00" * 65_536, field=RAW, most=1)[1] == []
    with pytest.raises(ValueError, match="more than 65536 fields"):
        core.split(b"\x2a\x00" * 65_537, field=RAW, most=1)


def test_hostile_messages_are_read_as_upb_reads_them() -> None:
    """What upb refuses is refused; what it accepts is split into the same fields and bytes."""
    random = Random(5)
    seed = ModelInferRequest(
        model_name="net", inputs=[ModelInferRequest.InferInputTensor(shape=[1, 2])]
    ).SerializeToString()
    refused = 0
    for number in range(MESSAGES):
        # Field 15 of the generator is made field 7, so that payloads are met.
        message = hostile_message(random).replace(b"\x7a", b"\x3a")
        if number % 3 == 0:
            message = mutated(random, seed + b"\x3a\x02ab" + message)
        expected = read_by_upb(message)
        refused += expected is None
        for core in (_core, _pure):
            assert read_split(core, message) == expected, message
    assert MESSAGES / 20 < refused < MESSAGES * 19 / 20


def read_by_upb(message: bytes) -> ModelInferRequest | None:
    try:
        return ModelInferRequest.FromString(message)
    except DecodeError:
        return None


def read_split(core: ModuleType, message: bytes) -> ModelInferRequest | None:
    try:
        rest, payloads = core.split(message, field=RAW, most=1000)
        request = ModelInferRequest.FromString(rest)
    except (ValueError, DecodeError):
        return None
    request.raw_input_contents.extend(map(bytes, payloads))
    return request
