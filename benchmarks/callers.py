"""Callers in processes of their own, so that one interpreter's lock does not limit the load.

Started as a program it connects, answers orders (a JSON object a line) and ends with its input.
``Callers`` starts some and spreads the callers among them, each on a channel of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import common
from layertap import Client, keep_memory

__all__ = ["PHOTO", "Callers", "tensor"]

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"


def tensor(batch: int, seed: int = 0) -> np.ndarray:
    """Return an input ``[batch, 3, 224, 224] float32`` in [0, 1)."""
    return np.random.default_rng(seed).random((batch, 3, 224, 224), dtype=np.float32)


class Callers:
    """Client processes that ask one server.

    Args:
        address: The server's.
        processes: How many processes share the callers.
    """

    def __init__(self, address: str, processes: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(processes)
        ]  # fmt: skip

    def load(
        self, model: str, layer: str, callers: int, seconds: float, *, batch: int = 0
    ) -> dict[str, float]:
        """Let callers ask without a pause; return answers a second and their milliseconds.

        Args:
            model: A served model.
            layer: The layer to ask for.
            callers: How many ask at once.
            seconds: For how long.
            batch: Items of the tensor that each sends; 0 for a photograph.
        """
        used = self._processes[: min(callers, len(self._processes))]
        shares = [callers // len(used) + (i < callers % len(used)) for i in range(len(used))]
        for process, share in zip(used, shares, strict=True):
            order = {"model": model, "layer": layer, "callers": share, "seconds": seconds,
                     "batch": batch}  # fmt: skip
            _tell(process, order)
        for process in used:  # Until the slowest has connected and warmed up.
            _hear(process)
        for process in used:
            _tell(process, {"begin": time.time() + 0.05})
        times: list[float] = []
        for process in used:
            times += _hear(process)
        return {"rate": len(times) / seconds, **common.quantiles(times)}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate()


def _tell(process: subprocess.Popen[str], what: Any) -> None:
    assert process.stdin is not None
    print(json.dumps(what), file=process.stdin, flush=True)


def _hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def _load(address: str, order: dict[str, Any]) -> list[float]:
    given = tensor(order["batch"]) if order["batch"] else PHOTO.read_bytes()
    warm, begin = (threading.Barrier(order["callers"] + 1) for _ in range(2))
    at = 0.0

    def call() -> list[float]:
        with Client(address, timeout=60) as client:
            for _ in range(2):
                client.extract(order["model"], given, order["layer"])
            warm.wait()
            begin.wait()
            time.sleep(max(0.0, at - time.time()))
            ends, times = at + order["seconds"], []
            while time.time() < ends:
                taken = common.timed(
                    lambda: client.extract(order["model"], given, order["layer"]), 1
                )
                # An answer after the end was computed partly in the time that is not counted.
                times += taken if time.time() <= ends else []
        return times

    with ThreadPoolExecutor(order["callers"]) as pool:
        taken = [pool.submit(call) for _ in range(order["callers"])]
        warm.wait()
        print("true", flush=True)
        at = json.loads(sys.stdin.readline())["begin"]
        begin.wait()
        return [each for times in taken for each in times.result()]


def _answer(address: str) -> None:
    keep_memory()
    while line := sys.stdin.readline():
        print(json.dumps(_load(address, json.loads(line))), flush=True)


if __name__ == "__main__":
    _answer(sys.argv[1])
