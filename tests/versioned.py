"""Model files whose every answer shows which version computed it."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from layertap import Client

ITEM = (3, 4, 4)
LAYERS = ("first", "second", "third")
# What each layer holds at an input of ones, in units of the version; exact in float32.
HOLDS = {"first": 3, "second": 1, "third": 5}


class Versioned(nn.Module):
    """Three layers that are constant on an input of ones, each by its own parameter."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)
        nn.init.constant_(self.first.weight, version)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, version)
        nn.init.ones_(self.third.weight)
        nn.init.constant_(self.third.bias, version)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


def save(file: Path, version: int) -> None:
    """Write a TorchScript file atomically."""
    part = file.with_suffix(".part")
    with warnings.catch_warnings():
        # TorchScript is deprecated, with a category that differs between torch's versions.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\..*` is")
        torch.jit.save(torch.jit.script(Versioned(version).eval()), part)
    part.replace(file)


def build() -> nn.Module:
    """Return the net of version 0: a factory, whose weights come from a file."""
    return Versioned(0)


def save_weights(file: Path, version: int) -> None:
    """Write the weights for ``build`` atomically."""
    part = file.with_suffix(".part")
    torch.save(Versioned(version).state_dict(), part)
    part.replace(file)


def write_config(file: Path, *models: str, extra: str = "") -> None:
    """Write a configuration of TorchScript files beside it, each ``NAME`` or ``NAME:LAYERS``."""
    tables = []
    for model in models:
        name, _, layers = model.partition(":")
        declared = f"layers = {layers.split(',')}\n" if layers else ""
        tables.append(f"[[models]]\nsource = '{name}.pt'\nitem_shape = [3, 4, 4]\n{declared}")
    part = file.with_suffix(".part")
    part.write_text(extra + "\n" + "".join(tables), encoding="utf-8")
    os.replace(part, file)  # noqa: PTH105 - as above


def version_of(client: Client, model: str = "net", extractor: str = "auto") -> int:
    """Request all layers, check every element, and return the version that answered."""
    features = client.extract(model, np.ones((2, *ITEM), np.float32), LAYERS, extractor=extractor)
    version = int(features["second"].flat[0])
    for layer in LAYERS:
        assert (features[layer] == version * HOLDS[layer]).all(), f"{layer} is of another version"
    return version


class Callers:
    """Clients that ask until the block ends, each by an extractor of its own.

    A request that fails, or is answered by a version that it can't be, is raised there.

    Attributes:
        written: The last version that was written, before which no answer may be newer.
        confirmed: The last that was told to serve, after which no answer may be older.
    """

    def __init__(self, address: str, version: int, extractors: tuple[str, ...]) -> None:
        self.written = self.confirmed = version
        self.answers = 0
        self._address = address
        self._extractors = extractors
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(len(extractors))

    def _ask(self, extractor: str) -> None:
        with Client(self._address) as client:
            while not self._ended.is_set():
                least = self.confirmed
                version = version_of(client, extractor=extractor)
                assert least <= version <= self.written
                self.answers += 1

    def __enter__(self) -> Callers:
        self._asking = [self._pool.submit(self._ask, how) for how in self._extractors]
        return self

    def check(self) -> None:
        """Raise the exception of a caller, if it had one."""
        for asking in self._asking:
            if asking.done():
                asking.result()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for asking in self._asking:
            asking.result()
