"""The asyncio client, with the methods of ``Client`` as coroutines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import ExitStack, aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import grpc
import grpc.aio

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
from layertap.client.failures import error_from_rpc
from layertap.client.features import Features
from layertap.client.items import MAX_IN_FLIGHT, Outcome, StreamItems, check_in_flight
from layertap.client.requests import StreamRequest, request_fields
from layertap.client.retry import Retries
from layertap.client.shared_memory_client import SharedMemoryClient, SharedMemoryWish
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
    """A channel to one server, its methods and its shared memory, for one event loop."""

    def __init__(self, settings: ChannelSettings, shared_memory: SharedMemoryWish) -> None:
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
        self.memory = SharedMemoryClient(settings.target, shared_memory, self._ask_for_memory)

    def _ask_for_memory(self, message: bytes, timeout: float) -> bytes:
        """Call OpenSharedMemory from a thread other than the loop's, and wait for the reply."""

        async def ask() -> bytes:
            return await self._open_memory(message, timeout=timeout, metadata=self.bearer)  # type: ignore[no-any-return]

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result()


class AsyncClient(BaseClient):
    """Extracts layers from a layertap server or from several, for asyncio.

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

    def _start(self, settings: list[ChannelSettings]) -> None:
        self._transports: list[_Transport] = []
        self._balance = Balance(self._targets)

    async def extract(
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
        """Run a model on a batch and return the selected layers; see ``Client.extract``."""
        self._opened()  # Connects while the request is encoded.
        fields, inputs = await _request_fields(
            model, given, layers, extractor,
            objective=objective, interventions=interventions, variant=variant,
        )  # fmt: skip
        return await self._anywhere(
            lambda transport, left: self._extract(transport, fields, inputs, left), timeout
        )

    async def stream(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> AsyncFeatureStream:
        """Open a stream for many items; see ``Client.stream``."""
        transports, balance = self._opened(), self._balance
        index = balance.take()
        transport = transports[index]
        try:
            return AsyncFeatureStream(
                transport.stream,
                max_in_flight,
                timeout=timeout,
                item_timeout=self._timeout if item_timeout is None else item_timeout,
                memory=await self._session(transport, self._timeout),
                metadata=(*self._metadata(), *transport.bearer),
                on_close=lambda: balance.give_back(index),
            )
        except BaseException:
            balance.give_back(index)
            raise

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
        variant: str = ...,
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
        variant: str = ...,
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
        variant: str = "",
        ordered: bool = True,
        return_errors: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        item_timeout: float | None = None,
    ) -> AsyncIterator[Outcome]:
        """Yield the layers of many inputs; see ``Client.extract_many``.

        ``inputs`` may be asynchronous. If you leave the iterator early, for example by ``break``,
        the stream stays open until the iterator is closed; ``contextlib.aclosing`` closes it.
        """
        if len(self._targets) > 1:
            seconds = self._timeout if item_timeout is None else item_timeout

            async def ask(given: InputLike) -> Features:
                return await self.extract(
                    model,
                    given,
                    layers,
                    extractor=extractor,
                    objective=objective,
                    interventions=interventions,
                    variant=variant,
                    timeout=seconds,
                )

            async with aclosing(
                _concurrently(ask, inputs, max_in_flight, ordered=ordered)
            ) as outcomes:
                async for outcome in outcomes:
                    if isinstance(outcome, LayertapError) and not return_errors:
                        raise outcome
                    yield outcome
            return
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
                    variant=variant,
                )
                async for given in _each(inputs)
            )
            async for _, outcome in stream.extract(requests, ordered=ordered):
                if isinstance(outcome, LayertapError) and not return_errors:
                    raise outcome
                yield outcome

    async def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server serves."""
        reply = await self._call("list", b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    async def describe_model(
        self, model: str, *, fingerprint: bool = False, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue; see ``Client.describe_model``."""
        message = describe_message(model, fingerprint=fingerprint)
        reply = await self._call("describe", message, timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    async def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Make the server read its configuration and changed weights again; see ``Client``."""
        self._check_one_server("reload")
        reply = await self._call("reload", b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return what the server reports by ``grpc.health.v1``; see ``Client.health``."""
        return health_in(await self._call("health", health_message(service), timeout))

    async def wait_ready(self, timeout: float = 60.0, *, servers: int | None = None) -> None:
        """Wait until the server reports itself as serving; see ``Client.wait_ready``."""
        wait = ReadyWait(self._targets, servers, timeout, time.monotonic())
        while wait.left(time.monotonic()) > 0:
            for index in list(wait.waiting):
                await self._check_health(wait, index)
            if wait.is_over:
                return
            await asyncio.sleep(wait.pause(time.monotonic()))
        raise wait.over()

    async def close(self) -> None:
        """Close the channel; open calls raise UnavailableError. Received features stay valid."""
        self._closed = True
        for transport in self._transports:
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

    def _opened(self) -> list[_Transport]:
        """Return the transport of each server, for the running loop."""
        self._check_open()
        current = self._transports
        if not current or current[0].loop is not asyncio.get_running_loop():
            for transport in current:
                # Its loop has ended, or continues elsewhere; the channel ends with the loop.
                transport.memory.close()
            self._transports = [_Transport(each, self._shared_memory) for each in self._settings()]
        return self._transports

    async def _check_health(self, wait: ReadyWait, index: int) -> None:
        """Ask one server for its health, while waiting for it."""
        transport = self._opened()[index]
        options = wait.options(time.monotonic())
        metadata = (*self._metadata(), *transport.bearer)
        try:
            reply = await self._answer(transport.health(b"", metadata=metadata, **options))
        except grpc.RpcError as error:
            wait.failed(index, error)
        else:
            if wait.answered(index, reply):
                self._balance.answers(index)

    async def _session(self, transport: _Transport, timeout: float | None) -> ClientSession | None:
        """Return the session of shared memory; None to use the network."""
        if transport.memory.is_settled:
            return transport.memory.session(timeout)
        return await _in_thread(lambda: transport.memory.session(timeout))

    async def _extract(
        self, transport: _Transport, fields: dict[str, Any], inputs: Arrays, timeout: float | None
    ) -> Features:
        """Send a request to one server, through shared memory if possible."""
        memory = await self._session(transport, timeout)
        if memory is not None:
            try:
                return await self._extract_shared(transport, memory, fields, inputs, timeout)
            except SharedMemoryLostError as error:
                _log.debug("shared memory is lost, using the network: %s", error)
        message = encode_request(feature_service_pb2.ExtractRequest(**fields), inputs)
        return Features(await self._call_once(transport, transport.extract, message, timeout))

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
                reply = await self._call_once(transport, transport.extract, message, timeout)
            return Features(reply, memory.finder())
        finally:
            memory.end_call()

    async def _call(
        self,
        method: Literal["list", "describe", "reload", "health"],
        message: bytes,
        timeout: float | None,
    ) -> bytes:
        return await self._anywhere(
            lambda transport, left: self._call_once(
                transport, getattr(transport, method), message, left
            ),
            timeout,
        )

    async def _anywhere(
        self, call: Callable[[_Transport, float | None], Awaitable[T]], timeout: float | None
    ) -> T:
        """Make a call on one of the servers; see Note [Several servers] and ``Retries``."""
        allowed = Retries(self._retries, self._timeout if timeout is None else timeout)
        while True:
            try:
                return await self._on_the_next(call, allowed)
            except OverloadedError as error:
                pause = allowed.pause(error)
            await asyncio.sleep(pause)

    async def _on_the_next(
        self, call: Callable[[_Transport, float | None], Awaitable[T]], allowed: Retries
    ) -> T:
        """Try a call on one server after the other, each at most once."""
        transports, attempts = self._opened(), Attempts(self._balance)
        while True:
            with attempts.server() as index:
                try:
                    return await call(transports[index], allowed.remaining())
                except LayertapError as error:
                    attempts.failed(error)

    async def _call_once(
        self,
        transport: _Transport,
        method: grpc.aio.UnaryUnaryMultiCallable,
        message: bytes,
        timeout: float | None,
    ) -> bytes:
        self._check_open()
        metadata = (*self._metadata(), *transport.bearer)
        try:
            return await self._answer(method(message, timeout=bounded(timeout), metadata=metadata))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

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
        on_close: Called once, when the stream is closed.

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
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
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
                # No variable: it would keep the reply, and its shared memory, until the next one.
                yield await self._next(keys, ordered=ordered)
            finished = True
        finally:
            if not finished:
                await self.close()

    async def close(self) -> None:
        """End the stream and abandon the items in flight. Received features stay valid."""
        if self._closed:
            return
        self._closed = True
        self._on_close()
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

    async def _next(self, keys: dict[int, Any], *, ordered: bool) -> tuple[Any, Outcome]:
        while (taken := self._items.take(keys, ordered=ordered)) is None:
            await self._receive()
        return taken

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
    variant: str,
) -> tuple[dict[str, Any], Arrays]:
    def fields() -> tuple[dict[str, Any], Arrays]:
        return request_fields(
            model, given, layers, extractor,
            objective=objective, interventions=interventions, variant=variant,
        )  # fmt: skip

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


async def _concurrently(
    call: Callable[[Any], Awaitable[Features]],
    arguments: Iterable[Any] | AsyncIterable[Any],
    max_in_flight: int,
    *,
    ordered: bool,
) -> AsyncGenerator[Outcome]:
    """Yield the outcome of a call for each argument; see ``concurrent_calls``."""
    check_in_flight(max_in_flight)

    async def outcome(argument: Any) -> Outcome:
        try:
            return await call(argument)
        except LayertapError as error:
            return error

    waiting, running = _each(arguments), list[asyncio.Task[Outcome]]()
    more = True
    try:
        while True:
            while more and len(running) < max_in_flight:
                try:
                    argument = await anext(waiting)
                except StopAsyncIteration:
                    more = False
                else:
                    running.append(asyncio.create_task(outcome(argument)))
            if not running:
                return
            first = running[:1] if ordered else running
            ended, _ = await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            task = next(iter(ended))
            running.remove(task)
            yield task.result()
    finally:
        for task in running:
            task.cancel()


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
