"""Builds modules with a seed, without changing the process's random number generators."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]

# torch has one CPU generator per process: two models built at once would take numbers from each
# other's sequence.
_LOCK = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block, and restore its state afterwards.

    Modules are built on the CPU and moved later, so the same seed gives the same weights on every
    device. ``torch.manual_seed`` isn't used because it seeds the GPUs' generators too.
    """
    with _LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
