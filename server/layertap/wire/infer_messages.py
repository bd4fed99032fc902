"""The messages of the Open Inference Protocol that carry tensors, and the form of its replies.

Their payloads are repeated bytes of the message itself, which the extension reads and writes in
place; all else goes through the ordinary protobuf code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError, InvalidInputError
from layertap.inference import grpc_service_pb2 as pb
from layertap.selection import Extractor
from layertap.wire import codec
from layertap.wire.client_regions import RegionSlice
from layertap.wire.dtypes import by_number
from layertap.wire.messages import Timings
from layertap.wire.reply_form import Builder, NamedTensor

__all__ = ["MODEL_VERSION", "InferForm", "Wanted", "decode_infer_request", "encode_stream_error"]

MODEL_VERSION = "1"
"""The version that every model has in this protocol."""

MAX_RAW_INPUTS = 64
"""No model takes more than one; more than a few are somebody's mistake or worse."""

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUT = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_MOST_FIELDS = 1 << 16
# Ways to the fields that occur any number of times.
_INPUT_PATH = (
    pb.ModelInferRequest.INPUTS_FIELD_NUMBER,
    pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER,
    pb.InferTensorContents.BYTES_CONTENTS_FIELD_NUMBER,
)
_OUTPUT_PATH = (
    pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER,
    pb.ModelInferRequest.InferRequestedOutputTensor.PARAMETERS_FIELD_NUMBER,
)
# The tag of ModelStreamInferResponse.infer_response.
_RESPONSE_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | 2])
_UINT8 = 6
_NOTHING = np.empty(0, np.uint8)
_NS_PER_MS = 1e-6


def decode_infer_request(message: bytes, request: pb.ModelInferRequest) -> list[memoryview]:
    """Split a ModelInferRequest into its small fields and views of its raw inputs.

    Args:
        message: The whole message.
        request: Is given the small fields.

    Raises:
        DecodeError: For bytes that are no well-formed request.
    """
    try:
        rest, raw = codec.split(message, field=_RAW_INPUT, most=MAX_RAW_INPUTS)
        _check_inner_fields(rest)
        request.ParseFromString(rest)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are no ModelInferRequest") from None
    return raw


def _check_inner_fields(rest: bytes) -> None:
    """Raise ValueError for more fields within inputs or outputs than there may be around them.

    Each takes two bytes of the message, and a hundred of the parser's memory. Several submessages
    are counted as one, since the fields of one after those of another are a message as well.
    """
    if len(rest) <= 2 * _MOST_FIELDS:  # As for all requests but hostile and typed ones.
        return
    for path in (_INPUT_PATH, _OUTPUT_PATH):
        inner = rest
        for number in path:
            _, found = codec.split(inner, field=number, most=_MOST_FIELDS)
            inner = b"".join(found)


