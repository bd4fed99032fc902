"""Client and server of one machine share memory, and nobody notices where they can't."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch

from layertap import Client, Features, StreamRequest, errors
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import encode_request
from layertap.wire.shared.hub import SharedMemory
from layertap.wire.shared.leases import End
from layertap.wire.shared.regions import supported
from tinynets import ITEM

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20
LARGE = np.random.default_rng(0).random((600, *ITEM), np.float32)
LAYERS = ["conv1", "layer1"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a net whose layers are large for a large batch, and two odd ones."""
    engine = Engine(Limits(request_bytes=8 * MIB))
    for name in ("residual", "raises", "dynamic"):
        engine.load(ModelSpec(f"tinynets:{name}", item_shape=ITEM))
    yield engine
    engine.close()


class Served:
    """A running server, what it shares, and clients of it."""

    def __init__(self, engine: Engine, mib: int, lease_seconds: float, port: int = 0) -> None:
        self.server = FeatureServer(
            engine,
            ServerOptions(
                port=port,
                shared_memory_bytes=mib * MIB,
                shared_memory_lease_seconds=lease_seconds,
            ),
        )
        self.server.start()
        self.server.ready()
        self.address = self.server.address

    @property
    def memory(self) -> SharedMemory:
        memory = self.server.shared_memory
        assert memory is not None
        return memory

    def regions(self) -> dict[str, int]:
        return {state: n for state, n in self.memory.state().regions.items() if n}


@pytest.fixture
def served(engine: Engine) -> Iterator[Served]:
    """A server that shares 64 MiB for a minute."""
    served = Served(engine, 64, 60.0)
    yield served
    served.server.stop(0)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, np.ndarray]:
    """What comes through the network."""
    served = Served(engine, 0, 60.0)
    with Client(served.address) as client:
        features = ask(client, LARGE)
    served.server.stop(0)
    return {name: array.copy() for name, array in features.items()}


def ask(client: Client, given: object) -> Features:
    """Ask for layers by hooks: an extractor that the server chose anew could round otherwise."""
    return client.extract("residual", given, LAYERS, extractor="hook")


def same(got: object, expected: dict[str, np.ndarray]) -> bool:
    assert list(got) == list(expected)
    return all(np.array_equal(got[name], expected[name]) for name in expected)


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until another thread or process has seen to it."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.005)
    return condition()


