"""The form of replies in the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from layertap.engine.reply_form import NamedTensor, ReplyBuilder
from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb
from layertap.selection import Extractor
from layertap.shm.client_regions import RegionSlice
from layertap.timings import Timings
from layertap.wire import codec
from layertap.wire.dtypes import by_number

__all__ = ["MODEL_VERSION", "InferForm", "ReplyOptions"]

MODEL_VERSION = "1"
"""The version of every model in this protocol."""

_RAW_OUTPUT = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
# The tag of ModelStreamInferResponse.infer_response.
_RESPONSE_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | 2])
_UINT8 = 6
_NOTHING = np.empty(0, np.uint8)
_NS_PER_MS = 1e-6


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What a request determines about its reply.

    Attributes:
        model: The model's name.
        request_id: The request's id.
        regions: The shared-memory regions for outputs that are not sent in the message, by output
            name.
        streamed: Whether the request is an item of a stream.
    """

    model: str
    request_id: str = ""
    regions: Mapping[str, RegionSlice] = field(default_factory=dict)
    streamed: bool = False


class InferForm:
    """The form of ``inference.ModelInferResponse``, a ``layertap.engine.reply_form.ReplyForm``.

    Args:
        extractor: The extractor that serves the request.
        variant: How its program is finished; empty for the usual way.
        options: What the request determines about the reply.
    """

    def __init__(self, extractor: Extractor, variant: str = "", *, options: ReplyOptions) -> None:
        self._options = options
        self._parameters = {"extractor": pb.InferParameter(string_param=extractor.value)}
        if variant:
            self._parameters["variant"] = pb.InferParameter(string_param=variant)
        if options.streamed:
            self._parameters["triton_final_response"] = pb.InferParameter(bool_param=True)
        self._outputs: list[pb.ModelInferResponse.InferOutputTensor] = []
        self._tensors: Sequence[NamedTensor] = ()
        self._opening = b""
        self._laid_out: codec.ReplyLayout

    @property
    def shared_bytes(self) -> int:
        """See ``ReplyForm``."""
        return sum(
            _nbytes(tensor) for tensor in self._tensors if tensor[0] in self._options.regions
        )

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """See ``ReplyForm``."""
        regions = self._options.regions
        self._tensors = tensors
        self._outputs = [_metadata(tensor, regions.get(tensor[0])) for tensor in tensors]
        raw = [
            (_UINT8, (0,)) if name in regions else (dtype, shape) for name, dtype, shape in tensors
        ]
        head = len(self._response(Timings()))
        layout = codec.raw_layout(raw, field=_RAW_OUTPUT, head_size=head)
        if self._options.streamed:
            self._opening = _RESPONSE_TAG + _varint(layout.nbytes)
            layout = codec.raw_layout(raw, field=_RAW_OUTPUT, head_size=len(self._opening) + head)
        self._laid_out = layout
        return layout.nbytes

    def builder(self, admit: Callable[[int], object]) -> ReplyBuilder[bytes]:
        """See ``ReplyForm``."""
        # Values for shared memory may first be cast into a buffer besides the message.
        admit(self._laid_out.nbytes + self.shared_bytes)
        builder = codec.ReplyBuilder(self._laid_out)
        if not self._options.regions:
            return builder
        return _Scattered(builder, self._tensors, self._options.regions)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return self._opening + self._response(timings)

    def nbytes(self, payload: bytes) -> int:
        """See ``ReplyForm``."""
        return len(payload)

    def _response(self, timings: Timings) -> bytes:
        """Return the response without payloads. Its size is fixed, as its numbers are doubles."""
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
            model_name=self._options.model,
            model_version=MODEL_VERSION,
            id=self._options.request_id,
            parameters={**self._parameters, **numbers},
            outputs=self._outputs,
        ).SerializeToString()


class _Scattered:
    """Writes tensors to the message, or to shared memory with an empty payload in the message."""

    def __init__(
        self,
        builder: codec.ReplyBuilder,
        tensors: Sequence[NamedTensor],
        regions: Mapping[str, RegionSlice],
    ) -> None:
        self._builder = builder
        self._targets = [(dtype, regions.get(name)) for name, dtype, _ in tensors]
        # The text instead of the error, whose traceback would refer to this object.
        self._failure = ""

    def write(self, index: int, array: np.ndarray, dtype: int) -> None:
        """See ``ReplyBuilder``."""
        target, place = self._targets[index]
        if place is None:
            self._builder.write(index, array, dtype)
            return
        self._builder.write(index, _NOTHING, _UINT8)
        try:
            place.write(_dense(array, dtype, target))
        except InvalidInputError as error:
            # Raised in ``finish``: raised here, it would pass through the model's own code.
            self._failure = str(error)

    def finish(self, head: bytes) -> bytes:
        """See ``ReplyBuilder``."""
        if self._failure:
            raise InvalidInputError(self._failure)
        return self._builder.finish(head)


def _dense(array: np.ndarray, dtype: int, target: int) -> memoryview:
    """Return an array's bytes in C order and cast; a view of its memory if no copy is needed."""
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
