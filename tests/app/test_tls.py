"""Real servers and clients: the right certificates and tokens are accepted, wrong ones refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from authorities import ADMIN, EXTRACT, UNKNOWN, Authority, token_file
from kept import kept
from layertap import Client, Tls, errors
from layertap.app.security import open_security
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.settings import SecretFiles
from tinynets import ITEM

ONE = np.zeros((1, *ITEM), np.float32)
HOSTS = ("localhost", "127.0.0.1", "::1")
RELOAD = "/layertap.v1.AdminService/ReloadModel"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with one net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority that everyone trusts."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@contextmanager
def secured(engine: Engine, host: str = "127.0.0.1", **files: Path) -> Iterator[FeatureServer]:
    """Serve the engine with these files."""
    security = open_security(SecretFiles(**files))
    server = FeatureServer(engine, ServerOptions(host, port=0), security=security)
    server.start()
    server.ready()
    try:
        yield server
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def tls_server(engine: Engine, authority: Authority) -> Iterator[str]:
    """The address of a server with TLS that requires no client certificate."""
    pair = authority.issue(*HOSTS)
    with secured(engine, tls_cert=pair.certificate, tls_key=pair.key) as server:
        yield server.address


@pytest.fixture(scope="module")
def mutual_server(engine: Engine, authority: Authority) -> Iterator[str]:
    """The address of a server that requires a client certificate."""
    pair = authority.issue(*HOSTS)
    with secured(
        engine, tls_cert=pair.certificate, tls_key=pair.key, tls_client_ca=authority.file
    ) as server:
        yield server.address


def refused(client: Client) -> str:
    """Check that a call fails with UNAVAILABLE, and return the text."""
    with client, pytest.raises(errors.UnavailableError) as caught:
        client.list_models(timeout=20)
    return str(caught.value)


def test_the_right_authority_passes(tls_server: str, authority: Authority) -> None:
    """A client that trusts the server's CA connects and gets layers."""
    with Client(tls_server, tls=Tls(ca=authority.file)) as client:
        client.wait_ready(30)
        assert client.extract("residual", ONE, "layer1")["layer1"].shape == (1, 8, 8, 8)


def test_another_authority_is_refused(tls_server: str, stranger: Authority) -> None:
    """A server whose CA the client doesn't trust gets no request."""
    text = refused(Client(tls_server, tls=Tls(ca=stranger.file)))
    assert "CERTIFICATE_VERIFY_FAILED" in text
    assert "CERTIFICATE_VERIFY_FAILED" in refused(Client(tls_server, tls=True))


def test_plain_text_is_no_way_in(tls_server: str) -> None:
    """A client without TLS gets nothing from a server with TLS."""
    refused(Client(tls_server))


def test_tls_to_a_plain_server_fails(engine: Engine, authority: Authority) -> None:
    """A client with TLS never falls back to plain text."""
    with secured(engine) as server:
        refused(Client(server.address, tls=Tls(ca=authority.file)))


def test_an_expired_certificate_is_refused(engine: Engine, authority: Authority) -> None:
    """An expired certificate is refused."""
    pair = authority.issue(*HOSTS, expired=True)
    with secured(engine, tls_cert=pair.certificate, tls_key=pair.key) as server:
        text = refused(Client(server.address, tls=Tls(ca=authority.file)))
        assert "certificate has expired" in text


def test_a_certificate_for_another_host_is_refused(engine: Engine, authority: Authority) -> None:
    """The certificate must be for the requested host, or for the expected name."""
    pair = authority.issue("features.example.org")
    with secured(engine, tls_cert=pair.certificate, tls_key=pair.key) as server:
        refused(Client(server.address, tls=Tls(ca=authority.file)))
        named = Tls(ca=authority.file, server_name="features.example.org")
        with Client(server.address, tls=named) as client:
            assert client.list_models()
        refused(Client(server.address, tls=Tls(ca=authority.file, server_name="example.org")))


def test_a_clients_certificate_passes(mutual_server: str, authority: Authority) -> None:
    """With mutual TLS, a client with a certificate of the right CA is served."""
    mine = authority.issue("client")
    tls = Tls(ca=authority.file, certificate=mine.certificate, key=mine.key)
    with Client(mutual_server, tls=tls) as client:
        assert client.extract("residual", ONE, "layer1")