def test_large_replies_come_through_shared_memory(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """The values are those of the network, read-only and aligned; their lease ends with them."""
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
    """A second reply takes another region while the first is looked at, and its own afterwards."""
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
    """What is quicker through the network goes there, and counts as no fallback."""
    client.extract("residual", LARGE[:1], LAYERS)
    state = served.memory.state()
    assert (state.sessions, state.reply_bytes, state.fallbacks) == (1, 0, {})
    assert served.regions() == {}


def test_torch_tensors_may_be_written_to(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Writing to the tensors changes neither the arrays nor what the next reply holds."""
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
    """Strided, big-endian and torch inputs arrive as their values, through an input region."""
    channels_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(LARGE, 1, 3)), 3, 1)
    for given in (channels_last, LARGE.astype(">f4"), torch.from_numpy(LARGE)):
        assert same(ask(client, given), expected)
    assert served.regions()["input"] == 1


def test_streams_share_memory_too(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Each item's reply has a lease of its own; errors and small replies come as ever."""
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
    """A reply whose lease ran out before anybody read it is there, right, and then given back."""
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
    """A reply that is laid out after the pass goes through shared memory as well."""
    with Client(served.address, shared_memory=False) as plain:
        wanted = plain.extract("dynamic", LARGE, "**")
    got = client.extract("dynamic", LARGE, "**")
    assert same(got, dict(wanted))


@pytest.mark.parametrize("how", ["turned off here", "turned off there", "another machine"])
def test_without_shared_memory_all_is_as_ever(
    engine: Engine, expected: dict[str, np.ndarray], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where either end does without, or there is no such socket here, replies are sent."""
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
    """A wish that is none is said at once."""
    with pytest.raises(errors.InvalidInputError, match="shared_memory: got 'yes'"):
        Client("127.0.0.1:1", shared_memory="yes")  # type: ignore[arg-type]


def test_auto_asks_servers_of_this_machine_only(served: Served) -> None:
    """Nothing is asked of a server elsewhere, unless it is wished for."""
    assert Client("[::1]:1")._memory._open is not None
    assert Client("unix:/run/layertap")._memory._open is not None
    assert Client("features.example:8001")._memory._open is None
    assert Client("features.example:8001", shared_memory=True)._memory._open is not None


def test_full_memory_sends_replies_through_the_network(
    engine: Engine, expected: dict[str, np.ndarray]
) -> None:
    """A hoarder gets all it asks for, right, whichever way; it counts why."""
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
    """What the client still looks at is not written to again; it gets new regions meanwhile."""
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
    """After close the arrays stay right while others use the server; the lease ends with them."""
    client = Client(served.address)
    features = ask(client, LARGE)
    client.close()
    with Client(served.address) as other:
        for _ in range(3):
            ask(other, LARGE[::-1])
        assert same(features, expected)
    assert served.regions()["leased"] == 1
    del features
    assert eventually(lambda: served.memory.state().sessions == 0)
    assert "leased" not in served.regions()


def test_client_that_is_forgotten_ends_its_session(served: Served) -> None:
    """A client that nobody closed ends its session when it is collected."""
    client = Client(served.address)
    client.extract("residual", LARGE, "conv1")
    assert served.memory.state().sessions == 1
    client._channel.close()
    del client
    assert eventually(lambda: served.memory.state().sessions == 0)


def test_failed_requests_hold_nothing(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that fails after its region was lent leaves the region free."""
    # pytest would keep the records, and with them the frames of what failed.
    caplog.set_level(logging.CRITICAL, "layertap.engine.work")
    for _ in range(5):
        with pytest.raises(errors.ModelRunError):
            client.extract("raises", LARGE + 1e6, "**")
    assert eventually(lambda: "leased" not in served.regions())
    assert served.memory.state().reply_bytes == 0


def test_session_that_the_server_ended_is_opened_again(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """No request fails because of it, and the next ones share memory again."""
    first = ask(client, LARGE)
    [session] = served.memory._sessions.values()
    served.memory.close(session, End.RETIRE)
    for _ in range(3):
        assert same(ask(client, LARGE), expected)
    assert same(first, expected)
    assert eventually(lambda: served.memory.state().sessions == 1)
    assert served.memory.session(session.id) is None


def test_lost_input_is_sent_again(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Where the server has let go of the input region the request goes through the network."""
    ask(client, LARGE)
    [session] = served.memory._sessions.values()
    [lease] = [lease for lease in session.leases.values() if lease.region.kind.name == "INPUT"]
    served.memory.give_back(session, lease.region.number, lease.generation)
    assert same(ask(client, LARGE), expected)


def test_threads_share_one_session(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Six threads get the answers to their own questions, through one session."""
    wrong: list[int] = []

    def work(number: int) -> None:
        x = LARGE if number % 2 else np.ascontiguousarray(LARGE[::-1])
        for _ in range(4):
            got = ask(client, x)
            values = {n: a if number % 2 else a[::-1] for n, a in got.items()}
            if not all(np.allclose(values[n], expected[n], atol=1e-5) for n in expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert served.memory.state().sessions == 1
    assert eventually(lambda: "leased" not in served.regions())


def test_a_thousand_calls_leak_nothing(served: Served, client: Client) -> None:
    """However many calls, the files open are those of the few regions that take turns."""

    def others() -> int:
        """Count the files besides each region's: two at either end, Python's mmap has its own."""
        gc.collect()
        open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        return open_files - 4 * sum(served.memory.state().regions.values())

    client.extract("residual", LARGE[:100], LAYERS)
    before = others()
    for _ in range(1000):
        client.extract("residual", LARGE[:100], LAYERS)
    assert served.memory.state().reply_bytes >= 1000 * 256 * 1024
    assert eventually(lambda: "leased" not in served.regions())
    assert others() == before
    assert served.regions()["free"] <= 16


def hostile(
    session: bytes, region: int = 1, generation: int = 1, offset: int = 0, size: int = 3072
) -> bytes:
    request = feature_service_pb2.ExtractRequest(
        model="residual",
        layers=[feature_service_pb2.LayerSelection(layer="conv1")],
        shared_memory_session=session,
    )
    request.tensor.dtype = 1  # type: ignore[assignment]
    request.tensor.shape.extend((1, *ITEM))
    shared = request.tensor.shared
    shared.region, shared.generation, shared.offset, shared.size = region, generation, offset, size
    return request.SerializeToString()


@pytest.mark.parametrize(
    ("session", "place", "refusal"),
    [
        (b"", {}, "FAILED_PRECONDITION: shared_memory_session"),
        (b"x" * 16, {}, "FAILED_PRECONDITION: shared_memory_session"),
        (b"x" * 100_000, {}, "FAILED_PRECONDITION: shared_memory_session"),
        (None, {"region": 77}, "FAILED_PRECONDITION: region 77"),
        (None, {"generation": 77}, "FAILED_PRECONDITION: generation 77"),
        (None, {"offset": (1 << 64) - 1}, "INVALID_ARGUMENT: expected them within"),
        (None, {"offset": (1 << 64) - 3072}, "INVALID_ARGUMENT: expected them within"),
        (None, {"size": 3073}, "INVALID_ARGUMENT: expected 3072"),
        (None, {"size": 0}, "INVALID_ARGUMENT: expected 3072"),
        (None, {"size": (1 << 64) - 1}, "INVALID_ARGUMENT: expected 3072"),
    ],
)
def test_references_that_are_wrong_are_refused(
    served: Served, client: Client, session: bytes | None, place: dict[str, int], refusal: str
) -> None:
    """No number in a request reaches memory that is not the sender's, and the status says so."""
    client.extract("residual", LARGE, "conv1")
    [own] = served.memory._sessions.values()
    [lease] = [lease for lease in own.leases.values() if lease.region.kind.name == "INPUT"]
    right = {"region": lease.region.number, "generation": lease.generation}
    with grpc.insecure_channel(served.address) as channel:
        call = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        assert call(hostile(own.id, **right))
        with pytest.raises(grpc.RpcError) as caught:
            call(hostile(own.id if session is None else session, **{**right, **place}))
    code, text = refusal.split(": ")
    assert caught.value.code().name == code, caught.value.details()
    assert text in caught.value.details()


def test_inputs_have_the_limit_of_requests(served: Served, client: Client) -> None:
    """An input over the server's request limit is refused, though it was not sent."""
    with pytest.raises(errors.InvalidInputError, match="expected at most 8388608"):
        client.extract("residual", np.zeros((2740, *ITEM), np.float32), "avgpool")


def test_stock_clients_see_no_slices(served: Served) -> None:
    """Who names no session gets every byte in the message."""
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[feature_service_pb2.LayerSelection(layer="conv1")]
    )
    with grpc.insecure_channel(
        served.address, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        call = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        reply = feature_service_pb2.ExtractResponse.FromString(call(encode_request(request, LARGE)))
    [tensor] = reply.tensors
    assert not tensor.HasField("shared")
    assert len(tensor.data) == 600 * 8 * 8 * 8 * 4


def test_forked_children_leave_their_parents_session_alone(served: Served) -> None:
    """A child that drops its copies of the arrays and exits gives nothing of its parent's back."""
    code = textwrap.dedent(f"""
        import gc, os, sys, numpy as np
        from layertap import Client
        client = Client({served.address!r})
        x = np.random.default_rng(0).random((600, 3, 16, 16), np.float32)
        features = client.extract("residual", x, "conv1")
        copy = features["conv1"].copy()
        connection = client._memory._current
        child = os.fork()
        if child == 0:
            del features
            gc.collect()
            os._exit(0 if connection.lost else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("forked", flush=True)
        sys.stdin.readline()
        assert np.array_equal(features["conv1"], copy)
        again = client.extract("residual", x, "conv1")
        assert np.array_equal(again["conv1"], copy)
        print("right", flush=True)
    """)
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "forked\n"
    time.sleep(0.2)
    assert served.regions()["leased"] == 1
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "right\n"
    child.stdin.close()
    assert child.wait(60) == 0
    child.stdout.close()
