"""The output of each client in ``examples/``, compared with the Python client's values.

A client prints a line a tensor and a last one for the error::

    photo layer1 float32 1x64x56x56 sum=140344.3002 first=1.505641
    photo avgpool:input float32 1x512x7x7 sum=43724.5751 first=1.016828
    tensor avgpool float32 1x512x1x1 sum=336.6542 first=0.215358
    map layer1:grad_cam float32 1x56x56 sum=629.1962 first=0.059553
    map objective.value float32 1 sum=892.3384 first=892.338379
    text encoder.layer.1 float32 2x32 sum=0.0000 first=0.358231
    error NOT_FOUND LayerNotFoundError no layer 'no.such.layer'; DescribeModel (...

The error's line has the status as the language names it, the trailing metadata ``layertap-error``,
and the message.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from layertap import Client, LayerSelection, LayertapError, Texts
from layertap.app.server import FeatureServer

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
PHOTO = EXAMPLES / "images" / "grace_hopper.jpg"
TEXT_MODEL, TEXT_LAYER = "bert", "encoder.layer.1"
TEXTS = ["the cat sat on the mat.", "a bird flew"]
UNKNOWN_LAYER = "no.such.layer"

TENSOR_LINE = re.compile(
    r"(\w+) (\S+) (\w+) (\d+(?:x\d+)*) sum=(-?\d+\.\d{4}) first=(-?\d+\.\d{6})"
)
ERROR_LINE = re.compile(r"error (\w+) (\w+) (.+)")
RUN_SECONDS = 90


@dataclass(frozen=True)
class Reference:
    """The Python client's values: each line's name, dtype and shape; its sum and first element."""

    tensors: dict[str, tuple[float, float]]
    kind: str
    message: str


def ask(address: str, model: str) -> Reference:
    """Make the clients' requests with the Python client."""
    ramp = (np.arange(3 * 224 * 224) % 255).astype(np.float32) / np.float32(255)
    with Client(address) as client:
        photo = client.extract(model, PHOTO, ["layer1", "avgpool:input"])
        tensor = client.extract(model, ramp.reshape(1, 3, 224, 224), "avgpool")
        maps = client.extract(model, PHOTO, "layer1:grad_cam", objective="avgpool[sum]")
        mean = LayerSelection(TEXT_LAYER, reduction="global_average_pool")
        text = client.extract(TEXT_MODEL, Texts(TEXTS), mean)
        with pytest.raises(LayertapError) as refused:
            client.extract(model, PHOTO, UNKNOWN_LAYER)
    return Reference(
        {
            f"{what} {name} {array.dtype} {'x'.join(map(str, array.shape))}": (
                float(array.sum(dtype=np.float64)),
                float(array.flat[0]),
            )
            for what, features in (
                ("photo", photo),
                ("tensor", tensor),
                ("map", maps),
                ("text", text),
            )
            for name, array in features.items()
        },
        type(refused.value).__name__,
        str(refused.value),
    )


def check(command: Sequence[str | Path], address: str, model: str) -> None:
    """Run a client to its end, and compare each line that it prints with the Python client's."""
    done = subprocess.run(
        [*command, address, model, PHOTO, TEXT_MODEL, TEXT_LAYER],
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    *tensors, error = done.stdout.splitlines()
    expected = ask(address, model)

    found = [TENSOR_LINE.fullmatch(line) for line in tensors]
    assert all(found), done.stdout
    printed = {" ".join(line.group(1, 2, 3, 4)): line.group(5, 6) for line in found}
    assert list(printed) == list(expected.tensors), done.stdout
    for name, (total, first) in printed.items():
        # Another number of threads adds in another order.
        # The values after a layer norm add up to almost nothing.
        total_expected = pytest.approx(expected.tensors[name][0], rel=1e-3, abs=1e-3)
        assert float(total) == total_expected, name
        assert float(first) == pytest.approx(expected.tensors[name][1], abs=1e-5), name

    status, kind, message = ERROR_LINE.fullmatch(error).groups()
    # Languages write it as NOT_FOUND, NotFound or not_found.
    assert status.replace("_", "").upper() == grpc.StatusCode.NOT_FOUND.name.replace("_", "")
    assert (kind, message) == (expected.kind, expected.message)


def check_waits(command: Sequence[str | Path], server: FeatureServer) -> None:
    """Start a client before its server is ready, and see it wait, ask, and tell what went wrong.

    The server has no models, so that the first request is refused.
    """
    waiting = subprocess.Popen(
        [*command, server.address, "resnet18", PHOTO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = threading.Timer(2.0, server.ready)
    begun = time.monotonic()
    ready.start()
    try:
        output, errors = waiting.communicate(timeout=RUN_SECONDS)
        # Before the join, which takes the two seconds by itself.
        took = time.monotonic() - begun
    finally:
        waiting.kill()
        ready.join()
    assert took > 1.9, "it did not wait"
    assert waiting.returncode not in (0, None)
    assert (output, "resnet18" in errors) == ("", True), errors
