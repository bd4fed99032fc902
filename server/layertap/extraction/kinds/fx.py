"""FX: runs the symbolic graph, cut after the last requested value.

See Note [FX done right] in ``symbolic``.
"""

from __future__ import annotations

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.kinds.base import BuildContext, DirectKind
from layertap.extraction.measurement import Measurement
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.symbolic import FxExtractor
from layertap.selection import Extractor

__all__ = ["KIND", "FxKind"]


class FxKind(DirectKind):
    """Serves any node of the symbolic graph of a traceable model."""

    id = Extractor.FX
    nodes = True

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind."""
        return super().refuses(found) or found.graph.reason

    def obstacle(self, point: CapturePoint, found: Measurement) -> str:
        """See ExtractorKind."""
        graph = found.graph
        if point.kind is PointKind.NODE:
            if point.path in graph.lost:
                return "it depends on statements that dead-code elimination removes"
            if graph.astray:
                return (
                    f"the symbolic graph and the model compute different values of {graph.astray!r}"
                )
            return ""
        if point not in graph.equal:
            return "the symbolic graph has no node for it"
        return "" if graph.equal[point] else "the symbolic graph's value differs from the model's"

    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See DirectKind."""
        names = context.traced()
        built = FxExtractor(context.model, names, names.nodes_of(pass_spec.points))
        return context.guarded(built)


KIND = FxKind()
