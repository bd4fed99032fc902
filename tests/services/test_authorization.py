"""Calls of every kind are admitted or refused by their token, before their request is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from authorities import ADMIN, EXTRACT, UNKNOWN, token_file
from layertap.services.grpc_adapter.authorization import Authorization
from layertap.services.tokens import Tokens

Code = grpc.StatusCode
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
SERVICES = ("layertap.v1.FeatureService", "layertap.v1.AdminService", "grpc.health.v1.Health")
FEATURE, ADMINISTRATION, HEALTH = SERVICES


def one(message: object, context: grpc.ServicerContext) -> bytes:
    return b"one"


def many(message: object, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"one"


@contextmanager
def guarded_server(tokens: Tokens) -> Iterator[grpc.Channel]:
    """Serve a method of each kind in each service, and yield a channel."""
    methods = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(many if kind.endswith("stream") else one)
        for kind in KINDS
    }
    server = grpc.server(ThreadPoolExecutor(2), interceptors=(Authorization(tokens),))
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(service, methods) for service in SERVICES)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0)


def call(channel: grpc.Channel, service: str, kind: str, *metadata: tuple[str, str]) -> Code:
    """Call a method and return the status with which it ended."""
    message = iter([b"x"]) if kind.startswith("stream") else b"x"
    method = getattr(channel, kind)(f"/{service}/{kind}")
    try:
        reply = method(message, metadata=metadata, timeout=30)
        assert (list(reply) if kind.endswith("stream") else [reply]) == [b"one"]
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def bearer(token: str) -> tuple[str, str]:
    return ("authorization", f"Bearer {token}")


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """A token with each right."""
    return Tokens(token_file(tmp_path / "e", EXTRACT), token_file(tmp_path / "a", ADMIN))


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_opens_what_it_has_a_right_to(tokens: Tokens, kind: str) -> None:
    """The table of rights holds for unary and streaming calls."""
    with guarded_server(tokens) as channel:
        table = {
            service: [
                call(channel, service, kind),
                call(channel, service, kind, bearer(UNKNOWN)),
                call(channel, service, kind, bearer(EXTRACT)),
                call(channel, service, kind, bearer(ADMIN)),
            ]
            for service in SERVICES
        }
    stranger = [Code.UNAUTHENTICATED, Code.UNAUTHENTICATED]
    assert table == {
        FEATURE: [*stranger, Code.OK, Code.OK],
        ADMINISTRATION: [*stranger, Code.PERMISSION_DENIED, Code.OK],
        HEALTH: [Code.OK] * 4,
    }


def test_without_tokens_extraction_is_open_and_administration_closed() -> None:
    """A server without tokens answers everyone, but does not let everyone administrate."""
    with guarded_server(Tokens()) as channel:
        assert call(channel, FEATURE, "unary_unary") is Code.OK
        assert call(channel, FEATURE, "unary_unary", bearer(UNKNOWN)) is Code.OK
        assert call(channel, ADMINISTRATION, "unary_unary") is Code.PERMISSION_DENIED
        assert call(channel, ADMINISTRATION, "unary_unary", bearer(ADMIN)) is Code.PERMISSION_DENIED


def test_extract_tokens_alone_leave_administration_closed(tmp_path: Path) -> None:
    """Without admin tokens no token may administrate, and callers without one are asked for one."""
    with guarded_server(Tokens(token_file(tmp_path / "e", EXTRACT))) as channel:
        assert call(channel, ADMINISTRATION, "unary_unary") is Code.UNAUTHENTICATED
        code = call(channel, ADMINISTRATION, "unary_unary", bearer(EXTRACT))
        assert code is Code.PERMISSION_DENIED


def test_admin_tokens_alone_leave_extraction_open(tmp_path: Path) -> None:
    """A server that protects only administration leaves extraction open."""
    with guarded_server(Tokens(admin_file=token_file(tmp_path / "a", ADMIN))) as channel:
        assert call(channel, FEATURE, "unary_unary") is Code.OK
        assert call(channel, ADMINISTRATION, "unary_unary") is Code.UNAUTHENTICATED
        assert call(channel, ADMINISTRATION, "unary_unary", bearer(ADMIN)) is Code.OK


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ([("authorization", f"bearer {EXTRACT}")], Code.OK),
        ([("authorization", EXTRACT)], Code.UNAUTHENTICATED),
        ([("authorization", f"Basic {EXTRACT}")], Code.UNAUTHENTICATED),
        ([("authorization", "Bearer")], Code.UNAUTHENTICATED),
        ([("authorization", "Bearer ")], Code.UNAUTHENTICATED),
        ([("authorization-bin", f"Bearer {EXTRACT}".encode())], Code.UNAUTHENTICATED),
        ([("authorization", f"Bearer {EXTRACT}, Bearer {UNKNOWN}")], Code.UNAUTHENTICATED),
        ([bearer(UNKNOWN), bearer(EXTRACT)], Code.UNAUTHENTICATED),
        ([bearer(EXTRACT), bearer(EXTRACT)], Code.UNAUTHENTICATED),
    ],
)
def test_only_one_well_formed_header_counts(tokens: Tokens, metadata, code: Code) -> None:
    """The scheme Bearer is accepted in any case; a second header is refused."""
    with guarded_server(tokens) as channel:
        assert call(channel, FEATURE, "unary_unary", *metadata) is code


def test_a_prefix_of_the_path_decides(tokens: Tokens) -> None:
    """A service whose name only begins like an open service's is not open."""
    with guarded_server(tokens) as channel:
        for method in ("/grpc.health.v1.HealthX/Check", "/grpc.health.v1/Check", "/x/Health/Check"):
            with pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary(method)(b"", timeout=30)
            assert refusal.value.code() is Code.UNAUTHENTICATED


