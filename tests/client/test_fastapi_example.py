"""The FastAPI example works as a web service."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest

from kept import kept
from layertap import Client
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTO = EXAMPLES / "images" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server of a net that takes images."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=(3, 32, 32)))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture
def example(address: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module, configured with the server's address."""
    monkeypatch.setenv("LAYERTAP_TARGET", address)
    spec = importlib.util.spec_from_file_location(
        "fastapi_app", EXAMPLES / "python" / "fastapi_app.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def post(
    example: ModuleType, *paths: str, body: bytes = PHOTO.read_bytes()
) -> list[httpx.Response]:
    """POST a body to several URLs at the same time."""

    async def ask() -> list[httpx.Response]:
        app = example.app
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://web") as web,
        ):
            return await asyncio.gather(*(web.post(path, content=body) for path in paths))

    return asyncio.run(ask())


def test_photographs_are_answered(example, address) -> None:
    """Each request gets the client's values, averaged over the positions."""
    for response in post(example, *["/features/residual/layer1.0.conv1"] * 5):
        assert response.status_code == 200, response.text
        found = response.json()
        with Client(address) as client:
            layer = "layer1.0.conv1"
            value = client.extract("residual", PHOTO, layer, extractor="hook")[layer][0]
        assert found["shape"] == list(value.shape)
        assert np.allclose(found["values"], value.mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)


def test_mistakes_are_told_in_the_servers_words(example) -> None:
    """An unknown model or layer gives 404, and a body that is not an image gives 400."""
    unknown, layer = post(example, "/features/nobody/layer1", "/features/residual/layer9")
    (body,) = post(example, "/features/residual/layer1", body=b"no image")
    assert (unknown.status_code, layer.status_code, body.status_code) == (404, 404, 400)
    assert "'nobody'" in unknown.json()["error"]
    assert "images[0]" in body.json()["error"]
