"""The least that a gRPC server in Python can be: bytes in, bytes out, one compute thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from peers.given import Announce, Ask

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def serve(threads: int, announce: Announce) -> None:
    """Serve until standard input ends."""
    from peers.subject import Subject

    subject = Subject(threads)
    handlers = {
        kind: grpc.unary_unary_rpc_method_handler(lambda m, _, f=answer: f(m))
        for kind, answer in subject.answers().items()
    }
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    announce(f"127.0.0.1:{port}")
    sys.stdin.read()
    server.stop(0).wait()
    subject.close()


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """Yield what asks, on a connection of its own."""
    # Without the last option all channels of a process to one address share a connection.
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        methods: dict[str, Callable[[bytes], bytes]] = {}

        def ask(kind: str, data: bytes) -> bytes:
            method = methods.get(kind) or methods.setdefault(
                kind, channel.unary_unary(f"/bare/{kind}")
            )
            return method(data)

        yield ask
