"""Errors of every kind, over a real channel, are about the request and never about the server."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from kept import kept
from layertap import errors
from layertap.app.security import open_security
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from layertap.services.caller import Caller
from layertap.services.grpc_adapter.handlers import unary
from layertap.settings import SecretFiles
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire.messages import encode_request
from leakynets import SECRET
from serving import running_server, serving_method

Code = grpc.StatusCode
SERVICE = "/layertap.v1.FeatureService/"
ITEM = (3, 4, 4)
ROOT = Path(__file__).resolve().parents[2]
# What only the server knows: its files, its code, and what the model's own code says.
INTERNAL = (
    SECRET,
    "acme",
    str(ROOT),
    str(Path.home()),
    "site-packages",
    ".py",
    "Traceback",
    'File "',
)


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A channel to a server of a net whose errors name files."""
    engine = Engine(
        Limits(request_bytes=200_000, reply_bytes=60_000, batch=100, pixels=10_000),
        plan_cache=kept(),
    )
    engine.load(ModelSpec("leakynets:leaky", item_shape=ITEM))
    options = [("grpc.max_send_message_length", -1)]
    try:
        with (
            running_server(engine) as address,
            grpc.insecure_channel(address, options=options) as channel,
        ):
            yield channel
    finally:
        engine.close()


def extract(
    *layers: str, model: str = "leaky", x: np.ndarray | None = None, extractor: int = 0
) -> bytes:
    request = feature_service_pb2.ExtractRequest(
        model=model,
        layers=[feature_service_pb2.LayerSelection(layer=layer) for layer in layers],
        extractor=extractor,  # type: ignore[arg-type]
    )
    return encode_request(request, [("", np.zeros((1, *ITEM), np.float32) if x is None else x)])


def images(*files: bytes) -> bytes:
    request = feature_service_pb2.ExtractRequest(
        model="leaky", layers=[feature_service_pb2.LayerSelection(layer="conv")]
    )
    request.images.add(images=files)
    return request.SerializeToString()


def picture(side: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()


FAILING = np.full((1, *ITEM), 2000, np.float32)
JIT = catalogue_pb2.EXTRACTOR_TORCHSCRIPT
CASES: dict[str, tuple[str, Callable[[], bytes], Code]] = {
    "the model raises": ("Extract", lambda: extract("conv", x=FAILING), Code.INTERNAL),
    "its plan can't be made": (
        "Extract",
        lambda: extract("conv", x=np.zeros((1, 5, 9, 9), np.float32)),
        Code.INVALID_ARGUMENT,
    ),
    "garbage": ("Extract", lambda: b"\xff" * 50, Code.INVALID_ARGUMENT),
    "garbage to list": ("ListModels", lambda: b"\xff" * 50, Code.INVALID_ARGUMENT),
    "garbage to describe": ("DescribeModel", lambda: b"\xff" * 50, Code.INVALID_ARGUMENT),
    "no model": ("Extract", lambda: extract("conv", model="nobody"), Code.NOT_FOUND),
    "a path for a model": ("Extract", lambda: extract("x", model="../../etc"), Code.NOT_FOUND),
    "no layer of that name": ("Extract", lambda: extract("cnov"), Code.NOT_FOUND),
    "a glob that matches nothing": ("Extract", lambda: extract("z*"), Code.NOT_FOUND),
    "a name that is far too long": ("Extract", lambda: extract("é" * 50_000), Code.NOT_FOUND),
    "no layers": ("Extract", extract, Code.INVALID_ARGUMENT),
    "an extractor that can't": (
        "Extract",
        lambda: extract("conv", extractor=catalogue_pb2.EXTRACTOR_FX),
        Code.FAILED_PRECONDITION,
    ),
    "an extractor that is none": (
        "Extract",
        lambda: extract("conv", extractor=77),
        Code.INVALID_ARGUMENT,
    ),
    "too many items": (
        "Extract",
        lambda: extract("conv", x=np.zeros((101, *ITEM), np.float32)),
        Code.INVALID_ARGUMENT,
    ),
    "a reply that is too large": (
        "Extract",
        lambda: extract("conv", x=np.zeros((1, 3, 100, 100), np.float32)),
        Code.OUT_OF_RANGE,
    ),
    "a request that is too large": ("Extract", lambda: b"x" * 200_001, Code.RESOURCE_EXHAUSTED),
    "no image": ("Extract", lambda: images(b"GIF89a" + b"\0" * 20), Code.INVALID_ARGUMENT),
    "half an image": ("Extract", lambda: images(picture(50)[:60]), Code.INVALID_ARGUMENT),
    "a damaged JPEG": ("Extract", lambda: images(picture(50, "JPEG")[:300]), Code.INVALID_ARGUMENT),
    "too many pixels": ("Extract", lambda: images(picture(101)), Code.INVALID_ARGUMENT),
    "no such method": ("Nothing", lambda: b"", Code.UNIMPLEMENTED),
}


def failure(channel: grpc.Channel, method: str, message: bytes) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(message, timeout=60)
    return caught.value


def check(error: grpc.RpcError) -> str:
    """Check that nothing internal left the server, and return the text that did."""
    left = f"{error.details()} {error.trailing_metadata()}"
    assert [word for word in INTERNAL if word in left] == []
    assert len(left.encode()) < 4096
    return error.details()


@pytest.mark.parametrize("case", CASES)
def test_no_error_speaks_of_the_server(channel: grpc.Channel, case: str) -> None:
    """Each error has its status, and a text without file names or the model's own words."""
    method, message, code = CASES[case]
    error = failure(channel, SERVICE + method, message())
    assert error.code() is code, error.details()
    check(error)


def test_a_long_quotation_is_cut_not_lost(channel: grpc.Channel) -> None:
    """A text that is too long for a header is shortened, and keeps its status."""
    error = failure(channel, f"{SERVICE}Extract", extract("é" * 50_000))
    assert error.code() is Code.NOT_FOUND
    assert error.details().startswith("no layer 'éééé")
    assert error.details().endswith(" …")


@contextmanager
def answering(work: Callable[[], object]) -> Iterator[grpc.Channel]:
    """Serve a method that raises errors about the server's own files."""

    def handle(message: bytes, caller: Caller) -> bytes:
        work()
        return b""

    with serving_method(unary(handle)) as channel:
        yield channel


def load(source: str) -> None:
    engine = Engine(plan_cache=kept())
    try:
        engine.load(ModelSpec(source))
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda: load("leakynets:broken"), errors.ModelLoadError),
        (lambda: load(f"{SECRET}.pt"), errors.ModelLoadError),
        (lambda: open_security(SecretFiles(tls_key=Path(SECRET))), errors.ConfigError),
        (lambda: Path(SECRET).read_bytes(), errors.InternalError),
    ],
)
def test_what_the_operator_must_know_is_in_the_log_only(
    caplog: pytest.LogCaptureFixture,
    work: Callable[[], object],
    kind: type[errors.LayertapError],
) -> None:
    """Errors about the server's files keep their class; their text is logged under an id."""
    with caplog.at_level(logging.ERROR), answering(work) as channel:
        error = failure(channel, "/test.Service/Call", b"")
    text = check(error)
    assert dict(error.trailing_metadata())["layertap-error"] == kind.__name__
    assert text.rsplit(" ", 1)[-1] in caplog.text
    assert SECRET in caplog.text
