"""The caller of a call: its id, address, credentials and trace, and whether it still waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kept import kept
from layertap.engine import Call, Engine
from layertap.errors import CancelledError, DeadlineExceededError
from layertap.services.caller import Caller, current_caller
from layertap.services.grpc_adapter.caller import caller_of
from layertap.services.grpc_adapter.handlers import stream, unary
from serving import FakeContext, running_server, serving_method
from streams import eventually


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A channel to a server without models."""
    engine = Engine(plan_cache=kept())
    with running_server(engine) as address, grpc.insecure_channel(address) as channel:
        yield channel
    engine.close()


def list_models(channel: grpc.Channel, *metadata: tuple[str, str]) -> str:
    """Return the id that an answered call returns."""
    method = channel.unary_unary("/layertap.v1.FeatureService/ListModels")
    _, call = method.with_call(b"", metadata=metadata)
    return dict(call.trailing_metadata())["x-request-id"]


def callers_of(*calls: tuple[tuple[str, str], ...]) -> list[Caller]:
    """Return the callers of calls with this metadata."""
    callers: list[Caller] = []

    def handle(message: bytes, caller: Caller) -> bytes:
        callers.append(caller)
        return message

    with serving_method(unary(handle)) as channel:
        for metadata in calls:
            channel.unary_unary("/test.Service/Call")(b"", metadata=metadata)
    return callers


@pytest.mark.parametrize(
    "given", ["a", "0b5f2d9e-9d2b-4c43-8a37-0e0a7a3f5a11", "Root=1-67891233-abcdef01", "x" * 64]
)
def test_a_sane_id_is_kept(channel: grpc.Channel, given: str) -> None:
    """A short id of harmless characters is returned unchanged."""
    assert list_models(channel, ("x-request-id", given)) == given


@pytest.mark.parametrize(
    "given", ["", "x" * 65, "two words", '"quoted"', "<b>", "a;rm", "{}", "%0a"]
)
def test_another_id_is_replaced(channel: grpc.Channel, given: str) -> None:
    """An id that is long, empty or has unsafe characters is replaced by the server's own."""
    made = list_models(channel, ("x-request-id", given))
    assert made != given
    assert len(made) == 16
    assert made.isalnum()


def test_the_first_sane_id_counts(channel: grpc.Channel) -> None:
    """Of several ids the first valid one is used."""
    assert list_models(channel, ("x-request-id", "<b>"), ("x-request-id", "mine")) == "mine"


def test_made_ids_differ(channel: grpc.Channel) -> None:
    """Each call without an id gets its own."""
    assert len({list_models(channel) for _ in range(50)}) == 50


def test_a_refusal_carries_its_id(channel: grpc.Channel) -> None:
    """A failed call returns its id next to the error's name."""
    method = channel.unary_unary("/layertap.v1.FeatureService/Extract")
    with pytest.raises(grpc.RpcError) as failure:
        method(b"\xff", metadata=(("x-request-id", "mine"),))
    metadata = dict(failure.value.trailing_metadata())
    assert metadata["x-request-id"] == "mine"
    assert metadata["layertap-error"] == "DecodeError"


def test_there_is_no_caller_outside_of_calls() -> None:
    """A thread works for a caller while it handles a call, and for none afterwards."""
    seen: list[Caller | None] = []

    def handle(message: bytes, caller: Caller) -> bytes:
        seen.extend((caller, current_caller()))
        return message

    with serving_method(unary(handle)) as channel:
        channel.unary_unary("/test.Service/Call")(b"", metadata=(("x-request-id", "mine"),))
    assert seen[0] is seen[1]
    assert seen[0] is not None
    assert seen[0].request_id == "mine"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(current_caller).result(60) is None


def test_an_interceptor_and_the_handler_see_one_caller() -> None:
    """Whichever asks first creates the call's caller; two calls have different callers."""
    seen: list[Caller] = []

    class Interceptor(grpc.ServerInterceptor):
        def intercept_service(
            self, continuation: Callable[..., grpc.RpcMethodHandler], details: object
        ) -> grpc.RpcMethodHandler:
            handler = continuation(details)

            def behaviour(message: bytes, context: grpc.ServicerContext) -> bytes:
                seen.append(caller_of(context))
                return handler.unary_unary(message, context)

            return grpc.unary_unary_rpc_method_handler(behaviour)

    def handle(message: bytes, caller: Caller) -> bytes:
        seen.append(caller)
        return message

    with serving_method(unary(handle), (Interceptor(),)) as channel:
        for _ in range(2):
            channel.unary_unary("/test.Service/Call")(b"")
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[0] is not seen[2]


