"""The fuzzers' one check: layertap reads a message like upb, or says which rule it breaks.

upb is the parser behind Python's protobuf. What it refuses, layertap refuses. What it accepts,
layertap reads as the same names, dtypes, shapes and bytes, unless a tensor breaks a rule of
layertap's own; then it is refused for exactly that rule. Both decoders are held to it, the
extension and its plain-Python twin, by way of the functions that server and client call.

Behind those functions stands upb itself, which reads the rest of a message and refuses what decode
let through at the top level. So the twins are compared on their own as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap import _core, _pure
from layertap.client.features import Features
from layertap.errors import DecodeError, InvalidInputError
from layertap.v1.catalogue_pb2 import Extractor
from layertap.v1.feature_service_pb2 import ExtractRequest, ExtractResponse
from layertap.v1.tensor_pb2 import DATA_TYPE_BOOL, Tensor
from layertap.wire import codec
from layertap.wire.dtypes import DTYPES, by_number
from layertap.wire.messages import MAX_INPUTS, decode_reply, decode_request
from layertap.wire.tensors import SharedTensor, TensorView

CORES = {"core": _core, "pure": _pure}
KINDS = (ExtractRequest, ExtractResponse)

MALFORMED = "malformed"

ITEMSIZE = {row.number: row.itemsize for row in DTYPES}


class Found(NamedTuple):
    """A tensor: name, the dtype's number, sizes and elements, or their place in shared memory."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    data: bytes | tuple[int, ...]


class Reading(NamedTuple):
    """The content of a message: its other fields, serialized again, and its tensors."""

    rest: bytes
    tensors: list[Found]


def check(message: bytes) -> None:
    """Raise AssertionError if the decoders and upb disagree about a message of either kind."""
    for kind in KINDS:
        expected = by_upb(message, kind)
        decoded = []
        for name, core in CORES.items():
            with decoding_by(core) as record:
                got = by_layertap(message, kind)
            assert agree(got, expected), f"{kind.__name__}, {name}: {got!r}, upb: {expected!r}"
            decoded.append(record.decoded)
        assert decoded[0] == decoded[1], (
            f"{kind.__name__}: {decoded[0]!r}, its twin: {decoded[1]!r}"
        )
    check_features(message)


def agree(got: Reading | str, expected: Reading | str) -> bool:
    """Compare what was read or refused; the texts about malformed bytes are not compared."""
    return isinstance(got, str) if expected == MALFORMED else got == expected


def by_upb(message: bytes, kind: type) -> Reading | str:
    """Return what upb reads; the refusal's text if layertap has to refuse the message."""
    parsed = kind()
    try:
        parsed.ParseFromString(message)
    except ProtobufDecodeError:
        return MALFORMED
    tensors = list(parsed.tensors if kind is ExtractResponse else parsed.inputs)
    if kind is ExtractRequest and len(tensors) > MAX_INPUTS:
        return f"message: more than {MAX_INPUTS} tensors"
    for tensor in tensors:
        if rule := broken_rule(tensor):
            return rule
    found = [Found(t.name, t.dtype, tuple(t.shape), _elements(t)) for t in tensors]
    return Reading(_rest(parsed), found)


def broken_rule(tensor: Tensor) -> str:
    """Return how layertap refuses a tensor that upb accepts; empty if it doesn't."""
    itemsize = ITEMSIZE.get(tensor.dtype)
    if itemsize is None:
        return f"tensor: dtype: got {tensor.dtype}, not a DataType"
    if len(tensor.shape) > 32:
        return f"tensor: shape: got rank {len(tensor.shape)}, expected at most 32"
    product = itemsize
    for size in tensor.shape:
        product *= size or 1
    if min(tensor.shape, default=0) < 0 or product >= 1 << 63:
        return "tensor: shape: got a negative size or one that overflows"
    return _broken_rule_of_elements(tensor, 0 if 0 in tensor.shape else product)


