"""The client: one channel, and a method for each RPC."""

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

from layertap.client.base import (
    BaseClient,
    Method,
    ReadyWait,
    describe_message,
    health_in,
    health_message,
)
from layertap.client.channel import ChannelSettings
from layertap.client.failures import error_from_rpc
from layertap.client.features import Features
from layertap.client.items import MAX_IN_FLIGHT
from layertap.client.requests import StreamRequest, request_fields
from layertap.client.retry import retrying
from layertap.client.shared_memory_client import SharedMemoryClient, SharedMemoryWish
from layertap.client.stream import FeatureStream
from layertap.client.timeouts import bounded
from layertap.errors import LayertapError, SharedMemoryLostError
from layertap.selection import Extractor, SelectionLike
from layertap.v1 import admin_service_pb2, catalogue_pb2, feature_service_pb2
from layertap.wire.messages import encode_request

if TYPE_CHECKING:
    from layertap.inputs import InputLike
    from layertap.intervention import InterventionsLike
    from layertap.objective import ObjectiveLike
    from layertap.shm.client_session import ClientSession
    from layertap.wire.tensors import Arrays

__all__ = ["Client"]

_log = logging.getLogger(__name__)


class _Transport:
    """A channel, its methods and its shared memory, for one process."""

    def __init__(self, target: str, channel: grpc.Channel, shared_memory: SharedMemoryWish) -> None:
        self.channel = channel
        open_memory = channel.unary_unary(Method.OPEN_SHARED_MEMORY)
        self.memory = SharedMemoryClient(target, shared_memory, open_memory)
        self.extract = channel.unary_unary(Method.EXTRACT)
        self.stream = channel.stream_stream(Method.EXTRACT_STREAM)
        self.list = channel.unary_unary(Method.LIST_MODELS)
        self.describe = channel.unary_unary(Method.DESCRIBE_MODEL)
        self.reload = channel.unary_unary(Method.RELOAD)
        self.health = channel.unary_unary(Method.HEALTH)

    def close(self) -> None:
        self.memory.close()
        self.channel.close()


