"""What every peer serves: resnet18 up to a layer, as a frozen TorchScript program.

Imported in the environments of all peers, which have PyTorch, torchvision and Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from peers.given import IMAGE, ITEM, LAYERS, given, kinds

__all__ = ["Answer", "Subject", "expected", "pixels", "save_weights"]

Answer = Callable[[bytes], bytes]
"""Takes a tensor ``[B, 3, 224, 224] float32`` or a JPEG file, returns the layer as float32."""


def expected(kind: str, batch: int) -> np.ndarray:
    """Return what is right for ``given``, computed by the plain module."""
    layer, sent = kind.split("-")
    data = given(kind, batch)
    x = pixels([data]) if sent == IMAGE else _floats(data)
    with torch.inference_mode():
        value: np.ndarray = _part(layer)(torch.from_numpy(x)).numpy()
    return value


def save_weights(file: Path) -> None:
    """Write the network's weights."""
    torch.save(_net().state_dict(), file)


def pixels(files: Iterable[bytes]) -> np.ndarray:
    """Return a batch ``[B, 3, 224, 224] float32`` of JPEG files, by torchvision's transform."""
    transform = ResNet18_Weights.DEFAULT.transforms()
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    batch: np.ndarray = torch.stack([transform(image) for image in images]).numpy()
    return batch


class Subject:
    """The programs. One thread runs them all, as OpenMP has a team for each thread that uses it.

    Args:
        threads: PyTorch's threads.
    """

    def __init__(self, threads: int) -> None:
        self._compute = ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(threads))
        self._programs = {layer: self._compute.submit(_program, layer).result() for layer in LAYERS}

    def answers(self) -> dict[str, Answer]:
        """Return what answers a request of each kind."""
        return {kind: self._answer(*kind.split("-")) for kind in kinds()}

    def run(self, layer: str, x: np.ndarray) -> np.ndarray:
        """Return the layer of a batch ``[B, 3, 224, 224] float32``."""
        return self._compute.submit(self._run, layer, x).result()

    def close(self) -> None:
        """End the compute thread."""
        self._compute.shutdown()

    def _run(self, layer: str, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            value: np.ndarray = self._programs[layer](torch.from_numpy(x)).numpy()
        return value

    def _answer(self, layer: str, sent: str) -> Answer:
        def answer(data: bytes) -> bytes:
            x = pixels([data]) if sent == IMAGE else _floats(data)
            return self.run(layer, x).tobytes()

        return answer


def _floats(data: bytes) -> np.ndarray:
    # PyTorch warns that the array can't be written to, which nobody does: a copy would be slower.
    return np.frombuffer(data, np.float32).reshape(-1, *ITEM)


def _net() -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = resnet18(weights=None).eval()
    return net


def _part(layer: str) -> nn.Module:
    """Return the module up to a layer; resnet18 runs its children one after the other."""
    children = dict(_net().named_children())
    names = list(children)[: list(children).index(layer) + 1]
    return nn.Sequential(*(children[name] for name in names)).eval()


def _program(layer: str) -> torch.jit.ScriptModule:
    with torch.inference_mode():
        program = torch.jit.freeze(torch.jit.trace(_part(layer), torch.rand(1, *ITEM)))
        for _ in range(3):  # The profiling executor optimises after a few runs.
            program(torch.rand(1, *ITEM))
    return program
