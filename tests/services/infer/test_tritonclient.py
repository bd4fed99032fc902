"""NVIDIA's own client, unmodified and in its own environment, gets correct answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infering import batch, run_tritonclient
from layertap import Client
from layertap.engine import Engine
from layertap.models import ModelSpec
from tinynets import ITEM

ROOT = Path(__file__).parents[3]
PHOTO = ROOT / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def halves(engine: Engine) -> Iterator[None]:
    """Two nets that compute in half precision."""
    for name, precision in (("half", "float16"), ("brain", "bfloat16")):
        engine.load(ModelSpec("tinynets:residual", name=name, item_shape=ITEM, precision=precision))
    yield
    for name in ("half", "brain"):
        engine.unload(name)


@pytest.mark.usefixtures("halves")
def test_the_synchronous_client(server, tmp_path: Path) -> None:
    """FP32, FP16, BF16 and photos; metadata, statistics and refusals; the native values."""
    file = tmp_path / "layer1.npy"
    run_tritonclient("sync.py", server.address, file, PHOTO)
    with Client(server.address) as client:
        expected = client.extract("residual", batch(2), "layer1", extractor="hook")["layer1"]
    assert np.array_equal(np.load(file), expected)


def test_several_inputs(server, engine: Engine) -> None:
    """Metadata, an optional input given and left out, and a required one missing."""
    engine.load(ModelSpec("severalnets:optional", item_shape=(6,)))
    run_tritonclient("several.py", server.address)
    engine.unload("optional")


@pytest.mark.parametrize("script", ["asyncio_client.py", "streaming.py", "shared.py"])
def test_the_other_ways_to_call(server, script: str) -> None:
    """asyncio, streams and system shared memory."""
    run_tritonclient(script, server.address)
