"""The client: one channel, one method for each RPC."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import grpc

from layertap.client.channel import PathLike, Tls, open_channel, read_token
from layertap.client.failures import error_from_rpc
from layertap.client.features import Features
from layertap.client.requests import StreamRequest, request_fields
from layertap.client.retry import check_retries, retrying
from layertap.client.shared_memory import (
    OPEN,
    SharedMemoryClient,
    SharedMemoryWish,
    written,
)
from layertap.client.stream import MAX_IN_FLIGHT, FeatureStream
from layertap.client.timeouts import bounded
from layertap.client.trace_context import trace_metadata
from layertap.errors import (
    ConfigError,
    InvalidInputError,
    LayertapError,
    SharedMemoryLostError,
    UnavailableError,
)
from layertap.grpc_health import health_pb2
from layertap.selection import Extractor, SelectionLike
from layertap.v1 import admin_service_pb2, catalogue_pb2, feature_service_pb2
from layertap.wire.messages import (
    REPLY_COMPRESSION_KEY,
    REPLY_COMPRESSIONS,
    encode_request,
    encode_shared_request,
)

if TYPE_CHECKING:
    import numpy as np

    from layertap.client.inputs import InputLike
    from layertap.wire.shared.connection import Connection

__all__ = ["Client"]

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SERVICE = "/layertap.v1.FeatureService/"
RELOAD = "/layertap.v1.AdminService/Reload"
TARGET = "127.0.0.1:8001"

# The time is up, or the server stops or has gone: another may stand in its place soon.
_AWAY = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
)
# How often ``wait_ready`` asks: soon at first, then less and less often.
_ASK_AGAIN_SECONDS, _ASK_AGAIN_AT_MOST = 0.05, 0.5

_log = logging.getLogger(__name__)


class _Transport:
    """A channel, its methods and its shared memory: what belongs to one process."""

    def __init__(self, target: str, channel: grpc.Channel, shared_memory: SharedMemoryWish) -> None:
        self.channel = channel
        self.memory = SharedMemoryClient(target, shared_memory, channel.unary_unary(OPEN))
        self.extract = channel.unary_unary(f"{SERVICE}Extract")
        self.stream = channel.stream_stream(f"{SERVICE}ExtractStream")
        self.list = channel.unary_unary(f"{SERVICE}ListModels")
        self.describe = channel.unary_unary(f"{SERVICE}DescribeModel")
        self.reload = channel.unary_unary(RELOAD)
        self.health = channel.unary_unary(HEALTH_CHECK)

    def close(self) -> None:
        self.memory.close()
        self.channel.close()


class Client:
    """Asks a layertap server for layers.

    Safe to share between threads. Use it as a context manager, or ``close`` it. A client that a
    forked process inherits opens a connection of its own there. A pickled one (for
    ``multiprocessing`` or a data loader's workers) is made again from its arguments where it is
    unpickled; with ``token`` it can't be pickled, as the pickle would hold the secret, but with
    ``token_file`` it can.

    Args:
        target: The server's address: ``host:port``, or ``unix:/path`` for a Unix socket.
        timeout: Seconds that a call may take, unless the call says otherwise; None for no end.
        tls: ``True`` for a server that a public authority vouches for; a ``Tls`` for one with an
            authority of its own, or one that asks for a client's certificate; False for no TLS.
        token: The bearer token to send with every call.
        token_file: A file whose first token is sent, instead of ``token``: one a line, ``#`` begins
            a comment.
        allow_plaintext_token: Whether the token may be sent to another machine without TLS, for
            networks that encrypt by themselves.
        shared_memory: Whether large tensors go through memory shared with the server, where it is
            on this machine and runs as the same user: ``"auto"`` tries where the target is a
            loopback address or a Unix socket, True everywhere, False never. Where it can't be had
            they go through the network, without a word; only an item of a stream whose memory
            is lost on the way fails with SharedMemoryLostError.
        reply_compression: How the server compresses replies that go through the network:
            ``"none"``, ``"gzip"`` or ``"deflate"``. Worth it on slow networks only:
            docs/performance.md has what it costs.
        retries: How often a call is made again that the server refuses because it is full, within
            the call's timeout; streams are not. It waits as long as the server says, and a random
            time on top. 0 raises OverloadedError at once, whose ``retry_after`` says how long.

    Raises:
        InvalidInputError: For a ``shared_memory`` or ``reply_compression`` that is none of these,
            or negative retries.
        ConfigError: For files or a token that won't do, for a token that would be sent as plain
            text to another machine, and under gevent without gRPC's ``init_gevent``.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     features = client.extract("resnet18", "photo.jpg", ["layer1", "avgpool:input"])
        >>> features["layer1"].shape
        (1, 64, 56, 56)
    """

    def __init__(
        self,
        target: str = TARGET,
        *,
        timeout: float | None = 60.0,
        tls: bool | Tls = False,
        token: str | None = None,
        token_file: PathLike | None = None,
        allow_plaintext_token: bool = False,
        shared_memory: SharedMemoryWish = "auto",
        reply_compression: str = "none",
        retries: int = 0,
    ) -> None:
        check_retries(retries)
        if token is not None and token_file is not None:
            raise ConfigError("token: got token and token_file, expected one of them or none")
        if reply_compression not in REPLY_COMPRESSIONS:
            raise InvalidInputError(
                f"reply_compression: got {reply_compression!r}, expected one of "
                f"{', '.join(REPLY_COMPRESSIONS)}"
            )
        self._target = target
        self._arguments: dict[str, Any] = {
            "timeout": timeout,
            "tls": tls,
            "token": token,
            "token_file": token_file,
            "allow_plaintext_token": allow_plaintext_token,
            "shared_memory": shared_memory,
            "reply_compression": reply_compression,
            "retries": retries,
        }
        self._retries = retries
        self._timeout = timeout
        self._metadata: tuple[tuple[str, str], ...] = ()
        if reply_compression != "none":
            self._metadata = ((REPLY_COMPRESSION_KEY, reply_compression),)
        self._closed = False
        self._opening = threading.Lock()
        self._transport: _Transport | None = self._open()
        _CLIENTS.add(self)

    def extract(
        self,
        model: str,
        given: InputLike,
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        timeout: float | None = None,
    ) -> Features:
        """Run a model on a batch and return layers of it.

        Args:
            model: A served model's name.
            given: A float array ``[B, ...]`` as the model takes it; or an image, or a list of
                images: a path, the bytes of a JPEG, PNG or WebP file, or a PIL image.
            layers: What to return: a name or glob, ``"avgpool:input"`` for an input,
                ``"layer4=deep"`` to rename, a LayerSelection; a list of those; or a mapping of
                names to aliases.
            extractor: How to take them.
            timeout: Seconds that this call may take; None for the client's own.

        Returns:
            The layers by name: read-only numpy views of the received message or of shared memory.

        Raises:
            LayertapError: Whatever the server refuses, as the exception that it names.
        """
        fields, tensor = request_fields(model, given, layers, extractor)
        transport = self._opened()
        memory = transport.memory.connection(self._timeout if timeout is None else timeout)
        if memory is not None:
            try:
                return self._extract_shared(transport, memory, fields, tensor, timeout)
            except SharedMemoryLostError as error:
                _log.debug("shared memory is lost, the wire instead: %s", error)
        message = encode_request(feature_service_pb2.ExtractRequest(**fields), tensor)
        return Features(self._call(transport.extract, message, timeout))

    def stream(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> FeatureStream:
        """Open a stream for many items; close it, or use it as a context manager.

        Args:
            max_in_flight: Items that are sent and not yet yielded.
            timeout: Seconds that the whole stream may take; None for no end.
            item_timeout: Seconds that the server may take for one item, unless the item says
                otherwise; None for the client's own.
        """
        transport = self._opened()
        return FeatureStream(
            transport.stream,
            max_in_flight,
            timeout,
            self._timeout if item_timeout is None else item_timeout,
            transport.memory.connection(self._timeout),
            metadata=self._metadata,
        )

    @overload
    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = ...,
        ordered: bool = ...,
        return_errors: Literal[False] = ...,
        max_in_flight: int = ...,
        item_timeout: float | None = ...,
    ) -> Iterator[Features]: ...

    @overload
    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = ...,
        ordered: bool = ...,
        return_errors: bool,
        max_in_flight: int = ...,
        item_timeout: float | None = ...,
    ) -> Iterator[Features | LayertapError]: ...

    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        ordered: bool = True,
        return_errors: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        item_timeout: float | None = None,
    ) -> Iterator[Features | LayertapError]:
        """Yield the layers of many inputs, several of which are in flight at once.

        The stream ends when the iterator does, or is closed, or is let go of.

        Args:
            model: A served model's name.
            inputs: What ``extract`` takes, item by item; read no further ahead than
                ``max_in_flight``.
            layers: What to return.
            extractor: How to take them.
            ordered: Whether to yield in the order of the inputs, or as they finish.
            return_errors: Whether the error of an item is yielded in its place, or raised, which
                ends the iteration.
            max_in_flight: Items that are sent and not yet yielded.
            item_timeout: Seconds that the server may take for one item; None for the client's own.

        Raises:
            LayertapError: What the stream ends with, and what an item fails with unless
                ``return_errors``.
        """
        with self.stream(max_in_flight=max_in_flight, item_timeout=item_timeout) as stream:
            requests = (StreamRequest(model, given, layers, extractor) for given in inputs)
            for _, outcome in stream.extract(requests, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome

    def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server holds."""
        reply = self._call(self._opened().list, b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    def describe_model(
        self, model: str, *, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue: every layer, its shapes and the extractors that serve it."""
        request = feature_service_pb2.DescribeModelRequest(model=model)
        reply = self._call(self._opened().describe, request.SerializeToString(), timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Have the server read its configuration and changed weights again.

        Returns:
            What became of each model, once everything new is warm.

        Raises:
            LayertapError: Where the configuration is wrong, another reload is in progress, or the
                server was started without ``--admin``.
        """
        reply = self._call(self._opened().reload, b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return what the server says of itself by ``grpc.health.v1``: ``SERVING`` or another.

        Args:
            service: A model's name, or ``layertap.v1.FeatureService``; the server as a whole if
                empty.
            timeout: Seconds that this call may take; None for the client's own.

        Raises:
            NotFoundError: For a name that it does not know.
            UnavailableError: Where it can't be reached.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        reply = self._call(self._opened().health, request.SerializeToString(), timeout)
        return _status_in(reply)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server reports itself as serving; it may come, go and come back meanwhile.

        Calls by this client reach it then: it is this client's connection that is waited for.

        Raises:
            UnavailableError: After ``timeout`` seconds; the text says what was last heard.
            LayertapError: Where it answers, but does not report its health, or not to us.
        """
        end = time.monotonic() + timeout
        pause = _ASK_AGAIN_SECONDS
        heard = "it never answered"
        while (left := end - time.monotonic()) > 0:
            try:
                reply = self._opened().health(
                    b"", timeout=bounded(left), wait_for_ready=True, metadata=self._metadata
                )
            except grpc.RpcError as error:
                if error.code() not in _AWAY:
                    raise error_from_rpc(error) from None
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    heard = str(error_from_rpc(error))
            except ValueError:  # The channel was closed in this moment.
                self._check_open()
                raise
            else:
                status = _status_in(reply)
                if status == "SERVING":
                    return
                heard = f"it reports {status}"
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(_ASK_AGAIN_AT_MOST, pause * 1.5)
        raise UnavailableError(
            f"the server at {self._target} was not ready within {timeout:g} seconds: {heard}"
        )

    def close(self) -> None:
        """Close the channel, to every call's UnavailableError. Features that came stay valid."""
        self._closed = True
        transport = self._transport
        if transport is not None:
            transport.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments.

        Raises:
            TypeError: Where they hold a token.
        """
        if self._arguments["token"] is not None:
            raise TypeError(
                "cannot pickle a Client that was given a token, which the pickle would hold for "
                "anybody to read; give it token_file, or make a Client in each process"
            )
        return _made_again, (type(self), self._target, self._arguments)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the channel."""
        self.close()

    def _extract_shared(
        self,
        transport: _Transport,
        memory: Connection,
        fields: dict[str, Any],
        tensor: np.ndarray | None,
        timeout: float | None,
    ) -> Features:
        request = feature_service_pb2.ExtractRequest(shared_memory_session=memory.session, **fields)
        memory.begin_call()
        try:
            with written(memory, tensor) as at:
                if tensor is None or at is None:
                    message = encode_request(request, tensor)
                else:
                    message = encode_shared_request(request, tensor, at)
                reply = self._call(transport.extract, message, timeout)
            return Features(reply, memory.finder())
        finally:
            memory.end_call()

    def _open(self) -> _Transport:
        given = self._arguments
        token, file = given["token"], given["token_file"]
        channel = open_channel(
            self._target,
            tls=given["tls"],
            token=token if file is None else read_token(file),
            allow_plaintext_token=given["allow_plaintext_token"],
        )
        return _Transport(self._target, channel, given["shared_memory"])

    def _opened(self) -> _Transport:
        """Return the transport; one of its own in a forked process."""
        self._check_open()
        transport = self._transport
        if transport is None:
            with self._opening:
                transport = self._transport = self._transport or self._open()
        return transport

    def _after_fork(self) -> None:
        """Leave the connection to the parent process, in a child that was forked from it."""
        if self._transport is not None:
            # Never let go of: to close it would speak on the parent's sockets.
            _PARENTS.append(self._transport)
        self._transport = None
        self._opening = threading.Lock()

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the client is closed")

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable, message: bytes, timeout: float | None
    ) -> bytes:
        seconds = self._timeout if timeout is None else timeout
        return retrying(lambda left: self._call_once(method, message, left), self._retries, seconds)

    def _call_once(
        self, method: grpc.UnaryUnaryMultiCallable, message: bytes, timeout: float | None
    ) -> bytes:
        self._check_open()
        try:
            return method(  # type: ignore[no-any-return]
                message,
                timeout=bounded(timeout),
                metadata=(*self._metadata, *(trace_metadata() or ())),
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        except ValueError:  # gRPC's word for a channel that was closed in this moment.
            self._check_open()
            raise


def _status_in(reply: bytes) -> str:
    status = health_pb2.HealthCheckResponse.FromString(reply).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def _made_again(kind: type[Client], target: str, arguments: dict[str, Any]) -> Client:
    """Return what was pickled."""
    return kind(target, **arguments)


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()
_PARENTS: list[_Transport] = []


def _forked() -> None:
    for client in list(_CLIENTS):
        client._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
