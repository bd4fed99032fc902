from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError as ProtobufDecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layertap import _core, _pure
from layertap.v1.feature_service_pb2 import ExtractRequest, ExtractResponse
from layertap.v1.tensor_pb2 import DATA_TYPE_INT8, Tensor
from layertap.wire import codec
from layertap.wire.dtypes import DTYPES

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

TENSOR, IMAGES = ExtractRequest.TENSOR_FIELD_NUMBER, ExtractRequest.IMAGES_FIELD_NUMBER
ITEMSIZE = {row.number: row.itemsize for row in DTYPES}

Outcome = tuple[bytes, list[tuple[str, int, tuple[int, ...], bytes]]] | None


def varint(value: int, size: int = 1) -> bytes:
    """Return a varint of at least ``size`` bytes, overlong where that is more than it needs."""
    out = bytearray()
    while value >= 0x80 or len(out) + 1 < size:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, wire_type: int, value: bytes = b"") -> bytes:
    """Return a field: its tag and the bytes given; a length in front of them for wire type 2."""
    length = varint(len(value)) if wire_type == 2 else b""
    return varint(number << 3 | wire_type) + length + value


def groups(depth: int) -> bytes:
    """Return ``depth`` groups of field 15, one in the other."""
    return field(15, 3) * depth + field(15, 4) * depth


INT8 = field(2, 0, varint(DATA_TYPE_INT8))
SCALAR = INT8 + field(5, 2, b"\x07")


def decode_one(core: ModuleType, tensor: bytes) -> tuple[str, int, tuple[int, ...], bytes]:
    """Decode a reply that is one tensor."""
    rest, [(name, dtype, shape, data)] = core.decode(field(1, 2, tensor), field=1, repeated=True)
    assert rest == b""
    return name, dtype, shape, bytes(data)


def refuses(core: ModuleType, tensor: bytes, match: str) -> None:
    """Check that a reply that is one tensor is refused."""
    with pytest.raises(ValueError, match=match):
        core.decode(field(1, 2, tensor), field=1, repeated=True)


def fits(tensor: Tensor) -> bool:
    """Say whether a tensor that upb accepts keeps layertap's stricter rules as well."""
    itemsize = ITEMSIZE.get(tensor.dtype)
    if itemsize is None or len(tensor.shape) > 32 or min(tensor.shape, default=0) < 0:
        return False
    product = itemsize
    for size in tensor.shape:
        product *= size or 1
    expected = 0 if 0 in tensor.shape else product
    return product < 1 << 63 and len(tensor.data) == expected


def by_upb(message: bytes, kind: Callable[[], Any]) -> Outcome:
    """Return what the ordinary parser makes of a message: rest and tensors; None for an error."""
    parsed = kind()
    try:
        parsed.ParseFromString(message)
    except ProtobufDecodeError:
        return None
    if kind is ExtractResponse:
        tensors = list(parsed.tensors)
    else:
        tensors = [parsed.tensor] if parsed.WhichOneof("input") == "tensor" else []
    if not all(map(fits, tensors)):
        return None
    found = [(t.name, t.dtype, tuple(t.shape), t.data) for t in tensors]
    parsed.ClearField("tensors" if kind is ExtractResponse else "tensor")
    return parsed.SerializeToString(deterministic=True), found


