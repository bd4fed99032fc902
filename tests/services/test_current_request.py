"""Every call has a request id: the caller's own if it is sane, and it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from layertap.engine import Engine
from layertap.services.current_request import current_request
from layertap.services.status import guarded
from serving import running_server

METADATA = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    engine = Engine()
    with running_server(engine) as address, grpc.insecure_channel(address) as channel:
        yield channel
    engine.close()


def list_models(channel: grpc.Channel, *metadata: tuple[str, str]) -> str:
    """Return the id that a call which is answered comes back with."""
    method = channel.unary_unary("/layertap.v1.FeatureService/ListModels")
    _, call = method.with_call(b"", metadata=metadata)
    return dict(call.trailing_metadata())["x-request-id"]


@pytest.mark.parametrize(
    "given", ["a", "0b5f2d9e-9d2b-4c43-8a37-0e0a7a3f5a11", "Root=1-67891233-abcdef01", "x" * 64]
)
def test_a_sane_id_is_kept(channel: grpc.Channel, given: str) -> None:
    """A short id of harmless characters comes back as it was given."""
    assert list_models(channel, ("x-request-id", given)) == given


@pytest.mark.parametrize(
    "given", ["", "x" * 65, "two words", '"quoted"', "<b>", "a;rm", "{}", "%0a"]
)
def test_another_id_is_replaced(channel: grpc.Channel, given: str) -> None:
    """What is long, empty or has characters that logs could trip over gives way to one of ours."""
    made = list_models(channel, ("x-request-id", given))
    assert made != given
    assert len(made) == 16
    assert made.isalnum()


def test_the_first_sane_id_counts(channel: grpc.Channel) -> None:
    """Of several ids the first sane one is taken."""
    assert list_models(channel, ("x-request-id", "<b>"), ("x-request-id", "mine")) == "mine"


def test_made_ids_differ(channel: grpc.Channel) -> None:
    """Calls without an id get one each."""
    assert len({list_models(channel) for _ in range(50)}) == 50


def test_a_refusal_carries_its_id(channel: grpc.Channel) -> None:
    """A call that fails comes back with its id beside the error's name."""
    method = channel.unary_unary("/layertap.v1.FeatureService/Extract")
    with pytest.raises(grpc.RpcError) as failure:
        method(b"\xff", metadata=(("x-request-id", "mine"),))
    metadata = dict(failure.value.trailing_metadata())
    assert metadata["x-request-id"] == "mine"
    assert metadata["layertap-error"] == "DecodeError"


def test_there_is_no_request_outside_of_calls() -> None:
    """A thread works for a request while it handles it, and for none afterwards."""
    ids = []

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        request = current_request()
        ids.append(request.id if request else "")
        return message

    pool = ThreadPoolExecutor(1)
    server = grpc.server(pool)
    method = grpc.unary_unary_rpc_method_handler(guarded(handle))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Service", {"Call": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        channel.unary_unary("/test.Service/Call")(b"", metadata=(("x-request-id", "mine"),))
    assert ids == ["mine"]
    assert pool.submit(current_request).result(60) is None
    server.stop(0).wait()
