"""A replica: an engine with its models, which answers the calls that Ray hands to it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import ray

from layertap.app.config import ServerConfig
from layertap.app.health import ModelHealth
from layertap.app.lifecycle import RunningServer, keep_freed_memory, open_engine
from layertap.app.logs import LogNarrator
from layertap.app.security import open_security
from layertap.app.served_models import ServedModels
from layertap.app.server import SPARE_WORKERS
from layertap.app.telemetry import open_telemetry
from layertap.engine import Engine
from layertap.errors import NotFoundError
from layertap.grpc_health import health_pb2
from layertap.ray.serve.calls import Failure, Reply, caller_of, check_size, messages_of
from layertap.ray.serve.proxy import FEATURES, HEALTH
from layertap.services.answer import Answer
from layertap.services.caller import Caller, set_current_caller
from layertap.services.feature_service import FeatureService
from layertap.services.grpc_adapter.authorization import refusal
from layertap.services.grpc_adapter.compression import compress_replies
from layertap.services.methods import Handler, StreamHandler, UnaryMethod
from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams
from layertap.services.parsing import parse
from layertap.services.public_errors import public_error
from layertap.services.stream_threads import StreamThreads
from layertap.settings import replaced
from layertap.threads import WorkerThreads, start_threads

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

__all__ = ["Replica"]


class Replica:
    """Serves the models of a configuration. Ray calls the methods, each by its name in the service.

    Args:
        config: What to serve.
        direct: Whether it also listens at the configuration's address.

    Raises:
        LayertapError: If no model could be loaded, or the address can't be bound.
    """

    def __init__(self, config: ServerConfig, *, direct: bool) -> None:
        config = _with_resources(config)
        self._closing = ExitStack()
        try:
            self._start(config, direct=direct)
        except BaseException:
            self._closing.close()
            raise

    def _start(self, config: ServerConfig, *, direct: bool) -> None:
        self._running: RunningServer | None = None
        if direct:
            self._running = RunningServer(
                config, LogNarrator(), lambda: config, None, self._closing
            )
            engine, observer = self._running.engine, self._running.observer
            health = self._running.health
            self._closing.callback(self._running.stop)
        else:
            engine, observer, health = _loaded(config, self._closing)
        self._engine = engine
        self._health = health
        self._tokens = open_security(config.server.secrets).tokens
        limits = engine.limits
        self._most_bytes = limits.request_bytes
        self._streams = OpenStreams(limits.streams)
        stream_threads = StreamThreads(self._streams, observer)
        self._threads = WorkerThreads(
            limits.pending + limits.streams + SPARE_WORKERS, "layertap-ray"
        )
        for pool in (self._threads, *stream_threads.pools):
            self._closing.callback(pool.shutdown, wait=False)
        start_threads((self._threads, *stream_threads.pools))
        self._closing.callback(self._streams.drain)
        methods = FeatureService(engine, observer, stream_threads).methods()
        self._unary: dict[str, Handler] = {f"/{HEALTH}/Check": self._check}
        self._stream: dict[str, StreamHandler] = {}
        for name, method in methods.items():
            path = f"/{FEATURES}/{name}"
            if isinstance(method, UnaryMethod):
                self._unary[path] = method.handler
            else:
                self._stream[path] = method.handler

    async def Extract(  # noqa: N802 - the method's name in the service
        self, message: bytes, grpc_context: RayServegRPCContext
    ) -> Reply:
        """Run a model and return the selected layers."""
        return await self._answer(f"/{FEATURES}/Extract", message, grpc_context)

    async def ExtractStream(  # noqa: N802
        self, messages: gRPCInputStream[bytes], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[Reply]:
        """Answer the items of a stream."""
        caller = caller_of(grpc_context)
        path = f"/{FEATURES}/ExtractStream"
        loop = asyncio.get_running_loop()
        received = messages_of(messages, loop, caller.call, self._most_bytes)

        def begin() -> Iterator[bytes]:
            self._check_call(path, grpc_context)
            yield from self._stream[path](received, caller)

        replies = _Replies(begin, caller)
        try:
            while True:
                reply = await loop.run_in_executor(self._threads, replies.next)
                if reply is None:
                    return
                if isinstance(reply, Failure):
                    yield reply.report(grpc_context, caller)
                    return
                yield Reply(reply)
                del reply
        finally:
            # The reader and the items in flight, if the client has left.
            caller.call.cancel()
            self._threads.submit(replies.close)

    async def ListModels(  # noqa: N802
        self, message: bytes, grpc_context: RayServegRPCContext
    ) -> Reply:
        """List the models."""
        return await self._answer(f"/{FEATURES}/ListModels", message, grpc_context)

    async def DescribeModel(  # noqa: N802
        self, message: bytes, grpc_context: RayServegRPCContext
    ) -> Reply:
        """Describe a model and its layers."""
        return await self._answer(f"/{FEATURES}/DescribeModel", message, grpc_context)

    async def Check(  # noqa: N802
        self, message: bytes, grpc_context: RayServegRPCContext
    ) -> Reply:
        """Report the health of a model, a service, or with an empty name of this replica."""
        return await self._answer(f"/{HEALTH}/Check", message, grpc_context)

    def check_health(self) -> None:
        """Raise if the replica can't run models any more; Ray then replaces it."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        """Close everything; Ray calls this once the calls in flight have ended."""
        closing = getattr(self, "_closing", None)
        if closing is not None:
            closing.close()

    async def _answer(self, path: str, message: bytes, context: RayServegRPCContext) -> Reply:
        caller = caller_of(context)
        work = partial(self._work, path, message, context, caller)
        answering = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(_in_context_of, caller, work)
        )
        try:
            answer = await answering
        except asyncio.CancelledError:
            caller.call.cancel()
            raise
        if isinstance(answer, Failure):
            return answer.report(context, caller)
        return Reply(answer)

    def _work(
        self, path: str, message: bytes, context: RayServegRPCContext, caller: Caller
    ) -> bytes | Failure:
        """Answer a call in a thread of the pool."""
        try:
            self._check_call(path, context)
            check_size(message, self._most_bytes)
            answer = self._unary[path](message, caller)
        except Exception as error:  # noqa: BLE001 - it is reported, and logged if unexpected
            return Failure(public_error(error))
        if not isinstance(answer, Answer):
            return answer
        # When Ray has sent it can't be seen from here.
        answer.release()
        return answer.message

    def _check_call(self, path: str, context: RayServegRPCContext) -> None:
        """Check the call's token, and have its reply compressed if it wants that.

        Raises:
            LayertapError: If it has no valid token, or wants an unknown compression.
        """
        error = refusal(self._tokens, path, context.invocation_metadata())
        if error is not None:
            raise error
        compress_replies(context)

    def _check(self, message: bytes, caller: Caller) -> bytes:
        del caller
        name = parse(health_pb2.HealthCheckRequest, message).service
        status = self._health.status(name)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError(f"service: got {name!r}, unknown to this server")
        reply: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        return reply


