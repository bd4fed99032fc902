"""The client's channel: TLS, when the token may be sent, reconnecting, and gevent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from layertap.addresses import may_be_several, target_is_loopback
from layertap.certificates import read_authorities, read_key_pair
from layertap.errors import ConfigError
from layertap.token_files import check_token, read_tokens

__all__ = ["ChannelSettings", "Tls", "channel_settings", "read_token"]

PathLike = str | os.PathLike[str]

_OPTIONS = (
    # Features are large: gRPC's default of 4 MB would refuse most replies.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # By default, if a server was away, gRPC waits up to two minutes before it connects again, and
    # fails every call until then. gRPC's jitter adds up to a fifth to these times.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Time limit of one attempt. After lost packets a new attempt is faster than TCP, whose pauses
    # grow exponentially.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # Look a name up again just as soon, as a cluster may have given it to another machine. The
    # default is 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)


# Each address behind a name gets its share of the calls. It also connects again by itself, where
# gRPC's default waits for the next call.
_ROUND_ROBIN = ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')


@dataclass(frozen=True, slots=True)
class Tls:
    """How to verify the server, and how the client authenticates itself.

    Attributes:
        ca: A PEM file with the CA certificate, or the server's own certificate, used to verify the
            server. None for the public CAs included in gRPC, or those in the file named by the
            environment variable ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH``.
        certificate: A PEM file with this client's certificate, for servers that require one.
        key: A PEM file with the certificate's private key, not encrypted.
        server_name: The name expected in the server's certificate; the target's host if empty.
    """

    ca: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials for a channel.

        Raises:
            ConfigError: If a file can't be read, or the key doesn't belong to the certificate.
        """
        if (self.certificate is None) is not (self.key is None):
            raise ConfigError("tls: got one of certificate and key, expected both or neither")
        roots = None if self.ca is None else read_authorities(Path(self.ca), "ca")
        chain = secret = None
        if self.certificate is not None and self.key is not None:
            chain, secret = read_key_pair(
                Path(self.certificate), Path(self.key), "certificate", "key"
            )
        return grpc.ssl_channel_credentials(roots, secret, chain)


def read_token(file: PathLike) -> str:
    """Return the first token in a file, which has one token per line; ``#`` starts a comment.

    Raises:
        ConfigError: If the file can't be read or has no token.
    """
    return read_tokens(Path(file), "token file")[0]


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """How to reach a server, for a channel of either kind.

    Attributes:
        target: The server's address.
        options: gRPC's channel arguments.
        credentials: The TLS credentials; None for no TLS.
        token: The bearer token to send with every call; None for no token.
    """

    target: str
    options: tuple[tuple[str, int | str], ...]
    credentials: grpc.ChannelCredentials | None
    token: str | None

    def open(self) -> grpc.Channel:
        """Open a channel that sends the token with every call."""
        if self.credentials is None:
            channel = grpc.insecure_channel(self.target, options=self.options)
        else:
            channel = grpc.secure_channel(self.target, self.credentials, options=self.options)
        return (
            channel if self.token is None else grpc.intercept_channel(channel, _Bearer(self.token))
        )

    def open_async(self) -> grpc.aio.Channel:
        """Open a channel on the running event loop; its calls must add ``bearer`` themselves."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=self.options)
        return grpc.aio.secure_channel(self.target, self.credentials, options=self.options)

    @property
    def bearer(self) -> tuple[tuple[str, str], ...]:
        """The metadata with the token; empty if there is no token."""
        return () if self.token is None else (_bearer(self.token),)


def channel_settings(
    target: str,
    *,
    tls: bool | Tls,
    token: str | None,
    allow_plaintext_token: bool,
    stay_connected: bool = False,
) -> ChannelSettings:
    """Check how to reach a server, and return the settings.

    ``stay_connected`` is for one of several servers: its channel connects again without a call.

    Raises:
        ConfigError: If TLS files can't be used, the token is malformed or would be sent as plain
            text over the network without ``allow_plaintext_token``, or gevent has patched the
            process without gRPC's support for it.
    """
    _check_gevent()
    # Channels with equal options share a connection; a forked child must not share its parent's.
    options: list[tuple[str, int | str]] = [*_OPTIONS, ("layertap.process", os.getpid())]
    if stay_connected or may_be_several(target):
        options.append(_ROUND_ROBIN)
    local = target_is_loopback(target)
    if local:
        # No proxy, whatever http_proxy and no_proxy say: it could not reach this machine's own
        # addresses, and it would see what is sent without TLS.
        options.append(("grpc.enable_http_proxy", 0))
    how = Tls() if tls is True else tls
    if token is not None:
        check_token(token, "token")
    if isinstance(how, Tls):
        if how.server_name:
            options.append(("grpc.ssl_target_name_override", how.server_name))
        return ChannelSettings(target, tuple(options), how.credentials(), token)
    if token is not None and not allow_plaintext_token and not local:
        raise ConfigError(
            f"token: it would be sent to {target} as plain text, which can be read in transit; "
            f"expected TLS, a server on this machine, or allow_plaintext_token"
        )
    return ChannelSettings(target, tuple(options), None, token)


def _check_gevent() -> None:
    """Raise ConfigError if gRPC would block gevent's only thread.

    gevent turns all threads into greenlets. gRPC then waits in native code for a greenlet that
    can't run in the meantime: every call blocks the whole program, and streams hang.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return
    # gRPC offers no public way to ask; the client's tests fail if this attribute disappears.
    if getattr(sys.modules.get("grpc._cython.cygrpc"), "g_gevent_activated", True):
        return
    raise ConfigError(
        "gevent has patched this process but gRPC's gevent support is off, so calls would block "
        "every greenlet: call grpc.experimental.gevent.init_gevent() after monkey.patch_all() and "
        "before the first Client"
    )


def _bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


class _CallDetails(NamedTuple):
    """A ``grpc.ClientCallDetails``, which is an interface without a constructor."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc] # gRPC has no types
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Adds the token to each call's metadata.

    It replaces gRPC's own call credentials, which gRPC refuses to send without encryption.
    """

    def __init__(self, token: str) -> None:
        self._metadata = _bearer(token)

    def _send(
        self, continuation: Callable[[Any, Any], Any], details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        with_token = _CallDetails(
            details.method,
            details.timeout,
            (*(details.metadata or ()), self._metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return continuation(with_token, request)

    intercept_unary_unary = _send
    intercept_unary_stream = _send
    intercept_stream_unary = _send
    intercept_stream_stream = _send
