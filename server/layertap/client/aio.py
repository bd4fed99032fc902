"""The asyncio client, with the methods of ``Client`` as coroutines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import grpc
import grpc.aio

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
from layertap.client.items import MAX_IN_FLIGHT, Outcome, StreamItems
from layertap.client.requests import StreamRequest, request_fields
from layertap.client.retry import Retries
from layertap.client.shared_memory_client import SharedMemoryClient
from layertap.client.timeouts import bounded
from layertap.errors import LayertapError, OverloadedError, SharedMemoryLostError, UnavailableError
from layertap.selection import Extractor, SelectionLike
from layertap.shm.client_session import is_shared
from layertap.v1 import admin_service_pb2, catalogue_pb2, feature_service_pb2
from layertap.wire.messages import encode_request

if TYPE_CHECKING:
    from layertap.inputs import InputLike
    from layertap.intervention import InterventionsLike
    from layertap.objective import ObjectiveLike
    from layertap.shm.client_session import ClientSession
    from layertap.wire.tensors import Arrays, SharedSlice

__all__ = ["AsyncClient", "AsyncFeatureStream"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSE_SECONDS = 1.0


class _Transport:
    """A channel, its methods and its shared memory, for one event loop."""

    def __init__(self, client: BaseClient, settings: ChannelSettings) -> None:
        self.loop = asyncio.get_running_loop()
        self.bearer = settings.bearer
        self.channel = settings.open_async()
        self.extract = self.channel.unary_unary(Method.EXTRACT)
        self.stream = self.channel.stream_stream(Method.EXTRACT_STREAM)
        self.list = self.channel.unary_unary(Method.LIST_MODELS)
        self.describe = self.channel.unary_unary(Method.DESCRIBE_MODEL)
        self.reload = self.channel.unary_unary(Method.RELOAD)
        self.health = self.channel.unary_unary(Method.HEALTH)
        self._open_memory = self.channel.unary_unary(Method.OPEN_SHARED_MEMORY)
        self.memory = SharedMemoryClient(
            client._target, client._shared_memory, self._ask_for_memory
        )

    def _ask_for_memory(self, message: bytes, timeout: float) -> bytes:
        """Call OpenSharedMemory from a thread other than the loop's, and wait for the reply."""

        async def ask() -> bytes:
            return await self._open_memory(message, timeout=timeout, metadata=self.bearer)  # type: ignore[no-any-return]

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result()


