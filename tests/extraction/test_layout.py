"""Layouts are told by sizes: what is the image's, what are channels, what are tokens."""

from __future__ import annotations

import pytest
import torch

from layertap.extraction import Dim, ValueSpec, measure
from layertap.extraction.layout import Geometry, Layout, geometry
from layertap.models import ModelSpec, load_model

SQUARE, WIDE, ODD = (3, 224, 224), (3, 128, 192), (3, 65, 97)
FIRST, LAST, TOKENS = Layout.CHANNELS_FIRST, Layout.CHANNELS_LAST, Layout.TOKENS

CASES = {
    "ResNet": (SQUARE, (64, 56, 56), Geometry(FIRST, 64, 56, 56)),
    "ResNet, wide": (WIDE, (64, 32, 48), Geometry(FIRST, 64, 32, 48)),
    "ResNet, sizes rounded up": (ODD, (64, 33, 49), Geometry(FIRST, 64, 33, 49)),
    "pooled": (SQUARE, (512, 1, 1), Geometry(FIRST, 512, 1, 1)),
    "as many channels as pixels": (SQUARE, (56, 56, 56), Geometry(FIRST, 56, 56, 56)),
    "Swin": (SQUARE, (56, 56, 96), Geometry(LAST, 96, 56, 56)),
    "Swin, wide": (WIDE, (32, 48, 96), Geometry(LAST, 96, 32, 48)),
    "video, channels first": ((3, 8, 64, 64), (64, 4, 16, 16), Geometry(FIRST, 64, 16, 16)),
    "video, channels last": ((3, 8, 64, 64), (4, 16, 16, 96), Geometry(LAST, 96, 16, 16)),
    "ViT-B/16": (SQUARE, (197, 768), Geometry(TOKENS, 768, 14, 14, front=1)),
    "ViT-B/16, wide": (WIDE, (97, 768), Geometry(TOKENS, 768, 8, 12, front=1)),
    "ViT without a class token": (SQUARE, (196, 384), Geometry(TOKENS, 384, 14, 14)),
    "DeiT distilled": (SQUARE, (198, 192), Geometry(TOKENS, 192, 14, 14, front=2)),
    "DINOv2 with registers": ((3, 518, 518), (1374, 384), Geometry(TOKENS, 384, 37, 37, front=5)),
    "overlapping patches": (SQUARE, (729, 64), Geometry(TOKENS, 64, 27, 27)),
    "no grid": (SQUARE, (77, 64), Geometry()),
    "a vector": (SQUARE, (1000,), Geometry()),
    "text": ((128,), (128, 64), Geometry()),
}


def spec(*sizes: int, batch: int = 1) -> ValueSpec:
    return ValueSpec(torch.float32, (Dim(batch, batch=True), *map(Dim, sizes)))


@pytest.mark.parametrize("case", CASES)
def test_layouts(case) -> None:
    """Known families' activations, square and not, are what their authors say they are."""
    item_shape, sizes, expected = CASES[case]
    assert geometry(spec(*sizes), item_shape) == expected


def test_windows_are_no_images() -> None:
    """Swin's windows are folded into the batch; nothing is claimed of them."""
    assert geometry(spec(7, 7, 96, batch=64), SQUARE) == Geometry()


@pytest.mark.parametrize(("side", "wide"), [(64, 64), (64, 96)])
def test_swin_is_measured_as_channels_last(side, wide) -> None:
    """torchvision's Swin says channels last in its catalogue, up to its permutation."""
    model = load_model(ModelSpec("swin_t", weights="random", item_shape=(3, side, wide)))
    catalogue = measure(model)
    stage = catalogue.entry("features.1").geometry
    assert stage == Geometry(LAST, 96, side // 4, wide // 4)
    assert catalogue.entry("permute").geometry == Geometry(FIRST, 768, side // 32, wide // 32)
