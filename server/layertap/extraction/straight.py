"""Finds how far a model's ``forward`` only calls its children one after the other.

Note [Two witnesses]
    A walk over the children skips whatever ``forward`` does around them: remapping of ids,
    ``nan_to_num``, a clamp that no sample reaches. So a walk is allowed up to a child only if three
    tests agree:

    - The symbolic graph of ``forward``, in which each child is one node, begins with the calls of
      the children in order, each with the output of the one before.
    - A real pass runs no operation between two children on values that depend on the input (see
      ``survey_looks``). This pass is needed because symbolic tracing can be misled:
      ``isinstance(x, Tensor)`` is false for a symbol.
    - The values are equal (``survey_walk``).

    A TorchScript program's graph is the code that runs, so the second test is not needed for it.
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
    """Return the children up to which ``forward`` only calls the children in order.

    See Note [Two witnesses]. This traces the model, so it must not be called inside a forward pass.

    Args:
        module: The model.
        seen: What a real pass showed; see ``survey_looks``.
    """
    children = [name for name, _ in module.named_children()]
    if isinstance(module, torch.jit.ScriptModule):
        calls = zip(children, _program_calls(module), strict=False)
        return {child for child, _ in takewhile(lambda names: names[0] == names[1], calls)}
    pairs = zip(children, _traced_calls(module), seen.straight, strict=False)
    return {child for child, *_ in takewhile(lambda names: len(set(names)) == 1, pairs)}


def _program_calls(module: torch.jit.ScriptModule) -> list[str]:
    """Return the first children that a program calls in order, each on the output before."""
    this, *given = module.graph.inputs()
    if len(given) != 1:
        return []
    before = given[0].debugName()
    children: dict[str, str] = {}  # Keyed by the graph value that holds the child.
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
    """Calls a model's forward with one argument; symbolic tracing would give it all arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module.forward(x)


class _EachChildIsALeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep the tracer from tracing into any module but the root."""
        return True


def _traced_calls(module: nn.Module) -> list[str]:
    """Return the first children that ``forward`` calls in order, each on the output before."""
    tracer = _EachChildIsALeaf()
    # Model code may raise anything on symbols; then what was traced before that is used.
    with no_forward_pass(), as_it_was(module), suppress(Exception):
        tracer.trace(_ForwardOnly(module))
    calls: list[str] = []
    nodes = list(getattr(tracer, "graph", fx.Graph()).nodes)
    for before, node in pairwise(nodes):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            break
        calls.append(str(node.target).removeprefix(_PREFIX))
    return calls