class AsyncClient(BaseClient):
    """Extracts layers from a layertap server, for asyncio.

    The methods are those of ``Client``, as coroutines. Cancelling a task cancels its call, and the
    server stops computing for it. Use the client as an asynchronous context manager, or ``close``
    it. One client can serve all tasks of an event loop; in another loop (a second ``asyncio.run``)
    it opens another connection. It uses threads to read files and to write large inputs to shared
    memory.

    See ``BaseClient`` for arguments and errors.

    Example:
        >>> async with AsyncClient("127.0.0.1:8001") as client:
        ...     features = await client.extract("resnet18", "photo.jpg", "layer1")
    """

    _transport: _Transport | None = None

    async def extract(
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
        """Run a model on a batch and return the selected layers; see ``Client.extract``."""
        transport = self._opened()
        fields, inputs = await _request_fields(
            model, given, layers, extractor, objective=objective, interventions=interventions
        )
        memory = await self._session(transport, timeout)
        if memory is not None:
            try:
                return await self._extract_shared(transport, memory, fields, inputs, timeout)
            except SharedMemoryLostError as error:
                _log.debug("shared memory is lost, using the network: %s", error)
        message = encode_request(feature_service_pb2.ExtractRequest(**fields), inputs)
        return Features(await self._call(transport, transport.extract, message, timeout))

    async def stream(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> AsyncFeatureStream:
        """Open a stream for many items; see ``Client.stream``."""
        transport = self._opened()
        return AsyncFeatureStream(
            transport.stream,
            max_in_flight,
            timeout=timeout,
            item_timeout=self._timeout if item_timeout is None else item_timeout,
            memory=await self._session(transport, None),
            metadata=(*self._metadata(), *transport.bearer),
        )

    @overload
    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike] | AsyncIterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = ...,
        objective: ObjectiveLike | None = ...,
        interventions: InterventionsLike | None = ...,
        ordered: bool = ...,
        return_errors: Literal[False] = ...,
        max_in_flight: int = ...,
        item_timeout: float | None = ...,
    ) -> AsyncIterator[Features]: ...

    @overload
    def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike] | AsyncIterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = ...,
        objective: ObjectiveLike | None = ...,
        interventions: InterventionsLike | None = ...,
        ordered: bool = ...,
        return_errors: bool,
        max_in_flight: int = ...,
        item_timeout: float | None = ...,
    ) -> AsyncIterator[Outcome]: ...

    async def extract_many(
        self,
        model: str,
        inputs: Iterable[InputLike] | AsyncIterable[InputLike],
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        objective: ObjectiveLike | None = None,
        interventions: InterventionsLike | None = None,
        ordered: bool = True,
        return_errors: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        item_timeout: float | None = None,
    ) -> AsyncIterator[Outcome]:
        """Yield the layers of many inputs; see ``Client.extract_many``.

        ``inputs`` may be asynchronous. If you leave the iterator early, for example by ``break``,
        the stream stays open until the iterator is closed; ``contextlib.aclosing`` closes it.
        """
        opening = self.stream(max_in_flight=max_in_flight, item_timeout=item_timeout)
        async with await opening as stream:
            requests = (
                StreamRequest(
                    model,
                    given,
                    layers,
                    extractor,
                    objective=objective,
                    interventions=interventions,
                )
                async for given in _each(inputs)
            )
            async for _, outcome in stream.extract(requests, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome

    async def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server serves."""
        transport = self._opened()
        reply = await self._call(transport, transport.list, b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    async def describe_model(
        self, model: str, *, fingerprint: bool = False, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue; see ``Client.describe_model``."""
        transport = self._opened()
        message = describe_message(model, fingerprint=fingerprint)
        reply = await self._call(transport, transport.describe, message, timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    async def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Make the server read its configuration and changed weights again; see ``Client``."""
        transport = self._opened()
        reply = await self._call(transport, transport.reload, b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return what the server reports by ``grpc.health.v1``; see ``Client.health``."""
        transport = self._opened()
        message = health_message(service)
        return health_in(await self._call(transport, transport.health, message, timeout))

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server reports itself as serving; see ``Client.wait_ready``."""
        wait = ReadyWait(self._target, timeout, time.monotonic())
        while (left := wait.left(time.monotonic())) > 0:
            transport = self._opened()
            try:
                call = transport.health(
                    b"",
                    timeout=bounded(left),
                    wait_for_ready=True,
                    metadata=(*self._metadata(), *transport.bearer),
                )
                if wait.serves(await self._answer(call)):
                    return
            except grpc.RpcError as error:
                wait.failed(error)
            await asyncio.sleep(wait.pause(time.monotonic()))
        raise wait.over()

    async def close(self) -> None:
        """Close the channel; open calls raise UnavailableError. Received features stay valid."""
        self._closed = True
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.memory.close()
            if transport.loop is asyncio.get_running_loop():
                await transport.channel.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the channel."""
        await self.close()

    def _opened(self) -> _Transport:
        """Return the transport of the running loop."""
        self._check_open()
        if self._transport is None or self._transport.loop is not asyncio.get_running_loop():
            if self._transport is not None:
                # Its loop has ended, or continues elsewhere; the channel ends with the loop.
                self._transport.memory.close()
            self._transport = _Transport(self, self._settings())
        return self._transport

    async def _session(self, transport: _Transport, timeout: float | None) -> ClientSession | None:
        """Return the session of shared memory; None to use the network."""
        seconds = self._timeout if timeout is None else timeout
        if transport.memory.is_settled:
            return transport.memory.session(seconds)
        return await _in_thread(lambda: transport.memory.session(seconds))

    async def _extract_shared(
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
            with ExitStack() as stack:
                places: list[SharedSlice | None] = []
                if is_shared(inputs):
                    places = await _in_thread(lambda: stack.enter_context(memory.written(inputs)))
                message = encode_request(request, inputs, places)
                reply = await self._call(transport, transport.extract, message, timeout)
            return Features(reply, memory.finder())
        finally:
            memory.end_call()

    async def _call(
        self,
        transport: _Transport,
        method: grpc.aio.UnaryUnaryMultiCallable,
        message: bytes,
        timeout: float | None,
    ) -> bytes:
        allowed = Retries(self._retries, self._timeout if timeout is None else timeout)
        while True:
            self._check_open()
            call = method(
                message,
                timeout=bounded(allowed.remaining()),
                metadata=(*self._metadata(), *transport.bearer),
            )
            try:
                return await self._answer(call)
            except grpc.RpcError as error:
                failure = error_from_rpc(error)
            if not isinstance(failure, OverloadedError):
                raise failure
            await asyncio.sleep(allowed.pause(failure))

    async def _answer(self, call: Awaitable[bytes]) -> bytes:
        """Await a call; raise UnavailableError if it was cancelled by closing the client."""
        try:
            return await call
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise UnavailableError("the client is closed") from None


class AsyncFeatureStream:
    """One open ``ExtractStream``. For one task at a time; ``AsyncClient.stream`` makes them.

    Args:
        method: The channel's ``ExtractStream``.
        max_in_flight: Maximum number of items that are sent and not yet yielded.
        timeout: Seconds that the stream may take; None for no limit.
        item_timeout: Seconds for an item without its own timeout; None for no limit.
        memory: The session of shared memory; None for none.
        metadata: The metadata of the call.

    Raises:
        InvalidInputError: If ``max_in_flight`` is below 1.

    Example:
        >>> asks = [StreamRequest("resnet18", path, "avgpool", key=path) for path in paths]
        >>> async with await client.stream() as stream:
        ...     async for path, outcome in stream.extract(asks):
        ...         print(path, outcome)
    """

    def __init__(
        self,
        method: grpc.aio.StreamStreamMultiCallable,
        max_in_flight: int,
        *,
        timeout: float | None,
        item_timeout: float | None,
        memory: ClientSession | None,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self._items = StreamItems(max_in_flight, item_timeout, memory)
        self._memory = memory
        if memory is not None:
            memory.begin_call()
        self._closed = False
        self._call = method(timeout=bounded(timeout), metadata=metadata)
        # A separate task sends. Otherwise a server that waits for its replies to be read, and a
        # client that waits to send, would wait for each other. None means the half close.
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send())

    async def extract(
        self,
        requests: Iterable[StreamRequest] | AsyncIterable[StreamRequest],
        *,
        ordered: bool = False,
    ) -> AsyncIterator[tuple[Any, Outcome]]:
        """Yield each item's key and its outcome; see ``FeatureStream.extract``.

        ``requests`` may be asynchronous. Closing the iterator before its end closes the stream.
        """
        if self._closed:
            raise UnavailableError("the stream is closed")
        waiting = _each(requests)
        keys: dict[int, Any] = {}
        position = 0
        more = finished = False
        try:
            more = True
            while more or keys:
                while more and self._items.has_room(keys):
                    request = await anext(waiting, None)
                    if request is None:
                        more = False
                        break
                    await self._submit(position, request, keys)
                    position += 1
                if not keys:
                    break
                while (taken := self._items.take(keys, ordered=ordered)) is None:
                    await self._receive()
                yield taken
            finished = True
        finally:
            if not finished:
                await self.close()

    async def close(self) -> None:
        """End the stream and abandon the items in flight. Received features stay valid."""
        if self._closed:
            return
        self._closed = True
        self._outgoing.put_nowait(None)
        try:
            # With nothing in flight, the server ends the stream at once with OK, which looks better
            # in its logs than a cancellation. If it doesn't, we don't wait long.
            if not self._items.unanswered:
                ended = asyncio.ensure_future(self._call.code())
                await asyncio.wait([ended], timeout=_CLOSE_SECONDS)
                ended.cancel()
        finally:
            self._call.cancel()
            self._sending.cancel()
            if self._memory is not None:
                self._memory.end_call()

    async def __aenter__(self) -> Self:
        """Return the stream."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream."""
        await self.close()

    async def _submit(self, position: int, request: StreamRequest, keys: dict[int, Any]) -> None:
        if _is_in_memory(request.given):
            message = self._items.encode(position, request, keys)
        else:
            message = await _in_thread(lambda: self._items.encode(position, request, keys))
        if message is not None:
            self._outgoing.put_nowait(message)

    async def _send(self) -> None:
        """Send the encoded items, until the half close or the end of the call."""
        try:
            while (message := await self._outgoing.get()) is not None:
                await self._call.write(message)
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # The call has ended; ``_receive`` reports why.

    async def _receive(self) -> None:
        """Receive an outcome, and keep it until the iterator that it belongs to takes it."""
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise UnavailableError("the stream is closed") from None
        if message is grpc.aio.EOF:
            raise UnavailableError("the server ended the stream")
        self._items.receive(message)


async def _request_fields(
    model: str,
    given: InputLike,
    layers: SelectionLike,
    extractor: Extractor | str,
    *,
    objective: ObjectiveLike | None,
    interventions: InterventionsLike | None,
) -> tuple[dict[str, Any], Arrays]:
    def fields() -> tuple[dict[str, Any], Arrays]:
        return request_fields(
            model, given, layers, extractor, objective=objective, interventions=interventions
        )

    return fields() if _is_in_memory(given) else await _in_thread(fields)


def _is_in_memory(given: Any) -> bool:
    """Return whether an input can be encoded quickly: arrays, tensors or the bytes of a file."""
    if isinstance(given, Mapping):
        return all(map(_is_in_memory, given.values()))
    return isinstance(given, bytes) or hasattr(given, "dtype")


async def _in_thread(work: Callable[[], T]) -> T:
    """Run work in a thread to its end, even if the task is cancelled meanwhile."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _task_is_cancelled() -> bool:
    """Return whether this task was cancelled; otherwise a CancelledError is from a call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
