"""Lays out the weights of a compiled program's convolutions with channels last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["lay_out_channels_last"]

_CONVOLUTIONS = tuple(
    f"aten::{name}" for name in ("conv2d", "convolution", "_convolution", "_convolution_mode")
)

_WEIGHT = 1
"""The position of the weight among the inputs of such a node."""


def lay_out_channels_last(program: torch.jit.ScriptModule) -> None:
    """Give the convolutions of a frozen program weights that have channels last.

    A convolution with such weights takes and returns channels last. The values stay the same, but
    for the order in which they are added up.

    Args:
        program: A frozen program; it is changed in place. Only 2-d convolutions whose weights are
            constants get others: of shape (outputs, inputs, height, width), any dtype.
    """
    graph: Any = program.graph
    laid_out: dict[Any, Any] = {}
    for node, weight in list(_weights(graph)):
        if weight not in laid_out:
            tensor = weight.toIValue().contiguous(memory_format=torch.channels_last)
            with graph.insert_point_guard(weight.node()):
                laid_out[weight] = graph.insertConstant(tensor)
        node.replaceInput(_WEIGHT, laid_out[weight])
    # Frees the old weights.
    torch._C._jit_pass_dce(graph)


def _weights(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Return the 2-d convolutions that have constant weights, and these weights."""
    for kind in _CONVOLUTIONS:
        for node in graph.findAllNodes(kind):
            weight = list(node.inputs())[_WEIGHT]
            if weight.node().kind() != "prim::Constant":
                continue
            tensor = weight.toIValue()
            if isinstance(tensor, torch.Tensor) and _is_plain(tensor):
                yield node, weight


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.ndim == 4 and weight.layout is torch.strided and not weight.requires_grad
