"""Asks a server for its health all the time, as orchestrators do, and notes how long it takes."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

EVERY = 0.1
WITHIN = 1.0
"""Seconds within which health must answer, whatever else goes on."""

_GIVE_UP = 10.0


class Probes:
    """Two threads: one probes by gRPC over one connection, one by HTTP with a new connection each.

    Where the machine itself is so busy that a thread which only sleeps wakes up late, so much more
    time is allowed; and where other work had more threads running than there are cores before the
    drill began, as many times more.

    Args:
        address: Where the gRPC port is.
        http_port: Where the HTTP port is, on this machine.
        stretch: How many times longer everything takes because of other work; at least 1.
    """

    def __init__(self, address: str, http_port: int, stretch: float = 1.0) -> None:
        self._within = WITHIN * stretch
        self._channel = grpc.insecure_channel(address)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._port = http_port
        self._lock = threading.Lock()
        self._taken: dict[str, list[float]] = {}
        self._faults: list[str] = []
        self._late = 0.0
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._probe, args=("gRPC health", self._by_grpc)),
            threading.Thread(target=self._probe, args=("/healthz", self._by_http)),
            threading.Thread(target=self._sleep),
        ]
        self._by_grpc()  # Connected before anything goes wrong.
        for thread in self._threads:
            thread.start()

    def take(self) -> tuple[dict[str, float], list[str]]:
        """Return the slowest probe of each kind in seconds, and the faults, since the last time."""
        with self._lock:
            slowest = {kind: round(max(each), 3) for kind, each in self._taken.items()}
            faults = list(dict.fromkeys(self._faults))
            faults += [
                f"{kind}: took {took:g} s"
                for kind, took in slowest.items()
                if took > self._within + self._late
            ]
            self._taken, self._faults, self._late = {}, [], 0.0
        return slowest, faults

    def close(self) -> None:
        """Probe no more."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def _probe(self, kind: str, ask: Callable[[], str]) -> None:
        while not self._ended.wait(EVERY):
            begun = time.monotonic()
            try:
                fault = ask()
            except (grpc.RpcError, OSError, http.client.HTTPException) as error:
                code = error.code() if isinstance(error, grpc.RpcError) else ""
                fault = f"{type(error).__name__} {code}".strip()
            took = time.monotonic() - begun
            with self._lock:
                self._taken.setdefault(kind, []).append(took)
                if fault:
                    self._faults.append(f"{kind}: {fault}")

    def _sleep(self) -> None:
        while not self._ended.is_set():
            begun = time.monotonic()
            self._ended.wait(EVERY)
            late = time.monotonic() - begun - EVERY
            with self._lock:
                self._late = max(self._late, late)

    def _by_grpc(self) -> str:
        status = self._stub.Check(health_pb2.HealthCheckRequest(), timeout=_GIVE_UP).status
        return "" if status == health_pb2.HealthCheckResponse.SERVING else f"status {status}"

    def _by_http(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_GIVE_UP)
        try:
            connection.request("GET", "/healthz")
            status = connection.getresponse().status
        finally:
            connection.close()
        return "" if status == 200 else f"status {status}"
