"""The common base of both clients: arguments, messages and replies, without input and output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from layertap.addresses import TARGET
from layertap.client.channel import ChannelSettings, PathLike, Tls, channel_settings, read_token
from layertap.client.failures import error_from_rpc
from layertap.client.retry import check_retries
from layertap.client.shared_memory_client import SharedMemoryWish
from layertap.client.timeouts import bounded
from layertap.client.trace_context import trace_metadata
from layertap.errors import ConfigError, InvalidInputError, LayertapError, UnavailableError
from layertap.grpc_health import health_pb2
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import REPLY_COMPRESSION_KEY, REPLY_COMPRESSIONS

__all__ = [
    "BaseClient",
    "Method",
    "ReadyWait",
    "describe_message",
    "health_in",
    "health_message",
]

Metadata = tuple[tuple[str, str], ...]


class Method:
    """The full names of the RPCs that a client calls."""

    EXTRACT = "/layertap.v1.FeatureService/Extract"
    EXTRACT_STREAM = "/layertap.v1.FeatureService/ExtractStream"
    LIST_MODELS = "/layertap.v1.FeatureService/ListModels"
    DESCRIBE_MODEL = "/layertap.v1.FeatureService/DescribeModel"
    RELOAD = "/layertap.v1.AdminService/Reload"
    HEALTH = "/grpc.health.v1.Health/Check"
    OPEN_SHARED_MEMORY = "/layertap.v1.SharedMemoryService/OpenSharedMemory"


class BaseClient:
    """The arguments of a client, and the messages that its methods send.

    Args:
        target: The server's address: ``host:port``, or ``unix:/path`` for a Unix socket. Or the
            addresses of several servers that have the same models; each call goes to one of them
            (docs/clients.md, "Several servers"). ``dns:///name:port`` stands for all servers that
            have the name.
        timeout: Default limit for each call, in seconds; None for no limit.
        tls: ``True`` for a server whose certificate is from a public CA; a ``Tls`` for another CA
            or for a client certificate; False for no TLS.
        token: The bearer token to send with every call.
        token_file: A file whose first token is sent, instead of ``token``. It has one token per
            line; ``#`` starts a comment.
        allow_plaintext_token: Whether the token may be sent to another machine without TLS, for
            networks that are encrypted themselves.
        shared_memory: Whether large tensors go through memory shared with the server, if the server
            runs on this machine as the same user. ``"auto"`` tries this if the target is a loopback
            address or a Unix socket, True always, False never. If shared memory is not available,
            tensors silently go over the network. Only an item of a stream whose memory is lost in
            transit fails, with SharedMemoryLostError.
        reply_compression: How the server compresses replies that go over the network: ``"none"``,
            ``"gzip"`` or ``"deflate"``. Useful only on slow networks; docs/performance.md has the
            costs.
        retries: How many times to retry a call that the server refuses because it is full, within
            the call's timeout. Streams are not retried. The client waits for the time that the
            server specifies, and a random time in addition. With 0 the call raises
            OverloadedError at once; its ``retry_after`` has the time to wait.
        metadata: Headers to send with every call, for what stands between the client and the
            server: ``{"application": "vision"}`` chooses an application of Ray Serve.

    Raises:
        InvalidInputError: If ``shared_memory`` or ``reply_compression`` has another value,
            ``retries`` is negative, ``target`` is an empty list or has an address twice, or
            ``metadata`` has an entry that can't be sent or has an argument of its own.
        ConfigError: If TLS files or tokens are invalid, if a token would be sent as plain text to
            another machine, or under gevent without gRPC's ``init_gevent``.
    """

    def __init__(
        self,
        target: str | Sequence[str] = TARGET,
        *,
        timeout: float | None = 60.0,
        tls: bool | Tls = False,
        token: str | None = None,
        token_file: PathLike | None = None,
        allow_plaintext_token: bool = False,
        shared_memory: SharedMemoryWish = "auto",
        reply_compression: str = "none",
        retries: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        check_retries(retries)
        if token is not None and token_file is not None:
            raise ConfigError("token: got token and token_file, expected one of them or none")
        if reply_compression not in REPLY_COMPRESSIONS:
            raise InvalidInputError(
                f"reply_compression: got {reply_compression!r}, expected one of "
                f"{', '.join(REPLY_COMPRESSIONS)}"
            )
        if shared_memory not in (True, False, "auto"):
            raise InvalidInputError(
                f"shared_memory: got {shared_memory!r}, expected True, False or 'auto'"
            )
        self._targets = _checked_targets(target)
        self._timeout = timeout
        self._retries = retries
        self._shared_memory = shared_memory
        self._closed = False
        self._arguments: dict[str, Any] = {
            "timeout": timeout,
            "tls": tls,
            "token": token,
            "token_file": token_file,
            "allow_plaintext_token": allow_plaintext_token,
            "shared_memory": shared_memory,
            "reply_compression": reply_compression,
            "retries": retries,
            "metadata": metadata,
        }
        self._own_metadata: Metadata = _checked_metadata(metadata or {})
        if reply_compression != "none":
            self._own_metadata += ((REPLY_COMPRESSION_KEY, reply_compression),)
        # Read now, so that unusable files are reported here and not by the first call.
        self._start(self._settings())

    def _start(self, settings: list[ChannelSettings]) -> None:
        """Begin input and output, or leave that to the first call."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments.

        Raises:
            TypeError: If the arguments contain a token.
        """
        if self._arguments["token"] is not None:
            raise TypeError(
                f"cannot pickle a {type(self).__name__} that was given a token, because the pickle "
                f"would contain the secret; use token_file, or create a client in each process"
            )
        return _made_again, (type(self), self._targets, self._arguments)

    def _settings(self) -> list[ChannelSettings]:
        """Return the settings for a channel to each server; the token file is read each time."""
        given = self._arguments
        token, file = given["token"], given["token_file"]
        token = token if file is None else read_token(file)
        return [
            channel_settings(
                target,
                tls=given["tls"],
                token=token,
                allow_plaintext_token=given["allow_plaintext_token"],
                stay_connected=len(self._targets) > 1,
            )
            for target in self._targets
        ]

    def _check_one_server(self, call: str) -> None:
        if len(self._targets) > 1:
            raise InvalidInputError(
                f"{call}: this client has {len(self._targets)} servers; use a client for each"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the client is closed")

    def _metadata(self) -> Metadata:
        """Return the metadata of a call: the client's own, and the caller's trace."""
        return (*self._own_metadata, *(trace_metadata() or ()))


class ReadyWait:
    """The state of ``wait_ready`` between health checks, which become less and less frequent.

    Args:
        targets: The servers' addresses, for the error.
        servers: How many of them must be serving; None for all.
        timeout: Seconds to wait in all.
        now: The current time in seconds, on the same clock as the argument of ``left``.

    Raises:
        InvalidInputError: If ``servers`` is not between 1 and the number of addresses.
    """

    _FIRST_PAUSE, _LONGEST_PAUSE, _GROWTH = 0.05, 0.5, 1.5
    _ONE_SERVER_SECONDS = 1.0

    # The time is up, or the server is stopping or away; another one may soon take its place.
    _AWAY = (
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
    )

    def __init__(
        self, targets: Sequence[str], servers: int | None, timeout: float, now: float
    ) -> None:
        if servers is not None and not 1 <= servers <= len(targets):
            raise InvalidInputError(
                f"servers: got {servers}, expected a number from 1 to {len(targets)}, the number "
                f"of addresses of this client"
            )
        self.waiting = list(range(len(targets)))
        self._targets = targets
        self._needed = len(targets) if servers is None else servers
        self._timeout = timeout
        self._end = now + timeout
        self._pause = self._FIRST_PAUSE
        self._heard = ["it never answered"] * len(targets)

    def left(self, now: float) -> float:
        """Return the seconds that are left."""
        return self._end - now

    @property
    def is_over(self) -> bool:
        """Whether enough servers are serving."""
        return len(self._targets) - len(self.waiting) >= self._needed

    def options(self, now: float) -> dict[str, Any]:
        """Return the options of a call: a lone server may take its time to connect."""
        if len(self._targets) == 1:
            return {"timeout": bounded(self.left(now)), "wait_for_ready": True}
        return {"timeout": min(self._ONE_SERVER_SECONDS, max(0.0, self.left(now)))}

    def answered(self, index: int, reply: bytes) -> bool:
        """Record the reply to a health check of a server; return whether it is serving."""
        status = health_in(reply)
        self._heard[index] = f"it reports {status}"
        if status == "SERVING":
            self.waiting.remove(index)
        return status == "SERVING"

    def failed(self, index: int, error: grpc.RpcError) -> None:
        """Record a failed health check of a server.

        Raises:
            LayertapError: If retrying is of no use.
        """
        if error.code() not in self._AWAY:
            raise error_from_rpc(error) from None
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._heard[index] = str(error_from_rpc(error))

    def pause(self, now: float) -> float:
        """Return the seconds to sleep before the next health check."""
        pause, self._pause = self._pause, min(self._LONGEST_PAUSE, self._pause * self._GROWTH)
        return max(0.0, min(pause, self.left(now)))

    def over(self) -> LayertapError:
        """Return the error for a server that did not become ready in time."""
        within = f"not ready within {self._timeout:g} seconds"
        if len(self._targets) == 1:
            return UnavailableError(
                f"the server at {self._targets[0]} was {within}: {self._heard[0]}"
            )
        ready = len(self._targets) - len(self.waiting)
        heard = "; ".join(f"{self._targets[index]}: {self._heard[index]}" for index in self.waiting)
        return UnavailableError(
            f"{ready} of {len(self._targets)} servers serve, expected {self._needed}; the others "
            f"were {within}: {heard}"
        )


def _checked_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the addresses of a client.

    Raises:
        InvalidInputError: If there is none, or one of them twice.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    if not targets:
        raise InvalidInputError("target: got an empty list, expected one or more addresses")
    for each in targets:
        if targets.count(each) > 1:
            raise InvalidInputError(f"target: got {each} twice, expected each server once")
    return targets


# What gRPC accepts, without its own headers and those for bytes.
_HEADER = re.compile(r"(?!grpc-)(?!.*-bin$)[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_OTHERWISE = {"authorization": "token or token_file", REPLY_COMPRESSION_KEY: "reply_compression"}


def _checked_metadata(metadata: Mapping[str, str]) -> Metadata:
    """Return the metadata as gRPC takes it.

    Raises:
        InvalidInputError: If an entry can't be sent or has an argument of its own.
    """
    for key, value in metadata.items():
        if key in _OTHERWISE:
            raise InvalidInputError(f"metadata: got {key!r}, expected it as {_OTHERWISE[key]}")
        if not isinstance(key, str) or not _HEADER.fullmatch(key):
            raise InvalidInputError(
                f"metadata: got the name {key!r}, expected small letters, digits and _.- that "
                f"neither begin with grpc- nor end with -bin"
            )
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidInputError(
                f"metadata: got another value of {key!r}, expected printable ASCII characters"
            )
    return tuple(metadata.items())


def describe_message(model: str, *, fingerprint: bool) -> bytes:
    """Return the message of DescribeModel."""
    request = feature_service_pb2.DescribeModelRequest(model=model, fingerprint=fingerprint)
    message: bytes = request.SerializeToString()
    return message


def health_message(service: str) -> bytes:
    """Return the message of a health check."""
    return health_pb2.HealthCheckRequest(service=service).SerializeToString()


def health_in(reply: bytes) -> str:
    """Return the status in a health check's reply, such as ``SERVING``."""
    status = health_pb2.HealthCheckResponse.FromString(reply).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def _made_again(
    kind: type[BaseClient], targets: tuple[str, ...], arguments: dict[str, Any]
) -> BaseClient:
    """Create a client from its pickled arguments."""
    return kind(targets, **arguments)
