"""The output of each client in ``examples/``, compared with the Python client's values.

A client prints a line for each tensor, for each intervention, and for the error::

    photo layer1 float32 1x64x56x56 sum=140344.3002 first=1.505641
    photo avgpool:input float32 1x512x7x7 sum=43724.5751 first=1.016828
    tensor avgpool float32 1x512x1x1 sum=336.6542 first=0.215358
    map layer1:grad_cam float32 1x56x56 sum=5.9097 first=0.000616
    map objective.value float32 1 sum=8.9207 first=8.920695
    map objective.index int64 1x3 sum=400 first=400
    changed avgpool:input float32 1x512x7x7 sum=36166.7979 first=0.690792
    intervention 0 calls=1 elements=6272 changed=4113 norm=38.4223->0.0000
    intervention 1 calls=1 elements=100352 changed=76292 norm=341.1440->170.5720
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from layertap import Client, Intervention, LayerSelection, LayertapError, Texts
from layertap.app.server import FeatureServer

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
PHOTO = EXAMPLES / "images" / "grace_hopper.jpg"
TEXT_MODEL, TEXT_LAYER = "bert", "encoder.layer.1"
TEXTS = ["the cat sat on the mat.", "a bird flew"]
UNKNOWN_LAYER = "no.such.layer"

INTERVENTIONS = [
    Intervention.zero("layer1", channel=[0, 1]),
    Intervention.scale("layer1", 0.5, channel=slice(32, None)),
]

SHAPE = r"\d+(?:x\d+)*"
LINES = [
    re.compile(rf"(\w+ \S+ float32 {SHAPE}) sum=(-?\d+\.\d{{4}}) first=(-?\d+\.\d{{6}})"),
    re.compile(rf"(\w+ \S+ int64 {SHAPE}) sum=(-?\d+) first=(-?\d+)"),
    re.compile(
        r"(intervention \d+) calls=(\d+) elements=(\d+) changed=(\d+)"
        r" norm=(\d+\.\d{4})->(\d+\.\d{4})"
    ),
]
ERROR_LINE = re.compile(r"error (\w+) (\w+) (.+)")
RUN_SECONDS = 90


@dataclass(frozen=True)
class Reference:
    """What a client is to print: the numbers of each line by how it begins, and the error."""

    lines: dict[str, tuple[Any, ...]]
    kind: str
    message: str


def ask(address: str, model: str) -> Reference:
    """Make the clients' requests with the Python client."""
    ramp = (np.arange(3 * 224 * 224) % 255).astype(np.float32) / np.float32(255)
    pooled = "avgpool:input"
    with Client(address) as client:
        photo = client.extract(model, PHOTO, ["layer1", pooled])
        tensor = client.extract(model, ramp.reshape(1, 3, 224, 224), "avgpool")
        maps = client.extract(model, PHOTO, "layer1:grad_cam", objective="avgpool[maximum]")
        changed = client.extract(model, PHOTO, pooled, interventions=INTERVENTIONS)
        mean = LayerSelection(TEXT_LAYER, reduction="global_average_pool")
        text = client.extract(TEXT_MODEL, Texts(TEXTS), mean)
        with pytest.raises(LayertapError) as refused:
            client.extract(model, PHOTO, UNKNOWN_LAYER)
    assert np.abs(changed[pooled] - photo[pooled]).max() > 0.1, "the interventions change nothing"
    return Reference(
        of_tensors("photo", photo)
        | of_tensors("tensor", tensor)
        | of_tensors("map", maps)
        | of_tensors("changed", changed)
        | of_interventions(changed)
        | of_tensors("text", text),
        type(refused.value).__name__,
        str(refused.value),
    )


def of_tensors(what: str, features: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Return the sum and the first element of each tensor but the reports of interventions."""
    return {
        f"{what} {name} {array.dtype} {'x'.join(map(str, array.shape))}": numbers(array)
        for name, array in features.items()
        if not name.startswith("interventions.")
    }


def numbers(array: np.ndarray) -> tuple[Any, Any]:
    if array.dtype.kind == "i":
        return int(array.sum()), int(array.flat[0])
    # Another number of threads adds in another order.
    # The values after a layer norm add up to almost nothing.
    total = pytest.approx(float(array.sum(dtype=np.float64)), rel=1e-3, abs=1e-3)
    return total, pytest.approx(float(array.flat[0]), abs=1e-5)


def of_interventions(features: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Return the calls, elements, changed elements and norms of each intervention."""
    names = ("calls", "elements", "changed")
    counts = np.stack([features[f"interventions.{name}"] for name in names], axis=1)
    return {
        f"intervention {index}": (
            *counts[index].tolist(),
            *(pytest.approx(norm, rel=1e-3) for norm in norms.tolist()),
        )
        for index, norms in enumerate(features["interventions.norm"])
    }


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
    *lines, error = done.stdout.splitlines()
    expected = ask(address, model)

    matched = [next(filter(None, (form.fullmatch(line) for form in LINES)), None) for line in lines]
    assert all(matched), done.stdout
    printed = {
        name: tuple(map(float, found)) for name, *found in (each.groups() for each in matched)
    }
    assert list(printed) == list(expected.lines), done.stdout
    for name, found in printed.items():
        assert found == expected.lines[name], name

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
