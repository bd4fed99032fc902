"""Uses shared memory with a server on this machine if possible, and the network otherwise."""

from __future__ import annotations

import logging
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal

import grpc
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.addresses import target_is_loopback
from layertap.shm.client_session import ClientSession
from layertap.shm.regions import supported
from layertap.v1.shared_memory_service_pb2 import OpenSharedMemoryResponse

__all__ = ["SharedMemoryClient", "SharedMemoryWish"]

_log = logging.getLogger(__name__)

SharedMemoryWish = bool | Literal["auto"]

_OPEN_SECONDS = 1.0
# A server that restarts is back soon; a server without shared memory will not get it soon.
_AWAY_SECONDS, _RETRY_SECONDS = 1.0, 30.0


class SharedMemoryClient:
    """Keeps a session with a server. Failures of the session never reach the caller.

    Args:
        target: The server's address.
        wish: ``"auto"`` tries this if the address is on this machine, True always, False never.
        open_: Calls OpenSharedMemory, given the message and a ``timeout`` in seconds.
    """

    def __init__(self, target: str, wish: SharedMemoryWish, open_: Callable[..., bytes]) -> None:
        wanted = wish is True or (wish == "auto" and target_is_loopback(target))
        self._open = open_ if wanted and supported() else None
        self._opening = threading.Lock()
        self._retry_at = 0.0
        self._current: ClientSession | None = None
        self._at_end: weakref.finalize[[], SharedMemoryClient] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether ``session`` returns at once, without calling the server."""
        current = self._current
        if current is not None and not current.lost:
            return True
        return self._open is None or time.monotonic() < self._retry_at

    def session(self, timeout: float | None) -> ClientSession | None:
        """Return an open session, opening it if necessary; None to use the network."""
        current = self._current
        if current is not None and not current.lost:
            return current
        if self._open is None or time.monotonic() < self._retry_at:
            return None
        if not self._opening.acquire(blocking=False):
            return None
        try:
            self._current = self._connect(self._open, timeout)
        finally:
            self._opening.release()
        if self._open is None:  # The client was closed meanwhile.
            self.close()
        return self._current

    def close(self) -> None:
        """End the session once nothing views lent memory; don't open another session."""
        self._open = None
        current, self._current = self._current, None
        if current is not None:
            current.close()

    def _connect(self, open_: Callable[..., bytes], timeout: float | None) -> ClientSession | None:
        seconds = _OPEN_SECONDS if timeout is None else min(timeout, _OPEN_SECONDS)
        try:
            reply = OpenSharedMemoryResponse.FromString(open_(b"", timeout=seconds))
            session = ClientSession(reply.socket, reply.ticket)
        except (
            *(grpc.RpcError, ProtobufDecodeError, OSError, ValueError, struct.error),
            RuntimeError,  # Python raises this if the system doesn't allow another thread.
        ) as error:
            _log.debug("no shared memory, using the network: %s", error)
            away = isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
            self._retry_at = time.monotonic() + (_AWAY_SECONDS if away else _RETRY_SECONDS)
            return None
        # If nobody closes the client, this closes the session when the client is freed. A lost
        # session must not be kept open that long, so its finalizer is removed.
        if self._at_end is not None:
            self._at_end.detach()
        self._at_end = weakref.finalize(self, session.close)
        self._at_end.atexit = False
        return session