def by_codec(core: ModuleType, message: bytes, kind: Callable[[], Any]) -> Outcome:
    """Return what decode and the ordinary parser make of a message between them."""
    reply = kind is ExtractResponse
    rivals = () if reply else (IMAGES,)
    parsed = kind()
    try:
        rest, tensors = core.decode(
            message, field=1 if reply else TENSOR, repeated=reply, rivals=rivals
        )
        parsed.ParseFromString(rest)
    except (ValueError, ProtobufDecodeError):
        return None
    parsed.ClearField("tensors" if reply else "tensor")
    found = [(name, dtype, shape, bytes(data)) for name, dtype, shape, data in tensors]
    return parsed.SerializeToString(deterministic=True), found


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors that keep every rule."""
    row = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = row.itemsize * int(np.prod(shape, dtype=int))
    data = draw(st.binary(min_size=size, max_size=size))
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
    return Tensor(name=name, dtype=row.number, shape=shape, padding=bytes(size % 3), data=data)


def hostile_value(random: Random, wire_type: int, depth: int) -> bytes:
    """Return a value of a wire type, mostly well-formed, nested up to ``depth`` deep."""
    if wire_type == 0:
        values = [0, 1, 1, 2, 5, 6, 10, 127, 1 << 31, (1 << 32) + 5, (1 << 64) - 1]
        return varint(random.choice(values), random.choice([*[1] * 16, 2, 5, 6, 10, 11]))
    if wire_type in {2, 3}:
        kind = random.randrange(8)
        if kind < 3 and depth:
            return random.choice([b"", SCALAR, SCALAR]) + hostile_fields(random, depth - 1)
        if kind < 5:
            return SCALAR if kind == 3 else INT8 + field(3, 0, b"\x02") + field(5, 2, b"ab")
        if kind == 5:
            return b"".join(hostile_value(random, 0, 0) for _ in range(random.randrange(3)))
        return random.randbytes(random.randrange(4))
    return bytes({1: 8, 5: 4}.get(wire_type, 0))


def hostile_fields(random: Random, depth: int) -> bytes:
    """Return a run of fields, mostly well-formed, of few numbers and every wire type."""
    out = b""
    for _ in range(random.randrange(5)):
        number = random.choice([*[1, 2] * 8, *[3, 4, 5, 15] * 3, 0, (1 << 29) - 1])
        wire_type = random.choice([*[2] * 24, *[0] * 8, *[3, 1, 5] * 2, 4, 6])
        out += field(number, wire_type, hostile_value(random, wire_type, depth))
        if wire_type == 3:
            out += field(random.choice([*[number] * 9, 15]), 4)
    return out


def hostile_message(random: Random) -> bytes:
    """Return a run of fields, some of them cut or with a byte changed."""
    message = bytearray(hostile_fields(random, 2))
    for _ in range(random.choice([0, 0, 0, 0, 1, 2])):
        if message:
            message[random.randrange(len(message))] = random.randrange(256)
    return bytes(message[: random.choice([*[None] * 8, -1, -2])])


@cores
@bounded
@given(st.lists(tensors(), max_size=3), st.integers(-5, 5))
def test_structured_replies_decode_as_upb_does(
    core: ModuleType, parts: list[Tensor], extractor: int
) -> None:
    """A reply of the ordinary library is read with the values that the library reads."""
    message = ExtractResponse(tensors=parts, extractor=extractor).SerializeToString()
    outcome = by_codec(core, message, ExtractResponse)
    assert outcome is not None
    assert outcome == by_upb(message, ExtractResponse)


@cores
@bounded
@given(seed=st.integers(0, 1 << 64))
@pytest.mark.parametrize("kind", [ExtractRequest, ExtractResponse])
def test_hostile_bytes_decode_as_upb_does(core: ModuleType, kind: Any, seed: int) -> None:
    """Any bytes are accepted or refused as the ordinary parser does, and mean the same."""
    random = Random(seed)
    for _ in range(20):
        message = hostile_message(random)
        assert by_codec(core, message, kind) == by_upb(message, kind), message


@cores
@bounded
@given(st.lists(tensors(), max_size=3), st.integers(0, 9))
def test_encoded_messages_mean_what_upb_would_have_written(
    core: ModuleType, parts: list[Tensor], extractor: int
) -> None:
    """An encoded message parses to the message built the ordinary way, but for the padding."""
    head = ExtractResponse(extractor=extractor).SerializeToString()
    arrays = [
        (t.name, t.dtype, np.frombuffer(t.data, f"V{ITEMSIZE[t.dtype]}").reshape(t.shape))
        if t.data
        else (t.name, t.dtype, np.zeros(tuple(t.shape), f"V{ITEMSIZE[t.dtype]}"))
        for t in parts
    ]
    message = core.encode(arrays, field=1, head=head)
    parsed = ExtractResponse.FromString(message)
    for tensor in (*parsed.tensors, *parts):
        assert set(tensor.padding) <= {0}
        tensor.ClearField("padding")
    assert parsed == ExtractResponse(tensors=parts, extractor=extractor)
    assert message == _pure.encode(arrays, field=1, head=head)


@cores
@pytest.mark.parametrize("kind", [ExtractRequest, ExtractResponse])
def test_every_prefix_is_refused_or_read_as_upb_does(core: ModuleType, kind: Any) -> None:
    """A message cut anywhere never crashes and is never read as something else."""
    tensor = Tensor(name="né", dtype=1, shape=[1, 300], padding=b"\0", data=bytes(1200))
    if kind is ExtractRequest:
        message = ExtractRequest(model="m", tensor=tensor).SerializeToString() + groups(3)
    else:
        message = ExtractResponse(tensors=[tensor], extractor=1).SerializeToString() + groups(3)
    for size in range(len(message) + 1):
        assert by_codec(core, message[:size], kind) == by_upb(message[:size], kind)


@cores
def test_rest_is_verbatim_and_in_order(core: ModuleType) -> None:
    """The other fields come back byte for byte, an overlong varint and a group included."""
    odd = varint(2 << 3, 3) + varint(4, 4)
    message = odd + field(1, 2, SCALAR) + groups(2) + field(1, 0, b"\x05") + field(1, 2, SCALAR)
    rest, found = core.decode(message, field=1, repeated=True)
    assert rest == odd + groups(2) + field(1, 0, b"\x05")
    assert len(found) == 2


def test_message_without_tensors_is_its_own_rest() -> None:
    """Encoded images, megabytes of them, are not copied on the way to the parser."""
    message = field(3, 2, b"x" * 1000)
    rest, found = _core.decode(message, field=2, repeated=False)
    assert rest is message
    assert found == []


@cores
def test_data_is_a_readonly_view_of_the_message(core: ModuleType) -> None:
    """The payload is not copied and can't be written."""
    message = field(1, 2, SCALAR)
    [(_, _, _, data)] = core.decode(message, field=1, repeated=True)[1]
    assert data.obj is message
    assert (data.readonly, data.format, bytes(data)) == (True, "B", b"\x07")


