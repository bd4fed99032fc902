"""A relay between a client and a server, which shows what really passes."""

from __future__ import annotations

import contextlib
import socket
import threading


class Counting:
    """A relay that counts the bytes that the server sends."""

    def __init__(self, address: str) -> None:
        self.received = 0
        host, port = address.rsplit(":", 1)
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
                threading.Thread(target=self._pump, args=(client, server, 0), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, 1), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: int) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(1 << 16):
                # Counted first, so that a caller who has its reply finds all of it counted.
                self.received += counted * len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
