"""What does the encoder's one pass cost, beside a copy of the bytes and beside torch's steps?

A 12.8 MB activation ``[16, 64, 56, 56]`` becomes a finished message: as it is, cast to float16,
from channels last, and a slice of a larger batch. torch's way is to cast, to make contiguous,
``tobytes`` and an ordinary protobuf message. Then two threads do it at once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import common
import report
from layertap.malloc import keep_memory
from layertap.v1 import tensor_pb2
from layertap.wire.codec import ReplyBuilder, ReplyLayout
from layertap.wire.dtypes import by_name

SHAPE = (16, 64, 56, 56)
Case = tuple[torch.Tensor, str]


def cases() -> dict[str, Case]:
    """Return each case's activation and the type to send it in."""
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, x])
    return {
        "as it is": (x, "float32"),
        "float32 to float16": (x, "float16"),
        "float32 to bfloat16": (x, "bfloat16"),
        "channels last": (x.contiguous(memory_format=torch.channels_last), "float32"),
        "a slice of a batch": (wide[8:24], "float32"),
    }


def ours(value: torch.Tensor, dtype: str) -> bytes:
    """Encode in one pass."""
    row = by_name(dtype)
    layout = ReplyLayout([("layer1", row.number, SHAPE)], field=1, head_size=0)
    builder = ReplyBuilder(layout)
    builder.write(0, value.numpy(), by_name("float32").number)
    return builder.finish(b"")


def torchs(value: torch.Tensor, dtype: str) -> bytes:
    """Encode step by step: cast, contiguous, tobytes, protobuf."""
    cast = value.to(getattr(torch, dtype)).contiguous()
    raw = cast.view(torch.uint8).numpy().tobytes()
    number: Any = by_name(dtype).number  # The stubs know only the enum and its names.
    tensor = tensor_pb2.Tensor(name="layer1", dtype=number, shape=SHAPE, data=raw)
    message: bytes = tensor.SerializeToString()
    return message


def check(value: torch.Tensor, dtype: str) -> None:
    """Stop where the two ways' tensors differ."""
    expected = tensor_pb2.Tensor.FromString(torchs(value, dtype)).data
    message = ours(value, dtype)
    start = message.find(expected[:64])
    if start < 0 or message[start : start + len(expected)] != expected:
        raise SystemExit(f"{dtype}: the encoder's bytes are not torch's")


def copier(size: int) -> Callable[[], object]:
    """Return what copies so many bytes, to memory of its own."""
    source, target = (ctypes.create_string_buffer(size) for _ in range(2))
    return lambda: ctypes.memmove(target, source, size)


def both_threads(make: Callable[[], Callable[[], object]], seconds: float) -> float:
    """Return the throughput of two threads at once, each with its own call, as a multiple of one's.

    Where plain copies reach no more either, it is the memory that both wait for.
    """

    def rate(threads: int) -> float:
        counts = [0] * threads
        calls = [make() for _ in counts]
        ends = time.perf_counter() + seconds

        def work(index: int) -> None:
            while time.perf_counter() < ends:
                calls[index]()
                counts[index] += 1

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(counts)

    one, two = [], []
    for _ in range(5):
        one.append(rate(1))
        two.append(rate(2))
    return float(np.median(two) / np.median(one))


def run(rounds: int) -> dict[str, Any]:
    """Time every case, the ways taking turns."""
    keep_memory()
    results: dict[str, Any] = {}
    for name, (value, dtype) in cases().items():
        check(value, dtype)
        ways = {
            "memcpy of float32": copier(value.numel() * 4),
            "ours": lambda v=value, d=dtype: len(ours(v, d)),
            "torch's steps": lambda v=value, d=dtype: len(torchs(v, d)),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                times[way] += common.timed(call, 3)
        results[name] = {way: common.quantiles(t) for way, t in times.items()}
        results[name]["two threads"] = both_threads(
            lambda v=value, d=dtype: partial(ours, v, d), 0.4
        )
        results[name]["two threads, memcpy"] = both_threads(partial(copier, value.numel() * 4), 0.4)
    return {"machine": common.machine("torch", "numpy"), "rounds": rounds, "cases": results}


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with torch.inference_mode():
        results = run(options.rounds)
    common.save("encode", results)
    report.write()
    print(json.dumps(results["cases"], indent=2))


if __name__ == "__main__":
    main()
