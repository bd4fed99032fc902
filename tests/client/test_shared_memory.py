"""Client and server on one machine share memory; if they can't, everything works as without it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from layertap import Client, StreamRequest, errors
from layertap.engine import Engine
from layertap.shm.regions import supported
from sharing import LARGE, LAYERS, MIB, Served, ask, eventually, same

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")


def test_large_replies_come_through_shared_memory(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """The values are those of the network, read-only and aligned; then the lease ends."""
    features = ask(client, LARGE)
    assert same(features, expected)
    for array in features.values():
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True
    assert served.memory.state().reply_bytes == sum(a.nbytes for a in expected.values())
    assert served.regions() == {"leased": 1, "input": 1}
    one = features["layer1"][3:5, 1]
    del features, array
    gc.collect()
    assert served.regions() == {"leased": 1, "input": 1}
    assert np.array_equal(one, expected["layer1"][3:5, 1])
    del one
    assert eventually(lambda: served.regions() == {"free": 1, "input": 1})


def test_regions_are_used_again_and_arrays_stay(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """A second reply uses another region while the first is in use, and the same one afterwards."""
    first = ask(client, LARGE)
    second = ask(client, LARGE[::-1])
    assert same(first, expected)
    assert not np.shares_memory(first["conv1"], second["conv1"])
    del first, second
    assert eventually(lambda: served.regions() == {"free": 2, "input": 1})
    for _ in range(20):
        assert same(ask(client, LARGE), expected)
    assert eventually(lambda: served.regions() == {"free": 2, "input": 1})


def test_small_replies_and_inputs_stay_on_the_wire(served: Served, client: Client) -> None:
    """What is faster through the network is sent there, and doesn't count as a fallback."""
    client.extract("residual", LARGE[:1], LAYERS)
    state = served.memory.state()
    assert (state.sessions, state.reply_bytes, state.fallbacks) == (1, 0, {})
    assert served.regions() == {}


def test_torch_tensors_may_be_written_to(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Writing to the tensors changes neither the arrays nor the next reply."""
    features = ask(client, LARGE)
    tensors = features.torch()
    assert torch.equal(tensors["layer1"], torch.from_numpy(expected["layer1"]))
    tensors["conv1"].add_(1)
    assert np.array_equal(tensors["conv1"].numpy(), expected["conv1"] + 1)
    assert same(features, expected)
    assert torch.equal(features.torch()["conv1"], tensors["conv1"])
    del features
    gc.collect()
    assert served.regions() == {"leased": 1, "input": 1}
    assert same(ask(client, LARGE), expected)
    assert np.array_equal(tensors["conv1"].numpy(), expected["conv1"] + 1)
    del tensors
    assert eventually(lambda: "leased" not in served.regions())


def test_inputs_of_any_layout_are_written_as_they_are_meant(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Strided, big-endian and torch inputs arrive with the right values through an input region."""
    channels_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(LARGE, 1, 3)), 3, 1)
    for given in (channels_last, LARGE.astype(">f4"), torch.from_numpy(LARGE)):
        assert same(ask(client, given), expected)
    assert served.regions()["input"] == 1


