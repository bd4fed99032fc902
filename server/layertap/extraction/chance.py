"""Detects that a forward pass draws random numbers.

Two passes of such a model on one input give different values. So no extractor can be compared with
the model, and two requests get different values. We detect this by the state of the random number
generators that a model's code can use without creating one: torch's (of the CPU and of the model's
device), Python's and numpy's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["Generators"]


class Generators:
    """The states of the global random number generators when this object was made.

    Args:
        device: The model's device, whose generator is watched as well as the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = _numpy_state()
        self._torch = self._torch_states()
        self._moved = False

    def moved(self) -> bool:
        """Return whether any generator has been used since; once true, it stays true."""
        if torch.compiler.is_compiling():
            # torch.compile traces hooks as well, and would make numpy's calls part of its graph.
            return self._moved
        self._moved = self._moved or not (
            all(map(torch.equal, self._torch, self._torch_states()))
            and self._python == random.getstate()
            and self._numpy == _numpy_state()
        )
        return self._moved

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Repeat inside the block the random numbers drawn since this object was made."""
        after = Generators(self._device)
        self._set()
        try:
            yield
        finally:
            after._set()

    def _set(self) -> None:
        states = iter(self._torch)
        torch.set_rng_state(next(states))
        for state in states:
            torch.cuda.set_rng_state(state, self._device)
        random.setstate(self._python)
        name, keys, *rest = self._numpy
        np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))

    def _torch_states(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


def _numpy_state() -> tuple[Any, ...]:
    # Only numpy's global (legacy) generator: other generators belong to the code that made them.
    name, keys, *rest = np.random.get_state(legacy=True)
    return (name, keys.tobytes(), *rest)  # type: ignore[union-attr]
