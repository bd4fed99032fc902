"""What was measured of a model. The extractor kinds use it to decide which layers they serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from layertap.extraction.names import LayerNames
from layertap.extraction.passes import PassRules, PassScope
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import GraphNames, Trace
from layertap.models import Batch, LoadedModel

__all__ = ["MeasuredGraph", "Measurement"]


@dataclass
class MeasuredGraph:
    """What was measured of a model's symbolic graph.

    Attributes:
        names: The graph's node names; None if there is no graph.
        reason: Why there is no graph; empty if there is one.
        equal: For each point that has a node, whether the node has the model's own value.
        specs: The dtype and shape of each node that calls no module, by node name.
        lost: The nodes whose value changes when dead-code elimination is applied to the graph.
        astray: The path of a module whose value in the graph differs from what it returned; empty
            if there is none. Then the graph and the model compute different values.
        unsendable: For each node whose value can't be sent, why.
        trace: The graph, ready to run; None if there is no graph.
    """

    names: GraphNames | None = None
    reason: str = ""
    equal: Mapping[CapturePoint, bool] = field(default_factory=dict)
    specs: Mapping[str, ValueSpec] = field(default_factory=dict)
    lost: Collection[str] = ()
    astray: str = ""
    unsendable: Mapping[str, str] = field(default_factory=dict)
    trace: Trace | None = None

    def shapes(self, scope: PassScope, x: Batch) -> dict[CapturePoint, tuple[int, ...]]:
        """Return, for a batch, the shape of every node that calls no module."""
        if self.trace is None:
            return {}
        names = self.trace.names.eval
        shapes: dict[CapturePoint, tuple[int, ...]] = {}

        def see(index: int, value: torch.Tensor) -> None:
            if names[index] in self.specs:
                shapes[CapturePoint(PointKind.NODE, names[index])] = tuple(value.shape)

        with scope:
            self.trace.whole.run(x.clone(), see)
        return shapes


@dataclass
class Measurement:
    """Everything that was measured of one model.

    Attributes:
        model: The model.
        specs: The dtype and shape of each value of a module.
        walk: For each top-level child, why calling the children one after the other does not give
            its value; empty if it does.
        graph: The model's symbolic graph.
        looks: What a pass does with the values of its input.
        random: The points whose values depend on random numbers.
        order: (module path, call) in the order in which the calls began.
        varying: The modules that run for some inputs only.
        sometimes: The points that have a value for some inputs only.
        names: The names of its layers.
        unsendable: For each value that can't be sent, why.
        threaded: The modules that ran in one of the model's own threads.
        rules: How the model's passes may run.
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