def test_credentials_tell_callers_apart() -> None:
    """Callers with the same token, or all without one, are equal; the token is not kept."""
    token, other = (("authorization", f"Bearer {word}") for word in ("mine", "theirs"))
    mine, again, theirs, nobody, also = callers_of((token,), (token,), (other,), (), ())
    assert mine.identity == again.identity
    assert nobody.identity == also.identity
    assert len({mine.identity, theirs.identity, nobody.identity}) == 3
    assert "mine" not in repr(mine.identity)
    assert "identity" not in repr(mine)


def test_the_address_and_the_trace_are_the_callers() -> None:
    """A caller on this machine is local; of its metadata, W3C's trace headers are kept."""
    trace = (("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("tracestate", "a=b"))
    caller, untraced = callers_of((*trace, ("other", "header")), ())
    assert caller.transport == "grpc"
    assert caller.peer.startswith("ipv4:127.0.0.1:")
    assert caller.local
    assert caller.trace_context == dict(trace)
    assert untraced.trace_context == {}


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:4000", True),
        ("ipv6:[::1]:4000", True),
        ("ipv6:%5B::1%5D:4000", True),
        ("unix:/run/layertap.sock", True),
        ("ipv4:10.0.0.1:4000", False),
        ("ipv4:128.127.0.1:4000", False),
        ("ipv6:[2001:db8::1]:4000", False),
        ("", False),
    ],
)
def test_only_callers_on_this_machine_are_local(peer: str, local: bool) -> None:
    """Loopback addresses and Unix sockets are local; any other address is another machine."""
    with ThreadPoolExecutor(1) as elsewhere:  # In a thread that serves nobody yet.
        assert elsewhere.submit(caller_of, FakeContext(peer)).result(60).local is local


def test_the_deadline_is_the_callers() -> None:
    """A call may take the time that the client allows; without a deadline there is no limit."""
    left: list[float | None] = []

    def handle(message: bytes, caller: Caller) -> bytes:
        left.append(caller.call.remaining())
        return message

    with serving_method(unary(handle)) as channel:
        method = channel.unary_unary("/test.Service/Call")
        method(b"", timeout=60)
        method(b"")
    assert left[0] is not None
    assert 0 < left[0] < 61  # gRPC rounds it up.
    assert left[1] is None


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_a_caller_that_leaves_is_cancelled(kind: str) -> None:
    """Once the client cancels, its work is asked to stop."""
    callers: list[Caller] = []

    def wait(caller: Caller) -> None:
        callers.append(caller)
        eventually(lambda: _is_cancelled(caller.call))

    def handle(message: bytes, caller: Caller) -> bytes:
        wait(caller)
        return message

    def handle_stream(messages: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        wait(caller)
        yield from messages

    method = unary(handle) if kind == "unary" else stream(handle_stream)
    with serving_method(method) as channel:
        if kind == "unary":
            call = channel.unary_unary("/test.Service/Call").future(b"")
        else:
            call = channel.stream_stream("/test.Service/Call")(iter([b""]))
        eventually(lambda: bool(callers))
        assert not _is_cancelled(callers[0].call)
        call.cancel()
        eventually(lambda: _is_cancelled(callers[0].call))


def test_an_item_has_its_own_deadline_within_its_streams() -> None:
    """An item may take as long as its request says, but no longer than its stream."""
    opened = Caller(Call(60), request_id="mine", peer="ipv4:127.0.0.1:1", local=True)
    for timeout, least, most in ((None, 50, 60), (5, 4, 5), (100, 50, 60)):
        item = opened.of_item(timeout)
        assert least < item.call.remaining() <= most
        assert item.in_stream
        assert (item.request_id, item.peer, item.local) == ("mine", "ipv4:127.0.0.1:1", True)
    item.call.cancel()
    assert _is_cancelled(item.call)
    assert not _is_cancelled(opened.call)
    assert Caller(Call()).of_item(None).call.remaining() is None
    with pytest.raises(DeadlineExceededError):
        Caller(Call(0)).of_item(100).call.check()


def _is_cancelled(call: Call) -> bool:
    try:
        call.check()
    except CancelledError:
        return True
    return False
