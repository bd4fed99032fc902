"""A gRPC server around an engine: health, reflection, limits, drain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc

from layertap.addresses import host_port, is_unix, unix_path
from layertap.app.grpc_options import STREAMS, channel_options
from layertap.app.health import HEALTH, ModelHealth
from layertap.app.reflection import REFLECTIONS, Reflection
from layertap.app.security import Security, open_security
from layertap.app.thread_limit import ThreadLimit
from layertap.app.unix_socket import UnixSocket
from layertap.engine import Engine, Limits
from layertap.errors import UnavailableError
from layertap.resources import file_budget
from layertap.services.admin_service import AdminService
from layertap.services.feature_service import FeatureService
from layertap.services.grpc_adapter.authorization import Authorization
from layertap.services.grpc_adapter.handlers import service
from layertap.services.grpc_adapter.overload import Overload
from layertap.services.infer.repository import RepositoryControl
from layertap.services.infer.service import InferenceService, InferenceSettings
from layertap.services.infer.statistics import Statistics
from layertap.services.methods import Service
from layertap.services.observer import Observer, Observers
from layertap.services.open_streams import OpenStreams
from layertap.services.shared_memory_service import SharedMemoryService
from layertap.services.stream_threads import StreamThreads
from layertap.settings import ServerOptions
from layertap.shm.broker import open_broker
from layertap.shm.client_regions import ClientRegions
from layertap.threads import WorkerThreads, start_threads

__all__ = ["FeatureServer", "ServerOptions"]

_log = logging.getLogger(__name__)

SPARE_WORKERS = 16
"""Threads for short or refused calls, in addition to one for each request that may be pending."""

_JOIN_SECONDS = 2.0
"""How long to wait for threads to end after the server has stopped; threads that hang are left."""


def _workers(limits: Limits) -> int:
    """Return the number of threads that serve RPCs. Each open stream keeps one."""
    return limits.pending + limits.streams + REFLECTIONS + SPARE_WORKERS


class FeatureServer:
    """Serves an engine. Models may be loaded into it before or after ``start``.

    Health (``grpc.health.v1``) answers for the server (``""``), the services' full names and each
    model's name: NOT_SERVING until ``ready()`` and again once ``stop()`` begins. Code that loads
    models later reports their status through ``health``.

    Args:
        engine: The engine; the caller must close it.
        options: The addresses and other options of the server.
        observer: Notified of the outcome of each extraction.
        interceptors: gRPC interceptors, the outermost first.
        health: Reports the health of models; if not given, the server makes one.
        admin: The administrative operations; none if not given.
        repository: Loads and unloads models for the operator; if not given, that is not possible.
        security: TLS and tokens; if not given, they are read from the files that the options name.
        client_regions: Shared memory that clients of the Open Inference Protocol name; if not
            given, the options decide.

    Attributes:
        addresses: The addresses at which it listens: ``host:port``, ``unix:/path``.
        address: The first of these addresses.
        security: TLS and tokens; its ``reload`` reads their files again.
        shared_memory: The memory shared with clients on this machine; None if there is none.

    Raises:
        UnavailableError: If the address can't be bound.
        ConfigError: If files of certificates or tokens can't be used.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions | None = None,
        observer: Observer | None = None,
        *,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        health: ModelHealth | None = None,
        admin: AdminService | None = None,
        repository: RepositoryControl | None = None,
        security: Security | None = None,
        client_regions: ClientRegions | None = None,
    ) -> None:
        self._engine = engine
        options = options or ServerOptions()
        files = file_budget()
        self.security = security or open_security(options.secrets)
        if client_regions is None and options.allow_client_shm:
            client_regions = ClientRegions(
                frozenset(options.client_shm_uids), most=files.named_regions
            )
        statistics = Statistics()
        observer = Observers(observer, statistics) if observer else statistics
        self._overload = Overload(engine, observer)
        self._workers = WorkerThreads(_workers(engine.limits), "layertap-rpc")
        self._server = grpc.server(
            self._workers,
            interceptors=(
                ThreadLimit(self._workers, observer),
                *interceptors,
                Authorization(self.security.tokens),
                # Inside the authorization, so that a caller without a token takes no place.
                self._overload,
            ),
            options=channel_options(
                engine.limits.request_bytes,
                max(STREAMS, 2 * _workers(engine.limits)),
                options.max_connection_age_seconds,
                options.max_connection_age_grace_seconds,
                connections=files.rpc_connections,
            ),
        )
        self._health = health or ModelHealth()
        self._server.add_generic_rpc_handlers((self._health.handlers(),))
        self._broker = open_broker(
            options.shared_memory_bytes,
            options.shared_memory_lease_seconds,
            regions=files.regions,
            clients=files.region_clients,
        )
        self.shared_memory = self._broker.memory if self._broker else None
        self._streams = OpenStreams(engine.limits.streams)
        self._stream_threads = StreamThreads(self._streams, observer)
        features = FeatureService(engine, observer, self._stream_threads, self.shared_memory)
        inference = InferenceService(
            engine,
            InferenceSettings(
                lambda: self._health.serving(""), statistics, client_regions, repository
            ),
            observer,
            self._stream_threads,
        )
        self._serve(features)
        self._serve(inference)
        self._pools = (self._workers, *self._health.pools, *self._stream_threads.pools)
        names = [FeatureService.NAME, InferenceService.NAME, HEALTH]
        if admin is not None:
            self._serve(admin)
            names.append(AdminService.NAME)
        if self._broker is not None:
            self._serve(SharedMemoryService(self._broker))
            names.append(SharedMemoryService.NAME)
        self._server.add_generic_rpc_handlers(Reflection(names).handlers())
        self._set_health(serving=False)
        self._sockets: list[UnixSocket] = []
        try:
            self.addresses = self._bind_all(options)
        except UnavailableError:
            self._close()
            raise

    @property
    def address(self) -> str:
        """The first address at which the server listens."""
        return self.addresses[0]

    @property
    def waiting(self) -> int:
        """Calls that wait for a worker thread, before they reach the engine's own queue."""
        return self._workers.waiting

    def start(self) -> None:
        """Begin to answer calls; health stays NOT_SERVING until ``ready``.

        Raises:
            UnavailableError: If the system does not allow enough threads.
        """
        missing = start_threads(self._pools)
        if missing:
            _log.warning(
                "the system allows this process %d threads fewer than the %d that the limits take, "
                "so fewer calls are served at once; raise the limit of processes (pids.max, "
                "--pids-limit, ulimit -u), or lower limits.pending",
                missing,
                sum(pool.most for pool in self._pools),
            )
        if self._broker is not None:
            self._broker.start()
        self._overload.refusals.start()
        self._server.start()

    def ready(self) -> None:
        """Report the server, its services and its models as SERVING."""
        self._set_health(serving=True)

    def stop(self, grace: float) -> None:
        """Report NOT_SERVING, refuse new calls, and give admitted calls ``grace`` seconds."""
        self._health.enter_graceful_shutdown()
        self._streams.drain()
        self._overload.refusals.drain()
        # Python's locks can't wait longer than this.
        grace = min(grace, threading.TIMEOUT_MAX)
        try:
            self._server.stop(grace).wait()
        except RuntimeError:
            # gRPC begins to refuse calls, then starts a thread that waits for the grace period. If
            # the system allows no more threads, this thread waits instead.
            self._server.wait_for_termination(grace)
            self._server.stop(None)
        self._close()

    def wait(self) -> None:
        """Block until the server has stopped."""
        self._server.wait_for_termination()

    def _close(self) -> None:
        for each in self._sockets:
            each.close()
        self._overload.refusals.shutdown()
        for pool in self._pools:
            pool.shutdown(wait=False)
        for pool in self._pools:
            pool.join(_JOIN_SECONDS)
        if self._broker is not None:
            self._broker.close()

    def _serve(self, offered: Service) -> None:
        self._server.add_generic_rpc_handlers((service(offered.NAME, offered.methods()),))

    def _set_health(self, *, serving: bool) -> None:
        self._health.show_server(serving=serving)
        for host in self._engine.hosts():
            self._health.show(host.model.name, serving=serving)

    def _bind_all(self, options: ServerOptions) -> tuple[str, ...]:
        """Listen on all addresses, and return them."""
        path = unix_path(options.host)
        if path:
            addresses = [self._bind_unix(Path(path), options)]
        elif is_unix(options.host):
            self._bind(options.host, options)
            addresses = [options.host]
        else:
            port = self._bind(host_port(options.host, options.port), options)
            addresses = [host_port(options.host, port)]
        if options.unix_socket is not None:
            addresses.append(self._bind_unix(options.unix_socket, options))
        return tuple(addresses)

    def _bind_unix(self, path: Path, options: ServerOptions) -> str:
        made = UnixSocket(
            path, options.unix_socket_mode, lambda address: self._add(address, options)
        )
        self._sockets.append(made)
        return f"unix:{made.path}"

    def _bind(self, wanted: str, options: ServerOptions) -> int:
        try:
            return self._add(wanted, options)
        except RuntimeError:
            raise UnavailableError(
                f"can't listen on {wanted}: is the port in use, or does the host belong to "
                f"another machine?"
            ) from None

    def _add(self, address: str, options: ServerOptions) -> int:
        """Make gRPC listen on an address; return the port. Raise RuntimeError if it can't."""
        tls = self.security.tls
        if tls:
            return int(self._server.add_secure_port(address, tls.credentials()))
        return int(self._server.add_insecure_port(address))
