"""A model's symbolic graph: its nodes, and their values taken the moment they are computed.

Note [FX done right]
    - torchvision returns the values at the end, by when later in-place operations may have
      overwritten them. Here a capture is inserted into the graph right after each node.
    - A module and its last child are one node. If both are requested, torchvision silently drops
      one. Here every point is resolved to a node first, and each node is captured once.
    - Tracing calls ``train()`` on the model and patches ``Module.__call__`` in the whole process.
      So it runs only while no forward pass does. If it fails half way, the model is left in
      training mode, and attributes that its code wrote meanwhile hold symbols instead of values.
      Both are restored here.
    - Dead-code elimination keeps every ``torch._assert`` and whatever the asserted value depends
      on: for the first layer of a ViT, torchvision's extractor runs all layers. Here the graph ends
      after the last capture.
    - Dead-code elimination deletes in-place statements whose result is not assigned
      (``y.relu_()``). The plan builder compares each extractor with the oracle and finds this out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from layertap.extraction.containers import plain
from layertap.extraction.gate import no_forward_pass
from layertap.extraction.points import CapturePoint, PointKind, Sink
from layertap.extraction.state import Snapshot
from layertap.models import Batch, LoadedModel

__all__ = ["FxExtractor", "GraphNames", "Trace", "WholeGraphExtractor", "as_it_was", "trace"]

_sink: ContextVar[Sink | None] = ContextVar("layertap_fx_sink", default=None)


class GraphNames:
    """The node names of a model's symbolic graphs.

    Args:
        train: Names in training mode.
        targets: Names in evaluation mode, in execution order, each with the path of the module that
            the node calls; empty for a node that calls none.

    Attributes:
        train: One name of the training graph, which torchvision wants as well.
        eval: Names in evaluation mode, in execution order.
        operations: Those that call no module.
    """

    def __init__(self, train: Sequence[str], targets: Mapping[str, str]) -> None:
        self.train = train[0]
        self.eval = tuple(targets)
        self.operations = tuple(name for name, target in targets.items() if not target)
        self._targets = targets

    def node_of(self, point: CapturePoint) -> str | None:
        """Return the node whose value a point is; None if the graph has none.

        A module that is traced through has the value of the last node inside it. One that is a node
        itself is found by what the node calls, since its name may mislead: torchvision cuts a
        number off the end, so that ViT's `ln_2` is called `ln_1`, and its `ln_1` is called `ln`.
        """
        if point.kind is PointKind.NODE:
            return point.path if point.path in self._targets else None
        if not point.path:
            return None  # The model's own result: no node says which one it is.
        own = [name for name, target in self._targets.items() if target == point.path]
        if own:
            return own[point.call] if point.call < len(own) else None
        inside = point.path + "."
        if point.call:
            return None
        return next((name for name in reversed(self.eval) if name.startswith(inside)), None)

    def nodes_of(self, points: Sequence[CapturePoint]) -> list[str]:
        """Return the nodes of points; those that have none are left out."""
        nodes = [self.node_of(point) for point in points]
        return [node for node in nodes if node is not None]


@dataclass(frozen=True)
class Trace:
    """A model's symbolic graph, ready to be run.

    Attributes:
        names: Its node names.
        whole: An extractor of every node in ``names.eval``, in that order.
        useful: The last node, and those that its value is computed from.
        pruned: An extractor of the useful nodes only; None if all are. What dead-code
            elimination takes for dead, an unassigned in-place statement say, is missing in it,
            as it is in every extractor of a few layers.
    """

    names: GraphNames
    whole: FxExtractor
    useful: tuple[str, ...]
    pruned: FxExtractor | None


def trace(model: LoadedModel) -> Trace:
    """Trace a model symbolically; raise whatever tracing raises."""
    with no_forward_pass(), as_it_was(model.module):
        train, evaluation = get_graph_node_names(model.module, suppress_diff_warning=True)
    every = [name for name in evaluation if name != "output"]
    whole = FxExtractor(model, GraphNames(train, dict.fromkeys(every, "")), every)
    names = GraphNames(train, whole.targets())
    used = whole.used_by(every[-1])
    useful = tuple(name for name in every if name in used)
    pruned = FxExtractor(model, names, useful) if len(useful) < len(every) else None
    return Trace(names, whole, useful, pruned)


class FxExtractor:
    """Serves any node of the symbolic graph of a traceable model.

    Args:
        model: The model.
        names: Its graphs' names.
        nodes: The node of each point, in the order of the points; several may name one node.
    """

    def __init__(self, model: LoadedModel, names: GraphNames, nodes: Sequence[str]) -> None:
        with no_forward_pass(), as_it_was(model.module):
            graph_module = create_feature_extractor(
                model.module,
                train_return_nodes={names.train: names.train},
                eval_return_nodes={node: node for node in nodes},
                suppress_diff_warning=True,
            ).eval()
        self._returned = _capture_in_graph(graph_module, nodes)
        self._graph_module = graph_module
        self._model = model

    def targets(self) -> dict[str, str]:
        """Return each node's name with the path of the module that it calls, else empty."""
        return {
            name: str(node.target) if node.op == "call_module" else ""
            for name, node in self._returned.items()
        }

    def used_by(self, last: str) -> set[str]:
        """Return a node and all those that its value is computed from.

        Nodes that dead-code elimination keeps anyhow, an assertion say, count like it.
        """
        names = {node: name for name, node in self._returned.items()}
        used: set[fx.Node] = set()
        for node in reversed(self._graph_module.graph.nodes):
            if node.target is not _capture and (
                names.get(node) == last
                or not used.isdisjoint(node.users)
                or (node.op not in ("output", "placeholder") and node.is_impure())
            ):
                used.add(node)
        return {names[node] for node in used if node in names}

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        token = _sink.set(sink)
        try:
            self._model.call(self._graph_module, x)
        finally:
            _sink.reset(token)


