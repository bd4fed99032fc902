"""Faults around shared memory leak nothing, and give nobody access to another client's data."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time

import grpc
import numpy as np
import pytest

from layertap import Client, errors
from layertap.shm.leases import End
from layertap.shm.regions import supported
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import encode_request
from sharing import LARGE, LAYERS, Served, ask, eventually, same
from tinynets import ITEM

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")


def test_failed_requests_hold_nothing(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """If the model fails after a region was lent, the region is free again."""
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
    """No request fails when the server ends a session, and the next requests share memory again."""
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
    """If the server has taken back the input region, the request goes through the network."""
    ask(client, LARGE)
    [session] = served.memory._sessions.values()
    [lease] = [lease for lease in session.leases.values() if lease.region.kind.name == "INPUT"]
    served.memory.give_back(session, lease.region.number, lease.generation)
    assert same(ask(client, LARGE), expected)


def test_threads_share_one_session(
    served: Served, client: Client, expected: dict[str, np.ndarray]
) -> None:
    """Six threads that share one session get the answers to their own requests."""
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


def test_hundreds_of_calls_leak_nothing(served: Served, client: Client) -> None:
    """However many calls are made, only the files of a few alternating regions are open."""

    def others() -> int:
        """Count the files besides those of regions: two per end, of which one is mmap's."""
        gc.collect()
        open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        return open_files - 4 * sum(served.memory.state().regions.values())

    client.extract("residual", LARGE[:100], LAYERS)
    before = others()
    for _ in range(250):
        client.extract("residual", LARGE[:100], LAYERS)
    assert served.memory.state().reply_bytes >= 250 * 256 * 1024
    assert eventually(lambda: "leased" not in served.regions())
    assert others() == before
    assert served.regions()["free"] <= 16


def test_sessions_that_ended_leave_no_file(served: Served, client: Client) -> None:
    """A long-lived client whose session ends many times keeps only one socket."""

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def end_one() -> None:
        client.extract("residual", LARGE[:1], LAYERS)
        [session] = served.memory._sessions.values()
        served.memory.close(session, End.RETIRE)
        assert eventually(lambda: client._transports[0].memory._current.lost)

    end_one()
    end_one()
    before = open_files()
    for _ in range(5):
        end_one()
    # Another thread may have a file open for a moment.
    assert eventually(lambda: open_files() <= before)


def test_arrays_without_a_dtype_are_refused_as_on_the_wire(served: Served, client: Client) -> None:
    """An array that no message can hold raises InvalidInputError in either case."""
    for size in (1, 100_000):
        with pytest.raises(errors.InvalidInputError, match="dtype: got numpy object"):
            client.extract("residual", np.full((size, 1), None), LAYERS)


def hostile(
    session: bytes, region: int = 1, generation: int = 1, offset: int = 0, size: int = 3072
) -> bytes:
    request = feature_service_pb2.ExtractRequest(
        model="residual",
        layers=[feature_service_pb2.LayerSelection(layer="conv1")],
        shared_memory_session=session,
    )
    shared = request.inputs.add(dtype=1, shape=(1, *ITEM)).shared  # type: ignore[arg-type]
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
    """No reference in a request reaches memory of another client, and the status says so."""
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
    """An input over the server's request limit is refused, although it was not sent."""
    with pytest.raises(errors.InvalidInputError, match="expected at most 8388608"):
        client.extract("residual", np.zeros((2740, *ITEM), np.float32), "avgpool")


def test_stock_clients_see_no_slices(served: Served) -> None:
    """A client that names no session gets all bytes in the message."""
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[feature_service_pb2.LayerSelection(layer="conv1")]
    )
    with grpc.insecure_channel(
        served.address, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        call = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        reply = feature_service_pb2.ExtractResponse.FromString(
            call(encode_request(request, [("", LARGE)]))
        )
    [tensor] = reply.tensors
    assert not tensor.HasField("shared")
    assert len(tensor.data) == 600 * 8 * 8 * 8 * 4


def test_forked_children_leave_their_parents_session_alone(served: Served) -> None:
    """A child that drops its copies of the arrays and exits returns none of its parent's leases."""
    code = textwrap.dedent(f"""
        import gc, os, sys, numpy as np
        from layertap import Client
        client = Client({served.address!r})
        x = np.random.default_rng(0).random((600, 3, 16, 16), np.float32)
        features = client.extract("residual", x, "conv1")
        copy = features["conv1"].copy()
        connection = client._transports[0].memory._current
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