class _Replies:
    """The replies of a stream, taken one after the other by any threads.

    Args:
        begin: Returns the iterator of the replies.
        caller: Who opened the stream.
    """

    def __init__(self, begin: Callable[[], Iterator[bytes]], caller: Caller) -> None:
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()
        self._context.run(set_current_caller, caller)
        self._replies = begin()

    def next(self) -> bytes | Failure | None:
        """Wait for the next reply; None after the last one."""
        with self._lock:
            return self._context.run(self._next)

    def close(self) -> None:
        """End the stream, once the thread that waits for a reply has it or has given up."""
        with self._lock:
            self._context.run(self._replies.close)  # type: ignore[attr-defined] # a generator's

    def _next(self) -> bytes | Failure | None:
        try:
            return next(self._replies, None)
        except Exception as error:  # noqa: BLE001 - as for unary calls
            return Failure(public_error(error))


def _in_context_of(caller: Caller, work: Callable[[], bytes | Failure]) -> bytes | Failure:
    """Run work in a context of its own, whose log records have the request's id."""
    context = contextvars.copy_context()
    context.run(set_current_caller, caller)
    return context.run(work)


def _loaded(config: ServerConfig, closing: ExitStack) -> tuple[Engine, Observer, ModelHealth]:
    """Return an engine with the models of a configuration, without a server around it."""
    config.check()
    narrator = LogNarrator()
    engine = open_engine(config, narrator)
    closing.callback(engine.close)
    health = ModelHealth()
    telemetry = open_telemetry(engine, config, closing)
    ServedModels(engine, health, narrator).load(config, strict=config.server.strict)
    keep_freed_memory(config.server, narrator)
    health.show_server(serving=True)
    return engine, telemetry.observer, health


def _with_resources(config: ServerConfig) -> ServerConfig:
    """Return the configuration with the cores and the device that Ray has assigned."""
    context = ray.get_runtime_context()
    assigned: Mapping[str, float] = context.get_assigned_resources()  # type: ignore[no-untyped-call]
    changes: dict[str, object] = {}
    if config.server.threads is None and assigned.get("CPU"):
        changes["threads"] = max(1, int(assigned["CPU"]))
    if config.server.device == "auto":
        changes["device"] = "cuda" if assigned.get("GPU") else "cpu"
    return ServerConfig(replaced(config.server, changes), config.limits, config.models)
