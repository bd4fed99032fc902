from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from layertap import _core, _pure
from layertap.errors import InvalidInputError
from layertap.v1 import tensor_pb2
from layertap.wire.dtypes import DTYPES, DType, by_datatype, by_name, by_number, of_array

rows = pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)


def test_every_enum_value_has_a_row() -> None:
    """The table and the protocol's enum have the same names and numbers."""
    enum = {
        number: name.removeprefix("DATA_TYPE_").lower()
        for name, number in tensor_pb2.DataType.items()
        if number != tensor_pb2.DATA_TYPE_UNSPECIFIED
    }
    assert {row.number: row.name for row in DTYPES} == enum


@rows
def test_row_describes_its_numpy_type(row: DType) -> None:
    """Name, item size and byte order of a row are those of its numpy type."""
    assert row.numpy.name == row.name
    assert row.numpy.itemsize == row.itemsize
    assert row.numpy.newbyteorder("<") == row.numpy
    assert row.is_float == (row.name in {"float32", "float16", "bfloat16", "float64"})


@rows
@pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
def test_codec_knows_every_row(core: object, row: DType) -> None:
    """The codec accepts the item size of the row for its number, and no other."""
    layout = core.ReplyLayout([("", row.number, (3,))], field=1, head_size=0)
    builder = core.ReplyBuilder(layout)
    builder.write(0, np.zeros(3, f"V{row.itemsize}"), row.number)
    with pytest.raises(ValueError, match=f"item size: got 3, expected {row.itemsize}"):
        builder.write(0, np.zeros(3, "V3"), row.number)


@pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
def test_codec_knows_no_other_dtype(core: object) -> None:
    """The codec refuses a number without a row."""
    for number in {-1, 0, *range(200)} - {row.number for row in DTYPES}:
        with pytest.raises(ValueError, match=f"dtype: got {number}"):
            core.ReplyLayout([("", number, (3,))], field=1, head_size=0)


@rows
def test_lookups_find_a_row(row: DType) -> None:
    """A row is found by its number, its name and an array of its type."""
    assert by_number(row.number) is row
    assert by_name(row.name) is row
    assert by_datatype(row.datatype) is row
    assert of_array(np.zeros(2, row.numpy)) is row


def test_lookups_refuse_strangers() -> None:
    """An unknown number, name or array type is refused, with the choices."""
    with pytest.raises(InvalidInputError, match=r"got enum value 0, expected one of float32"):
        by_number(0)
    with pytest.raises(InvalidInputError, match=r"got 'half', expected one of float32"):
        by_name("half")
    with pytest.raises(InvalidInputError, match="datatype: got 'FP8', expected one of FP32, FP16"):
        by_datatype("FP8")
    with pytest.raises(InvalidInputError, match=r"got numpy complex64, expected one of float32"):
        of_array(np.zeros(2, np.complex64))


def test_big_endian_arrays_are_strangers() -> None:
    """An array of the other byte order has no row, so its bytes are never sent unconverted."""
    with pytest.raises(InvalidInputError, match="got numpy"):
        of_array(np.zeros(2, ">f4"))


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    """The numpy type of bfloat16 reads the bits as the protocol defines them."""
    ones = np.array([0x3F80, 0xC000], "<u2").view(by_name("bfloat16").numpy)
    assert ones.dtype == ml_dtypes.bfloat16
    assert ones.tolist() == [1.0, -2.0]
