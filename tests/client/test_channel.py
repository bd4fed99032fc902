"""Where a token may be sent, and errors in the client's own files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from authorities import EXTRACT, Authority, token_file
from layertap import Client, Tls, errors, read_token
from layertap.client.channel import channel_settings

ELSEWHERE = "features.example.org:8001"


@pytest.mark.parametrize("target", [ELSEWHERE, "10.0.0.1:8001", "dns:///example.org", "0.0.0.0:1"])
def test_a_token_is_not_sent_as_plain_text(target: str) -> None:
    """A client that would send a token to another machine without TLS can't be created."""
    with pytest.raises(errors.ConfigError, match="as plain text") as caught:
        Client(target, token=EXTRACT)
    assert EXTRACT not in str(caught.value)


def test_a_token_may_go_over_tls_the_loopback_or_on_demand() -> None:
    """A token may be sent over TLS, to this machine, or if ``allow_plaintext_token`` is set."""
    Client(ELSEWHERE, token=EXTRACT, tls=True).close()
    Client("localhost:8001", token=EXTRACT).close()
    Client("[::1]:8001", token=EXTRACT).close()
    Client(ELSEWHERE, token=EXTRACT, allow_plaintext_token=True).close()


@pytest.mark.parametrize("token", ["", "short", "with space 0123456789", "line\nbreak-0123456789"])
def test_what_is_no_token_is_not_sent(token: str) -> None:
    """A malformed token raises before a connection is made; the message does not contain it."""
    with pytest.raises(errors.ConfigError, match="token") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


def test_the_first_token_of_a_file_is_read(tmp_path: Path) -> None:
    """A client's token file has the same format as a server's."""
    assert read_token(token_file(tmp_path / "t", EXTRACT, "other-0123456789abcdef")) == EXTRACT
    with pytest.raises(errors.ConfigError, match="token file: .*gone: No such file"):
        read_token(tmp_path / "gone")


def test_files_that_will_not_do_are_told(tmp_path: Path) -> None:
    """The client's error names the file and the fault before a connection is made."""
    authority = Authority(tmp_path / "ca")
    mine, other = authority.issue("client"), authority.issue("client")
    with pytest.raises(errors.ConfigError, match="ca: .*gone: No such file"):
        Client(tls=Tls(ca=tmp_path / "gone"))
    with pytest.raises(errors.ConfigError, match="ca: .*: got no certificate"):
        Client(tls=Tls(ca=mine.key))
    with pytest.raises(errors.ConfigError, match="key: .* is not the key of the certificate"):
        Client(tls=Tls(certificate=mine.certificate, key=other.key))
    with pytest.raises(errors.ConfigError, match="got one of certificate and key"):
        Client(tls=Tls(certificate=mine.certificate))


KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@pytest.fixture
def mirror() -> Iterator[str]:
    """The address of a server that answers each call with the authorization it received."""

    def shown(message: object, context: grpc.ServicerContext) -> bytes:
        metadata = context.invocation_metadata()
        return " ".join(value for key, value in metadata if key == "authorization").encode()

    def streamed(message: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield shown(message, context)

    methods = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            streamed if kind.endswith("stream") else shown
        )
        for kind in KINDS
    }
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Mirror", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def ask(address: str, kind: str, token: str | None) -> bytes:
    settings = channel_settings(address, tls=False, token=token, allow_plaintext_token=False)
    channel = settings.open()
    with channel:
        message = iter([b""]) if kind.startswith("stream") else b""
        reply = getattr(channel, kind)(f"/test.Mirror/{kind}")(message, timeout=30)
        return b"".join(reply) if kind.endswith("stream") else reply


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_has_the_token(mirror: str, kind: str) -> None:
    """Unary calls and streams send the token if there is one, and no authorization otherwise."""
    assert ask(mirror, kind, EXTRACT) == f"Bearer {EXTRACT}".encode()
    assert ask(mirror, kind, None) == b""


@pytest.mark.parametrize("token", [EXTRACT, None])
def test_calls_to_this_machine_pass_no_proxy(mirror: str, token: str | None, monkeypatch) -> None:
    """A proxy from the environment is not used for a loopback address."""
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ask(mirror, "unary_unary", token) == (f"Bearer {token}".encode() if token else b"")
