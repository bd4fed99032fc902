"""LAYER_GETTER: torchvision's IntermediateLayerGetter, with each value captured as it appears."""

from __future__ import annotations

from torchvision.models._utils import IntermediateLayerGetter

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.kinds.children import WalkExtractor, WalkKind, indices_of
from layertap.extraction.pass_spec import PassSpec
from layertap.selection import Extractor

__all__ = ["KIND", "LayerGetterKind"]


class LayerGetterKind(WalkKind):
    """Calls the children that torchvision's IntermediateLayerGetter keeps after truncating a model.

    The getter's own ``forward`` returns the children's outputs only after the last child has run.
    By then an in-place operation of a later child may have overwritten them. So this class calls
    the getter's children itself.
    """

    id = Extractor.LAYER_GETTER

    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See DirectKind."""
        indices = indices_of(pass_spec)
        getter = IntermediateLayerGetter(context.model.module, {name: name for name in indices})
        return context.guarded(WalkExtractor(list(getter.items()), indices))


KIND = LayerGetterKind()
