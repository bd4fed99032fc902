"""Callers of a layertap server in processes of their own.

Started as a program it makes the calls that ``Callers`` orders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import common
from layertap import Client, keep_memory
from loads import CallerProcesses, answer_orders

__all__ = ["PHOTO", "Callers", "tensor"]

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"


ITEM = (3, 224, 224)


def tensor(batch: int, seed: int = 0, item: Sequence[int] = ITEM) -> np.ndarray:
    """Return an input ``[batch, *item] float32`` in [0, 1)."""
    return np.random.default_rng(seed).random((batch, *item), dtype=np.float32)


class Callers:
    """Client processes that ask one server.

    Args:
        address: The server's.
        processes: How many processes share the callers.
    """

    def __init__(self, address: str, processes: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, address]
        self._processes = CallerProcesses(command, processes)

    def load(
        self,
        model: str,
        layer: str,
        callers: int,
        seconds: float,
        *,
        batch: int = 0,
        item: Sequence[int] = ITEM,
    ) -> dict[str, float]:
        """Let callers ask without a pause; return answers a second and their milliseconds.

        Args:
            model: A served model.
            layer: The layer to ask for.
            callers: How many ask at once.
            seconds: For how long.
            batch: Items of the tensor that each sends; 0 for a photograph.
            item: The shape of an item of the tensor.
        """
        order = {"model": model, "layer": layer, "batch": batch, "item": item}
        answered = self._processes.load(order, callers, seconds)
        # An answer after the end was computed partly in the time that is not counted.
        pairs = zip(answered.ends, answered.times, strict=True)
        times = [took for end, took in pairs if end <= seconds]
        return {"rate": len(times) / seconds, **common.quantiles(times)}

    def close(self) -> None:
        """End the processes."""
        self._processes.close()


@contextmanager
def _connect(address: str, order: dict[str, Any]) -> Iterator[Callable[[], object]]:
    batch = order["batch"]
    given = tensor(batch, item=order["item"]) if batch else PHOTO.read_bytes()
    with Client(address, timeout=60) as client:
        yield lambda: client.extract(order["model"], given, order["layer"])


if __name__ == "__main__":
    keep_memory()
    answer_orders(lambda order: _connect(sys.argv[1], order))
