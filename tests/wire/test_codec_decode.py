"""The rules of decode, with one named test for each; tests/fuzz finds what they omit."""

from __future__ import annotations

from types import ModuleType

import pytest
from google.protobuf.message import DecodeError

from layertap import _core, _pure
from layertap.v1.feature_service_pb2 import ExtractRequest
from layertap.v1.tensor_pb2 import DATA_TYPE_BOOL
from layertap.wire.dtypes import DTYPES
from protowire import INT8, SCALAR, field, groups, varint

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])


def decode_one(core: ModuleType, tensor: bytes) -> tuple[str, int, tuple[int, ...], bytes]:
    """Decode a reply that is a single tensor."""
    rest, [(name, dtype, shape, data)] = core.decode(field(1, 2, tensor), field=1)
    assert rest == b""
    return name, dtype, shape, bytes(data)


def refuses(core: ModuleType, tensor: bytes, match: str) -> None:
    """Check that a reply that is a single tensor is refused."""
    with pytest.raises(ValueError, match=match):
        core.decode(field(1, 2, tensor), field=1)


@cores
def test_rest_is_verbatim_and_in_order(core: ModuleType) -> None:
    """The other fields are returned byte for byte, including an overlong varint and a group."""
    odd = varint(2 << 3, 3) + varint(4, 4)
    message = odd + field(1, 2, SCALAR) + groups(2) + field(1, 0, b"\x05") + field(1, 2, SCALAR)
    rest, found = core.decode(message, field=1)
    assert rest == odd + groups(2) + field(1, 0, b"\x05")
    assert len(found) == 2


def test_message_without_tensors_is_its_own_rest() -> None:
    """Encoded images, which may have megabytes, are not copied before they are parsed."""
    message = field(3, 2, b"x" * 1000)
    rest, found = _core.decode(message, field=2)
    assert rest is message
    assert found == []


@cores
def test_data_is_a_readonly_view_of_the_message(core: ModuleType) -> None:
    """The payload is not copied and can't be written to."""
    message = field(1, 2, SCALAR)
    [(_, _, _, data)] = core.decode(message, field=1)[1]
    assert data.obj is message
    assert (data.readonly, data.format, bytes(data)) == (True, "B", b"\x07")


@cores
def test_last_of_a_repeated_scalar_wins(core: ModuleType) -> None:
    """If name, dtype or data occur twice, the later value is used."""
    twice = field(1, 2, b"a") + field(2, 0, b"\x01") + field(5, 2, b"1234")
    assert decode_one(core, twice + field(1, 2, b"b") + SCALAR) == ("b", 5, (), b"\x07")


@cores
def test_shape_is_read_packed_and_unpacked(core: ModuleType) -> None:
    """Sizes may be single, packed, or both, and are concatenated."""
    sizes = field(3, 0, b"\x02") + field(3, 2, b"\x01\x03") + field(3, 0, b"\x01")
    assert decode_one(core, INT8 + sizes + field(5, 2, b"abcdef"))[2] == (2, 1, 3, 1)


@cores
def test_packed_size_ends_with_its_field(core: ModuleType) -> None:
    """A packed size that continues after the field's length is refused."""
    refuses(core, INT8 + field(3, 2, b"\x81") + field(5, 2, b"a"), "truncated")


@cores
def test_known_field_of_another_wire_type_is_unknown(core: ModuleType) -> None:
    """A known number with an unexpected wire type is skipped."""
    strangers = field(1, 0, b"\x05") + field(2, 2, b"\x09") + field(3, 1, bytes(8))
    strangers += field(5, 5, bytes(4)) + field(5, 3) + field(5, 4)
    assert decode_one(core, SCALAR + strangers) == ("", 5, (), b"\x07")


@cores
def test_enum_is_cut_to_32_bits(core: ModuleType) -> None:
    """Only the lower 32 bits of a dtype are used."""
    assert decode_one(core, SCALAR + field(2, 0, varint((7 << 32) + 5)))[1] == 5


@cores
def test_padding_is_skipped(core: ModuleType) -> None:
    """Padding has no meaning, whatever its bytes."""
    assert decode_one(core, field(4, 2, b"\xff" * 70) + SCALAR) == ("", 5, (), b"\x07")


