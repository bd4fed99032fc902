"""A client of several servers shares its calls among them, and does without one of them."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kept import kept
from layertap import AsyncClient, Client, Features, StreamRequest
from layertap.app.server import FeatureServer, ServerOptions
from layertap.client.balance import Attempts, Balance
from layertap.client.concurrent_calls import concurrent_calls
from layertap.engine import Engine, Extraction
from layertap.errors import (
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from layertap.models import ModelSpec
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode
from ports import free_port
from processes import serving
from tinynets import ITEM

DOCUMENTED = ("features-1:8001", "features-2:8001", "127.0.0.1:8001")
X = np.zeros((1, *ITEM), np.float32)


class Count:
    """Counts the answers of one server."""

    def __init__(self) -> None:
        self.answers = 0
        self._lock = threading.Lock()

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        with self._lock:
            self.answers += 1

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        pass


class Group:
    """Servers of one engine, each of which can be stopped and started again."""

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self.counts = [Count() for _ in range(size)]
        self._servers: list[FeatureServer | None] = [None] * size
        self.addresses = [""] * size
        for index in range(size):
            self.start(index)

    def start(self, index: int) -> None:
        """Start a server, at its former address if it has one."""
        port = int(self.addresses[index].rpartition(":")[2] or 0)
        server = FeatureServer(self._engine, ServerOptions(port=port), self.counts[index])
        server.start()
        server.ready()
        self._servers[index] = server
        self.addresses[index] = server.address

    def stop(self, index: int) -> None:
        """Stop a server as SIGTERM does; calls that it has begun end first."""
        server, self._servers[index] = self._servers[index], None
        if server is not None:
            server.stop(10)

    def answers(self) -> list[int]:
        """Return how many answers each server has given."""
        return [count.answers for count in self.counts]

    def close(self) -> None:
        for index in range(len(self._servers)):
            self.stop(index)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a small net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture
def group(engine: Engine) -> Iterator[Group]:
    """Three servers."""
    group = Group(engine, 3)
    yield group
    group.close()


def absent() -> str:
    """Return an address at which no server listens."""
    return f"127.0.0.1:{free_port()}"


def is_even(answers: list[int]) -> bool:
    """Return whether each server's answers are within a tenth of the mean."""
    mean = sum(answers) / len(answers)
    return all(abs(each - mean) <= 0.1 * mean for each in answers)


def test_a_call_goes_where_the_fewest_calls_run() -> None:
    """Servers with equal numbers of calls take turns."""
    balance = Balance(["a", "b", "c"])
    assert [balance.take() for _ in range(4)] == [0, 1, 2, 0]
    balance.give_back(1)
    assert [balance.take() for _ in range(2)] == [1, 2]


def refused(text: str = "stopping") -> UnavailableError:
    error = UnavailableError(text)
    error.refused = True
    return error


def test_a_refused_call_is_tried_once_on_every_server() -> None:
    """The error has what each of them said, and nothing counts as running afterwards."""
    balance = Balance(["a", "b"])
    attempts = Attempts(balance)
    with attempts.server() as index:
        attempts.failed(refused("starting"))
    with attempts.server() as other, pytest.raises(UnavailableError) as caught:
        attempts.failed(refused())
    assert {index, other} == {0, 1}
    assert str(caught.value) == "none of the servers can be used: a: starting; b: stopping"
    assert balance._calls == [0, 0]


def test_a_server_that_refused_is_avoided_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that it gets calls again."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    balance = Balance(["a", "b"])
    balance.avoid(0)
    assert [balance.take() for _ in range(3)] == [1, 1, 1]
    now = 101.1
    assert balance.take() == 0


def test_a_full_server_leaves_the_call_to_another() -> None:
    """If all are full, the error is that of the server that asks for the shortest wait."""
    attempts = Attempts(Balance(["a", "b", "c"]))
    errors = [OverloadedError(seconds) for seconds in ("2", "never", "1")]
    for error, seconds in zip(errors, (2.0, -1.0, 1.0), strict=True):
        error.retry_after = seconds
    for error in errors[:2]:
        with attempts.server():
            attempts.failed(error)
    with attempts.server(), pytest.raises(OverloadedError, match="1"):
        attempts.failed(errors[2])


