"""Guided backpropagation: every ReLU lets only the positive part of a gradient pass.

Note [Which ReLUs are guided]
    Other tools replace the modules of the class ``nn.ReLU``, and so miss ``relu`` called as a
    function or a method, and change the model for everyone. autograd records one node for each of
    them, whether a module or a function called it, in place or not. So the nodes of this pass's own
    graph are guided, and nothing else is changed. Other activations are left alone: ReLU6, GELU,
    SiLU and a maximum with zero that is not written as a ReLU.

Source: Springenberg et al. 2014 (arXiv:1412.6806).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.graph import GradientEdge, Node

__all__ = ["guided_relus", "nodes_of", "relus_before"]

_RELU = "ReluBackward0"


@contextmanager
def guided_relus(total: torch.Tensor) -> Iterator[None]:
    """Guide the ReLUs in the graph of a number in a block."""
    handles = [node.register_prehook(_positive) for node in nodes_of(total) if _is_relu(node)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relus_before(total: torch.Tensor, edges: Sequence[GradientEdge]) -> list[int]:
    """Return how many ReLUs are on the way from a number back to each of some values."""
    users: dict[Node, list[Node]] = {}
    for node in nodes_of(total):
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
    return [sum(map(_is_relu, _all_users(edge.node, users))) for edge in edges]


def _all_users(node: Node, users: dict[Node, list[Node]]) -> set[Node]:
    """Return all nodes from which a way leads back to a node, without itself."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return seen


def nodes_of(total: torch.Tensor) -> list[Node]:
    """Return every node of a graph."""
    if total.grad_fn is None:
        return []
    found: dict[Node, None] = {total.grad_fn: None}
    waiting: list[Node] = [total.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                waiting.append(node)
    return list(found)


def _is_relu(node: Node) -> bool:
    return node.name() == _RELU


def _positive(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if each is None else each.clamp(min=0) for each in gradients)
