"""The client: one channel, and a method for each RPC."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import grpc

from layertap.client.balance import Attempts, Balance
from layertap.client.base import (
    BaseClient,
    Method,
    ReadyWait,
    describe_message,
    health_in,
    health_message,
)
from layertap.client.channel import ChannelSettings
from layertap.client.concurrent_calls import concurrent_calls
from layertap.client.failures import error_from_rpc
from layertap.client.features import Features
from layertap.client.items import MAX_IN_FLIGHT
from layertap.client.requests import StreamRequest, request_fields
from layertap.client.retry import retrying
from layertap.client.shared_memory_client import SharedMemoryClient, SharedMemoryWish
from layertap.client.stream import FeatureStream
from layertap.client.timeouts import Deadline, bounded
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

R = TypeVar("R")


class _Transport:
    """A channel to one server, its methods and its shared memory, for one process.

    Args:
        settings: How to reach the server.
        shared_memory: See ``BaseClient``.
    """

    def __init__(self, settings: ChannelSettings, shared_memory: SharedMemoryWish) -> None:
        self.channel = channel = settings.open()
        open_memory = channel.unary_unary(Method.OPEN_SHARED_MEMORY)
        self.memory = SharedMemoryClient(settings.target, shared_memory, open_memory)
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
    """Extracts layers from a layertap server, or from several that have the same models.

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

    def _start(self, settings: list[ChannelSettings]) -> None:
        self._opening = threading.Lock()
        self._transports: list[_Transport] | None = None
        self._balance = Balance(self._targets)
        self._transports = self._open(settings)
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
        variant: str = "",
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
            variant: How the extractor's program is finished, such as ``"channels_last"``: one of
                the model's ``variants`` (see ``describe_model``) of the extractor, which must be
                named; empty for the usual way.
            timeout: Seconds that this call may take; None for the client's default.

        Returns:
            The layers by name: read-only numpy views of the received message or of shared memory.

        Raises:
            LayertapError: The server's error, as an exception of the same class.
        """
        fields, inputs = request_fields(
            model, given, layers, extractor,
            objective=objective, interventions=interventions, variant=variant,
        )  # fmt: skip
        return self._anywhere(
            lambda transport, left: self._extract(transport, fields, inputs, left), timeout
        )

    def stream(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> FeatureStream:
        """Open a stream for many items; close it, or use it as a context manager.

        A client of several servers opens it on one of them, where all of its items go.

        Args:
            max_in_flight: Maximum number of items that are sent and not yet yielded.
            timeout: Seconds that the whole stream may take; None for no limit.
            item_timeout: Seconds that the server may take for one item, unless the item has its
                own; None for the client's default.
        """
        transports, balance = self._opened(), self._balance
        index = balance.take()
        try:
            return FeatureStream(
                transports[index].stream,
                max_in_flight,
                timeout,
                self._timeout if item_timeout is None else item_timeout,
                transports[index].memory.session(self._timeout),
                metadata=self._own_metadata,
                on_close=lambda: balance.give_back(index),
            )
        except BaseException:
            balance.give_back(index)
            raise

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
        variant: str = ...,
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
        variant: str = ...,
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
        variant: str = "",
        ordered: bool = True,
        return_errors: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        item_timeout: float | None = None,
    ) -> Iterator[Features | LayertapError]:
        """Yield the layers of many inputs, with several inputs in flight at once.

        With one server they go over a stream, which ends when the iterator is exhausted, closed or
        garbage-collected. With several, each input is a call of its own, so that every server gets
        its share and the loss of one server costs at most the inputs that it was working on.

        Args:
            model: The name of a served model.
            inputs: The inputs, each as for ``extract``; read at most ``max_in_flight`` ahead.
            layers: The layers to return.
            extractor: The extractor to use.
            objective: What requested gradients are the gradients of; None if there are none.
            interventions: Changes of values while the model runs; None if there are none.
            variant: How the extractor's program is finished; see ``extract``.
            ordered: Whether to yield in the order of the inputs, or as they finish.
            return_errors: Whether the error of an item is yielded in its place; otherwise it is
                raised, which ends the iteration.
            max_in_flight: Maximum number of items that are sent and not yet yielded.
            item_timeout: Seconds that the server may take for one item; None for the client's
                default.

        Raises:
            LayertapError: If the stream fails, or if an item fails without ``return_errors``.
        """
        if len(self._targets) > 1:
            seconds = self._timeout if item_timeout is None else item_timeout

            def ask(given: InputLike) -> Features:
                return self.extract(
                    model,
                    given,
                    layers,
                    extractor=extractor,
                    objective=objective,
                    interventions=interventions,
                    variant=variant,
                    timeout=seconds,
                )

            for outcome in concurrent_calls(ask, inputs, max_in_flight, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome
            return
        with self.stream(max_in_flight=max_in_flight, item_timeout=item_timeout) as stream:
            requests = (
                StreamRequest(
                    model,
                    given,
                    layers,
                    extractor,
                    objective=objective,
                    interventions=interventions,
                    variant=variant,
                )
                for given in inputs
            )
            for _, outcome in stream.extract(requests, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome

    def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server serves."""
        reply = self._call("list", b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    def describe_model(
        self, model: str, *, fingerprint: bool = False, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue: every layer, its shapes and the extractors that serve it.

        With ``fingerprint`` it has a digest of the weights too, which may take some seconds.
        """
        message = describe_message(model, fingerprint=fingerprint)
        reply = self._call("describe", message, timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Make the server read its configuration and changed weights again.

        Returns:
            The result for each model, after everything new is warm.

        Raises:
            InvalidInputError: If this client has several servers.
            LayertapError: If the configuration is wrong, another reload is in progress, or the
                server was started without ``--admin``.
        """
        self._check_one_server("reload")
        reply = self._call("reload", b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return the server's status from ``grpc.health.v1``, such as ``SERVING``.

        A client of several servers asks one of them.

        Args:
            service: A model's name, or ``layertap.v1.FeatureService``; the server as a whole if
                empty.
            timeout: Seconds that this call may take; None for the client's default.

        Raises:
            NotFoundError: If the server does not know the name.
            UnavailableError: If the server can't be reached.
        """
        return health_in(self._call("health", health_message(service), timeout))

    def wait_ready(self, timeout: float = 60.0, *, servers: int | None = None) -> None:
        """Wait until the server reports SERVING; it may start, stop and restart meanwhile.

        This client is then connected to the server.

        Args:
            timeout: Seconds to wait.
            servers: How many of several servers must report SERVING; None for all of them.

        Raises:
            InvalidInputError: If ``servers`` is not between 1 and the number of servers.
            UnavailableError: After ``timeout`` seconds; the message has the last status.
            LayertapError: If the server answers, but does not report its health to this client.
        """
        wait = ReadyWait(self._targets, servers, timeout, time.monotonic())
        while wait.left(time.monotonic()) > 0:
            for index in list(wait.waiting):
                self._check_health(wait, index)
            if wait.is_over:
                return
            time.sleep(wait.pause(time.monotonic()))
        raise wait.over()

    def close(self) -> None:
        """Close the channel; open calls raise UnavailableError. Received features stay valid."""
        self._closed = True
        for transport in self._transports or ():
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

    def _extract(
        self, transport: _Transport, fields: dict[str, Any], inputs: Arrays, timeout: float | None
    ) -> Features:
        """Send a request to one server, through shared memory if possible."""
        memory = transport.memory.session(timeout)
        if memory is not None:
            try:
                return self._extract_shared(transport, memory, fields, inputs, timeout)
            except SharedMemoryLostError as error:
                _log.debug("shared memory is lost, using the network: %s", error)
        message = encode_request(feature_service_pb2.ExtractRequest(**fields), inputs)
        return Features(self._call_once(transport.extract, message, timeout))

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
                reply = self._call_once(transport.extract, message, timeout)
            return Features(reply, memory.finder())
        finally:
            memory.end_call()

    def _check_health(self, wait: ReadyWait, index: int) -> None:
        """Ask one server for its health, while waiting for it."""
        options = wait.options(time.monotonic())
        try:
            reply = self._opened()[index].health(b"", metadata=self._metadata(), **options)
        except grpc.RpcError as error:
            wait.failed(index, error)
        except ValueError:  # The channel was closed just now.
            self._check_open()
            raise
        else:
            if wait.answered(index, reply):
                self._balance.answers(index)

    def _open(self, settings: list[ChannelSettings]) -> list[_Transport]:
        return [_Transport(each, self._shared_memory) for each in settings]

    def _opened(self) -> list[_Transport]:
        """Return the transport of each server; a forked process opens its own."""
        self._check_open()
        transports = self._transports
        if transports is None:
            with self._opening:
                transports = self._transports = self._transports or self._open(self._settings())
        return transports

    def _after_fork(self) -> None:
        """Leave the connection to the parent process, in a child that was forked from it."""
        if self._transports is not None:
            # Never released, because closing it would write to the parent's sockets.
            _PARENTS.extend(self._transports)
        self._transports = None
        self._opening = threading.Lock()
        self._balance = Balance(self._targets)  # Another thread of the parent may hold its lock.

    def _call(
        self,
        method: Literal["list", "describe", "reload", "health"],
        message: bytes,
        timeout: float | None,
    ) -> bytes:
        return self._anywhere(
            lambda transport, left: self._call_once(getattr(transport, method), message, left),
            timeout,
        )

    def _anywhere(self, call: Callable[[_Transport, float | None], R], timeout: float | None) -> R:
        """Make a call on one of the servers; see Note [Several servers] and ``Retries``."""
        transports = self._opened()

        def tried(left: float | None) -> R:
            deadline = Deadline(left)
            attempts = Attempts(self._balance)
            while True:
                with attempts.server() as index:
                    try:
                        return call(transports[index], deadline.left())
                    except LayertapError as error:
                        attempts.failed(error)

        return retrying(tried, self._retries, self._timeout if timeout is None else timeout)

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