def test_refusals_tell_strangers_nothing(tokens: Tokens) -> None:
    """The refusal is the same whatever was wrong, and whether or not the method exists."""
    texts = set()
    with guarded_server(tokens) as channel:
        for method in (f"/{FEATURE}/unary_unary", f"/{ADMINISTRATION}/unary_unary", "/no.Such/It"):
            for metadata in ((), (bearer(UNKNOWN),), (("authorization", "x"),)):
                with pytest.raises(grpc.RpcError) as refusal:
                    channel.unary_unary(method)(b"", metadata=metadata, timeout=30)
                texts.add((refusal.value.code(), refusal.value.details()))
    ((code, text),) = texts
    assert code is Code.UNAUTHENTICATED
    assert not any(secret in text for secret in (EXTRACT, ADMIN, UNKNOWN, "layertap.v1"))


def test_a_refused_request_is_not_waited_for(tokens: Tokens) -> None:
    """A caller without a token that sends no request is refused at once, and occupies no thread."""

    def silent() -> Iterator[bytes]:
        released.wait(60)
        yield b""

    from threading import Event

    released = Event()
    try:
        with guarded_server(tokens) as channel:
            # stream_unary, so that this side can hold back what the server would read as unary.
            method = channel.stream_unary(f"/{FEATURE}/unary_unary")
            with pytest.raises(grpc.RpcError) as refusal:
                method(silent(), timeout=30)
            assert refusal.value.code() is Code.UNAUTHENTICATED
    finally:
        released.set()


def test_reloaded_tokens_hold_for_the_next_call(tmp_path: Path) -> None:
    """A token that was removed from the file is refused on an open connection too."""
    file = token_file(tmp_path / "e", EXTRACT)
    tokens = Tokens(file)
    with guarded_server(tokens) as channel:
        assert call(channel, FEATURE, "unary_unary", bearer(EXTRACT)) is Code.OK
        token_file(file, UNKNOWN)
        tokens.reload()
        assert call(channel, FEATURE, "unary_unary", bearer(EXTRACT)) is Code.UNAUTHENTICATED
        assert call(channel, FEATURE, "unary_unary", bearer(UNKNOWN)) is Code.OK
