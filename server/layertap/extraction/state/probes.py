"""Reads and writes the state of objects that show it as a value, such as random generators."""

from __future__ import annotations

import array
import io
import itertools
import operator
import pickle
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["probe_of"]

_LOCKS = (type(threading.Lock()), type(threading.RLock()))


_Made = tuple[Callable[[], Any], Callable[[Any], None] | None, str]


def probe_of(value: Any) -> _Made | None:
    """Return (read, write, why it can't be written) for an object's state; None if it has none."""
    for kinds, make in _PROBES:
        if isinstance(value, kinds):
            return make(value)
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        return _progress(value), None, "an iterator can't be rewound"
    return None


def _progress(value: Any) -> Callable[[], Any]:
    """Return a function that shows how far an iterator has come, as far as that can be known."""
    if isinstance(value, types.GeneratorType):
        return lambda: (value.gi_frame and value.gi_frame.f_lasti, value.gi_running)
    if isinstance(value, itertools.count):
        return lambda: repr(value)
    return lambda: operator.length_hint(value, -1)


def _random(value: random.Random) -> _Made:
    return value.getstate, value.setstate, ""


def _numpy_random(value: Any) -> _Made:
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator

    def write(state: bytes) -> None:
        bits.state = pickle.loads(state)  # noqa: S301 - our own bytes

    return lambda: pickle.dumps(bits.state), write, ""


def _torch_random(value: torch.Generator) -> _Made:
    def write(state: bytes) -> None:
        value.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    return lambda: value.get_state().numpy().tobytes(), write, ""


def _lock(value: Any) -> _Made:
    def read() -> bool:
        # Before Python 3.14, only its repr shows whether an RLock is taken.
        text = repr(value)
        return not text.startswith("<unlocked")

    def write(held: bool) -> None:
        if not held:
            value.release()

    return read, write, ""


def _file(value: Any) -> _Made:
    def read() -> int:
        try:
            return int(value.tell())
        except (OSError, ValueError):
            return -1

    def write(position: int) -> None:
        if position >= 0 and not value.closed:
            value.seek(position)

    return read, write, ""


def _array(value: Any) -> _Made:
    def write(content: bytes) -> None:
        memoryview(value).cast("B")[:] = content

    return lambda: bytes(memoryview(value).cast("B")), write, ""


def _numpy_array(value: np.ndarray) -> _Made:
    def write(content: bytes) -> None:
        value[...] = pickle.loads(content)  # noqa: S301 - our own bytes

    return lambda: pickle.dumps(value), write, ""


_PROBES: tuple[tuple[Any, Callable[[Any], _Made]], ...] = (
    (random.Random, _random),
    ((np.random.Generator, np.random.RandomState), _numpy_random),
    (torch.Generator, _torch_random),
    (_LOCKS, _lock),
    (io.IOBase, _file),
    (np.ndarray, _numpy_array),
    ((bytearray, array.array), _array),
)
