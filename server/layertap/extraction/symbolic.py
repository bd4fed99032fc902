"""A model's symbolic graph: its nodes, and their values captured when they are computed.

Note [FX done right]
    - torchvision returns the values at the end, by when later in-place operations may have
      overwritten them. Here a capture is inserted into the graph right after each node.
    - A module and its last child are one node. If both are requested, torchvision silently drops
      one. Here every point is resolved to a node first, and each node is captured once.
    - Tracing calls ``train()`` on the model and patches ``Module.__call__`` in the whole process.
      So it runs only while no forward pass runs. If it fails half way, the model is left in
      training mode, and attributes that its code wrote meanwhile hold symbols instead of values.
      Both are restored here.
    - Dead-code elimination keeps every ``torch._assert`` and whatever the asserted value depends
      on: for the first layer of a ViT, torchvision's extractor runs all layers. Here the graph ends
      after the last capture.
    - Dead-code elimination deletes in-place statements whose result is not assigned
      (``y.relu_()``). The plan builder finds this by comparing each extractor with the reference.
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
            the node calls; the path is empty if it calls none.

    Attributes:
        train: The name of one node in training mode; torchvision's tracer requires one.
        eval: Names in evaluation mode, in execution order.
        operations: The names of nodes that call no module.
        targets: As given.
    """

    def __init__(self, train: Sequence[str], targets: Mapping[str, str]) -> None:
        self.train = train[0]
        self.eval = tuple(targets)
        self.operations = tuple(name for name, target in targets.items() if not target)
        self.targets = targets

    def node_of(self, point: CapturePoint) -> str | None:
        """Return the node that has the value of a point; None if the graph has none.

        If a module is traced through, its value is that of the last node inside it. If a module is
        itself a node, it is found by what the node calls, since its name may mislead: torchvision
        cuts numbers off the end, so that ViT's `ln_2` is called `ln_1`, and `ln_1` is called `ln`.
        """
        if point.kind is PointKind.NODE:
            return point.path if point.path in self.targets else None
        if not point.path:
            return None  # The model's own result: nothing says which node it is.
        own = [name for name, target in self.targets.items() if target == point.path]
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
    """A model's symbolic graph, ready to run.

    Attributes:
        names: The graph's node names.
        whole: An extractor for every node in ``names.eval``, in that order.
        useful: The last node, and the nodes that its value is computed from.
        pruned: An extractor for the useful nodes only; None if all nodes are useful. It lacks
            statements that dead-code elimination removes by mistake, such as an in-place statement
            without assignment. So does every extractor for a few layers.
    """

    names: GraphNames
    whole: FxExtractor
    useful: tuple[str, ...]
    pruned: FxExtractor | None


def trace(model: LoadedModel) -> Trace:
    """Trace a model symbolically; pass on any exception of the tracer."""
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
        names: The node names of the model's graphs.
        nodes: The node of each point, in the order of the points; a node may occur several times.
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
        """Return, for each node's name, the path of the module that it calls; empty for none."""
        return {
            name: str(node.target) if node.op == "call_module" else ""
            for name, node in self._returned.items()
        }

    def used_by(self, last: str) -> set[str]:
        """Return a node and all nodes that its value is computed from.

        Nodes that dead-code elimination never removes, such as an assertion, count as used too.
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
    """Runs the symbolic graph with every node, and passes on the values of some.

    It is slow, but dead-code elimination can't remove anything from it, so its values are the
    reference for graph nodes.
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
    """Restore every submodule's training mode and whatever its code wrote when the block ends.

    Inside the block, ``train()`` and ``eval()`` only set flags. A model's own version may do more,
    such as merging low-rank weights into others, which can't be undone exactly.
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
    """Insert a capture after each node; return the nodes by name."""
    graph = graph_module.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned: dict[str, fx.Node] = output.args[0]
    for index, name in enumerate(nodes):
        with graph.inserting_after(returned[name]):
            graph.call_function(_capture, (returned[name], index))
    # The graph returns nothing, so each activation is freed as soon as it is no longer needed.
    output.args = ((),)
    _end_behind_captures(graph)
    graph_module.recompile()
    return returned


def _end_behind_captures(graph: fx.Graph) -> None:
    """Erase the nodes after the last capture, which no longer have any visible effect."""
    for node in reversed(list(graph.nodes)):
        if node.target is _capture:
            return
        if node.op not in ("output", "placeholder"):
            graph.erase_node(node)


def _capture(value: Any, index: int) -> None:
    sink = _sink.get()
    if sink is not None and isinstance(value, torch.Tensor):
        sink(index, plain(value))