def test_streams_share_memory_too(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Each item's reply has its own lease; errors and small replies are sent as usual."""
    items = [StreamRequest("residual", LARGE, LAYERS, "hook", key=n) for n in range(4)]
    items.append(StreamRequest("residual", LARGE[:1], "conv1", key="small"))
    items.append(StreamRequest("residual", LARGE, "no_such_layer", key="bad"))
    with client.stream() as stream:
        outcomes = dict(stream.extract(items))
    assert isinstance(outcomes.pop("bad"), errors.LayerNotFoundError)
    assert outcomes.pop("small")["conv1"].shape[0] == 1
    assert all(same(features, expected) for features in outcomes.values())
    assert served.regions() == {"leased": 4}


def test_slow_readers_of_streams_find_what_was_lent(
    engine: Engine, expected: dict[str, np.ndarray]
) -> None:
    """A reply whose lease expired before it was read is intact, and is returned afterwards."""
    served = Served(engine, 64, 0.2)
    items = [StreamRequest("residual", LARGE, LAYERS, "hook") for _ in range(4)]
    with Client(served.address) as client:
        with client.stream() as stream:
            got = stream.extract(items, ordered=True)
            assert same(next(got)[1], expected)
            assert eventually(lambda: served.regions().get("retired") == 3)
            assert all(same(features, expected) for _, features in got)
        assert eventually(lambda: served.regions() == {})
        # Replies that nobody reads are given back when the stream ends.
        with client.stream() as stream:
            got = stream.extract(items)
            next(got)
            assert eventually(lambda: served.regions().get("retired") == 3)
            assert served.regions()["retired"] == 3
        del got
        assert eventually(lambda: served.regions() == {})
    served.server.stop(0)


def test_values_of_unpredictable_shape_are_shared(served: Served, client: Client) -> None:
    """A reply that is laid out after the pass goes through shared memory too."""
    with Client(served.address, shared_memory=False) as plain:
        wanted = plain.extract("dynamic", LARGE, "**")
    got = client.extract("dynamic", LARGE, "**")
    assert same(got, dict(wanted))


@pytest.mark.parametrize("how", ["turned off here", "turned off there", "another machine"])
def test_without_shared_memory_all_is_as_ever(
    engine: Engine, expected: dict[str, np.ndarray], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If either end has shared memory disabled, or there is no such socket, replies are sent."""
    served = Served(engine, 0 if how == "turned off there" else 64, 60.0)
    if how == "another machine":
        monkeypatch.setattr(served.server._broker, "name", "layertap-elsewhere")
    wish = how != "turned off here"
    with Client(served.address, shared_memory=wish) as client:
        for _ in range(2):
            assert same(ask(client, LARGE), expected)
    if served.server.shared_memory is not None:
        assert served.memory.state().sessions == 0
        assert served.memory.state().reply_bytes == 0
    served.server.stop(0)


def test_wishes_are_checked() -> None:
    """An invalid value of ``shared_memory`` raises at once."""
    with pytest.raises(errors.InvalidInputError, match="shared_memory: got 'yes'"):
        Client("127.0.0.1:1", shared_memory="yes")  # type: ignore[arg-type]


def test_auto_asks_servers_of_this_machine_only(served: Served) -> None:
    """A server on another machine is asked for shared memory only if this is requested."""
    assert Client("[::1]:1")._opened()[0].memory._open is not None
    assert Client("unix:/run/layertap")._opened()[0].memory._open is not None
    assert Client("features.example:8001")._opened()[0].memory._open is None
    assert Client("features.example:8001", shared_memory=True)._opened()[0].memory._open is not None


def test_full_memory_sends_replies_through_the_network(
    engine: Engine, expected: dict[str, np.ndarray]
) -> None:
    """A client that holds all memory still gets correct replies, and counts the fallbacks."""
    served = Served(engine, 12, 60.0)
    with Client(served.address) as client:
        kept = [ask(client, LARGE) for _ in range(6)]
        assert all(same(features, expected) for features in kept)
        state = served.memory.state()
        assert 0 < state.reply_bytes < 6 * sum(a.nbytes for a in expected.values())
        assert state.fallbacks["share"] > 0
        assert sum(state.bytes.values()) <= 12 * MIB
        del kept
        assert eventually(lambda: "leased" not in served.regions())
    served.server.stop(0)


def test_lease_that_runs_out_leaves_the_arrays_right(
    engine: Engine, expected: dict[str, np.ndarray]
) -> None:
    """A region that the client still reads is not reused; the client gets new ones meanwhile."""
    served = Served(engine, 64, 0.2)
    with Client(served.address) as client:
        first = ask(client, LARGE)
        assert eventually(lambda: "retired" in served.regions())
        for _ in range(3):
            assert not same(ask(client, LARGE[::-1]), expected)
        assert same(first, expected)
        assert np.array_equal(first.torch()["conv1"].numpy(), expected["conv1"])
        del first
        assert eventually(lambda: "retired" not in served.regions())
        # Nothing is used: the server lets go of all, the client's input region included.
        assert eventually(lambda: served.regions() == {})
        assert same(ask(client, LARGE), expected)
    served.server.stop(0)


def test_features_outlive_their_client(served: Served, expected: dict[str, np.ndarray]) -> None:
    """After close the arrays stay intact while others use the server; the lease ends with them."""
    client = Client(served.address)
    features = ask(client, LARGE)
    client.close()
    with Client(served.address) as other:
        for _ in range(3):
            ask(other, LARGE[::-1])
        assert same(features, expected)
    assert eventually(lambda: served.regions().get("leased") == 1)
    del features
    assert eventually(lambda: served.memory.state().sessions == 0)
    assert "leased" not in served.regions()


def test_client_that_is_forgotten_ends_its_session(served: Served) -> None:
    """A client that was never closed ends its session when it is garbage-collected."""
    client = Client(served.address)
    client.extract("residual", LARGE, "conv1")
    assert served.memory.state().sessions == 1
    client._opened()[0].channel.close()
    del client
    assert eventually(lambda: served.memory.state().sessions == 0)
