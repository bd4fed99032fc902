"""What does a photograph cost before a model sees it, and what does it add to a call?

First the decoders alone, in this process, on one core. Then the whole way from a file to the item
of a model: by torchvision's transform on Pillow's image, and by layertap. Then calls to a server in
a process of its own: a tensor, a photograph, and 16 photographs, in one request and one after the
other. All ways take turns, and their values are compared before anything is timed. Decoders that
are not installed are left out (simplejpeg is, OpenCV and PyTurboJPEG are not).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import io as torchvision_io
from torchvision.models import ResNet18_Weights

import common
import report
from layertap import Client, LayerSelection
from layertap.call import Call
from layertap.engine.decoders import Decoders
from layertap.models import ImageBatch, Preprocess
from layertap.selection import Reduction

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"
NET, LAYER = "resnet18", "conv1"
BATCH = 16
TENSOR, IMAGE = "a tensor", "a photograph"
TOGETHER = f"{BATCH} photographs in one request"
ONE_BY_ONE = f"{BATCH} photographs one after the other"

ONE_THREAD, ALL_CORES = "one thread", "the server's threads"

Way = Callable[[], object]


def files() -> dict[str, bytes]:
    """Return the photograph as it is, as other formats, and as a camera would store it."""
    photo = Image.open(PHOTO).convert("RGB")
    large = photo.resize((photo.width * 6, photo.height * 6), Image.Resampling.BICUBIC)
    return {
        "JPEG, 512 × 600": PHOTO.read_bytes(),
        "PNG, 512 × 600": _encoded(photo, "PNG"),
        "WebP, 512 × 600": _encoded(photo, "WEBP"),
        "JPEG, 3072 × 3600": _encoded(large, "JPEG", quality=90),
    }


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoders(data: bytes) -> dict[str, Callable[[], np.ndarray]]:
    """Return what decodes a JPEG file to ``[H, W, 3]``, all with Pillow's pixels."""
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "Pillow": lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision.io": lambda: (
            torchvision_io.decode_jpeg(tensor, torchvision_io.ImageReadMode.RGB)
            .permute(1, 2, 0)
            .numpy()
        ),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        ways["simplejpeg"] = lambda: simplejpeg.decode_jpeg(data, "RGB")
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        array = np.frombuffer(data, np.uint8)
        ways["OpenCV"] = lambda: cv2.imdecode(array, cv2.IMREAD_COLOR_RGB)
    expected = ways["Pillow"]()
    for name, way in ways.items():
        if not np.array_equal(way(), expected):
            print(f"{name}: other pixels than Pillow's, left out")
    return {name: way for name, way in ways.items() if np.array_equal(way(), expected)}


def whole_ways(data: bytes) -> dict[str, Way]:
    """Return torchvision's way from a file to an item, and layertap's."""
    transform = ResNet18_Weights.DEFAULT.transforms()
    preprocess = Preprocess.of(transform)
    assert preprocess.is_fast, "this machine's libraries disagree: see the log"

    def reference() -> torch.Tensor:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours() -> torch.Tensor:
        batch = ImageBatch(preprocess, 1)
        batch.decode(0, data)
        return batch.tensor()[0]

    assert torch.equal(reference(), ours()), "other values than torchvision's"
    return {"torchvision on Pillow": reference, "layertap": ours}


def batch_ways(data: bytes, decoders: Decoders) -> dict[str, Way]:
    """Return the ways to prepare a batch: in one thread, and in the server's."""
    preprocess = Preprocess.of(ResNet18_Weights.DEFAULT.transforms())

    def alone() -> torch.Tensor:
        batch = ImageBatch(preprocess, BATCH)
        for index in range(BATCH):
            batch.decode(index, data)
        return batch.tensor()

    def together() -> torch.Tensor:
        batch = ImageBatch(preprocess, BATCH)
        decoders.each(lambda index: batch.decode(index, data), BATCH, Call())
        return batch.tensor()

    assert torch.equal(alone(), together()), "other values in several threads"
    return {ONE_THREAD: alone, ALL_CORES: together}


@contextmanager
def serving() -> Iterator[str]:
    """Serve the net from a process of its own; yield the address once it is ready."""
    command = [sys.executable, "-m", "layertap", "serve", NET, "--weights", "random"]
    command += ["--layers", LAYER, "--port", "0", "--metrics-port", "-1", "--plan-cache", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line for line in process.stderr if "serving" in line).split()[-1]
        finally:
            process.terminate()


def calls(client: Client, data: bytes) -> dict[str, Way]:
    """Return the calls with a tensor and with photographs, which have the same answers."""
    x = ResNet18_Weights.DEFAULT.transforms()(Image.open(io.BytesIO(data)).convert("RGB"))
    tensor, photographs = x[None].numpy(), [data] * BATCH

    # The reply is a few numbers, so that the photographs are what a call costs.
    pooled = LayerSelection(LAYER, reduction=Reduction.GLOBAL_AVERAGE_POOL)

    def ask(given: Any) -> np.ndarray:
        return client.extract(NET, given, [pooled], extractor="torchscript")[LAYER]

    expected = ask(tensor)
    assert np.array_equal(ask(data), expected), "a photograph's answer is not its tensor's"
    assert np.allclose(ask(photographs), expected, atol=1e-5), "other answers in a batch"
    return {
        TENSOR: lambda: ask(tensor),
        IMAGE: lambda: ask(data),
        TOGETHER: lambda: ask(photographs),
        ONE_BY_ONE: lambda: [ask(each) for each in photographs],
    }


def run(rounds: int) -> dict[str, Any]:
    """Run all parts."""
    torch.set_num_threads(1)
    given = files()
    photo = next(iter(given.values()))
    results: dict[str, Any] = {
        "decoders": common.in_turns(decoders(photo), rounds, slow=()),
        "ways": {
            name: common.in_turns(whole_ways(data), rounds, slow=()) for name, data in given.items()
        },
    }
    decoders_ = Decoders(len(common.cores()))
    results["batch"] = common.in_turns(batch_ways(photo, decoders_), rounds, slow=())
    decoders_.close()
    with serving() as address, Client(address) as client:
        client.wait_ready()
        asked = calls(client, photo)
        timed = common.in_turns(asked, rounds, slow=(TOGETHER, ONE_BY_ONE))
    results["calls"], results["count"] = timed, BATCH
    results["added_ms"] = timed[IMAGE]["p50"] - timed[TENSOR]["p50"]
    batch = results["batch"]
    results["cores_ratio"] = batch[ONE_THREAD]["p50"] / batch[ALL_CORES]["p50"]
    return results


def main() -> None:
    """Run the benchmark, and write its results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    results = run(parser.parse_args().rounds)
    parts = {"decoders": results["decoders"], **results["ways"], "batch": results["batch"]}
    parts["calls"] = results["calls"]
    for part, rows in parts.items():
        for way, row in rows.items():
            print(f"{part:20} {way:34} {row['p25']:8.2f} {row['p50']:8.2f} {row['p75']:8.2f} ms")
    print(
        f"a photograph adds {results['added_ms']:.2f} ms; all cores {results['cores_ratio']:.2f} x"
    )
    facts = common.machine("torch", "torchvision", "pillow", "simplejpeg")
    common.save("images", {"machine": facts, **results})
    report.write()


if __name__ == "__main__":
    main()
