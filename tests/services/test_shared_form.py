"""The tensors of a large native reply are written to memory that is lent to the client."""

from __future__ import annotations

import numpy as np
import pytest

from layertap.errors import OverloadedError
from layertap.selection import Extractor
from layertap.services.shared_form import SharedForm
from layertap.shm.regions import Region, supported
from layertap.shm.shared_memory import LEAST_BYTES, SessionMemory, SharedMemory
from layertap.timings import Timings
from layertap.v1.feature_service_pb2 import ExtractResponse

needs_shared_memory = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")


class Channel:
    """A client's socket that records the regions that the server announces."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}

    def announce(self, region: Region) -> bool:
        self.regions[region.number] = region
        return True

    def poll(self) -> None: ...

    def forget(self, number: int, generation: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def memory() -> SessionMemory:
    memory = SharedMemory(64 << 20)
    session = memory.open(Channel())
    assert session is not None
    return SessionMemory(memory, session)


@needs_shared_memory
def test_large_tensors_stand_in_shared_memory(memory: SessionMemory) -> None:
    """The message refers to the region with the bytes; only the message counts for admission."""
    x = np.random.default_rng(0).random((2, LEAST_BYTES // 4), np.float32)
    form = SharedForm(Extractor.HOOK, memory=memory)
    nbytes = form.lay_out([("a", 1, x.shape)])
    admitted: list[int] = []
    builder = form.builder(admitted.append)
    builder.write(0, x, 1)
    message = builder.finish(form.head(Timings()))
    assert nbytes > x.nbytes == form.shared_bytes
    assert admitted == [len(message)]
    (tensor,) = ExtractResponse.FromString(message).tensors
    region = memory.session.channel.regions[tensor.shared.region]
    begin = tensor.shared.offset
    assert region.memory[begin : begin + tensor.shared.size] == x.tobytes()
    assert memory.memory.state().regions["leased"] == 1


@needs_shared_memory
def test_small_tensors_stay_in_the_message(memory: SessionMemory) -> None:
    """What is as fast to send is sent."""
    form = SharedForm(Extractor.HOOK, memory=memory)
    form.lay_out([("a", 1, (10,))])
    builder = form.builder(lambda nbytes: None)
    builder.write(0, np.ones(10, np.float32), 1)
    (tensor,) = ExtractResponse.FromString(builder.finish(form.head(Timings()))).tensors
    assert len(tensor.data) == 40
    assert not tensor.HasField("shared")
    assert memory.memory.state().regions["leased"] == 0


@needs_shared_memory
def test_a_reply_that_is_not_admitted_keeps_no_region(memory: SessionMemory) -> None:
    """The region that was lent for it is free again."""

    def refuse(nbytes: int) -> None:
        raise OverloadedError("full")

    form = SharedForm(Extractor.HOOK, memory=memory)
    form.lay_out([("a", 1, (LEAST_BYTES,))])
    with pytest.raises(OverloadedError):
        form.builder(refuse)
    state = memory.memory.state()
    assert (state.regions["leased"], state.regions["free"]) == (0, 1)
