"""Makes programs for some of the values that a TorchScript program returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["part_of"]


def part_of(program: torch.jit.ScriptModule, indexes: Sequence[int]) -> torch.jit.ScriptModule:
    """Return a program that returns some values only, and computes what these need.

    It does the same operations on the same constants, which both programs share in memory. Writes
    in place are left out only where torch's alias analysis shows that no value depends on them.

    It has a compilation unit of its own; see Note [A compilation unit of its own] in
    ``kinds.torchscript``.

    Args:
        program: A frozen program that returns a tuple of tensors. It may be optimised already, and
            is not changed.
        indexes: Which of these tensors to return, in that order; at least one.

    Raises:
        ValueError: If the program has another form.
    """
    graph = program.graph.copy()
    this, *given = graph.inputs()
    made = [output.node() for output in graph.outputs()]
    if this.uses() or len(made) != 1 or made[0].kind() != "prim::TupleConstruct":
        raise ValueError("expected a frozen program that returns a tuple of tensors")
    values = list(made[0].inputs())
    graph.eraseOutput(0)
    for index in indexes:
        graph.registerOutput(values[index])
    # Unlike the pass for nodes, the one for graphs knows which writes matter.
    torch._C._jit_pass_dce_graph(graph)
    graph.eraseInput(0)
    return _program_of(graph, len(given), len(indexes))


def _program_of(graph: torch.Graph, inputs: int, outputs: int) -> torch.jit.ScriptModule:
    """Return a program that runs a graph and returns its outputs as a tuple."""
    names = [f"x{index}" for index in range(inputs)]
    types = ", ".join(["Tensor"] * outputs)
    placeholders = ", ".join(names[:1] * outputs)
    empty = torch._C.ScriptModule("Part", torch._C.CompilationUnit(), True)  # type: ignore[call-arg]
    part: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(empty)
    # Only source code makes a method; then the graph takes the place of what it says.
    part.define(
        f"def forward(self, {', '.join(names)}) -> Tuple[{types}]:\n    return ({placeholders},)\n"
    )
    method = part.graph
    _, *given = method.inputs()
    returned = next(iter(method.outputs()))
    with method.insert_point_guard(returned.node()):
        values = list(method.insertGraph(graph, given))
    result = method.create("prim::TupleConstruct", values, 1).insertBefore(returned.node()).output()
    result.setType(returned.type())
    method.eraseOutput(0)
    method.registerOutput(result)
    torch._C._jit_pass_dce_graph(method)
    return part
