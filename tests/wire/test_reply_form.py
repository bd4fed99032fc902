"""The native form is an ExtractResponse, whose tensors may stand in shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from layertap.errors import OverloadedError
from layertap.selection import Extractor
from layertap.v1.feature_service_pb2 import ExtractResponse, ExtractStreamResponse
from layertap.wire.messages import Timings
from layertap.wire.reply_form import NativeForm
from layertap.wire.shared.hub import LEAST_BYTES, SharedMemory, Space
from layertap.wire.shared.regions import Region, supported
from layertap.wire.stream_messages import id_field

needs_shared_memory = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")


class Channel:
    """A client's socket that keeps the regions that it is told of."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}

    def announce(self, region: Region) -> bool:
        self.regions[region.number] = region
        return True

    def poll(self) -> None: ...

    def forget(self, number: int, generation: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def space() -> Space:
    memory = SharedMemory(64 << 20)
    session = memory.open(Channel())
    assert session is not None
    return Space(memory, session)


def test_the_native_form_is_what_upb_reads() -> None:
    """Extractor, timings, fields of its own and tensors, at the size that was laid out."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    form = NativeForm(Extractor.FX, fields=id_field(7))
    layout = form.lay_out([("a", 1, (2, 3))])
    admitted: list[int] = []
    builder = form.builder(layout, admitted.append)
    builder.write(0, x, 1)
    message = builder.finish(form.head(Timings(1, 2, 3, 4)))
    assert ([len(message)], form.shared_bytes) == (admitted, 0)
    reply = ExtractStreamResponse.FromString(message)
    assert (reply.id, reply.timings.compute_ns, reply.tensors[0].name) == (7, 3, "a")
    assert reply.tensors[0].data == x.tobytes()


@needs_shared_memory
def test_large_tensors_stand_in_shared_memory(space: Space) -> None:
    """The message, of which alone admission is told, refers to the region that has the bytes."""
    x = np.random.default_rng(0).random((2, LEAST_BYTES // 4), np.float32)
    form = NativeForm(Extractor.HOOK, space=space)
    layout = form.lay_out([("a", 1, x.shape)])
    admitted: list[int] = []
    builder = form.builder(layout, admitted.append)
    builder.write(0, x, 1)
    message = builder.finish(form.head(Timings()))
    assert layout.nbytes > x.nbytes == form.shared_bytes
    assert admitted == [len(message)]
    (tensor,) = ExtractResponse.FromString(message).tensors
    region = space.session.channel.regions[tensor.shared.region]
    begin = tensor.shared.offset
    assert region.memory[begin : begin + tensor.shared.size] == x.tobytes()
    assert space.memory.state().regions["leased"] == 1


@needs_shared_memory
def test_small_tensors_stay_in_the_message(space: Space) -> None:
    """What is as quick to send is sent."""
    form = NativeForm(Extractor.HOOK, space=space)
    builder = form.builder(form.lay_out([("a", 1, (10,))]), lambda nbytes: None)
    builder.write(0, np.ones(10, np.float32), 1)
    (tensor,) = ExtractResponse.FromString(builder.finish(form.head(Timings()))).tensors
    assert len(tensor.data) == 40
    assert not tensor.HasField("shared")
    assert space.memory.state().regions["leased"] == 0


@needs_shared_memory
def test_a_reply_that_is_not_admitted_keeps_no_region(space: Space) -> None:
    """What was lent for it is free again."""

    def refuse(nbytes: int) -> None:
        raise OverloadedError("full")

    form = NativeForm(Extractor.HOOK, space=space)
    layout = form.lay_out([("a", 1, (LEAST_BYTES,))])
    with pytest.raises(OverloadedError):
        form.builder(layout, refuse)
    state = space.memory.state()
    assert (state.regions["leased"], state.regions["free"]) == (0, 1)