def _broken_rule_of_elements(tensor: Tensor, expected: int) -> str:
    if tensor.HasField("shared"):
        if tensor.data:
            return "tensor: got both data and shared"
        got = tensor.shared.size
        return f"tensor: shared: got {got} bytes, expected {expected}" if got != expected else ""
    if len(tensor.data) != expected:
        return f"tensor: data: got {len(tensor.data)} bytes, expected {expected}"
    if tensor.dtype == DATA_TYPE_BOOL and (strays := tensor.data.strip(b"\0\1")):
        at = tensor.data.index(strays[:1])
        return (
            f"tensor: data: got byte {strays[0]} at position {at} of a bool tensor, expected 0 or 1"
        )
    return ""


def _elements(tensor: Tensor) -> bytes | tuple[int, ...]:
    if not tensor.HasField("shared"):
        return tensor.data
    at = tensor.shared
    return at.region, at.generation, at.offset, at.size


def by_layertap(message: bytes, kind: type) -> Reading | str:
    """Return what server or client read; the text of a DecodeError."""
    try:
        parsed, views = _decode(message, kind)
    except DecodeError as error:
        return str(error)
    return Reading(_rest(parsed), [_found(view) for view in views])


class Record:
    """A core's ``decode`` that keeps its last result: None for a refusal."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        self.decoded: Reading | None = None

    def decode(self, message: bytes, **arguments: Any) -> Any:
        self.decoded = None
        rest, found = self.core.decode(message, **arguments)
        self.decoded = Reading(
            rest,
            [
                Found(*fields, data if isinstance(data, tuple) else bytes(data))
                for *fields, data in found
            ],
        )
        return rest, found


@contextmanager
def decoding_by(core: ModuleType) -> Iterator[Record]:
    """Let the codec use one of its two implementations."""
    before, record = codec.decode, Record(core)
    codec.decode = record.decode
    try:
        yield record
    finally:
        codec.decode = before


def _decode(message: bytes, kind: type) -> tuple[Any, list[TensorView | SharedTensor]]:
    if kind is ExtractResponse:
        response, tensors = decode_reply(message, find=lambda shared: shared)  # type: ignore
        return response, list(tensors)
    return decode_request(message)


def _found(view: TensorView | SharedTensor) -> Found:
    """Check a view's array, and return the tensor."""
    if isinstance(view, SharedTensor):
        return Found(view.name, view.dtype.number, view.shape, tuple(view.at))
    array = view.array()
    assert (array.shape, array.dtype) == (view.shape, view.dtype.numpy)
    assert not array.flags.writeable
    assert array.tobytes() == view.data
    return Found(view.name, view.dtype.number, view.shape, bytes(view.data))


def _rest(parsed: Any) -> bytes:
    """Return a message without its tensors, unknown fields included."""
    parsed.ClearField("tensors" if isinstance(parsed, ExtractResponse) else "inputs")
    serialized: bytes = parsed.SerializeToString(deterministic=True)
    return serialized


def check_features(message: bytes) -> None:
    """Raise AssertionError if the client's Features differ from what upb reads in a reply."""
    expected = by_upb(message, ExtractResponse)
    try:
        features = Features(message)
    except DecodeError:
        # What stands in shared memory is refused by who did not ask for it.
        assert isinstance(expected, str) or any(
            isinstance(tensor.data, tuple) for tensor in expected.tensors
        )
        return
    except InvalidInputError:
        number = ExtractResponse.FromString(message).extractor
        assert number not in Extractor.values()
        return
    assert isinstance(expected, Reading)
    named = {tensor.name: tensor for tensor in expected.tensors}
    assert list(features) == list(named)
    for name, tensor in named.items():
        assert features[name].dtype == by_number(tensor.dtype).numpy
        assert (features[name].shape, features[name].tobytes()) == (tensor.shape, tensor.data)
    timings = ExtractResponse.FromString(message).timings
    for part in ("prepare_ns", "queue_ns", "compute_ns", "total_ns"):
        assert getattr(features.timings, part) == getattr(timings, part)
