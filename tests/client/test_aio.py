"""The asyncio client: the methods of Client as coroutines; cancelling a task frees the server."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from authorities import EXTRACT, Authority, token_file
from gatednets import HELD, gate
from kept import kept
from layertap import AsyncClient, Client, Features, StreamRequest, Tls, errors
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from layertap.settings import SecretFiles
from serving import running_server, started_server
from streams import GATED_ITEM, eventually, readers
from tinynets import ITEM

LARGE = 128
"""Items of a batch whose input and reply are large enough for shared memory."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with two compute threads, so that a blocked request does not block others."""
    engine = Engine(Limits(streams=2), instances=2, plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    yield engine
    engine.close()


@pytest.fixture
def server(engine: Engine) -> Iterator[FeatureServer]:
    """The address of a real server."""
    with started_server(engine) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Engine) -> Iterator[None]:
    """After each test, no item is pending and no stream is open."""
    yield
    eventually(lambda: engine.pending == 0)
    eventually(lambda: not readers())


def batch(seed: int = 0, items: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((items, *ITEM), np.float32)


def _memory_of(array: np.ndarray) -> object:
    """Return the object whose memory an array is a view of."""
    base: object = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


HELD_INPUT = np.full((1, *GATED_ITEM), HELD, np.float32)


def test_values_are_those_of_the_other_client(server) -> None:
    """Many concurrent tasks each get the same values as from the blocking client."""
    inputs = [batch(seed) for seed in range(20)]
    with Client(server.address) as blocking:
        expected = [
            blocking.extract("residual", x, ["bn1", "layer1=deep"], extractor="hook")
            for x in inputs
        ]

    async def ask() -> list[Features]:
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(
                *(
                    client.extract("residual", x, ["bn1", "layer1=deep"], extractor="hook")
                    for x in inputs
                )
            )

    for got, want in zip(asyncio.run(ask()), expected, strict=True):
        assert list(got) == ["bn1", "deep"]
        assert all(np.array_equal(got[name], want[name]) for name in want)


def test_large_tensors_go_through_shared_memory(server) -> None:
    """If the server is on this machine, the reply's arrays are views of shared memory."""
    x = batch(items=LARGE)

    async def ask(**arguments: object) -> Features:
        async with AsyncClient(server.address, **arguments) as client:
            return await client.extract("residual", x, "conv1", extractor="hook")

    shared, sent = asyncio.run(ask()), asyncio.run(ask(shared_memory=False))
    assert np.array_equal(shared["conv1"], sent["conv1"])
    # What was sent is a view of the received message; what is shared, of a mapping.
    assert isinstance(_memory_of(sent["conv1"]), bytes)
    assert not isinstance(_memory_of(shared["conv1"]), bytes)


def test_a_client_serves_one_loop_after_the_other(server) -> None:
    """A client that is used in a second event loop connects again."""
    client = AsyncClient(server.address)

    async def ask() -> tuple[int, ...]:
        return (await client.extract("residual", batch(), "layer1"))["layer1"].shape

    assert asyncio.run(ask()) == asyncio.run(ask())
    asyncio.run(client.close())


def test_a_cancelled_task_frees_the_server(engine, server) -> None:
    """A request whose task is cancelled while it waits is removed from the server's queue."""

    async def ask(closed) -> None:
        async with AsyncClient(server.address) as client:

            def held() -> asyncio.Task[Features]:
                call = client.extract("gated", HELD_INPUT, "conv", extractor="hook")
                return asyncio.create_task(call)

            running = [held(), held()]
            for _ in running:
                await asyncio.to_thread(closed.arrived)
            waiting = held()
            await asyncio.to_thread(eventually, lambda: engine.pending == 3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.to_thread(eventually, lambda: engine.pending == 2)
            closed.open()
            assert [list(features) for features in await asyncio.gather(*running)] == [["conv"]] * 2
            assert closed.passed == 2

    with gate() as closed:
        asyncio.run(ask(closed))


def test_a_call_that_takes_too_long(server) -> None:
    """If the timeout of the call or of the client passes, DeadlineExceededError is raised."""

    async def ask() -> None:
        async with AsyncClient(server.address, timeout=0.5) as client:
            with pytest.raises(errors.DeadlineExceededError):
                await client.extract("gated", HELD_INPUT, "conv", extractor="hook")
        async with AsyncClient(server.address) as client:
            with pytest.raises(errors.DeadlineExceededError):
                await client.extract("gated", HELD_INPUT, "conv", extractor="hook", timeout=0.5)
            # asyncio's own timeout cancels.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.extract("gated", HELD_INPUT, "conv", extractor="hook")

    with gate():
        asyncio.run(ask())


def test_closing_ends_what_is_under_way(server) -> None:
    """Calls and streams of a closed client raise UnavailableError, not CancelledError."""

    async def ask(closed) -> None:
        client = AsyncClient(server.address)
        call = asyncio.create_task(client.extract("gated", HELD_INPUT, "conv", extractor="hook"))
        await asyncio.to_thread(closed.arrived)
        stream = await client.stream()
        held = StreamRequest("gated", HELD_INPUT, "conv", extractor="hook")
        item = asyncio.create_task(anext(stream.extract([held])))
        await asyncio.sleep(0.1)
        await client.close()
        for each in (call, item):
            with pytest.raises(errors.UnavailableError):
                await each
        closed.open()
        await stream.close()
        with pytest.raises(errors.UnavailableError, match="closed"):
            await client.list_models()

    with gate() as closed:
        asyncio.run(ask(closed))


def test_errors_are_the_servers_own(server) -> None:
    """An error of the server is raised as the exception that the server names."""

    async def ask() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(errors.ModelNotFoundError, match="served models"):
                await client.extract("nobody", batch(), "layer1")
            with pytest.raises(errors.InvalidInputError, match="No such file"):
                await client.extract("residual", "/no/such/photo.jpg", "layer1")
            with pytest.raises(errors.NotFoundError):
                await client.health("nobody")
        async with AsyncClient("127.0.0.1:1", timeout=5) as client:
            with pytest.raises(errors.UnavailableError):
                await client.list_models()

    asyncio.run(ask())


def test_the_server_describes_itself(server) -> None:
    """Models, their catalogues and the server's health are the same as from the blocking client."""

    async def ask() -> tuple[object, ...]:
        async with AsyncClient(server.address) as client:
            await client.wait_ready(30)
            models = [model.name for model in await client.list_models()]
            return models, await client.describe_model("residual"), await client.health()

    with Client(server.address) as blocking:
        assert asyncio.run(ask()) == (
            [model.name for model in blocking.list_models()],
            blocking.describe_model("residual"),
            "SERVING",
        )


def test_a_server_that_is_not_there_is_waited_for(server) -> None:
    """``wait_ready`` raises after its timeout, with the last status that it received."""

    async def ask() -> float:
        begun = time.monotonic()
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(errors.UnavailableError, match="not ready within 0.5 seconds"):
                await client.wait_ready(0.5)
        return time.monotonic() - begun

    assert 0.5 <= asyncio.run(ask()) < 30


@pytest.mark.parametrize("ordered", [True, False])
def test_many_inputs(server, ordered) -> None:
    """Each input of an ordinary or asynchronous iterable gets its features exactly once."""
    given = [np.full((1, *ITEM), value, np.float32) for value in range(40)]

    async def produced() -> AsyncIterator[np.ndarray]:
        for x in given:
            await asyncio.sleep(0)
            yield x

    async def ask(inputs: object) -> list[float]:
        async with AsyncClient(server.address) as client:
            many = client.extract_many("residual", inputs, "conv1:input", ordered=ordered)
            return [float(features["conv1:input"].max()) async for features in many]

    for inputs in (given, produced()):
        got = asyncio.run(ask(inputs))
        assert (got if ordered else sorted(got)) == list(range(40))


def test_a_bad_item_is_an_outcome(server) -> None:
    """A stream yields the error with the item's key; ``extract_many`` raises it by default."""
    x = batch()
    asked = [
        StreamRequest("residual", x, "layer1", key="good"),
        StreamRequest("nobody", x, "layer1", key="bad"),
        StreamRequest("residual", "/no/such/photo.jpg", "layer1", key="gone"),
    ]

    async def ask() -> dict[str, type]:
        async with AsyncClient(server.address) as client:
            async with await client.stream(max_in_flight=2) as stream:
                got = {key: type(outcome) async for key, outcome in stream.extract(asked)}
            with pytest.raises(errors.InvalidInputError, match="No such file"):
                _ = [f async for f in client.extract_many("residual", ["/no/such.jpg"], "layer1")]
            kept = client.extract_many("residual", [x, "/no.jpg"], "layer1", return_errors=True)
            assert [type(each) async for each in kept] == [Features, errors.InvalidInputError]
        return got

    assert asyncio.run(ask()) == {
        "good": Features,
        "bad": errors.ModelNotFoundError,
        "gone": errors.InvalidInputError,
    }


def test_inputs_are_read_no_further_than_allowed(server) -> None:
    """Only a limited number of inputs are read and not yet yielded, as in the blocking client."""
    taken = 0

    def inputs() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield batch()

    async def ask() -> None:
        async with AsyncClient(server.address) as client:
            yielded = 0
            async for _ in client.extract_many("residual", inputs(), "layer1", max_in_flight=3):
                yielded += 1
                assert taken - yielded < 3

    asyncio.run(ask())
    assert taken == 20


def test_an_iterator_that_is_left_closes_its_stream(engine, server) -> None:
    """Leaving the iterator early abandons the items in flight; so does the end of the task."""

    async def ask(closed) -> None:
        async with AsyncClient(server.address) as client:
            many = client.extract_many("residual", [batch()] * 9, "layer1")
            async with aclosing(many):
                async for _ in many:
                    break
            await asyncio.to_thread(eventually, lambda: not readers())

            async def consume() -> None:
                async for _ in client.extract_many("gated", [HELD_INPUT], "conv", extractor="hook"):
                    raise AssertionError("the gate is closed")

            consuming = asyncio.create_task(consume())
            await asyncio.to_thread(closed.arrived)
            consuming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await consuming
            closed.open()
            await asyncio.to_thread(eventually, lambda: engine.pending == 0)

    with gate() as closed:
        asyncio.run(ask(closed))


def test_large_items_both_ways_do_not_block_each_other(server) -> None:
    """A stream with large requests and large replies works, through memory and network."""
    x = batch(items=LARGE)

    async def ask(**arguments: object) -> int:
        async with AsyncClient(server.address, **arguments) as client:
            many = client.extract_many("residual", [x] * 40, "conv1", extractor="hook")
            return len([features async for features in many])

    assert asyncio.run(ask()) == asyncio.run(ask(shared_memory=False)) == 40


def test_tls_and_tokens(engine, tmp_path: Path) -> None:
    """A client with TLS and a token may call the server; without the token the call is refused."""
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("localhost", "127.0.0.1")
    tokens = token_file(tmp_path / "tokens", EXTRACT)
    files = SecretFiles(tls_cert=pair.certificate, tls_key=pair.key, extract_tokens_file=tokens)
    server = FeatureServer(engine, ServerOptions(port=0, secrets=files))
    server.start()
    server.ready()
    tls = Tls(ca=authority.file)

    async def ask() -> None:
        async with AsyncClient(server.address, tls=tls, token_file=tokens) as client:
            assert list(await client.extract("residual", batch(), "layer1")) == ["layer1"]
            many = client.extract_many("residual", [batch()] * 3, "layer1")
            assert len([features async for features in many]) == 3
        async with AsyncClient(server.address, tls=tls) as client:
            with pytest.raises(errors.UnauthenticatedError):
                await client.extract("residual", batch(), "layer1")

    try:
        asyncio.run(ask())
    finally:
        server.stop(0)


def test_a_full_server_is_asked_again() -> None:
    """With ``retries``, a call that a full server refuses is repeated as often as allowed."""
    engine = Engine(Limits(pending=1), plan_cache=kept())
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    free = np.zeros((1, *GATED_ITEM), np.float32)

    async def ask(address: str, closed) -> None:
        async with AsyncClient(address) as once, AsyncClient(address, retries=9) as again:
            running = asyncio.create_task(
                once.extract("gated", HELD_INPUT, "conv", extractor="hook")
            )
            await asyncio.to_thread(closed.arrived)
            with pytest.raises(errors.OverloadedError):
                await once.extract("gated", free, "conv", extractor="hook")
            waiting = asyncio.create_task(again.extract("gated", free, "conv", extractor="hook"))
            await asyncio.sleep(0.2)
            closed.open()
            for each in await asyncio.gather(running, waiting):
                assert list(each) == ["conv"]

    with gate() as closed, running_server(engine) as address:
        asyncio.run(ask(address, closed))
    engine.close()


def test_a_pickled_client_asks_too(server) -> None:
    """An unpickled client is created from its arguments; the pickle never contains a token."""
    again = pickle.loads(pickle.dumps(AsyncClient(server.address, timeout=30)))

    async def ask() -> list[str]:
        async with again as client:
            return list(await client.extract("residual", batch(), "layer1"))

    assert asyncio.run(ask()) == ["layer1"]
    with pytest.raises(TypeError, match="token_file"):
        pickle.dumps(AsyncClient(token=EXTRACT))


def test_wrong_arguments_are_refused_at_once() -> None:
    """Wrong arguments raise without an event loop and without a server."""
    with pytest.raises(errors.InvalidInputError, match="shared_memory"):
        AsyncClient(shared_memory="maybe")
    with pytest.raises(errors.ConfigError, match="plain text"):
        AsyncClient("192.0.2.1:8001", token=EXTRACT)


def test_a_variant_is_named_in_each_kind_of_call(server) -> None:
    """A call, and the items of a stream."""
    named = {"extractor": "torchscript", "variant": "channels_last"}

    async def run() -> list[str]:
        async with AsyncClient(server.address) as client:
            once = await client.extract("residual", batch(), "layer1", **named)
            items = client.extract_many("residual", [batch()], "layer1", **named)
            return [once.variant, *[each.variant async for each in items]]

    assert asyncio.run(run()) == ["channels_last"] * 2
