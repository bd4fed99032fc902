"""Reloads run one at a time, and the server's health follows its models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

import slownets
from kept import kept
from layertap import Client, errors
from layertap.app.config import ServerConfig
from layertap.app.health import ModelHealth
from layertap.app.reload import Reloader
from layertap.app.security import Security
from layertap.app.served_models import ServedModels
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.selection import LayerSelection
from layertap.services.admin_service import AdminService
from layertap.services.tokens import Tokens
from layertap.settings import ModelSpec, ServedModel
from versioned import ITEM, save, version_of


class Scene:
    """A server in this process that reads its configuration from ``config``."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        save(folder / "net.pt", 1)
        self.net = ServedModel(ModelSpec(str(folder / "net.pt"), item_shape=ITEM))
        self.config = ServerConfig(models=(self.net,))
        self.said: list[str] = []
        health = ModelHealth()
        models = ServedModels(engine, health, self)
        self.reloader = Reloader(lambda: self.config, self.config, models, self)
        admin = AdminService(self.reloader.reload)
        security = Security(tokens=Tokens(trusted=True))
        self.server = FeatureServer(
            engine, ServerOptions(port=0), health=health, admin=admin, security=security
        )
        self.server.start()
        models.load(self.config, strict=False)
        self.server.ready()

    def say(self, text: str, level: int = logging.INFO) -> None:
        self.said.append(text)

    def busy(self, text: str) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A server whose reloader does not accept requests yet."""
    engine = Engine(plan_cache=kept())
    scene = Scene(tmp_path, engine)
    yield scene
    scene.reloader.stop()
    scene.server.stop(0)
    engine.close()


def test_a_second_reload_is_refused_and_requests_are_served_meanwhile(scene: Scene) -> None:
    """While a reload waits for a slow model another is refused, and callers are not affected."""
    slownets.GATE.clear()
    scene.reloader.start()
    gated = ServedModel(ModelSpec("slownets:gated", item_shape=ITEM))
    scene.config = ServerConfig(models=(scene.net, gated))
    with ThreadPoolExecutor(1) as pool, Client(scene.server.address) as client:
        first = pool.submit(client.reload)
        while not scene.reloader.busy:
            assert version_of(client) == 1
        with pytest.raises(errors.UnavailableError, match="another reload is in progress"):
            client.reload()
        assert version_of(client) == 1
        slownets.GATE.set()
        assert [model.name for model in first.result().models] == ["net", "gated"]
        assert len(client.reload().models) == 2
        assert client.extract("gated", np.zeros((1, *ITEM), np.float32), "conv")


def test_no_reload_before_the_start_nor_after_the_end(scene: Scene) -> None:
    """A server that is starting or stopping refuses reloads."""
    with Client(scene.server.address) as client:
        with pytest.raises(errors.UnavailableError, match="starting or stopping"):
            client.reload()
        scene.reloader.start()
        assert client.reload().models
        scene.reloader.stop()
        with pytest.raises(errors.UnavailableError, match="starting or stopping"):
            client.reload()


def test_a_reload_asked_for_while_another_runs_is_not_lost(scene: Scene, tmp_path: Path) -> None:
    """If a file changes during a reload, the reload requested afterwards applies the change."""
    slownets.GATE.clear()
    scene.reloader.start()
    gated = ServedModel(ModelSpec("slownets:gated", item_shape=ITEM))
    scene.config = ServerConfig(models=(scene.net, gated))
    with Client(scene.server.address) as client:
        scene.reloader.request()
        while "gated" not in str(_refusal(client)):
            pass
        save(tmp_path / "net.pt", 2)
        scene.reloader.request()
        slownets.GATE.set()
        while version_of(client) == 1:
            pass
        assert version_of(client) == 2


def _refusal(client: Client) -> errors.LayertapError:
    with pytest.raises(errors.LayertapError) as told:
        client.extract("gated", np.zeros((1, *ITEM), np.float32), "conv")
    return told.value if isinstance(told.value, errors.UnavailableError) else errors.LayertapError()


def test_factories_are_not_imported_again(scene: Scene, tmp_path: Path, monkeypatch) -> None:
    """A changed section builds the model again with the code that is already imported."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "from versioned import Versioned\ndef build():\n    return Versioned({})\n"
    (tmp_path / "mycode.py").write_text(code.format(5), encoding="utf-8")
    scene.reloader.start()
    spec = ModelSpec("mycode:build", name="net", item_shape=ITEM)
    with Client(scene.server.address) as client:
        scene.config = ServerConfig(models=(ServedModel(spec),))
        client.reload()
        assert version_of(client) == 5
        (tmp_path / "mycode.py").write_text(code.format(6), encoding="utf-8")
        scene.config = ServerConfig(models=(ServedModel(spec, layers=(LayerSelection("first"),)),))
        client.reload()
        assert version_of(client) == 5


def test_the_services_are_as_healthy_as_the_server(scene: Scene) -> None:
    """Without any model the server and both services are NOT_SERVING, until one is back."""
    scene.reloader.start()
    names = ("", "layertap.v1.FeatureService", "inference.GRPCInferenceService")
    with Client(scene.server.address) as client:
        assert {client.health(name) for name in names} == {"SERVING"}
        scene.reloader.unload_model("net")
        assert {client.health(name) for name in names} == {"NOT_SERVING"}
        scene.reloader.load_model("net")
        assert {client.health(name) for name in names} == {"SERVING"}