class Client(BaseClient):
    """Extracts layers from a layertap server.

    Safe to share between threads. Use it as a context manager, or ``close`` it. In a forked process
    an inherited client opens its own connection. An unpickled client (in ``multiprocessing`` or a
    data loader's workers) is created again from its arguments. A client with ``token`` can't be
    pickled, because the pickle would contain the secret; use ``token_file`` instead.
    ``AsyncClient`` has the same methods for asyncio.

    See ``BaseClient`` for arguments and errors.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     features = client.extract("resnet18", "photo.jpg", ["layer1", "avgpool:input"])
        >>> features["layer1"].shape
        (1, 64, 56, 56)
    """

    def _start(self, settings: ChannelSettings) -> None:
        self._opening = threading.Lock()
        self._transport: _Transport | None = self._open(settings)
        _CLIENTS.add(self)

    def extract(
        self,
        model: str,
        given: InputLike,
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        objective: ObjectiveLike | None = None,
        interventions: InterventionsLike | None = None,
        timeout: float | None = None,
    ) -> Features:
        """Run a model on a batch and return the selected layers.

        Args:
            model: The name of a served model.
            given: An array ``[B, ...]`` for the model, or a mapping of input names to such arrays;
                or an image, or a list of images. An image is a path, the bytes of a JPEG, PNG or
                WebP file, or a PIL image.
            layers: The layers to return: a name or glob, ``"avgpool:input"`` for an input,
                ``"layer4=deep"`` to rename, or a LayerSelection; a list of these; or a mapping of
                names to aliases.
            extractor: The extractor to use.
            objective: What the layers with ``:gradient`` or ``:input_gradient`` are the gradients
                of: an ``Objective``, or a text such as ``"fc[281]"`` or ``"fc[maximum]"``.
            interventions: Changes of values while the model runs: an ``Intervention``, a text such
                as ``"layer4:channel=3:zero"``, a list of these, or a list of such lists, one for
                each set.
            timeout: Seconds that this call may take; None for the client's default.

        Returns:
            The layers by name: read-only numpy views of the received message or of shared memory.

        Raises:
            LayertapError: The server's error, as an exception of the same class.
        """
        fields, inputs = request_fields(
            model, given, layers, extractor, objective=objective, interventions=interventions
        )
        transport = self._opened()
        memory = transport.memory.session(self._timeout if timeout is None else timeout)
        if memory is not None:
            try:
                return self._extract_shared(transport, memory, fields, inputs, timeout)
            except SharedMemoryLostError as error:
                _log.debug("shared memory is lost, using the network: %s", error)
        message = encode_request(feature_service_pb2.ExtractRequest(**fields), inputs)
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
            max_in_flight: Maximum number of items that are sent and not yet yielded.
            timeout: Seconds that the whole stream may take; None for no limit.
            item_timeout: Seconds that the server may take for one item, unless the item has its
                own; None for the client's default.
        """
        transport = self._opened()
        return FeatureStream(
            transport.stream,
            max_in_flight,
            timeout,
            self._timeout if item_timeout is None else item_timeout,
            transport.memory.session(self._timeout),
            metadata=self._own_metadata,
        )

    @overload
    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = ...,
        objective: ObjectiveLike | None = ...,
        interventions: InterventionsLike | None = ...,
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
        objective: ObjectiveLike | None = ...,
        interventions: InterventionsLike | None = ...,
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
        objective: ObjectiveLike | None = None,
        interventions: InterventionsLike | None = None,
        ordered: bool = True,
        return_errors: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        item_timeout: float | None = None,
    ) -> Iterator[Features | LayertapError]:
        """Yield the layers of many inputs, with several inputs in flight at once.

        The stream ends when the iterator is exhausted, closed or garbage-collected.

        Args:
            model: The name of a served model.
            inputs: The inputs, each as for ``extract``; read at most ``max_in_flight`` ahead.
            layers: The layers to return.
            extractor: The extractor to use.
            objective: What requested gradients are the gradients of; None if there are none.
            interventions: Changes of values while the model runs; None if there are none.
            ordered: Whether to yield in the order of the inputs, or as they finish.
            return_errors: Whether the error of an item is yielded in its place; otherwise it is
                raised, which ends the iteration.
            max_in_flight: Maximum number of items that are sent and not yet yielded.
            item_timeout: Seconds that the server may take for one item; None for the client's
                default.

        Raises:
            LayertapError: If the stream fails, or if an item fails without ``return_errors``.
        """
        with self.stream(max_in_flight=max_in_flight, item_timeout=item_timeout) as stream:
            requests = (
                StreamRequest(
                    model,
                    given,
                    layers,
                    extractor,
                    objective=objective,
                    interventions=interventions,
                )
                for given in inputs
            )
            for _, outcome in stream.extract(requests, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome

    def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server serves."""
        reply = self._call(self._opened().list, b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    def describe_model(
        self, model: str, *, fingerprint: bool = False, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue: every layer, its shapes and the extractors that serve it.

        With ``fingerprint`` it has a digest of the weights too, which may take some seconds.
        """
        message = describe_message(model, fingerprint=fingerprint)
        reply = self._call(self._opened().describe, message, timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Make the server read its configuration and changed weights again.

        Returns:
            The result for each model, after everything new is warm.

        Raises:
            LayertapError: If the configuration is wrong, another reload is in progress, or the
                server was started without ``--admin``.
        """
        reply = self._call(self._opened().reload, b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return the server's status from ``grpc.health.v1``, such as ``SERVING``.

        Args:
            service: A model's name, or ``layertap.v1.FeatureService``; the server as a whole if
                empty.
            timeout: Seconds that this call may take; None for the client's default.

        Raises:
            NotFoundError: If the server does not know the name.
            UnavailableError: If the server can't be reached.
        """
        return health_in(self._call(self._opened().health, health_message(service), timeout))

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server reports SERVING; it may start, stop and restart meanwhile.

        This client is then connected to the server.

        Raises:
            UnavailableError: After ``timeout`` seconds; the message has the last status.
            LayertapError: If the server answers, but does not report its health to this client.
        """
        wait = ReadyWait(self._target, timeout, time.monotonic())
        while (left := wait.left(time.monotonic())) > 0:
            try:
                reply = self._opened().health(
                    b"", timeout=bounded(left), wait_for_ready=True, metadata=self._metadata()
                )
            except grpc.RpcError as error:
                wait.failed(error)
            except ValueError:  # The channel was closed just now.
                self._check_open()
                raise
            else:
                if wait.serves(reply):
                    return
            time.sleep(wait.pause(time.monotonic()))
        raise wait.over()

    def close(self) -> None:
        """Close the channel; open calls raise UnavailableError. Received features stay valid."""
        self._closed = True
        transport = self._transport
        if transport is not None:
            transport.close()

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
        memory: ClientSession,
        fields: dict[str, Any],
        inputs: Arrays,
        timeout: float | None,
    ) -> Features:
        request = feature_service_pb2.ExtractRequest(shared_memory_session=memory.session, **fields)
        memory.begin_call()
        try:
            with memory.written(inputs) as places:
                message = encode_request(request, inputs, places)
                reply = self._call(transport.extract, message, timeout)
            return Features(reply, memory.finder())
        finally:
            memory.end_call()

    def _open(self, settings: ChannelSettings) -> _Transport:
        return _Transport(self._target, settings.open(), self._shared_memory)

    def _opened(self) -> _Transport:
        """Return the transport; a forked process opens its own."""
        self._check_open()
        transport = self._transport
        if transport is None:
            with self._opening:
                transport = self._transport = self._transport or self._open(self._settings())
        return transport

    def _after_fork(self) -> None:
        """Leave the connection to the parent process, in a child that was forked from it."""
        if self._transport is not None:
            # Never released, because closing it would write to the parent's sockets.
            _PARENTS.append(self._transport)
        self._transport = None
        self._opening = threading.Lock()

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
                metadata=self._metadata(),
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        except ValueError:  # gRPC raises this if the channel was closed just now.
            self._check_open()
            raise


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()
_PARENTS: list[_Transport] = []


def _forked() -> None:
    for client in list(_CLIENTS):
        client._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
