"""What was measured of a model, from which the kinds of extractors decide what they serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from layertap.extraction.names import LayerNames
from layertap.extraction.passes import PassGuard, PassRules
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import GraphNames, Trace
from layertap.models import Batch, LoadedModel

__all__ = ["MeasuredGraph", "Measurement"]


@dataclass
class MeasuredGraph:
    """What was measured of a model's symbolic graph.

    Attributes:
        names: Its node names; None if there is no graph.
        reason: Why there is no graph; empty if there is one.
        equal: For each point that has a node, whether the node has the model's own value.
        specs: The type and shape of each node that calls no module, by its name.
        lost: Nodes whose value is another one once dead-code elimination has been at the graph.
        astray: A module's call whose value in the graph is not what the module returned; empty
            where there is none. The graph then computes something else than the model.
        trace: The graph, ready to be run; None if there is no graph.
    """

    names: GraphNames | None = None
    reason: str = ""
    equal: Mapping[CapturePoint, bool] = field(default_factory=dict)
    specs: Mapping[str, ValueSpec] = field(default_factory=dict)
    lost: Collection[str] = ()
    astray: str = ""
    trace: Trace | None = None

    def shapes(self, guard: PassGuard, x: Batch) -> dict[CapturePoint, tuple[int, ...]]:
        """Return the shape of every node that calls no module, for a batch."""
        if self.trace is None:
            return {}
        names = self.trace.names.eval
        shapes: dict[CapturePoint, tuple[int, ...]] = {}

        def see(index: int, value: torch.Tensor) -> None:
            if names[index] in self.specs:
                shapes[CapturePoint(PointKind.NODE, names[index])] = tuple(value.shape)

        with guard:
            self.trace.whole.run(x.clone(), see)
        return shapes


@dataclass
class Measurement:
    """Everything that was measured of one model.

    Attributes:
        model: The model.
        specs: The type and shape of each value of a module.
        walk: For each top-level child, why calling the children one after the other does not give
            its value; empty if it does.
        graph: Its symbolic graph.
        looks: What a pass does with its input's values.
        random: The points whose values depend on chance.
        order: (module path, call) in the order in which the calls began.
        varying: The modules that run for some inputs only.
        sometimes: The points at which there is a value for some inputs only.
        names: The names of its layers.
        unsendable: Why nothing can be sent of a value, for those of which that is so.
        threaded: The modules that ran in a thread of the model's own.
        rules: What is allowed of its passes.
    """

    model: LoadedModel
    specs: dict[CapturePoint, ValueSpec]
    walk: dict[str, str]
    graph: MeasuredGraph
    looks: LooksSurvey
    random: Collection[CapturePoint]
    order: list[tuple[str, int]]
    varying: Collection[str]
    sometimes: Collection[CapturePoint]
    names: LayerNames
    unsendable: Mapping[CapturePoint, str]
    threaded: Collection[str]
    rules: PassRules
