"""HOOK: forward hooks and pre-hooks on the untouched model, stopping after the last capture."""

from __future__ import annotations

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.kinds.base import BuildContext, ReferenceKind
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import Sink
from layertap.models import Batch
from layertap.selection import Capture, Extractor

__all__ = ["KIND", "HookExtractor", "HookKind"]


class HookExtractor:
    """Runs the model with its taps.

    Args:
        context: The model, its taps, scope and graph.
        pass_spec: What to capture.
        reference: Whether its values prove other extractors. Then its passes run to their end, and
            are watched for state that no earlier pass wrote.
    """

    def __init__(
        self, context: BuildContext, pass_spec: PassSpec, *, reference: bool = False
    ) -> None:
        self._model = context.model
        self._taps = context.taps
        self._points = pass_spec.points
        self._scope = context.scope
        self._reference = reference

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        with self._scope as scope:
            to_end = self._reference or not scope.rules.early_stop
            threads = scope.rules.own_threads
            self._taps.run(
                self._model.forward, x, self._points, sink, to_end=to_end, own_threads=threads
            )
            if self._reference:
                scope.learn(self._model.name)


class HookKind(ReferenceKind):
    """Serves the outputs and inputs of every module that runs, in any eager model."""

    id = Extractor.HOOK
    captures = frozenset({Capture.OUTPUT, Capture.INPUT})
    members = True
    gradients = True
    edits = True

    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See DirectKind."""
        return HookExtractor(context, pass_spec)

    def build_reference(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """See ReferenceKind."""
        return HookExtractor(context, pass_spec, reference=True)


KIND = HookKind()