@pytest.mark.parametrize("error", [UnavailableError("connection reset"), NotFoundError("no model")])
def test_other_errors_are_final(error: UnavailableError | NotFoundError) -> None:
    """A call whose connection broke may have brought the server down; it is not sent again."""
    attempts = Attempts(Balance(["a", "b"]))
    with attempts.server(), pytest.raises(type(error)):
        attempts.failed(error)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_server_may_stop_and_come_back_under_load(group: Group) -> None:
    """No call fails, and each server has its share while all of them serve."""
    ended = threading.Event()
    failures: list[Exception] = []

    def even() -> list[int]:
        """Return the answers of each server during a while."""
        before = group.answers()
        while sum(group.answers()) - sum(before) < 600:
            time.sleep(0.01)
        return [now - then for now, then in zip(group.answers(), before, strict=True)]

    with Client(group.addresses, shared_memory=False) as client, ThreadPoolExecutor(6) as pool:

        def call() -> None:
            while not ended.is_set():
                try:
                    client.extract("residual", X, "layer1")
                except Exception as error:  # noqa: BLE001 - the test reports whatever failed
                    failures.append(error)

        client.wait_ready(20)
        calls = [pool.submit(call) for _ in range(6)]
        try:
            at_first = even()
            group.stop(1)
            without = even()
            group.start(1)
            client.wait_ready(20)
            time.sleep(1.5)  # A call that failed just before may still keep others away.
            again = even()
        finally:
            ended.set()
        for each in calls:
            each.result(20)
    assert not failures
    assert without[1] == 0
    assert is_even(at_first), at_first
    assert is_even(again), again


def test_asyncio_shares_calls_and_does_without_a_server(group: Group) -> None:
    """The asyncio client follows the same rules."""

    async def run() -> list[list[int]]:
        found = []
        async with AsyncClient(group.addresses, shared_memory=False) as client:
            await client.wait_ready(20)
            for step in range(2):
                before = group.answers()
                await asyncio.gather(*(client.extract("residual", X, "layer1") for _ in range(45)))
                found.append([a - b for a, b in zip(group.answers(), before, strict=True)])
                if step == 0:
                    await asyncio.to_thread(group.stop, 0)
        return found

    first, without = asyncio.run(run())
    assert is_even(first), first
    assert without[0] == 0
    assert sum(without) == 45


def test_an_absent_server_is_named_if_no_other_answers() -> None:
    """The error has the reason of each."""
    targets = [absent(), absent()]
    with Client(targets, timeout=10) as client, pytest.raises(UnavailableError) as caught:
        client.extract("residual", X, "layer1")
    words = str(caught.value)
    assert words.startswith("none of the servers can be used: ")
    assert all(f"{target}: connections to all backends failing" in words for target in targets)


@pytest.mark.parametrize("target", ["{0}", "dns:///{0}", "dns:///nobody.invalid:8001"])
def test_a_server_that_is_not_reached_works_on_nothing(target: str) -> None:
    """Whatever gRPC says: no connection, no connection to any address, no address."""
    with (
        Client(target.format(absent()), timeout=10) as client,
        pytest.raises(UnavailableError) as caught,
    ):
        client.extract("residual", X, "layer1")
    assert caught.value.refused


