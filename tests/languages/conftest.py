"""The servers for the clients in ``examples/``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hfnets
from kept import kept
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from processes import serving
from reference import TEXT_MODEL

MODELS = ("resnet18", "large=languages.largenet:build")


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `layertap serve` with resnet18, a net of large layers, and a small BERT."""
    folder = tmp_path_factory.mktemp("nets") / TEXT_MODEL
    bert = hfnets.wordpiece(hfnets.bert(folder, num_hidden_layers=2))
    models = (*MODELS, f"hf-config:{bert}")
    with serving(*models, "--weights", "random", "--seed", "0") as server:
        yield server.address


@pytest.fixture
def late_server() -> Iterator[FeatureServer]:
    """A server that listens but is not ready, and has no models."""
    engine = Engine(plan_cache=kept())
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    yield server
    server.stop(0)
    engine.close()
