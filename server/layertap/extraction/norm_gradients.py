"""Right gradients of batch norms, which PyTorch gets wrong for some memory layouts.

A dimension of size 1 fits any stride, so a gradient of one item can count as channels last and as
something else at once. The backward pass of a batch norm on the CPU then mixes the layouts of the
gradient and of the saved input, and returns wrong numbers without an error: torch 2.11 and 2.14.1,
in training and evaluation mode, and instance norms too, which are computed by it. It is right
whenever the gradient has the strides of the input, so here it gets a copy that has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd.graph import Node

from layertap.extraction.guided import nodes_of

__all__ = ["right_norm_gradients"]

Gradients = tuple[torch.Tensor | None, ...]


@contextmanager
def right_norm_gradients(total: torch.Tensor) -> Iterator[None]:
    """Give the batch norms in the graph of a number gradients laid out like their inputs."""
    norms = [node for node in nodes_of(total) if "BatchNormBackward" in node.name()]
    handles = [node.register_prehook(partial(_laid_out, node)) for node in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _laid_out(node: Node, gradients: Gradients) -> Gradients:
    gradient, *others = gradients
    if gradient is None or 1 not in gradient.shape:
        return gradients
    try:
        saved: torch.Tensor = node._saved_input  # type: ignore[attr-defined]
    except RuntimeError:
        return gradients  # It was changed in place, which the backward pass refuses itself.
    if gradient.stride() == saved.stride():
        return gradients
    copied = torch.empty_strided(
        saved.size(), saved.stride(), dtype=gradient.dtype, device=gradient.device
    )
    return copied.copy_(gradient), *others
