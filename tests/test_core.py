"""Layouts and builders; what a write does to elements is in test_core_copy.py."""

from __future__ import annotations

import threading
import tracemalloc
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap import _core, _pure
from layertap.v1.feature_service_pb2 import ExtractResponse

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])

F32, U8, I64 = 1, 6, 9
KIB = 1 << 10
MIB = 1 << 20

shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
specs = st.lists(st.tuples(st.text("aé", max_size=200), st.sampled_from([F32, U8]), shapes))


@settings(max_examples=150, deadline=None)
@given(specs, st.integers(0, 300), st.integers(1, (1 << 29) - 1))
def test_payloads_start_at_16_modulo_64(specs: list, head_size: int, field: int) -> None:
    """Whatever comes before it, a payload starts at an offset of 16 modulo 64."""
    layout = _core.ReplyLayout(specs, field=field, head_size=head_size)
    twin = _pure.ReplyLayout(specs, field=field, head_size=head_size)
    assert (layout.nbytes, len(layout)) == (twin.nbytes, len(twin))
    builder = _core.ReplyBuilder(layout)
    for index, (_, dtype, shape) in enumerate(specs):
        builder.write(index, np.zeros(shape, "f4" if dtype == F32 else "u1"), dtype)
    # Field 15 is unknown to everybody: a head of any size that is skipped.
    message = builder.finish(b"\x78\x00" * (head_size // 2) + b"\x78" * (head_size % 2))
    assert len(message) == layout.nbytes
    if head_size % 2 == 0 and field != 15:
        for *_, data in _core.decode(message, field=field)[1]:
            start = np.frombuffer(message, np.uint8).ctypes.data
            address = np.frombuffer(data, np.uint8).ctypes.data if len(data) else start + 16
            assert (address - start) % 64 == 16


@cores
def test_padding_fits_where_its_length_takes_another_byte(core: ModuleType) -> None:
    """Near a length of 2**14, where padding lengthens the header, the offset is still right."""
    for size in range((1 << 14) - 140, 1 << 14):
        message = core.encode([("", U8, np.ones(size, np.uint8))], field=1, head=b"")
        assert message.index(b"\x01" * 64) % 64 == 16
        assert len(ExtractResponse.FromString(message).tensors[0].data) == size


@cores
@pytest.mark.parametrize(
    ("tensor", "field", "head_size", "match"),
    [
        (("", 0, (1,)), 1, 0, "dtype: got 0"),
        (("", U8, (1,) * 33), 1, 0, "rank 33"),
        (("", U8, (-1,)), 1, 0, "negative"),
        (("", I64, (1 << 60,)), 1, 0, "overflow"),
        (("", I64, (0, 1 << 60)), 1, 0, "overflow"),
        (("", U8, (1 << 70,)), 1, 0, "64 bits"),
        (("", U8, ((1 << 31) - 1,)), 1, 0, "larger than"),
        (("", U8, (1,)), 1, (1 << 31) - 1, "larger than"),
        (("", U8, (1,)), 1, 1 << 31, "head_size"),
        (("", U8, (1,)), 1, -1, "head_size"),
        (("", U8, (1,)), 0, 0, "field"),
        (("", U8, (1,)), 1 << 29, 0, "field"),
        (("\ud800", U8, (1,)), 1, 0, "surrogates"),
    ],
)
def test_impossible_layouts_are_refused(
    core: ModuleType, tensor: tuple, field: int, head_size: int, match: str
) -> None:
    """What no message can contain is refused before anything is allocated."""
    with pytest.raises(ValueError, match=match):
        core.ReplyLayout([tensor], field=field, head_size=head_size)


@cores
def test_largest_message_can_be_laid_out(core: ModuleType) -> None:
    """A message of almost 2**31 - 1 bytes can be laid out, a slightly larger one can't."""
    assert core.MAX_MESSAGE_BYTES == (1 << 31) - 1
    size = (1 << 31) - 200
    assert core.ReplyLayout([("", U8, (size,))], field=1, head_size=0).nbytes < 1 << 31
    with pytest.raises(ValueError, match="larger than"):
        core.ReplyLayout([("", U8, (size,))], field=1, head_size=200)


def two_tensors(core: ModuleType) -> object:
    """Return a builder of an uint8 [2] and a float32 [3], with a head of 2 bytes."""
    specs = [("a", U8, (2,)), ("b", F32, (3,))]
    return core.ReplyBuilder(core.ReplyLayout(specs, field=1, head_size=2))


A, B, HEAD = np.array([1, 2], np.uint8), np.array([3, 4, 5], np.float32), b"\x10\x04"


@cores
def test_built_message_is_the_ordinary_one(core: ModuleType) -> None:
    """Tensors written in any order, one of them twice, give the message that upb reads."""
    builder = two_tensors(core)
    builder.write(1, B, F32)
    builder.write(0, A[::-1], U8)
    builder.write(0, A, U8)
    reply = ExtractResponse.FromString(builder.finish(HEAD))
    assert reply.extractor == 4
    assert [tensor.name for tensor in reply.tensors] == ["a", "b"]
    assert [tensor.data for tensor in reply.tensors] == [A.tobytes(), B.tobytes()]


@cores
def test_any_buffer_is_written(core: ModuleType) -> None:
    """bytes, bytearray and memoryview are arrays of bytes; an object without a buffer raises."""
    builder = two_tensors(core)
    for array in (b"ab", bytearray(b"ab"), memoryview(b"xaxb")[1::2]):
        builder.write(0, array, U8)
    with pytest.raises(TypeError):
        builder.write(0, [1, 2], U8)
    builder.write(1, B, F32)
    assert b"ab" in builder.finish(HEAD)


@cores
def test_writes_that_do_not_fit_are_refused(core: ModuleType) -> None:
    """Another shape, rank, item size or dtype is refused, and so is an invalid index."""
    builder = two_tensors(core)
    for array, dtype, match in (
        (np.zeros(3, np.uint8), U8, r"shape: got \[3\], expected \[2\]"),
        (np.zeros((2, 1), np.uint8), U8, r"shape: got \[2, 1\]"),
        (np.zeros((), np.uint8), U8, r"shape: got \[\]"),
        (np.zeros(2, np.int16), U8, "item size: got 2, expected 1"),
        (A, 11, "dtype: got 11"),
    ):
        with pytest.raises(ValueError, match=match):
            builder.write(0, array, dtype)
    for index in (-1, 2):
        with pytest.raises(IndexError, match="tensor"):
            builder.write(index, A, U8)


@cores
def test_finish_needs_every_tensor(core: ModuleType) -> None:
    """Memory that was never written is never returned; the builder can be completed."""
    builder = two_tensors(core)
    builder.write(0, A, U8)
    with pytest.raises(ValueError, match="tensor 1: never written"):
        builder.finish(HEAD)
    builder.write(1, B, F32)
    assert len(ExtractResponse.FromString(builder.finish(HEAD)).tensors) == 2


@cores
def test_refused_write_does_not_count_as_written(core: ModuleType) -> None:
    """A tensor whose only write was refused is not returned."""
    builder = two_tensors(core)
    builder.write(1, B, F32)
    with pytest.raises(ValueError, match="shape"):
        builder.write(0, B, F32)
    with pytest.raises(ValueError, match="tensor 0: never written"):
        builder.finish(HEAD)


@cores
@pytest.mark.parametrize("head", [b"", b"\x10", b"\x10\x04\x10"])
def test_head_must_have_the_size_laid_out(core: ModuleType, head: bytes) -> None:
    """A head of another size is refused, and the right one is still accepted."""
    builder = two_tensors(core)
    builder.write(0, A, U8)
    builder.write(1, B, F32)
    with pytest.raises(ValueError, match=f"head: got {len(head)} bytes, expected 2"):
        builder.finish(head)
    assert builder.finish(HEAD).startswith(HEAD)


@cores
def test_finished_builder_is_closed(core: ModuleType) -> None:
    """After finish the message can't change: no write and no second finish are possible."""
    builder = two_tensors(core)
    builder.write(0, A, U8)
    builder.write(1, B, F32)
    message = builder.finish(HEAD)
    copy = bytes(bytearray(message))
    with pytest.raises(ValueError, match="finished already"):
        builder.write(0, A[::-1], U8)
    with pytest.raises(ValueError, match="finished already"):
        builder.finish(HEAD)
    assert message == copy


@cores
def test_empty_message(core: ModuleType) -> None:
    """Without a head and tensors the message is empty."""
    assert core.encode([], field=1, head=b"") == b""
    assert core.encode([], field=1, head=HEAD) == HEAD


@cores
def test_dropped_builders_free_everything(core: ModuleType) -> None:
    """A refused finish and a builder dropped unfinished leak no memory."""
    layout = core.ReplyLayout([("", U8, (8 * MIB,)), ("", U8, (1,))], field=1, head_size=0)
    array = np.zeros(8 * MIB, np.uint8)
    tracemalloc.start()
    try:
        for _ in range(5):
            builder = core.ReplyBuilder(layout)
            builder.write(0, array, U8)
            with pytest.raises(ValueError, match="never written"):
                builder.finish(b"")
            del builder
        assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        tracemalloc.stop()


@cores
def test_arrays_are_released_after_a_write(core: ModuleType) -> None:
    """A written or refused array is released: a bytearray can be resized again."""
    builder = two_tensors(core)
    array = bytearray(2)
    builder.write(0, array, U8)
    array += b"x"
    with pytest.raises(ValueError, match="shape"):
        builder.write(0, array, U8)
    array += b"y"


@cores
def test_threads_write_different_tensors_at_once(core: ModuleType) -> None:
    """Each thread's tensors arrive completely."""
    count, size = 16, 256 * KIB
    arrays = [np.full(size, index, np.uint8) for index in range(count)]
    layout = core.ReplyLayout([("", U8, (size,))] * count, field=1, head_size=0)
    builder = core.ReplyBuilder(layout)
    barrier = threading.Barrier(4)

    def write(first: int) -> None:
        barrier.wait()
        for index in range(first, count, 4):
            builder.write(index, arrays[index], U8)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = core.decode(builder.finish(b""), field=1)[1]
    assert all(data == arrays[index].data for index, (*_, data) in enumerate(found))


def apart(core: ModuleType, size: int = 76, **where: int) -> tuple[object, bytearray]:
    """Return a builder of an uint8 [2] and a float32 [3] that stand in a buffer, and the buffer."""
    specs = [("a", U8, (2,)), ("b", F32, (3,))]
    layout = core.ReplyLayout(specs, field=1, head_size=2, apart=True)
    assert layout.payload_nbytes == 76
    buffer = bytearray(size)
    return core.ReplyBuilder(layout, buffer, **where), buffer


@cores
def test_payloads_apart_are_referred_to(core: ModuleType) -> None:
    """The message says where in the buffer each tensor is, and the buffer contains them."""
    where = {"region": 7, "generation": (1 << 64) - 1}
    builder, buffer = apart(core, **where)
    builder.write(1, B, F32)
    builder.write(0, A, U8)
    message = builder.finish(HEAD)
    reply = ExtractResponse.FromString(message)
    assert reply.extractor == 4
    assert [(t.name, t.data) for t in reply.tensors] == [("a", b""), ("b", b"")]
    slices = [t.shared for t in reply.tensors]
    assert [(s.offset, s.size) for s in slices] == [(0, 2), (64, 12)]
    assert {(s.region, s.generation) for s in slices} == {(7, (1 << 64) - 1)}
    assert buffer == A.tobytes() + bytes(62) + B.tobytes()
    found = core.decode(message, field=1)[1]
    assert [at for *_, at in found] == [(7, (1 << 64) - 1, 0, 2), (7, (1 << 64) - 1, 64, 12)]


@settings(max_examples=150, deadline=None)
@given(specs, st.integers(0, 300), st.integers(1, (1 << 29) - 1), st.integers(0, (1 << 64) - 1))
def test_payloads_apart_agree_with_the_twin(
    specs: list, head_size: int, field: int, region: int
) -> None:
    """For any tensors, both put them at the same multiples of 64 and write the same bytes."""
    made = []
    for core in (_core, _pure):
        layout = core.ReplyLayout(specs, field=field, head_size=head_size, apart=True)
        buffer = bytearray(layout.payload_nbytes)
        builder = core.ReplyBuilder(layout, buffer, region=region, generation=head_size)
        for index, (_, dtype, shape) in enumerate(specs):
            builder.write(index, np.full(shape, index, "f4" if dtype == F32 else "u1"), dtype)
        made.append((builder.finish(bytes(head_size)), bytes(buffer), layout.nbytes))
    assert made[0] == made[1]
    assert len(made[0][0]) == made[0][2]


@cores
def test_buffers_that_do_not_fit_are_refused(core: ModuleType) -> None:
    """A buffer is needed only if payloads are apart, and must be large enough and writable."""
    within = core.ReplyLayout([("", U8, (100,))], field=1, head_size=0)
    layout = core.ReplyLayout([("", U8, (100,))], field=1, head_size=0, apart=True)
    assert (within.payload_nbytes, layout.payload_nbytes) == (0, 100)
    for arguments, match in (
        ((layout,), "expected a buffer"),
        ((within, bytearray(100)), "expected a buffer"),
        ((layout, bytearray(99)), "got 99 bytes, expected 100"),
    ):
        with pytest.raises(ValueError, match=match):
            core.ReplyBuilder(*arguments)
    for buffer in (bytes(100), memoryview(bytearray(200))[::2]):
        with pytest.raises(BufferError):
            core.ReplyBuilder(layout, buffer)
    with pytest.raises(TypeError):
        core.ReplyBuilder(layout, 3)


@cores
def test_buffer_is_held_until_the_message_is_finished(core: ModuleType) -> None:
    """The buffer stays alive while it is written to; a finished builder releases it."""
    builder, buffer = apart(core)
    with pytest.raises(BufferError):
        buffer += b"x"
    builder.write(0, A, U8)
    builder.write(1, B, F32)
    builder.finish(HEAD)
    buffer += b"x"
    builder, buffer = apart(core)
    del builder
    buffer += b"x"


@cores
@pytest.mark.parametrize("offset", [0, 1, 16, 63])
@pytest.mark.parametrize("more", [0, 1, 63, 64])
def test_large_payloads_apart_arrive_whole(core: ModuleType, offset: int, more: int) -> None:
    """A payload too large for the caches is written correctly, and nothing next to it."""
    random = np.random.default_rng(offset)
    array = np.frombuffer(random.bytes(2 * (MIB + more)), np.uint8).reshape(2, 1, -1)
    layout = core.ReplyLayout([("", U8, array.shape)] * 2, field=1, head_size=0, apart=True)
    memory = bytearray(b"\xaa" * (offset + layout.payload_nbytes + 64))
    target = memoryview(memory)[offset : offset + layout.payload_nbytes]
    builder = core.ReplyBuilder(layout, target)
    builder.write(0, array, U8)
    builder.write(1, array[::-1], U8)
    builder.finish(b"")
    begin = layout.payload_nbytes - array.nbytes
    assert target[: array.nbytes] == array.tobytes()
    assert target[begin:] == array[::-1].tobytes()
    assert memory[:offset] == b"\xaa" * offset
    assert memory[offset + layout.payload_nbytes :] == b"\xaa" * 64


@cores
def test_payloads_apart_have_the_limits_of_a_message(core: ModuleType) -> None:
    """Tensors in another buffer may not exceed 2**31 - 1 bytes with their message either."""
    size = (1 << 30) - 200
    core.ReplyLayout([("", U8, (size,))] * 2, field=1, head_size=0, apart=True)
    for shape in ((1 << 31) - 1,), (1 << 30,):
        with pytest.raises(ValueError, match="larger than"):
            core.ReplyLayout([("", U8, shape)] * 2, field=1, head_size=0, apart=True)


@pytest.mark.parametrize("rival", ["write", "finish"])
def test_what_meets_a_write_in_flight_is_refused(rival: str) -> None:
    """A second write of the tensor, or finish, is refused while a write is in flight, and no later.

    Which calls meet is up to the scheduler, so they are sent off until some do.
    """
    array = np.broadcast_to(np.uint8(7), (8 * MIB, 4))[:, ::2]
    layout = _core.ReplyLayout([("", U8, array.shape)], field=1, head_size=0)
    for _ in range(100):
        builder = _core.ReplyBuilder(layout)
        builder.write(0, array, U8)
        about_to_write = threading.Event()
        thread = threading.Thread(target=write_after, args=(about_to_write, builder, array))
        thread.start()
        # The thread gives the GIL up in its write, which is when this one goes on.
        about_to_write.wait()
        message = outcome(builder.write, 0, array, U8) if rival == "write" else finish(builder)
        thread.join()
        if message in {
            "builder: a write is in flight",
            "tensor 0: being written by another thread",
        }:
            assert builder.finish(b"").count(7) >= array.size
            return
    pytest.fail("no call met a write in flight")


def write_after(event: threading.Event, builder: _core.ReplyBuilder, array: np.ndarray) -> None:
    """Signal that a write is about to begin, and write."""
    event.set()
    outcome(builder.write, 0, array, U8)


def finish(builder: _core.ReplyBuilder) -> str:
    """Finish, and return the error's text if there is one."""
    return outcome(builder.finish, b"")


def outcome(call: object, *arguments: object) -> str:
    """Return the text of the ValueError that a call raised, or nothing."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return ""