@cores
@pytest.mark.parametrize(
    "name", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"]
)
def test_name_must_be_utf8_each_time(core: ModuleType, name: bytes) -> None:
    """Surrogates, overlong forms and cut sequences are refused, even in a name that is replaced."""
    refuses(core, field(1, 2, name) + field(1, 2, b"fine") + SCALAR, "UTF-8")


@cores
def test_names_of_every_plane_are_read(core: ModuleType) -> None:
    """UTF-8 of one to four bytes and NUL are read."""
    name = "\0a\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"
    assert decode_one(core, field(1, 2, name.encode()) + SCALAR)[0] == name


@cores
def test_varint_of_ten_bytes_drops_bits_over_64(core: ModuleType) -> None:
    """The tenth byte's upper bits have no effect."""
    assert decode_one(core, SCALAR + field(2, 0, b"\x85" + b"\x80" * 8 + b"\x7e"))[1] == 5


@cores
def test_overflowing_varint_is_refused(core: ModuleType) -> None:
    """An eleventh byte of a varint is refused."""
    refuses(core, SCALAR + field(2, 0, b"\x85" + b"\x80" * 9 + b"\x00"), "too many bytes")


@cores
@pytest.mark.parametrize("tag", [varint(1 << 32), varint(2 << 3, 6), b"\x88\x80\x80\x80\x1f"])
def test_tag_of_more_than_32_bits_is_refused(core: ModuleType, tag: bytes) -> None:
    """A tag takes at most five bytes and 32 bits."""
    refuses(core, SCALAR + tag + b"\x05", "tag|too many bytes")


@cores
def test_field_number_0_is_refused(core: ModuleType) -> None:
    """Field number 0 is refused at the top and in a tensor."""
    refuses(core, SCALAR + b"\x00\x01", "field number 0")
    with pytest.raises(ValueError, match="field number 0"):
        core.decode(b"\x02\x00", field=1)


@cores
@pytest.mark.parametrize("wire_type", [6, 7])
def test_invalid_wire_type_is_refused(core: ModuleType, wire_type: int) -> None:
    """Wire types 6 and 7 are undefined."""
    refuses(core, SCALAR + field(9, wire_type), "wire type")


