from __future__ import annotations

import math

import numpy as np
import pytest

from layertap.errors import DecodeError, InvalidInputError
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.dtypes import DTYPES, DType, by_name
from layertap.wire.tensors import TensorView, decode_message, encode_message

FIELD = feature_service_pb2.ExtractResponse.TENSORS_FIELD_NUMBER
HEAD = feature_service_pb2.ExtractResponse(extractor=4).SerializeToString()

rows = pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)


def sample(row: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of distinct small values, as many as the type has."""
    return (np.arange(math.prod(shape)).reshape(shape) % 100).astype(row.numpy)


def round_trip(array: np.ndarray) -> np.ndarray:
    """Encode one array and return it as decoded."""
    message = encode_message([("x", array)], FIELD, HEAD)
    rest, [view] = decode_message(message, FIELD)
    assert (rest, view.name, view.shape) == (HEAD, "x", array.shape)
    return view.array()


@rows
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (0,), (3, 0, 2)], ids=str)
def test_round_trip(row: DType, shape: tuple[int, ...]) -> None:
    """Every dtype and shape, including a scalar and an empty tensor, survives unchanged."""
    array = sample(row, shape)
    back = round_trip(array)
    assert back.dtype == row.numpy
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


@rows
def test_strided_arrays_come_back_dense(row: DType) -> None:
    """Transposed, reversed and broadcast arrays are sent in C order."""
    array = sample(row, (3, 4, 5))
    for strided in (
        array.transpose(2, 0, 1),
        array[::-1, :, ::2],
        np.broadcast_to(array, (2, 3, 4, 5)),
    ):
        back = round_trip(strided)
        assert back.flags.c_contiguous
        assert back.tobytes() == strided.tobytes()


def test_views_share_the_message() -> None:
    """A decoded array is a view of the received bytes, and can't be written to."""
    message = encode_message([("x", np.arange(6, dtype=np.float32))], FIELD, b"")
    _, [view] = decode_message(message, FIELD)
    array = view.array()
    assert view.data.obj is message
    assert np.shares_memory(array, np.frombuffer(message, np.uint8))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_own_payloads_are_aligned_to_64_bytes() -> None:
    """In a large message a decoded array begins on a 64-byte boundary, which suits vector units."""
    message = encode_message([("x", np.zeros(1 << 20)), ("y", np.zeros(1 << 20))], FIELD, HEAD)
    _, views = decode_message(message, FIELD)
    start = np.frombuffer(message, np.uint8).ctypes.data
    for view in views:
        assert (view.array().ctypes.data - start) % 64 == 16


@pytest.mark.parametrize("shift", range(8))
def test_misaligned_payloads_are_copied(shift: int) -> None:
    """A payload from another encoder that is not aligned is copied, still read-only and right."""
    expected = np.arange(4, dtype=np.float64)
    data = memoryview(bytes(shift) + expected.tobytes())[shift:]
    view = TensorView("", by_name("float64"), (2, 2), data)
    array = view.array()
    address = np.frombuffer(data, np.uint8).ctypes.data
    assert array.flags.aligned
    assert not array.flags.writeable
    assert np.shares_memory(array, np.frombuffer(data, np.uint8)) == (address % 8 == 0)
    assert array.tolist() == [[0, 1], [2, 3]]


def test_views_are_frozen() -> None:
    """A view's fields can't be changed."""
    view = TensorView("", by_name("int8"), (), memoryview(b"\x01"))
    with pytest.raises(AttributeError):
        view.shape = (1,)  # type: ignore[misc]


def test_bfloat16_bits_are_kept() -> None:
    """bfloat16 arrays, which numpy exports no buffer of, keep all their bit patterns."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    array = bits.view(by_name("bfloat16").numpy)
    assert (round_trip(array).view(np.uint16) == bits).all()


def test_ordinary_messages_decode() -> None:
    """What the ordinary protobuf library wrote is read with the same values."""
    tensor = tensor_pb2.Tensor(
        name="layer1", dtype=tensor_pb2.DATA_TYPE_INT16, shape=[2, 1], data=b"\x01\x00\xff\xff"
    )
    message = feature_service_pb2.ExtractRequest(model="m", inputs=[tensor]).SerializeToString()
    field = feature_service_pb2.ExtractRequest.INPUTS_FIELD_NUMBER
    rest, [view] = decode_message(message, field, counted=(3,))
    assert feature_service_pb2.ExtractRequest.FromString(rest).model == "m"
    assert (view.name, view.dtype.name, view.array().tolist()) == ("layer1", "int16", [[1], [-1]])


def test_malformed_messages_raise_decode_error() -> None:
    """Whatever is wrong with the bytes is a DecodeError that says what."""
    with pytest.raises(DecodeError, match="length past the end|truncated"):
        decode_message(b"\x0a\x05", FIELD)
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"123")
    message = feature_service_pb2.ExtractResponse(tensors=[tensor]).SerializeToString()
    with pytest.raises(DecodeError, match="data: got 3 bytes, expected 8"):
        decode_message(message, FIELD)


def test_unfit_arrays_raise_invalid_input() -> None:
    """An array that the protocol has no type or no room for is refused."""
    with pytest.raises(InvalidInputError, match="dtype: got numpy complex64"):
        encode_message([("x", np.zeros(1, np.complex64))], FIELD, b"")
    with pytest.raises(InvalidInputError, match="rank 33"):
        encode_message([("x", np.zeros((1,) * 33, np.int8))], FIELD, b"")
    with pytest.raises(InvalidInputError, match="larger than"):
        encode_message([("x", np.broadcast_to(np.int8(0), (1 << 31,)))], FIELD, b"")