def encode_stream_error(request_id: str, text: str) -> bytes:
    """Return the reply to an item of a stream that failed."""
    return pb.ModelStreamInferResponse(
        error_message=text, infer_response=pb.ModelInferResponse(id=request_id)
    ).SerializeToString()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reply repeats of its request.

    Attributes:
        model: The model.
        request_id: The request's id.
        places: Where outputs go that don't go into the message, by name.
        streamed: Whether it is an item of a stream.
    """

    model: str
    request_id: str = ""
    places: Mapping[str, RegionSlice] = field(default_factory=dict)
    streamed: bool = False


class InferForm:
    """The form of ``inference.ModelInferResponse``, a ``layertap.wire.reply_form.ReplyForm``.

    Args:
        extractor: Which extractor serves it.
        wanted: What it repeats of its request.
    """

    def __init__(self, extractor: Extractor, wanted: Wanted) -> None:
        self._wanted = wanted
        self._parameters = {"extractor": pb.InferParameter(string_param=extractor.value)}
        if wanted.streamed:
            self._parameters["triton_final_response"] = pb.InferParameter(bool_param=True)
        self._outputs: list[pb.ModelInferResponse.InferOutputTensor] = []
        self._tensors: Sequence[NamedTensor] = ()
        self._opening = b""

    @property
    def shared_bytes(self) -> int:
        """See ``ReplyForm``."""
        return sum(_nbytes(tensor) for tensor in self._tensors if tensor[0] in self._wanted.places)

    def lay_out(self, tensors: Sequence[NamedTensor]) -> codec.ReplyLayout:
        """See ``ReplyForm``."""
        places = self._wanted.places
        self._tensors = tensors
        self._outputs = [_metadata(tensor, places.get(tensor[0])) for tensor in tensors]
        raw = [
            (_UINT8, (0,)) if name in places else (dtype, shape) for name, dtype, shape in tensors
        ]
        head = len(self._response(Timings()))
        layout = codec.raw_layout(raw, field=_RAW_OUTPUT, head_size=head)
        if self._wanted.streamed:
            self._opening = _RESPONSE_TAG + _varint(layout.nbytes)
            layout = codec.raw_layout(raw, field=_RAW_OUTPUT, head_size=len(self._opening) + head)
        return layout

    def builder(self, layout: codec.ReplyLayout, admit: Callable[[int], object]) -> Builder:
        """See ``ReplyForm``."""
        # What goes to shared memory may have to be cast first, beside the message.
        admit(layout.nbytes + self.shared_bytes)
        builder = codec.ReplyBuilder(layout)
        if not self._wanted.places:
            return builder
        return _Scattered(builder, self._tensors, self._wanted.places)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return self._opening + self._response(timings)

    def _response(self, timings: Timings) -> bytes:
        """Return the response without payloads; of one size, as its numbers are doubles."""
        milliseconds = {
            "prepare_ms": timings.prepare_ns,
            "queue_ms": timings.queue_ns,
            "compute_ms": timings.compute_ns,
            "total_ms": timings.total_ns,
        }
        numbers = {
            name: pb.InferParameter(double_param=ns * _NS_PER_MS)
            for name, ns in milliseconds.items()
        }
        return pb.ModelInferResponse(
            model_name=self._wanted.model,
            model_version=MODEL_VERSION,
            id=self._wanted.request_id,
            parameters={**self._parameters, **numbers},
            outputs=self._outputs,
        ).SerializeToString()


class _Scattered:
    """Takes tensors, some of which go to shared memory and leave an empty payload."""

    def __init__(
        self,
        builder: codec.ReplyBuilder,
        tensors: Sequence[NamedTensor],
        places: Mapping[str, RegionSlice],
    ) -> None:
        self._builder = builder
        self._targets = [(dtype, places.get(name)) for name, dtype, _ in tensors]
        # A text, not the error, whose traceback would refer to this object.
        self._failure = ""

    def write(self, index: int, array: np.ndarray, dtype: int) -> None:
        """See ``Builder``."""
        target, place = self._targets[index]
        if place is None:
            self._builder.write(index, array, dtype)
            return
        self._builder.write(index, _NOTHING, _UINT8)
        try:
            place.write(_dense(array, dtype, target))
        except InvalidInputError as error:
            # Raised at the end: here it would cross the model's own code.
            self._failure = str(error)

    def finish(self, head: bytes) -> bytes:
        """See ``Builder``."""
        if self._failure:
            raise InvalidInputError(self._failure)
        return self._builder.finish(head)


def _dense(array: np.ndarray, dtype: int, target: int) -> memoryview:
    """Return an array's bytes in C order, cast; a view of its own memory where that has them."""
    if dtype == target and array.flags.c_contiguous:
        return memoryview(array.reshape(-1).view(np.uint8))
    layout = codec.raw_layout([(target, array.shape)], field=1, head_size=0)
    builder = codec.ReplyBuilder(layout)
    builder.write(0, array, dtype)
    size = array.size * by_number(target).itemsize
    return memoryview(builder.finish(b""))[layout.nbytes - size :]


def _metadata(
    tensor: NamedTensor, place: RegionSlice | None
) -> pb.ModelInferResponse.InferOutputTensor:
    name, dtype, shape = tensor
    output = pb.ModelInferResponse.InferOutputTensor(
        name=name, datatype=by_number(dtype).datatype, shape=shape
    )
    if place is not None:
        size = _nbytes(tensor)
        if size > place.byte_size:
            raise InvalidInputError(
                f"output {name!r}: got shared memory of {place.byte_size} bytes, expected at least "
                f"{size} for shape {list(shape)}"
            )
        output.parameters["shared_memory_region"].string_param = place.region
        output.parameters["shared_memory_byte_size"].int64_param = size
    return output


def _nbytes(tensor: NamedTensor) -> int:
    _, dtype, shape = tensor
    size = by_number(dtype).itemsize
    for length in shape:
        size *= length
    return size


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