def test_no_certificate_of_the_client_is_refused(mutual_server: str, authority: Authority) -> None:
    """With mutual TLS, a client without a certificate gets nothing, not even health."""
    refused(Client(mutual_server, tls=Tls(ca=authority.file)))
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(mutual_server, credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("expired", [True, False])
def test_a_wrong_certificate_of_the_client_is_refused(
    mutual_server: str, authority: Authority, stranger: Authority, expired: bool
) -> None:
    """A client certificate that has expired, or is from another CA, is refused."""
    mine = (authority if expired else stranger).issue("client", expired=expired)
    tls = Tls(ca=authority.file, certificate=mine.certificate, key=mine.key)
    refused(Client(mutual_server, tls=tls))


def test_renewed_certificates_serve_the_next_connection(
    engine: Engine, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """A reload uses new files without a restart, and keeps the old ones if they are invalid."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(issuer: Authority) -> None:
        pair = issuer.issue(*HOSTS)
        shutil.copy(pair.certificate, cert)
        shutil.copy(pair.key, key)

    install(authority)
    with secured(engine, tls_cert=cert, tls_key=key) as server:
        with Client(server.address, tls=Tls(ca=authority.file)) as client:
            assert client.list_models()
            install(stranger)
            server.security.reload()
            assert client.list_models(), "the open connection goes on"
        with Client(server.address, tls=Tls(ca=stranger.file)) as client:
            assert client.list_models()
        refused(Client(server.address, tls=Tls(ca=authority.file)))
        key.write_text("no key")
        with pytest.raises(errors.ConfigError, match="tls_key"):
            server.security.reload()
        with Client(server.address, tls=Tls(ca=stranger.file)) as client:
            assert client.list_models()


def administer(address: str, authority: Authority, token: str) -> tuple[grpc.StatusCode, str]:
    """Call a method of AdminService and return how it ended."""
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(RELOAD)(
                b"", metadata=(("authorization", f"Bearer {token}"),), timeout=20
            )
        metadata = dict(caught.value.trailing_metadata())
        return caught.value.code(), metadata.get("layertap-error", "")


def test_tokens_decide_what_a_client_may_do(
    engine: Engine, authority: Authority, tmp_path: Path
) -> None:
    """Missing and wrong tokens have another status than insufficient rights; both are raised."""
    pair = authority.issue(*HOSTS)
    tls = Tls(ca=authority.file)
    with secured(
        engine,
        tls_cert=pair.certificate,
        tls_key=pair.key,
        extract_tokens_file=token_file(tmp_path / "e", EXTRACT),
        admin_tokens_file=token_file(tmp_path / "a", ADMIN),
    ) as server:
        for token in (EXTRACT, ADMIN):
            with Client(server.address, tls=tls, token=token) as client:
                client.wait_ready(30)
                assert client.extract("residual", ONE, "layer1")
                assert client.describe_model("residual").layers
        for wrong in (None, UNKNOWN):
            with Client(server.address, tls=tls, token=wrong) as client:
                client.wait_ready(30)  # Health asks for no token.
                for ask in (
                    client.list_models,
                    lambda: client.describe_model("residual"),
                    lambda: client.extract("residual", ONE, "layer1"),
                ):
                    with pytest.raises(errors.UnauthenticatedError, match="a valid token"):
                        ask()
        denied = (grpc.StatusCode.PERMISSION_DENIED, "PermissionDeniedError")
        unknown = (grpc.StatusCode.UNAUTHENTICATED, "UnauthenticatedError")
        assert administer(server.address, authority, EXTRACT) == denied
        assert administer(server.address, authority, UNKNOWN) == unknown
        code, _ = administer(server.address, authority, ADMIN)
        assert code not in {denied[0], unknown[0]}


def test_reflection_needs_a_token_as_well(engine: Engine, tmp_path: Path) -> None:
    """Streams need a token like unary calls: reflection is refused without one."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with (
        secured(engine, extract_tokens_file=token_file(tmp_path / "e", EXTRACT)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([ask]), timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {EXTRACT}"),)
        (reply,) = stub.ServerReflectionInfo(iter([ask]), timeout=20, metadata=metadata)
        assert reply.list_services_response.service


def test_ipv6_is_served_with_and_without_brackets(engine: Engine, authority: Authority) -> None:
    """The IPv6 loopback can be written with or without brackets, and called as reported."""
    pair = authority.issue(*HOSTS)
    for host in ("::1", "[::1]"):
        with secured(engine, host) as server, Client(server.address) as client:
            assert server.address.startswith("[::1]:")
            assert client.list_models()
    with (
        secured(engine, "::1", tls_cert=pair.certificate, tls_key=pair.key) as server,
        Client(server.address, tls=Tls(ca=authority.file)) as client,
    ):
        assert client.list_models()
