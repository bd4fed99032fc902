"""Requests of both protocols, and their recorded replies in ``recorded/``.

``python tests/recording.py`` records them again. Do that only if a reply is meant to change; the
diff then shows how. The models compute with small whole numbers, so
the replies are the same bits on every machine. What differs from call to call is left out: the
timings.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from layertap.engine import Engine
from layertap.inference import grpc_service_pb2 as infer
from layertap.models import ModelSpec
from layertap.selection import LayerSelection
from layertap.v1 import feature_service_pb2 as native
from serving import running_server

FOLDER = Path(__file__).with_name("recorded")
NATIVE = "/layertap.v1.FeatureService/"
OPEN_INFERENCE = "/inference.GRPCInferenceService/"
HOOK, FX, TORCHSCRIPT = 4, 3, 2
TIMES = ("prepare_ms", "queue_ms", "compute_ms", "total_ms")


def pixels(items: int) -> np.ndarray:
    """Return a batch of small whole numbers."""
    return np.random.default_rng(items).integers(-4, 5, (items, 3, 8, 8)).astype(np.float32)


def ids(items: int) -> np.ndarray:
    """Return a batch of token ids."""
    return np.random.default_rng(items).integers(0, 50, (items, 7))


def png() -> bytes:
    """Return an image file of the model's size."""
    values = np.random.default_rng(5).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def tensor(array: np.ndarray) -> dict[str, Any]:
    """Return a tensor's fields."""
    dtype = {"float32": 1, "int64": 9}[str(array.dtype)]
    return {"dtype": dtype, "shape": array.shape, "data": array.tobytes()}


def layers(*names: str, **fields: Any) -> list[dict[str, Any]]:
    """Return selections."""
    return [{"layer": name, **fields} for name in names]


def natives() -> dict[str, dict[str, Any]]:
    """Return the fields of the requests of ``Extract`` by name."""
    x = {"model": "image", "inputs": [tensor(pixels(2))], "extractor": HOOK}
    given = {"capture": 2}
    return {
        "one": {**x, "layers": layers("conv1")},
        "named": {**x, "inputs": [{**tensor(pixels(2)), "name": "x"}], "layers": layers("fc")},
        "everything": {**x, "layers": layers("**")},
        "twice": {**x, "layers": layers("relu", "relu_1")},
        "members": {**x, "layers": layers("split.0", "split.1")},
        "given": {**x, "layers": [*layers("conv2", **given), *layers("conv2")]},
        "half": {**x, "layers": layers("conv1", dtype=2, alias="half")},
        "brain": {**x, "layers": layers("fc", dtype=3)},
        "pooled": {**x, "layers": [*layers("conv2", reduction=2), *layers("pool", reduction=3)]},
        "node": {**x, "extractor": FX, "layers": layers("add", "conv1")},
        "compiled": {**x, "extractor": TORCHSCRIPT, "layers": layers("pool")},
        "seven": {**x, "inputs": [tensor(pixels(7))], "layers": layers("fc")},
        "images": {
            "model": "image", "extractor": HOOK, "images": [{"images": [png()] * 2}],
            "layers": layers("conv1", **given),
        },
        "ids": {
            "model": "tokens", "extractor": HOOK, "inputs": [tensor(ids(3))], "layers": layers("*"),
        },
        "unknown": {**x, "layers": layers("no.such.layer")},
        "unserved": {**x, "extractor": FX, "layers": layers("fc", **given)},
        "nothing": {"model": "image", "layers": layers("fc")},
        "nobody": {**x, "model": "nobody", "layers": layers("fc")},
    }  # fmt: skip


def infers() -> dict[str, infer.ModelInferRequest]:
    """Return the requests of ``ModelInfer`` by name."""

    def ask(array: np.ndarray, *outputs: str, **fields: Any) -> infer.ModelInferRequest:
        datatype = {"float32": "FP32", "int64": "INT64"}[str(array.dtype)]
        request = infer.ModelInferRequest(
            inputs=[{"name": "input", "datatype": datatype, "shape": array.shape}],
            outputs=[{"name": name} for name in outputs],
            raw_input_contents=[array.tobytes()],
            **{"model_name": "image", **fields},
        )
        request.parameters["extractor"].string_param = "hook"
        return request

    return {
        "infer_one": ask(pixels(2), "conv1", id="a"),
        "infer_default": ask(pixels(2)),
        "infer_several": ask(pixels(3), "relu_1", "conv2:input", "split.1"),
        "infer_ids": ask(ids(2), "embed", model_name="tokens"),
        "infer_unknown": ask(pixels(2), "no.such.layer"),
    }


@contextmanager
def channel() -> Iterator[grpc.Channel]:
    """Serve the models and yield a channel to them."""
    engine = Engine(threads=1)
    try:
        image = ModelSpec("exactnets:image", item_shape=(3, 8, 8))
        engine.load(image, [LayerSelection("pool"), LayerSelection.parse("fc=out")])
        engine.load(ModelSpec("exactnets:tokens", item_shape=(7,), input_dtype="int64"))
        with running_server(engine) as address, grpc.insecure_channel(address) as opened:
            yield opened
    finally:
        engine.close()


def replies(opened: grpc.Channel) -> dict[str, bytes]:
    """Return the reply to each request, without its timings; a refusal as its status and text."""
    found = {}
    for name, fields in natives().items():
        message = native.ExtractRequest(**fields).SerializeToString()
        found[name] = _untimed(_call(opened, f"{NATIVE}Extract", message))
    for name, request in infers().items():
        message = request.SerializeToString()
        found[name] = _untimed_infer(_call(opened, f"{OPEN_INFERENCE}ModelInfer", message))
    for number, reply in enumerate(_stream(opened)):
        found[f"stream_{number}"] = _untimed(reply)
    return found


def _call(opened: grpc.Channel, method: str, message: bytes) -> bytes:
    try:
        reply: bytes = opened.unary_unary(method)(message)
    except grpc.RpcError as error:
        return f"refused {error.code().name}: {error.details()}".encode()
    return reply


def _stream(opened: grpc.Channel) -> Sequence[bytes]:
    """Return the replies to the native requests as items of one stream, in the order of the ids."""
    items = [
        native.ExtractStreamRequest(id=number + 1, **fields).SerializeToString()
        for number, fields in enumerate(natives().values())
    ]
    method = opened.stream_stream(f"{NATIVE}ExtractStream")
    return sorted(method(iter(items)), key=lambda m: native.ExtractStreamResponse.FromString(m).id)


def _untimed(message: bytes) -> bytes:
    """Return a reply's bytes with zeros for the timings, which have a fixed size and place."""
    if message.startswith(b"refused "):
        return message
    times = native.ExtractStreamResponse.FromString(message).timings
    measured = times.SerializeToString()
    for field, _ in times.ListFields():
        setattr(times, field.name, 0)
    return message.replace(measured, times.SerializeToString(), 1) if measured else message


def _untimed_infer(message: bytes) -> bytes:
    """Return a reply with zeros for the timings; its parameters, a map, have no fixed order."""
    if message.startswith(b"refused "):
        return message
    reply = infer.ModelInferResponse.FromString(message)
    for name in TIMES:
        reply.parameters[name].double_param = 0
    again = reply.SerializeToString(deterministic=True)
    assert len(again) == len(message)
    return again


def main() -> None:
    """Write the replies."""
    FOLDER.mkdir(exist_ok=True)
    with channel() as opened:
        for name, reply in replies(opened).items():
            (FOLDER / name).write_bytes(reply)


if __name__ == "__main__":
    main()
