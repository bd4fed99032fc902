"""What can be asked of a model: every layer with its shapes and the extractors that serve it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layertap.errors import ExtractorUnsupportedError, LayerNotFoundError
from layertap.extraction.layout import Geometry
from layertap.extraction.obstacles import RANDOM
from layertap.extraction.passes import PassGuard
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.symbolic import GraphNames
from layertap.selection import Capture, Extractor, Glob

__all__ = ["REAL_EXTRACTORS", "Catalogue", "LayerEntry", "Support"]

REAL_EXTRACTORS = tuple(extractor for extractor in Extractor if extractor is not Extractor.AUTO)


@dataclass(frozen=True, slots=True)
class Support:
    """Whether an extractor serves a layer's output and input; why not, where it doesn't."""

    output: bool
    input: bool = False
    reason: str = ""

    def without(self, output: str, given: str) -> Support:
        """Return it without what can't be served for a reason; an empty reason is none.

        Args:
            output: Why the output can't be served.
            given: Why the input can't be.
        """
        # Chance explains why values differ; else the first reason is the more telling one.
        reason = RANDOM if output == RANDOM else self.reason or output or given
        if self.input and given and given not in reason:
            reason = f"{reason}; its input: {given}"
        return Support(
            output=self.output and not output, input=self.input and not given, reason=reason
        )


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One layer.

    Attributes:
        name: What to ask for; see Note [Names].
        kind: A module's call, or a node of the symbolic graph.
        type: The module's class or the node's operation.
        calls: How often the module runs in one forward pass; 0 if never.
        points: The capture point of each side that is a tensor.
        specs: The shape and type of each of those.
        support: Every extractor's answer.
        geometry: How the output is laid out.
        same_as: The name of the same layer by the first path of its module, where ``name`` is by
            another path to that module; else empty.
        is_result: Whether it is what the model itself returns, or a member of that.
    """

    name: str
    kind: PointKind
    type: str
    calls: int
    points: Mapping[Capture, CapturePoint] = field(default_factory=dict)
    specs: Mapping[Capture, ValueSpec] = field(default_factory=dict)
    support: Mapping[Extractor, Support] = field(default_factory=dict)
    geometry: Geometry = field(default_factory=Geometry)
    same_as: str = ""
    is_result: bool = False

    def serves(self, extractor: Extractor, capture: Capture) -> bool:
        """Tell whether an extractor can take that side of the layer."""
        support = self.support[extractor]
        return support.output if capture is Capture.OUTPUT else support.input

    def served_by(self, capture: Capture) -> list[Extractor]:
        """Return the extractors that can take that side of the layer."""
        return [extractor for extractor in REAL_EXTRACTORS if self.serves(extractor, capture)]


@dataclass(frozen=True)
class Catalogue:
    """The layers of a model, in execution order, those that never run last.

    Attributes:
        entries: By name.
        graph: The names of the symbolic graph, where the model can be traced symbolically.
        mutates_input: Whether the model writes into the batch that it is given.
        guard: Held in each pass of the model; has the rules for them.
        non_finite: The first layer that returned NaN or infinity when it was measured; empty where
            none did.
        notes: What a caller should know about the model that no layer's entry says, in sentences:
            arguments that are never given, random numbers, layers that run for some inputs only.
    """

    entries: Mapping[str, LayerEntry]
    graph: GraphNames | None
    mutates_input: bool
    guard: PassGuard
    non_finite: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def specs(self) -> Mapping[CapturePoint, ValueSpec]:
        """The type and shape of every point, at the item shape that was measured."""
        return {
            point: entry.specs[capture] for entry in self for capture, point in entry.points.items()
        }

    @cached_property
    def names(self) -> Mapping[CapturePoint, str]:
        """What to ask for to get a point: a layer's name, ``:input`` behind it for its input."""
        return {
            point: entry.name if side is Capture.OUTPUT else f"{entry.name}:{side}"
            for entry in self
            if not entry.same_as
            for side, point in entry.points.items()
        }

    def __iter__(self) -> Iterator[LayerEntry]:
        return iter(self.entries.values())

    def traced(self, model: str) -> GraphNames:
        """Return the names of the graph; raise ExtractorUnsupportedError where there is none."""
        if self.graph is None:
            raise ExtractorUnsupportedError(
                f"FX can't serve model {model!r}: it can't be traced symbolically"
            )
        return self.graph

    def entry(self, name: str) -> LayerEntry:
        """Return the entry of a name; raise LayerNotFoundError with close matches for another."""
        entry = self.entries.get(name)
        if entry is None:
            raise LayerNotFoundError(f"no layer {name!r}{_hint(name, self.entries)}")
        return entry

    def match(self, pattern: str) -> list[LayerEntry]:
        """Return the entries that a glob matches, in execution order.

        ``*`` and ``?`` stay within one component of a path, ``**`` crosses components. A layer
        that matches by several of its names is returned once. The model's own result is returned
        only for a glob that begins with its name, since it is mostly the last layer's output.
        """
        glob = Glob(pattern)
        found = {entry.name: entry for entry in self if glob.matches(entry.name)}
        return [
            entry
            for entry in found.values()
            if entry.same_as not in found
            and (not entry.is_result or pattern.startswith(_beginning(entry.name)))
        ]


def _beginning(name: str) -> str:
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def _hint(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    return "; DescribeModel (`layertap layers`) lists what there is"
