"""A server that shares memory, and what tests do with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np

from layertap import Client, Features
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.shm.shared_memory import SharedMemory
from tinynets import ITEM

MIB = 1 << 20
LARGE = np.random.default_rng(0).random((600, *ITEM), np.float32)
LAYERS = ["conv1", "layer1"]


class Served:
    """A running server, its shared memory, and clients of it."""

    def __init__(self, engine: Engine, mib: int, lease_seconds: float, port: int = 0) -> None:
        self.server = FeatureServer(
            engine,
            ServerOptions(
                port=port,
                shared_memory_bytes=mib * MIB,
                shared_memory_lease_seconds=lease_seconds,
            ),
        )
        self.server.start()
        self.server.ready()
        self.address = self.server.address

    @property
    def memory(self) -> SharedMemory:
        memory = self.server.shared_memory
        assert memory is not None
        return memory

    def regions(self) -> dict[str, int]:
        return {state: n for state, n in self.memory.state().regions.items() if n}


def ask(client: Client, given: object) -> Features:
    """Ask for layers by hooks: an extractor that the server chose anew could round otherwise."""
    return client.extract("residual", given, LAYERS, extractor="hook")


def same(got: object, expected: dict[str, np.ndarray]) -> bool:
    assert list(got) == list(expected)
    return all(np.array_equal(got[name], expected[name]) for name in expected)


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until another thread or process has made something true."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.005)
    return condition()
