"""A server whose clients share memory with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kept import kept
from layertap import Client
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from sharing import LARGE, MIB, Served, ask
from tinynets import ITEM


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a net whose layers are large for a large batch, and two unusual nets."""
    engine = Engine(Limits(request_bytes=8 * MIB), plan_cache=kept())
    for name in ("residual", "raises", "dynamic"):
        engine.load(ModelSpec(f"tinynets:{name}", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture
def served(engine: Engine) -> Iterator[Served]:
    """A server that shares up to 64 MiB, with leases of a minute."""
    served = Served(engine, 64, 60.0)
    yield served
    served.server.stop(0)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, np.ndarray]:
    """Return the values that arrive through the network."""
    served = Served(engine, 0, 60.0)
    with Client(served.address) as client:
        features = ask(client, LARGE)
    served.server.stop(0)
    return {name: array.copy() for name, array in features.items()}
