"""Real servers for the tests, on free ports of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from layertap.app.http_page import HttpPage
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.services.observer import Observer
from layertap.shm.client_regions import ClientRegions


@contextmanager
def started_server(
    engine: Engine,
    observer: Observer | None = None,
    *,
    client_regions: ClientRegions | None = None,
    grace: float = 0,
) -> Iterator[FeatureServer]:
    """Serve an engine and yield the server, which is stopped at the end of the block.

    Args:
        engine: The engine; the caller closes it.
        observer: Notified of the outcome of each extraction.
        client_regions: Shared memory that clients of the Open Inference Protocol name.
        grace: Seconds that the last calls may take.
    """
    server = FeatureServer(engine, ServerOptions(port=0), observer, client_regions=client_regions)
    server.start()
    server.ready()
    try:
        yield server
    finally:
        server.stop(grace)


@contextmanager
def running_server(engine: Engine) -> Iterator[str]:
    """Serve an engine and yield the address."""
    with started_server(engine, grace=1) as server:
        yield server.address


class FakeContext:
    """An RPC as far as its handler knows it, from any address, which may have ended.

    Args:
        peer: The address of its caller.
        ended: Whether it has ended, so that gRPC does not call back.
    """

    def __init__(self, peer: str = "", *, ended: bool = False) -> None:
        self.ended = ended
        self._peer = peer

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def time_remaining(self) -> None:
        return None

    def add_callback(self, callback: object) -> bool:
        return not self.ended

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> None:
        return None

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise RuntimeError(code.name)


@contextmanager
def serving_method(
    method: grpc.RpcMethodHandler, interceptors: tuple[grpc.ServerInterceptor, ...] = ()
) -> Iterator[grpc.Channel]:
    """Serve one method as ``/test.Service/Call``, and yield a channel to it."""
    threads = ThreadPoolExecutor(1)
    server = grpc.server(threads, interceptors=interceptors)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Service", {"Call": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()
        threads.shutdown()


def http_page(metrics: Metrics, port: int = 0) -> HttpPage:
    """Show the metrics of a serving server; the caller must close the page."""
    return HttpPage(metrics.registry, "127.0.0.1", port, alive=lambda: True, ready=lambda: True)