@cores
@pytest.mark.parametrize(
    "length", [b"\x05", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\x0f", b"\x81\x80\x80\x80\x10"]
)
def test_length_past_the_end_is_refused(core: ModuleType, length: bytes) -> None:
    """A length over the rest of the message is refused, even one that would wrap at 32 bits."""
    refuses(core, INT8 + b"\x2a" + length + b"a", "past the end|truncated")


@cores
def test_length_of_six_bytes_is_refused(core: ModuleType) -> None:
    """A length takes at most five bytes, even if its value would be valid."""
    assert decode_one(core, INT8 + b"\x2a" + varint(1, 5) + b"a")[3] == b"a"
    refuses(core, INT8 + b"\x2a" + varint(1, 6) + b"a", "too many bytes")


@cores
def test_tensor_may_not_reach_past_its_length(core: ModuleType) -> None:
    """A field in a tensor must end inside it, even if the message continues."""
    with pytest.raises(ValueError, match="past the end|truncated"):
        core.decode(b"\x0a\x04" + INT8 + b"\x2a\x01\x07", field=1)


@cores
def test_groups_are_skipped(core: ModuleType) -> None:
    """A group is skipped with its content, up to 99 levels deep in a tensor."""
    inner = field(1, 2, b"\xff") + field(0, 0, b"\x01") + field(9, 5, bytes(4)) + groups(98)
    group = field(14, 3) + inner + field(14, 4)
    assert decode_one(core, SCALAR + group) == ("", 5, (), b"\x07")


@cores
def test_groups_nest_no_deeper_than_in_upb(core: ModuleType) -> None:
    """At most 100 levels at the top and 99 in a tensor; a million don't overflow the stack."""
    assert core.decode(groups(100), field=1) == (groups(100), [])
    for message in (groups(101), field(1, 2, SCALAR + groups(100)), field(15, 3) * 1_000_000):
        with pytest.raises(ValueError, match="too deep"):
            core.decode(message, field=1)


@cores
@pytest.mark.parametrize("stray", [field(9, 4), field(9, 3), field(9, 3) + field(8, 4)])
def test_unbalanced_groups_are_refused(core: ModuleType, stray: bytes) -> None:
    """A group without a start, without an end, or with another group's end is refused."""
    refuses(core, SCALAR + stray, "group|truncated")


@cores
def test_unknown_dtype_is_refused(core: ModuleType) -> None:
    """A tensor without a dtype, or with an unknown one, is refused."""
    refuses(core, field(5, 2, b""), "dtype: got 0")
    refuses(core, field(2, 0, b"\x0b"), "dtype: got 11")
    refuses(core, field(2, 0, varint((1 << 64) - 1)), "dtype: got -1")


@cores
def test_rank_over_32_is_refused(core: ModuleType) -> None:
    """At most 32 sizes are accepted."""
    assert decode_one(core, SCALAR + field(3, 2, b"\x01" * 32))[2] == (1,) * 32
    refuses(core, SCALAR + field(3, 2, b"\x01" * 33), "rank 33")


@cores
def test_negative_size_is_refused(core: ModuleType) -> None:
    """A size below 0 is refused, even two of them whose product is right."""
    minus_one = varint((1 << 64) - 1)
    refuses(core, SCALAR + field(3, 2, minus_one), "negative")
    refuses(core, SCALAR + field(3, 2, minus_one + minus_one), "negative")


@cores
def test_overflowing_shape_product_is_refused(core: ModuleType) -> None:
    """Sizes whose product wraps around to the data's length are refused, even next to a 0."""
    refuses(core, INT8 + field(3, 2, varint(1 << 32) * 2), "overflow")
    refuses(core, INT8 + field(3, 2, varint(1 << 62) + b"\x04\x00"), "overflow")
    refuses(core, field(2, 0, b"\x09") + field(3, 2, varint(1 << 61)), "overflow")


@cores
def test_data_of_another_length_is_refused(core: ModuleType) -> None:
    """Data must have exactly as many bytes as shape and dtype require."""
    refuses(core, SCALAR + field(3, 0, b"\x02"), "data: got 1 bytes, expected 2")
    refuses(core, INT8, "data: got 0 bytes, expected 1")


@cores
@pytest.mark.parametrize("size", [1, 15, 4095, 4096, 4097, 12293])
def test_bool_byte_over_1_is_refused(core: ModuleType, size: int) -> None:
    """A bool's byte is 0 or 1; the error names the first other byte, wherever it is."""
    head = field(2, 0, varint(DATA_TYPE_BOOL)) + field(3, 0, varint(size))
    good = bytes([0, 1]) * (size // 2) + bytes([1]) * (size % 2)
    assert decode_one(core, head + field(5, 2, good))[3] == good
    for at in {0, size // 2, size - 1}:
        for byte in (2, 0x80, 0xFF):
            data = bytes([*good[:at], byte, *good[at + 1 : -1], *[3] * (at + 1 < size)])
            refuses(core, head + field(5, 2, data), f"data: got byte {byte} at position {at} of")


@cores
def test_only_bools_are_limited_to_0_and_1(core: ModuleType) -> None:
    """Other types may have any byte, and data that a later field replaces is not checked."""
    for row in DTYPES:
        if row.number != DATA_TYPE_BOOL:
            tensor = field(2, 0, varint(row.number)) + field(5, 2, b"\xff" * row.itemsize)
            assert decode_one(core, tensor)[1] == row.number
    replaced = field(5, 2, b"\x02") + field(5, 2, b"\x01")
    assert decode_one(core, field(2, 0, varint(DATA_TYPE_BOOL)) + replaced)[3] == b"\x01"


@cores
def test_no_more_tensors_than_allowed(core: ModuleType) -> None:
    """One tensor too many is refused before it is read, so that it costs nothing."""
    three = field(2, 2, SCALAR) * 3
    assert len(core.decode(three, field=2, most=3)[1]) == 3
    for message in (three + field(2, 2, SCALAR), three + field(2, 2)):
        with pytest.raises(ValueError, match="message: more than 3 tensors"):
            core.decode(message, field=2, most=3)
    with pytest.raises(ValueError, match="more than 0 tensors"):
        core.decode(three, field=2, most=0)
    with pytest.raises(ValueError, match="most: got -1"):
        core.decode(b"", field=2, most=-1)


@cores
def test_only_bytes_are_decoded(core: ModuleType) -> None:
    """A bytearray could change under a view and is refused, and so is an invalid field number."""
    with pytest.raises(TypeError):
        core.decode(bytearray(field(1, 2, SCALAR)), field=1)
    for number in (0, 1 << 29, 1 << 70):
        with pytest.raises(ValueError, match="field|64 bits"):
            core.decode(b"", field=number)


def eight(number: int, value: int) -> bytes:
    return field(number, 1, value.to_bytes(8, "little"))


@cores
def test_shared_slice_is_handed_out_as_four_numbers(core: ModuleType) -> None:
    """A tensor in shared memory is returned as its slice, unchecked, with the last values."""
    most = (1 << 64) - 1
    first = field(6, 2, eight(1, 5) + eight(2, most) + eight(3, most) + eight(4, 7))
    second = field(6, 2, eight(4, 1) + eight(5, 9) + groups(98))
    [(*_, at)] = core.decode(field(1, 2, INT8 + first + second), field=1)[1]
    assert at == (5, most, most, 1)


@cores
def test_empty_slice_is_a_slice(core: ModuleType) -> None:
    """An empty submessage still counts as a slice, as in every parser."""
    [(*_, at)] = core.decode(field(1, 2, INT8 + field(3, 0, b"\0") + field(6, 2)), field=1)[1]
    assert at == (0, 0, 0, 0)
    refuses(core, INT8 + field(6, 2), "shared: got 0 bytes, expected 1")


@cores
def test_shared_slice_must_fit_and_be_alone(core: ModuleType) -> None:
    """A slice whose size doesn't match the shape, or one next to data, is refused."""
    one = field(6, 2, eight(4, 1))
    refuses(core, INT8 + field(3, 0, b"\2") + one, "shared: got 1 bytes, expected 2")
    refuses(core, INT8 + field(6, 2, eight(4, 1 << 63)), "shared: got 9223372036854775808 bytes")
    refuses(core, SCALAR + one, "got both data and shared")
    refuses(core, INT8 + field(6, 2, field(4, 1, bytes(7))), "truncated")
    refuses(core, INT8 + field(6, 2, b"\0\1"), "field number 0")
    refuses(core, INT8 + field(6, 2, eight(4, 1) + groups(99)), "nested too deep")


@cores
def test_lists_that_would_cost_a_parser_dearly_are_refused(core: ModuleType) -> None:
    """Submessages of two bytes take a hundred bytes of memory each, so their number is limited."""
    layers = b"\x22\x00"
    rest, found = core.decode(layers * 65_536, field=2)
    assert (rest, found) == (layers * 65_536, [])
    with pytest.raises(ValueError, match="more than 65536 fields"):
        core.decode(layers * 65_537, field=2)


@cores
def test_lists_in_a_counted_field_count_as_well(core: ModuleType) -> None:
    """Empty images take a parser eight times their bytes, so their number is limited."""
    image = b"\x0a\x00"
    most = field(3, 2, image * 32_768)
    rest, found = core.decode(most * 2 + b"\x22\x00", field=2)
    assert (rest, found) == (most * 2 + b"\x22\x00", [])
    fits = field(3, 2, image * 65_535)
    assert core.decode(fits, field=2, counted=[3]) == (fits, [])
    for message in (field(3, 2, image * 65_536), most * 2, fits + b"\x22\x00"):
        with pytest.raises(ValueError, match="more than 65536 fields"):
            core.decode(message, field=2, counted=[3])


@cores
def test_a_counted_field_is_walked_as_upb_does(core: ModuleType) -> None:
    """Groups may nest in it as deep as in upb, and what upb refuses in it is refused."""
    deep = field(3, 2, groups(99))
    assert core.decode(deep, field=2, counted=[3]) == (deep, [])
    assert len(ExtractRequest.FromString(deep).images) == 1
    for inner in (groups(100), b"\x0a\x05ab", b"\x02\x00", b"\x0c"):
        with pytest.raises(ValueError, match=r"message: "):
            core.decode(field(3, 2, inner), field=2, counted=[3])
        with pytest.raises(DecodeError):
            ExtractRequest.FromString(field(3, 2, inner))
