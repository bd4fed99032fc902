"""Ray Serve (HTTP): one replica; the bytes are the body of the request, and of the response."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peers.given import Announce, Ask
from peers.over_http import free_port, post

__all__ = ["connect", "serve"]

SETTINGS = {
    # The settings that Ray's page on performance names, without direct ingress, which binds its
    # ports to all of the machine's addresses.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def serve(threads: int, announce: Announce) -> None:
    """Serve until standard input ends."""
    os.environ.update(SETTINGS, OMP_NUM_THREADS=str(threads))
    import ray
    from ray import serve as untyped
    from starlette.requests import Request
    from starlette.responses import Response

    from peers.subject import Subject

    ray_serve: Any = untyped

    class Replica:
        """Answers all kinds of requests; the path names the kind."""

        def __init__(self) -> None:
            self._answers = Subject(threads).answers()

        async def __call__(self, request: Request) -> Response:
            answer = self._answers[request.url.path.strip("/")]
            # In a thread, so that photographs are decoded while a pass runs.
            return Response(await asyncio.to_thread(answer, await request.body()))

    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
            logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployed = ray_serve.deployment(Replica)
        deployed = deployed.options(max_ongoing_requests=16, ray_actor_options={"num_cpus": 1})
        ray_serve.run(deployed.bind(), route_prefix="/")
        announce(f"127.0.0.1:{port}")
        sys.stdin.read()
        ray_serve.shutdown()
        ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """Yield what asks, on a connection of its own."""
    with post(address) as send:
        yield lambda kind, data: send(f"/{kind}", data)
