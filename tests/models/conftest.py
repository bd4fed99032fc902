"""Real files for the tests of ``layertap.models``: state dicts, images, a torch home."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

GRACE_HOPPER = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture
def photo() -> Image.Image:
    """A real photograph, 517 x 606 pixels or so, in RGB."""
    return Image.open(GRACE_HOPPER).convert("RGB")


@pytest.fixture
def photo_bytes() -> bytes:
    """The same photograph as the JPEG file that a client would send."""
    return GRACE_HOPPER.read_bytes()


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for torchvision's downloads, with the network cut off.

    Downloads go to a proxy on a port where nothing listens, so they fail at once, for real.
    """
    home = tmp_path / "torch_home"
    monkeypatch.setenv("TORCH_HOME", str(home))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    # urllib reads the proxies once and keeps them for the whole process.
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


@pytest.fixture
def tiny_net() -> nn.Module:
    """A seeded convolution and batch norm, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write Python source to an importable module, and return the module's name."""

    def write(source: str) -> str:
        name = f"nets_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


@pytest.fixture
def noise() -> Image.Image:
    """Seeded noise, 40 x 30 pixels in RGB."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """Encode a PIL image: ``encoded(image, "PNG", **options)``."""

    def encode(image: Image.Image, format_: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format_, **options)
        return buffer.getvalue()

    return encode
