"""Layers of ten and more kinds of model, whose dimensions are named by hand.

``prove_interventions.py`` applies each operation to each of them, by the names of axes, and holds
it against what plain PyTorch does to the dimensions that are named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from gradient_subjects import GradientSubject

import gradnets

__all__ = ["SITES", "NamedSite", "own"]


@dataclass(frozen=True)
class NamedSite:
    """A layer and what its dimensions are.

    Attributes:
        layer: Its name.
        axes: The dimension of each axis, in the whole value; none where layertap knows no layout,
            so that dimensions are given by number.
        items: The dimension of the batch's items.
        heads: The number of attention heads that the channels belong to; 0 if they don't.
        grid: The rows and columns of a vision transformer's patches, behind the class token.
        skips: Whether the module returns the shape that it is given.
    """

    layer: str
    axes: Mapping[str, int] = field(default_factory=dict)
    items: int = 0
    heads: int = 0
    grid: tuple[int, int] | None = None
    skips: bool = False


IMAGE = {"channel": 1, "y": 2, "x": 3}
LAST = {"y": 1, "x": 2, "channel": 3}
TEXT = {"token": 1, "channel": 2}

SITES: dict[str, tuple[NamedSite, ...]] = {
    "resnet18": (
        NamedSite("layer1.0.bn1", IMAGE, skips=True),  # Before an in-place ReLU.
        NamedSite("layer1.0.relu_1", IMAGE, skips=True),  # Its second call, in place.
        NamedSite("layer2", IMAGE),
    ),
    "mobilenet_v3_small": (
        NamedSite("features.0.2", IMAGE, skips=True),  # An in-place hard swish.
        NamedSite("features.5", IMAGE, skips=True),
    ),
    "densenet121": (
        # Its value is concatenated with later ones.
        NamedSite("features.denseblock1.denselayer1.conv2", IMAGE),
        NamedSite("features.denseblock2", IMAGE),
        NamedSite("features.norm5", IMAGE, skips=True),  # Before F.relu(x, inplace=True).
    ),
    "inception_v3": (
        NamedSite("Mixed_5b", IMAGE),
        NamedSite("Mixed_5c.branch1x1.bn", IMAGE, skips=True),
    ),
    "vit_b_16": (
        NamedSite("encoder.layers.encoder_layer_3", TEXT, grid=(4, 4), skips=True),
        NamedSite("encoder.layers.encoder_layer_5.mlp", TEXT, grid=(4, 4), skips=True),
    ),
    "swin_t": (
        NamedSite("features.1.1", LAST, skips=True),
        NamedSite("features.3.0.attn", LAST, skips=True),
    ),
    "bert": (
        NamedSite("encoder.layer.0", TEXT, skips=True),
        NamedSite("encoder.layer.1.attention.self.0", TEXT, heads=4),
    ),
    "gpt2": (
        NamedSite("h.0", TEXT, skips=True),
        NamedSite("h.1.mlp", TEXT, skips=True),
    ),
    "llama": (
        NamedSite("layers.0", TEXT, skips=True),
        NamedSite("layers.1.self_attn.0", TEXT, heads=4),
    ),
    "t5": (
        NamedSite("encoder.block.0.layer.1", TEXT, skips=True),
        NamedSite("decoder.block.1.layer.2", skips=True),
    ),
    "clip": (
        NamedSite("text_model.encoder.layers.0", TEXT, skips=True),
        NamedSite("vision_model.encoder.layers.1", skips=True),
    ),
    "batch_second": (NamedSite("lstm.0", items=1),),
    "splits": (
        NamedSite("split.low", IMAGE),  # A member of a named tuple.
        NamedSite("named.parts.0", IMAGE),  # A member of a list in a dict.
    ),
}
"""The sites of each model."""


def own() -> list[GradientSubject]:
    """Return nets of ``tests/gradnets.py``."""
    images = torch.randn(2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(3))
    return [
        GradientSubject(name, "own", getattr(gradnets, name), gradnets.IMAGE, images)
        for name in ("batch_second", "splits", "residual")
    ]
