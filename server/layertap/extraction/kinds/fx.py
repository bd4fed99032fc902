"""FX: the symbolic graph, cut behind the last value that is wanted.

See Note [FX done right] in ``symbolic``.
"""

from __future__ import annotations

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.kinds.base import BuildContext, DirectKind
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.symbolic import FxExtractor
from layertap.selection import Extractor

__all__ = ["KIND", "FxKind"]


class FxKind(DirectKind):
    """Serves any node of the symbolic graph of a traceable model."""

    id = Extractor.FX
    nodes = True

    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See DirectKind."""
        names = context.traced()
        built = FxExtractor(context.model, names, names.nodes_of(pass_spec.points))
        return context.guarded(built)


KIND = FxKind()
