"""CHILDREN: calls the model's top-level children one after the other.

CHILDREN and LAYER_GETTER serve the children of models whose forward calls each of them once, in
registration order, with nothing in between. Measuring finds out which children these are: see
``straight`` and ``survey_walk``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.containers import plain
from layertap.extraction.kinds.base import BuildContext, DirectKind
from layertap.extraction.measurement import Measurement
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, Sink
from layertap.models import Batch
from layertap.selection import Extractor

__all__ = ["KIND", "ChildrenKind", "WalkExtractor", "WalkKind", "indices_of"]


class WalkExtractor:
    """Calls each child with the output of the one before it.

    Args:
        children: The children in order, each with its name.
        indices: For each wanted child, by name: the index of the point that its output is for.
    """

    def __init__(
        self, children: Sequence[tuple[str, nn.Module]], indices: Mapping[str, int]
    ) -> None:
        self._children = children
        self._indices = indices

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        value = x.only
        for name, child in self._children:
            value = child(value)
            if name in self._indices:
                sink(self._indices[name], plain(value))


class WalkKind(DirectKind):
    """A kind that walks the top-level children."""

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; each child is given one tensor."""
        if len(found.model.signature.inputs) > 1:
            return "the model takes several inputs, and a child is called with one tensor"
        return super().refuses(found)

    def obstacle(self, point: CapturePoint, found: Measurement) -> str:
        """See ExtractorKind."""
        if not point.path:
            return "calling the children gives the children's values, not the model's own result"
        if point.call:
            return "each child is called only once"
        if point.path not in found.walk:
            return f"{point.path!r} is not a top-level child of the model"
        if found.walk[point.path]:
            return found.walk[point.path]
        if point in found.looks.looked:
            return (
                "before it the model branches on tensor values, so calling its children in order "
                "may give another result"
            )
        return ""


class ChildrenKind(WalkKind):
    """Calls each of ``named_children`` in turn, and stops after the last requested one."""

    id = Extractor.CHILDREN

    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See DirectKind."""
        indices = indices_of(pass_spec)
        children = _until_last(context.model.module.named_children(), indices)
        return context.guarded(WalkExtractor(children, indices))


KIND = ChildrenKind()


def indices_of(pass_spec: PassSpec) -> dict[str, int]:
    """Return the index of each point, by the name of its child."""
    return {point.path: index for index, point in enumerate(pass_spec.points)}


def _until_last(
    children: Iterable[tuple[str, nn.Module]], wanted: Mapping[str, int]
) -> list[tuple[str, nn.Module]]:
    taken: list[tuple[str, nn.Module]] = []
    left = set(wanted)
    for name, child in children:
        if not left:
            break
        taken.append((name, child))
        left.discard(name)
    return taken
