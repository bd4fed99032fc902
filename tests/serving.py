"""Real servers for the tests, on free ports of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layertap.app.http_page import HttpPage
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine


@contextmanager
def running_server(engine: Engine) -> Iterator[str]:
    """Serve an engine and yield the address."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    server.ready()
    try:
        yield server.address
    finally:
        server.stop(grace=1)


def http_page(metrics: Metrics, port: int = 0) -> HttpPage:
    """Show metrics of a server that works and serves; the page is the caller's to close."""
    return HttpPage(metrics.registry, "127.0.0.1", port, alive=lambda: True, ready=lambda: True)
