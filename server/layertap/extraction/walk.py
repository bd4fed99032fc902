"""CHILDREN and LAYER_GETTER: top-level children called one after the other.

Both serve the children of models whose forward calls them once each, in registration order, with
nothing in between. Whether a child is one of them is measured: see ``walk``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from layertap.extraction.containers import plain
from layertap.extraction.points import CapturePoint, Sink
from layertap.models import LoadedModel

__all__ = ["ChildrenExtractor", "LayerGetterExtractor", "walk"]


class ChildrenExtractor:
    """Walks ``named_children``, calls each, stops at the last layer wanted."""

    def __init__(self, model: LoadedModel, points: Sequence[CapturePoint]) -> None:
        self._indices = _indices(points)
        self._children = _until_last(model.module.named_children(), self._indices)

    def run(self, x: torch.Tensor, sink: Sink) -> None:
        """See BuiltExtractor."""
        walk(x, self._children, self._indices, sink)


class LayerGetterExtractor:
    """torchvision's IntermediateLayerGetter, which truncates the model, with each value taken live.

    Its own ``forward`` returns the children's outputs only after the last child ran, by when an
    in-place operation of a later child may have overwritten them; so its children are called here.
    """

    def __init__(self, model: LoadedModel, points: Sequence[CapturePoint]) -> None:
        self._indices = _indices(points)
        getter = IntermediateLayerGetter(model.module, {name: name for name in self._indices})
        self._children = list(getter.items())

    def run(self, x: torch.Tensor, sink: Sink) -> None:
        """See BuiltExtractor."""
        walk(x, self._children, self._indices, sink)


def walk(
    x: torch.Tensor,
    children: Iterable[tuple[str, nn.Module]],
    indices: dict[str, int],
    sink: Sink,
) -> None:
    """Feed each child the previous one's output; pass the outputs of those in ``indices`` on."""
    for name, child in children:
        x = child(x)
        if name in indices:
            sink(indices[name], plain(x))


def _indices(points: Sequence[CapturePoint]) -> dict[str, int]:
    return {point.path: index for index, point in enumerate(points)}


def _until_last(
    children: Iterable[tuple[str, nn.Module]], wanted: dict[str, int]
) -> list[tuple[str, nn.Module]]:
    taken: list[tuple[str, nn.Module]] = []
    left = set(wanted)
    for name, child in children:
        if not left:
            break
        taken.append((name, child))
        left.discard(name)
    return taken
