"""LitServe (HTTP): one worker; the bytes are the body of the request, and of the response.

Bytes in the body are the fastest of what FastAPI's annotations offer for ``decode_request``: a
multipart form must be parsed as well, and JSON holds no bytes.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import litserve
from fastapi import Body, Response

from peers.given import Announce, Ask, kinds
from peers.over_http import free_port, post, wait_for
from peers.subject import Answer, Subject

__all__ = ["connect", "serve"]


class Api(litserve.LitAPI):
    """Answers one kind of requests."""

    def __init__(self, kind: str, threads: int) -> None:
        super().__init__(api_path=f"/{kind}")
        self._kind, self._threads = kind, threads
        self._answer: Answer | None = None

    def setup(self, device: str) -> None:
        """Build the program in the worker."""
        self._answer = Subject(self._threads).answers()[self._kind]

    def decode_request(
        self, request: Annotated[bytes, Body(media_type="application/octet-stream")]
    ) -> bytes:
        """Take the body as it is."""
        return request

    def predict(self, x: bytes) -> bytes:
        """Run the program."""
        assert self._answer is not None
        return self._answer(x)

    def encode_response(self, output: bytes) -> Response:
        """Send the bytes as they are."""
        return Response(content=output, media_type="application/octet-stream")


def serve(threads: int, announce: Announce) -> None:
    """Serve until standard input ends."""
    port = free_port()
    address = f"127.0.0.1:{port}"

    def watch() -> None:
        try:
            wait_for(address, "/health")
            announce(address)
            sys.stdin.read()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    # A worker for each kind, of which one works at a time: callers ask for one kind only.
    apis = [Api(kind, threads) for kind in kinds()]
    server = litserve.LitServer(
        apis, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True
    )
    server.run(
        port=port, host="127.0.0.1", num_api_servers=1, generate_client_file=False,
        log_level="error",
    )  # fmt: skip


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """Yield what asks, on a connection of its own."""
    with post(address) as send:
        yield lambda kind, data: send(f"/{kind}", data)
