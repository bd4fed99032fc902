"""The catalogue of a model: every layer with its shapes and the extractors that serve it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layertap.errors import LayerNotFoundError
from layertap.extraction.kinds.base import Verdict
from layertap.extraction.layout import Geometry
from layertap.extraction.passes import PassGuard
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import GraphNames
from layertap.selection import Capture, Extractor, Glob

__all__ = ["Catalogue", "LayerEntry", "Support", "side_name"]


@dataclass(frozen=True, slots=True)
class Support:
    """What an extractor serves of a layer.

    Attributes:
        by: The verdict on each side of the layer.
    """

    by: Mapping[Capture, Verdict]

    @classmethod
    def refused(cls, reason: str) -> Support:
        """Return the support of an extractor that serves no side of a layer, for one reason."""
        return cls(dict.fromkeys(Capture, Verdict(reason)))

    def without(self, reasons: Mapping[Capture, str]) -> Support:
        """Return it without the sides for which there is a reason, where they are served."""
        return Support(
            {
                side: verdict if verdict.reason else Verdict(reasons.get(side, ""))
                for side, verdict in self.by.items()
            }
        )


def side_name(layer: str, side: Capture) -> str:
    """Return what one side of a layer is called: its name, ``:input`` after it for its input."""
    return layer if side is Capture.OUTPUT else f"{layer}:{side}"


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One layer.

    Attributes:
        name: What to request; see Note [Names].
        kind: A module's call, or a node of the symbolic graph.
        type: The module's class or the node's operation.
        calls: How often the module runs in one forward pass; 0 if never.
        points: The capture point of each side that is a tensor.
        specs: The shape and type of each of those.
        support: What each extractor serves of it.
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

    def refusal(self, extractor: Extractor, capture: Capture = Capture.OUTPUT) -> str:
        """Return why an extractor can't take that side of the layer; empty if it can."""
        return self.support[extractor].by[capture].reason

    def serves(self, extractor: Extractor, capture: Capture) -> bool:
        """Return whether an extractor can take that side of the layer."""
        return not self.refusal(extractor, capture)

    def served_by(self, capture: Capture) -> list[Extractor]:
        """Return the extractors that can take that side, those that AUTO prefers first."""
        return [extractor for extractor in self.support if self.serves(extractor, capture)]


@dataclass(frozen=True)
class Catalogue:
    """The layers of a model, in execution order, those that never run last.

    Attributes:
        entries: By name.
        graph: The names of the symbolic graph, where the model can be traced symbolically.
        mutates_input: Whether the model writes into the batch that it is given.
        guard: Held in each pass of the model; has the rules for them.
        non_finite: The first layer that returned NaN or infinity when it was measured; empty if
            none did.
        notes: What a caller should know about the model that no layer's entry says, in sentences:
            arguments that are never given, random numbers, layers that run for some inputs only.
        looks: What a pass does with its input's values.
    """

    entries: Mapping[str, LayerEntry]
    graph: GraphNames | None
    mutates_input: bool
    guard: PassGuard
    non_finite: str = ""
    notes: tuple[str, ...] = ()
    looks: LooksSurvey = field(default_factory=LooksSurvey)

    @cached_property
    def specs(self) -> Mapping[CapturePoint, ValueSpec]:
        """The type and shape of every point, at the item shape that was measured."""
        return {
            point: entry.specs[capture] for entry in self for capture, point in entry.points.items()
        }

    @cached_property
    def names(self) -> Mapping[CapturePoint, str]:
        """What to request to get a point; see ``side_name``."""
        return {
            point: side_name(entry.name, side)
            for entry in self
            if not entry.same_as
            for side, point in entry.points.items()
        }

    def __iter__(self) -> Iterator[LayerEntry]:
        return iter(self.entries.values())

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