def test_a_call_is_not_sent_again_if_its_server_is_killed(group: Group) -> None:
    """It may be what brought the server down; the error says that the call may have begun."""
    with (
        serving("slownets:sleepy", "--item-shape", "3,4,4") as victim,
        Client([victim.address, group.addresses[0]]) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.wait_ready(30)
        waiting = pool.submit(client.extract, "sleepy", np.full((1, 3, 4, 4), 20_000, "f4"), "conv")
        time.sleep(1)  # The call sleeps on the server for 20 seconds.
        os.kill(victim.process.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError) as caught:
            waiting.result(15)
        assert not caught.value.refused
        # The other server goes on.
        for _ in range(4):
            client.extract("residual", X, "layer1")


def test_wait_ready_waits_for_as_many_servers_as_asked(group: Group) -> None:
    """An absent server fails it only if all have to serve."""
    with Client([absent(), *group.addresses]) as client:
        client.wait_ready(20, servers=3)
        with pytest.raises(UnavailableError, match=r"3 of 4 servers serve, expected 4; the others"):
            client.wait_ready(0.5)
        with pytest.raises(
            InvalidInputError, match="servers: got 5, expected a number from 1 to 4"
        ):
            client.wait_ready(servers=5)


@pytest.mark.parametrize("ordered", [True, False])
def test_many_inputs_are_shared_among_the_servers(group: Group, ordered: bool) -> None:
    """Each is answered once, in order if that is asked for; an invalid one has its own error."""
    inputs = [np.full((1, *ITEM), value, np.float32) for value in range(30)]
    inputs[7] = np.zeros((1, 2, 2), np.float32)
    with Client(group.addresses) as client:
        client.wait_ready(20)
        outcomes = list(
            client.extract_many(
                "residual", inputs, "bn1:input", ordered=ordered, return_errors=True
            )
        )
        expected = [
            client.extract("residual", x, "bn1:input")["bn1:input"].sum()
            for index, x in enumerate(inputs)
            if index != 7
        ]
    sums = [each["bn1:input"].sum() for each in outcomes if isinstance(each, Features)]
    assert np.allclose(sums if ordered else sorted(sums), expected if ordered else sorted(expected))
    assert [type(each) for each in outcomes].count(InvalidInputError) == 1
    assert min(group.answers()) > 5


def test_asyncio_shares_many_inputs_among_the_servers(group: Group) -> None:
    """``extract_many`` of the asyncio client does the same."""

    async def run() -> list[Features]:
        async with AsyncClient(group.addresses) as client:
            await client.wait_ready(20)
            return [each async for each in client.extract_many("residual", [X] * 30, "layer1")]

    assert len(asyncio.run(run())) == 30
    assert min(group.answers()) > 5


def test_calls_at_once_end_with_the_iterator() -> None:
    """Leaving it early begins no further calls."""
    begun = Counter[int]()

    def call(value: int) -> int:
        begun[value] += 1
        return value

    outcomes = concurrent_calls(call, iter(range(1000)), 4, ordered=True)
    assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
    outcomes.close()  # type: ignore[attr-defined] # it is a generator
    assert len(begun) <= 8


def test_each_stream_belongs_to_one_server(group: Group) -> None:
    """Streams that are open at the same time are on different servers."""
    with Client(group.addresses) as client, ExitStack() as stack:
        client.wait_ready(20)
        for _ in range(3):
            stream = stack.enter_context(client.stream())
            requests = [StreamRequest("residual", X, "layer1") for _ in range(4)]
            assert len(list(stream.extract(requests))) == 4
    assert group.answers() == [4, 4, 4]


def test_all_addresses_of_a_name_get_calls(group: Group) -> None:
    """A target with a scheme may stand for several servers, which take turns."""
    with Client(f"ipv4:{','.join(group.addresses)}", shared_memory=False) as client:
        client.wait_ready(20)
        deadline = time.monotonic() + 20
        while min(group.answers()) < 3 and time.monotonic() < deadline:
            client.extract("residual", X, "layer1")
    assert min(group.answers()) >= 3


def test_a_name_with_a_stopped_server_loses_no_call(group: Group) -> None:
    """A call that one address refuses is tried again, on the next one."""
    with Client(f"ipv4:{','.join(group.addresses)}", shared_memory=False) as client:
        client.wait_ready(20)
        stopping = threading.Thread(target=group.stop, args=(2,))
        stopping.start()
        for _ in range(200):
            client.extract("residual", X, "layer1")
        stopping.join()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_lists_of_servers_are_refused(kind: type[Client] | type[AsyncClient]) -> None:
    """An empty list, and one with an address twice."""
    with pytest.raises(InvalidInputError, match="got an empty list"):
        kind([])
    with pytest.raises(InvalidInputError, match="got a:1 twice"):
        kind(["a:1", "b:1", "a:1"])


def test_the_documented_client_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/clients.md, with the addresses of servers that are here."""
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text("utf-8")
    (code,) = re.findall(r"## Several servers\n.*?```python\n(.*?)```", page, re.DOTALL)
    Image.new("RGB", (96, 80), (9, 99, 199)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("usualnets:resnet10", name="resnet18", item_shape=(3, 64, 64)))
    group = Group(engine, 3)
    for documented, real in zip(DOCUMENTED, group.addresses, strict=True):
        assert documented in code
        code = code.replace(documented, real)
    names: dict[str, Any] = {"Client": Client}
    try:
        exec(code, names)  # noqa: S102 - the page is ours
    finally:
        group.close()
        engine.close()
    assert names["features"]["layer4"].shape == (1, 512, 2, 2)


def test_a_reload_needs_one_server(group: Group) -> None:
    """Which of them should it be? The error says what to do."""
    with Client(group.addresses) as client, pytest.raises(InvalidInputError, match="for each"):
        client.reload()


def test_a_client_of_several_servers_can_be_pickled(group: Group) -> None:
    """The copy has the same servers."""
    with Client(group.addresses) as client:
        copy = pickle.loads(pickle.dumps(client))
    with copy:
        assert copy.extract("residual", X, "layer1")["layer1"].shape[0] == 1
