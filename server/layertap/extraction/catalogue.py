"""The catalogue of a model: every layer with its shapes and the extractors that serve it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layertap.errors import LayerNotFoundError
from layertap.extraction.kinds.base import Verdict
from layertap.extraction.layout import Geometry
from layertap.extraction.passes import PassScope
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import GraphNames
from layertap.models import BatchKey, Tower
from layertap.selection import SIDES, Capture, Extractor, Glob

INPUTS = "inputs"

__all__ = ["Catalogue", "LayerEntry", "Support", "side_name"]


@dataclass(frozen=True, slots=True)
class Support:
    """Which sides of a layer an extractor can capture.

    Attributes:
        by: The verdict for each side of the layer.
    """

    by: Mapping[Capture, Verdict]

    @classmethod
    def refused(cls, reason: str) -> Support:
        """Return the support of an extractor that can capture neither side, for one reason."""
        return cls(dict.fromkeys(SIDES, Verdict(reason)))

    def without(self, reasons: Mapping[Capture, str]) -> Support:
        """Return a copy that refuses the sides in ``reasons`` too; earlier reasons stay."""
        return Support(
            {
                side: verdict if verdict.reason else Verdict(reasons.get(side, ""))
                for side, verdict in self.by.items()
            }
        )


def side_name(layer: str, side: Capture) -> str:
    """Return the name of one side of a layer: for its input, the layer's name and ``:input``."""
    return layer if side is Capture.OUTPUT else f"{layer}:{side}"


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One layer.

    Attributes:
        name: The name that a client requests; see Note [Names].
        kind: Whether it is a call of a module or a node of the symbolic graph.
        type: The module's class or the node's operation.
        calls: How often the module runs in one forward pass; 0 if never.
        points: The capture point of each side that is a tensor.
        specs: The shape and dtype at each of these points.
        support: Which sides each extractor can capture.
        geometry: The layout of the output.
        same_as: If the module has several paths and ``name`` is not from the first of them: the
            layer's name from the first path. Else empty.
        is_result: Whether it is the model's own result, or a member of it.
        is_used: Whether the model goes on with it. It doesn't with attention weights that a module
            is asked for once more (see ``attention``), so nothing depends on them.
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
    is_used: bool = True

    def refusal(self, extractor: Extractor, capture: Capture = Capture.OUTPUT) -> str:
        """Return why an extractor can't capture this side of the layer; empty if it can."""
        return self.support[extractor].by[capture].reason

    def serves(self, extractor: Extractor, capture: Capture) -> bool:
        """Return whether an extractor can capture this side of the layer."""
        return not self.refusal(extractor, capture)

    def served_by(self, capture: Capture) -> list[Extractor]:
        """Return the extractors that can capture this side, those that AUTO prefers first."""
        return [extractor for extractor in self.support if self.serves(extractor, capture)]


@dataclass(frozen=True)
class Catalogue:
    """The layers of a model, in execution order; layers that never run come last.

    Attributes:
        entries: The layers by name.
        graph: The node names of the symbolic graph; None if the model can't be traced symbolically.
        key: The inputs, and the sizes of their items, at which the model was measured.
        mutates_input: Whether the model writes into the batch that it is given.
        scope: Has the rules for passes of the model; every pass runs in it.
        non_finite: The first layer that returned NaN or infinity when it was measured; empty if
            none did.
        notes: Facts about the model that no single layer's entry states, as sentences: arguments
            that are never given, random numbers, layers that run for some inputs only.
        looks: How a pass uses the values of its input.
        varying: The paths of modules that run for some inputs only; their place in the order is a
            guess.
        towers: The points that each tower of the model serves by itself; empty without towers.
    """

    entries: Mapping[str, LayerEntry]
    graph: GraphNames | None
    key: BatchKey
    mutates_input: bool
    scope: PassScope
    non_finite: str = ""
    notes: tuple[str, ...] = ()
    looks: LooksSurvey = field(default_factory=LooksSurvey)
    varying: frozenset[str] = frozenset()
    towers: Mapping[Tower, Collection[CapturePoint]] = field(default_factory=dict)

    def runs_with(self, points: Iterable[CapturePoint], given: Collection[str]) -> bool:
        """Return whether points were measured with no other inputs than the given ones."""
        if all(item.name in given for item in self.key.items):
            return True
        return any(
            all(point in own for point in points)
            for tower, own in self.towers.items()
            if any(name in given for name in tower.inputs)
        )

    def grid_input(self, point: CapturePoint) -> str:
        """Return the name of the input that the grid of a point follows."""
        towers = [tower for tower, own in self.towers.items() if point in own]
        if len(towers) != 1:
            return self.key.main.name
        return next(item.name for item in self.key.items if item.name in towers[0].inputs)

    @cached_property
    def specs(self) -> Mapping[CapturePoint, ValueSpec]:
        """The dtype and shape at every point, for the item shape that was measured."""
        return {
            point: entry.specs[capture] for entry in self for capture, point in entry.points.items()
        }

    @cached_property
    def names(self) -> Mapping[CapturePoint, str]:
        """The name to request for each point; see ``side_name``."""
        return {
            point: side_name(entry.name, side)
            for entry in self
            if not entry.same_as
            for side, point in entry.points.items()
        }

    @cached_property
    def begun(self) -> Mapping[CapturePoint, int]:
        """The place of each output in the order in which the calls of modules begin.

        What is inside a module comes after it, although it returns before it.
        """
        order: dict[CapturePoint, int] = {}
        for index, entry in enumerate(self):
            if Capture.OUTPUT in entry.points:
                # Other names of a module come later, wherever it runs.
                order.setdefault(entry.points[Capture.OUTPUT], index)
        return order

    def name_of(self, point: CapturePoint) -> str:
        """Return the name to request for a point, or that of a gradient or a report."""
        if point.is_report:
            return point.report_name
        name = (
            f"{self.inputs_name}.{point.path}"
            if point.kind is PointKind.INPUT
            else self.names[point.value]
        )
        if not point.gradient:
            return name
        end = f".{point.method.companion}" if point.companion else ""
        return f"{name}{'_' if point.capture is Capture.INPUT else ':'}{point.method}{end}"

    @cached_property
    def inputs_name(self) -> str:
        """The first part of the names of the model's inputs: ``inputs``, unless a module has it."""
        name = INPUTS
        while any(each == name or each.startswith(f"{name}.") for each in self.entries):
            name = f"model_{name}"
        return name

    def __iter__(self) -> Iterator[LayerEntry]:
        return iter(self.entries.values())

    def entry(self, name: str) -> LayerEntry:
        """Return the layer of a name; raise LayerNotFoundError, with close matches, if none."""
        entry = self.entries.get(name)
        if entry is None:
            raise LayerNotFoundError(f"no layer {name!r}{_hint(name, self.entries)}")
        return entry

    def match(self, pattern: str) -> list[LayerEntry]:
        """Return the entries that a glob matches, in execution order.

        ``*`` and ``?`` stay within one component of a path, ``**`` crosses components. A layer
        that matches by several of its names is returned once. The model's own result is returned
        only if the glob begins with its name, as it is usually the last layer's output too.
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