class WholeGraphExtractor:
    """Runs the symbolic graph with every node alive, and passes on the values of some.

    Slow, but nothing in it can be lost to dead-code elimination: the oracle for graph nodes.
    """

    def __init__(self, model: LoadedModel, names: GraphNames, nodes: Sequence[str]) -> None:
        self._whole = FxExtractor(model, names, names.eval)
        self._wanted = [
            [index for index, node in enumerate(nodes) if node == name] for name in names.eval
        ]

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""

        def select(position: int, value: torch.Tensor) -> None:
            for index in self._wanted[position]:
                sink(index, value)

        self._whole.run(x, select)


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back every submodule's training mode and all that its code wrote, whatever happens.

    Meanwhile ``train()`` and ``eval()`` set flags only: a model's own version may do more, such as
    merge low-rank weights into others, which does not undo itself exactly.
    """
    snapshot = Snapshot(module, copies=False)
    for submodule in module.modules():
        vars(submodule)["train"] = partial(_set_mode, submodule)
    try:
        yield
    finally:
        snapshot.restore()


def _set_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    for submodule in module.modules():
        vars(submodule)["training"] = mode
    return module


def _capture_in_graph(graph_module: fx.GraphModule, nodes: Sequence[str]) -> dict[str, fx.Node]:
    """Put a capture after each node; return the nodes by name."""
    graph = graph_module.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned: dict[str, fx.Node] = output.args[0]
    for index, name in enumerate(nodes):
        with graph.inserting_after(returned[name]):
            graph.call_function(_capture, (returned[name], index))
    # Nothing is returned: each activation is freed as soon as the graph no longer needs it.
    output.args = ((),)
    _end_behind_captures(graph)
    graph_module.recompile()
    return returned


def _end_behind_captures(graph: fx.Graph) -> None:
    """Erase what runs after the last capture: nothing that it does can be seen any more."""
    for node in reversed(list(graph.nodes)):
        if node.target is _capture:
            return
        if node.op not in ("output", "placeholder"):
            graph.erase_node(node)


def _capture(value: Any, index: int) -> None:
    sink = _sink.get()
    if sink is not None and isinstance(value, torch.Tensor):
        sink(index, plain(value))
