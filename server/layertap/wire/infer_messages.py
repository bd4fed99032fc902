"""The messages of the Open Inference Protocol that carry tensors.

Their payloads are repeated bytes fields of the message, which the codec reads and writes in place.
Everything else goes through the ordinary protobuf code.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError
from layertap.inference import grpc_service_pb2 as pb
from layertap.wire import codec

__all__ = ["MAX_INPUTS", "decode_infer_request", "encode_infer_error"]

MAX_INPUTS = 64
"""Maximum number of inputs in a request; more are a mistake or an attack."""

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_MOST_FIELDS = 1 << 16
# The paths of fields that a message may repeat without limit.
_INPUT_PATH = (
    pb.ModelInferRequest.INPUTS_FIELD_NUMBER,
    pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER,
    pb.InferTensorContents.BYTES_CONTENTS_FIELD_NUMBER,
)
_OUTPUT_PATH = (
    pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER,
    pb.ModelInferRequest.InferRequestedOutputTensor.PARAMETERS_FIELD_NUMBER,
)


def decode_infer_request(message: bytes) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """Split a ModelInferRequest into its small fields and views of its raw inputs.

    Raises:
        DecodeError: If the bytes are not a well-formed request.
    """
    request = pb.ModelInferRequest()
    try:
        rest, raw = codec.split(message, field=_RAW_INPUT, most=MAX_INPUTS)
        _check_inner_fields(rest)
        request.ParseFromString(rest)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are not a valid ModelInferRequest") from None
    return request, raw


def _check_inner_fields(rest: bytes) -> None:
    """Raise ValueError if inputs or outputs contain more fields than a message may have.

    Each field takes two bytes of the message but a hundred bytes in the parser. Submessages of one
    kind are joined and counted as one, because joined messages are a valid message.
    """
    if len(rest) <= 2 * _MOST_FIELDS:  # The case for all but hostile requests and typed inputs.
        return
    for path in (_INPUT_PATH, _OUTPUT_PATH):
        inner = rest
        for number in path:
            _, found = codec.split(inner, field=number, most=_MOST_FIELDS)
            inner = b"".join(found)


def encode_infer_error(request_id: str, text: str) -> bytes:
    """Return the reply to a failed item of a stream."""
    return pb.ModelStreamInferResponse(
        error_message=text, infer_response=pb.ModelInferResponse(id=request_id)
    ).SerializeToString()
