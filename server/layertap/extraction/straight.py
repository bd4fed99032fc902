"""Finds how far a model's ``forward`` only calls its children one after the other.

Note [Two witnesses]
    A walk over the children skips whatever ``forward`` does around them: remapping of ids,
    ``nan_to_num``, a clamp that no sample reaches. So a child is walked to only where the symbolic
    graph of ``forward``, in which each child is one node, begins with the calls of the children in
    order, each fed with the one before. Symbolic tracing can be misled (``isinstance(x, Tensor)``
    is false for a symbol), so a real pass must agree: no operation on values that follow the input
    may run between two children (see ``survey_looks``). And the values must be equal
    (``survey_walk``).

    A TorchScript program's graph is the code that runs, so it needs no second witness.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import fx, nn

from layertap.extraction.gate import no_forward_pass
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import as_it_was

__all__ = ["straight_children"]

_PREFIX = "module."
_OWN_OPERATORS = "layertap::"
"""Namespace of the operators that watch a program's calls and change nothing."""


def straight_children(module: nn.Module, seen: LooksSurvey) -> set[str]:
    """Return the children up to which ``forward`` does nothing but call them in order.

    See Note [Two witnesses]. The model is traced, so no forward pass may run in this thread.

    Args:
        module: The model.
        seen: What a real pass showed.
    """
    children = [name for name, _ in module.named_children()]
    if isinstance(module, torch.jit.ScriptModule):
        calls = zip(children, _program_calls(module), strict=False)
        return {child for child, _ in takewhile(lambda names: names[0] == names[1], calls)}
    pairs = zip(children, _traced_calls(module), seen.straight, strict=False)
    return {child for child, *_ in takewhile(lambda names: len(set(names)) == 1, pairs)}


def _program_calls(module: torch.jit.ScriptModule) -> list[str]:
    """Return the children that a program calls in a row, each fed with the one before."""
    this, *given = module.graph.inputs()
    if len(given) != 1:
        return []
    before = given[0].debugName()
    children: dict[str, str] = {}  # By the value that holds the child.
    calls: list[str] = []
    for node in module.graph.nodes():
        inputs = [value.debugName() for value in node.inputs()]
        if node.kind() == "prim::GetAttr" and inputs == [this.debugName()]:
            children[node.output().debugName()] = node.s("name")
        elif (
            node.kind() == "prim::CallMethod"
            and node.s("name") == "forward"
            and inputs[1:] == [before]
            and inputs[0] in children
        ):
            calls.append(children[inputs[0]])
            before = node.output().debugName()
        elif node.kind() != "prim::Constant" and not node.kind().startswith(_OWN_OPERATORS):
            break
    return calls


class _ForwardOnly(nn.Module):
    """Calls a model's forward with one argument, as symbolic tracing gives it all of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module.forward(x)


class _EachChildIsALeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace no module but the root."""
        return True


def _traced_calls(module: nn.Module) -> list[str]:
    """Return the children that ``forward`` calls in a row, each fed with the one before."""
    tracer = _EachChildIsALeaf()
    # Model code may raise anything on symbols; what was traced until then is what runs first.
    with no_forward_pass(), as_it_was(module), suppress(Exception):
        tracer.trace(_ForwardOnly(module))
    calls: list[str] = []
    nodes = list(getattr(tracer, "graph", fx.Graph()).nodes)
    for before, node in pairwise(nodes):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            break
        calls.append(str(node.target).removeprefix(_PREFIX))
    return calls
