"""Any bytes are answered or refused with a documented error; none causes an internal error."""

from __future__ import annotations

from random import Random

import grpc
import pytest

from hostile import mutated
from infering import batch, bytes_tensor, given, output, parameters, raw_request
from layertap.inference import grpc_service_pb2 as pb

Code = grpc.StatusCode
MESSAGES = 800
# What a request can be refused with; never INTERNAL or UNKNOWN.
REFUSALS = {
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.OUT_OF_RANGE,
    Code.DEADLINE_EXCEEDED,
    Code.UNAVAILABLE,
}


def seeds() -> list[bytes]:
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 9, "shared_memory_offset": 1}
    typed = pb.InferTensorContents(fp32_contents=batch().ravel()[:48])
    requests = [
        raw_request(None, output("layer1", reduction="flatten", dtype="FP16"), id="x"),
        raw_request(
            inputs=[given("input", "FP32", [1, 3, 4, 4], contents=typed)],
            raw_input_contents=[],
            parameters=parameters({"timeout": 10**7, "extractor": "fx", "sequence_id": 0}),
        ),
        raw_request(
            inputs=[given("images", "BYTES", [2])], raw_input_contents=[bytes_tensor(b"a", b"bc")]
        ),
        raw_request(
            None,
            output("fc", **place),
            inputs=[given("input", "BF16", [1, 3, 16, 16], parameters=parameters(place))],
        ),
    ]
    return [request.SerializeToString() for request in requests]


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_mutated_requests_are_answered_or_refused(channel, method: str) -> None:
    """Valid requests with changes at any depth are answered, or refused with a reason."""
    random = Random(11)
    good = seeds()
    messages = [mutated(random, random.choice(good)) for _ in range(MESSAGES)]
    name = f"/inference.GRPCInferenceService/{method}"
    if method == "ModelStreamInfer":
        replies = list(
            channel.stream_stream(name, None, pb.ModelStreamInferResponse.FromString)(
                iter(messages), timeout=100
            )
        )
        assert len(replies) == MESSAGES
        assert not [reply for reply in replies if "internal error" in reply.error_message]
        return
    call = channel.unary_unary(name)
    seen = {ending(call, message): message for message in messages}
    assert {code: seen[code] for code in seen.keys() - REFUSALS - {Code.OK}} == {}
    assert {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND} <= seen.keys()


@pytest.mark.parametrize(
    ("method", "message", "match"),
    [
        ("ModelInfer", b"\x2a\x80\x80\x40" + b"\x22\x00" * (1 << 19), "more than 65536 fields"),
        (
            "TraceSetting",
            b"\x0a\x00" * (1 << 19) + b"\x0a\x00",
            "expected a TraceSettingRequest of",
        ),
        ("LogSettings", b"\x0a\x00" * (1 << 20), "of at most 1048576"),
    ],
    ids=["infer", "traces", "logs"],
)
def test_many_small_fields_are_refused_before_they_are_parsed(
    channel, method: str, message: bytes, match: str
) -> None:
    """A request that would take the parser many times its bytes of memory is refused."""
    with pytest.raises(grpc.RpcError, match=match) as refusal:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(message, timeout=30)
    assert refusal.value.code() is Code.INVALID_ARGUMENT


def ending(call: grpc.UnaryUnaryMultiCallable, message: bytes) -> Code:
    """Return the status with which a call ends."""
    try:
        call(message, timeout=30)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK
