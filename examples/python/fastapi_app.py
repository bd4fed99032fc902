"""A web service in front of a layertap server: POST a photograph, get one layer as JSON.

    layertap serve resnet18 --layers avgpool
    uvicorn fastapi_app:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000/features/resnet18/avgpool

The event loop never waits for a model: while the server computes, it answers other requests. A
browser that closes its page cancels the call, and the server stops computing for it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from layertap import AsyncClient, LayertapError
from layertap.errors import DeadlineExceededError, NotFoundError, OverloadedError, UnavailableError

STATUS = {
    NotFoundError: 404,
    OverloadedError: 429,
    UnavailableError: 503,
    DeadlineExceededError: 504,
}
"""What a browser is told; anything else is a mistake in the request."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one client for all requests."""
    target = os.environ.get("LAYERTAP_TARGET", "127.0.0.1:8001")
    async with AsyncClient(target, timeout=10) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/features/{model}/{layer:path}")
async def features(model: str, layer: str, request: Request) -> dict[str, Any]:
    """Return one layer of the posted photograph, averaged over its positions."""
    client: AsyncClient = app.state.client
    reply = await client.extract(model, await request.body(), layer)
    value = reply[layer][0]
    pooled = value.reshape(len(value), -1).mean(axis=1)
    return {"layer": layer, "shape": value.shape, "values": pooled.tolist()}


@app.exception_handler(LayertapError)
async def refused(_: Request, error: LayertapError) -> JSONResponse:
    """Say in the server's words what was wrong."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 400)
    return JSONResponse({"error": str(error)}, status)