@cores
def test_last_of_a_repeated_scalar_wins(core: ModuleType) -> None:
    """name, dtype and data met twice have the later value."""
    twice = field(1, 2, b"a") + field(2, 0, b"\x01") + field(5, 2, b"1234")
    assert decode_one(core, twice + field(1, 2, b"b") + SCALAR) == ("b", 5, (), b"\x07")


@cores
def test_shape_is_read_packed_and_unpacked(core: ModuleType) -> None:
    """Sizes may come one by one, packed, or both, and follow one another."""
    sizes = field(3, 0, b"\x02") + field(3, 2, b"\x01\x03") + field(3, 0, b"\x01")
    assert decode_one(core, INT8 + sizes + field(5, 2, b"abcdef"))[2] == (2, 1, 3, 1)


@cores
def test_packed_size_ends_with_its_field(core: ModuleType) -> None:
    """A packed size that goes on past the field's length is refused."""
    refuses(core, INT8 + field(3, 2, b"\x81") + field(5, 2, b"a"), "truncated")


@cores
def test_known_field_of_another_wire_type_is_unknown(core: ModuleType) -> None:
    """A known number with an unexpected wire type is skipped."""
    strangers = field(1, 0, b"\x05") + field(2, 2, b"\x09") + field(3, 1, bytes(8))
    strangers += field(5, 5, bytes(4)) + field(5, 3) + field(5, 4)
    assert decode_one(core, SCALAR + strangers) == ("", 5, (), b"\x07")


@cores
def test_enum_is_cut_to_32_bits(core: ModuleType) -> None:
    """A dtype of more than 32 bits counts by its lower 32."""
    assert decode_one(core, SCALAR + field(2, 0, varint((7 << 32) + 5)))[1] == 5


