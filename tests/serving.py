"""Real servers for the tests, on free ports of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