@cores
def test_padding_is_skipped(core: ModuleType) -> None:
    """Padding carries no meaning, whatever its bytes."""
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
        core.decode(b"\x02\x00", field=1, repeated=True)


@cores
@pytest.mark.parametrize("wire_type", [6, 7])
def test_invalid_wire_type_is_refused(core: ModuleType, wire_type: int) -> None:
    """Wire types 6 and 7 mean nothing."""
    refuses(core, SCALAR + field(9, wire_type), "wire type")


@cores
@pytest.mark.parametrize(
    "length", [b"\x05", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\x0f", b"\x81\x80\x80\x80\x10"]
)
def test_length_past_the_end_is_refused(core: ModuleType, length: bytes) -> None:
    """A length over what remains is refused, also one that would wrap around in 32 bits."""
    refuses(core, INT8 + b"\x2a" + length + b"a", "past the end|truncated")


@cores
def test_length_of_six_bytes_is_refused(core: ModuleType) -> None:
    """A length takes at most five bytes, also where its value would do."""
    assert decode_one(core, INT8 + b"\x2a" + varint(1, 5) + b"a")[3] == b"a"
    refuses(core, INT8 + b"\x2a" + varint(1, 6) + b"a", "too many bytes")


@cores
def test_tensor_may_not_reach_past_its_length(core: ModuleType) -> None:
    """A field in a tensor ends with it, though the message goes on."""
    with pytest.raises(ValueError, match="past the end|truncated"):
        core.decode(b"\x0a\x04" + INT8 + b"\x2a\x01\x07", field=1, repeated=True)


@cores
def test_groups_are_skipped(core: ModuleType) -> None:
    """A group goes with all that is in it, 99 deep in a tensor."""
    inner = field(1, 2, b"\xff") + field(0, 0, b"\x01") + field(9, 5, bytes(4)) + groups(98)
    group = field(14, 3) + inner + field(14, 4)
    assert decode_one(core, SCALAR + group) == ("", 5, (), b"\x07")


@cores
def test_groups_nest_no_deeper_than_in_upb(core: ModuleType) -> None:
    """100 groups are the most at the top, 99 in a tensor; a million overflow no stack."""
    assert core.decode(groups(100), field=1, repeated=True) == (groups(100), [])
    for message in (groups(101), field(1, 2, SCALAR + groups(100)), field(15, 3) * 1_000_000):
        with pytest.raises(ValueError, match="too deep"):
            core.decode(message, field=1, repeated=True)


@cores
@pytest.mark.parametrize("stray", [field(9, 4), field(9, 3), field(9, 3) + field(8, 4)])
def test_unbalanced_groups_are_refused(core: ModuleType, stray: bytes) -> None:
    """A group without a begin, without an end, or with another's end is refused."""
    refuses(core, SCALAR + stray, "group|truncated")


@cores
def test_unknown_dtype_is_refused(core: ModuleType) -> None:
    """A tensor without a dtype, or with one that has no row, is refused."""
    refuses(core, field(5, 2, b""), "dtype: got 0")
    refuses(core, field(2, 0, b"\x0b"), "dtype: got 11")
    refuses(core, field(2, 0, varint((1 << 64) - 1)), "dtype: got -1")


@cores
def test_rank_over_32_is_refused(core: ModuleType) -> None:
    """32 sizes are the most."""
    assert decode_one(core, SCALAR + field(3, 2, b"\x01" * 32))[2] == (1,) * 32
    refuses(core, SCALAR + field(3, 2, b"\x01" * 33), "rank 33")


@cores
def test_negative_size_is_refused(core: ModuleType) -> None:
    """A size below 0 is refused, also two of them whose product is right."""
    minus_one = varint((1 << 64) - 1)
    refuses(core, SCALAR + field(3, 2, minus_one), "negative")
    refuses(core, SCALAR + field(3, 2, minus_one + minus_one), "negative")


@cores
def test_overflowing_shape_product_is_refused(core: ModuleType) -> None:
    """Sizes whose product wraps around to the data's length are refused, next to a 0 as well."""
    refuses(core, INT8 + field(3, 2, varint(1 << 32) * 2), "overflow")
    refuses(core, INT8 + field(3, 2, varint(1 << 62) + b"\x04\x00"), "overflow")
    refuses(core, field(2, 0, b"\x09") + field(3, 2, varint(1 << 61)), "overflow")


@cores
def test_data_of_another_length_is_refused(core: ModuleType) -> None:
    """Data must have exactly the bytes that shape and dtype say."""
    refuses(core, SCALAR + field(3, 0, b"\x02"), "data: got 1 bytes, expected 2")
    refuses(core, INT8, "data: got 0 bytes, expected 1")


@cores
def test_singular_tensor_met_twice_is_merged(core: ModuleType) -> None:
    """Scalars of the later one win, sizes of both follow one another."""
    first, second = INT8 + field(3, 0, b"\x02"), field(3, 0, b"\x03") + field(5, 2, b"abcdef")
    message = field(2, 2, first) + field(2, 2, second)
    _, [(_, dtype, shape, data)] = core.decode(message, field=2, repeated=False)
    assert (dtype, shape, bytes(data)) == (5, (2, 3), b"abcdef")


@cores
def test_rival_met_last_drops_the_tensor(core: ModuleType) -> None:
    """A tensor before a rival is dropped, and need not make sense."""
    images = field(3, 2, field(1, 2, b"png"))
    message = field(2, 2, INT8) + images
    assert core.decode(message, field=2, repeated=False, rivals=[3]) == (images, [])


@cores
def test_tensor_met_last_drops_the_rival(core: ModuleType) -> None:
    """A rival before a tensor is dropped by the ordinary parser, which still checks it."""
    images = field(3, 2, field(1, 2, b"png"))
    rest, found = core.decode(images + field(2, 2, SCALAR), field=2, repeated=False, rivals=[3])
    assert [bytes(data) for *_, data in found] == [b"\x07"]
    assert rest == images + field(2, 2)
    assert ExtractRequest.FromString(rest).WhichOneof("input") == "tensor"


@cores
def test_dropped_tensor_is_not_merged(core: ModuleType) -> None:
    """What a rival dropped is no part of a tensor that follows."""
    sized = field(2, 2, INT8 + field(3, 0, b"\x02"))
    message = sized + field(3, 2) + field(2, 2, SCALAR)
    _, [(_, _, shape, _)] = core.decode(message, field=2, repeated=False, rivals=[3])
    assert shape == ()


@cores
def test_rival_of_another_wire_type_is_unknown(core: ModuleType) -> None:
    """A rival's number with another wire type drops nothing."""
    message = field(2, 2, SCALAR) + field(3, 0, b"\x01")
    assert len(core.decode(message, field=2, repeated=False, rivals=[3])[1]) == 1


@cores
def test_only_bytes_are_decoded(core: ModuleType) -> None:
    """A bytearray may change under a view and is refused, as is a field number out of range."""
    with pytest.raises(TypeError):
        core.decode(bytearray(field(1, 2, SCALAR)), field=1, repeated=True)
    for number in (0, 1 << 29, 1 << 70):
        with pytest.raises(ValueError, match="field|64 bits"):
            core.decode(b"", field=number, repeated=True)


def test_extension_is_in_use() -> None:
    """Where the extension is built, the codec is the extension."""
    assert codec.ACCELERATED
    assert codec.decode is _core.decode
    assert codec.ReplyBuilder is _core.ReplyBuilder


def test_missing_extension_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension the twin takes its place, with a single warning."""
    monkeypatch.delattr("layertap._core")
    monkeypatch.setitem(sys.modules, "layertap._core", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "layertap.wire.codec")
    with pytest.warns(RuntimeWarning, match="plain Python") as caught:
        fallback = importlib.import_module("layertap.wire.codec")
    try:
        assert len(caught) == 1
        assert not fallback.ACCELERATED
        assert fallback.decode is _pure.decode
    finally:
        monkeypatch.undo()
        sys.modules["layertap.wire"].codec = codec  # type: ignore[attr-defined]
