"""Takes snapshots of the state that a model keeps in Python, finds differences, and restores it.

Note [What can't be restored]
    A generator or another iterator can't be rewound, we don't rewrite the content of files, and
    very large parameters are not copied. A change of any of these is reported as one that can't be
    restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from layertap.extraction.state.node import Change, Node
from layertap.extraction.state.nodes import HooksNode
from layertap.extraction.state.tensor_node import TensorNode
from layertap.extraction.state.walk import Walk

__all__ = ["Snapshot"]

OTHER_BYTES = 16 << 20
"""Copies of other tensors are kept up to this total size even if no pass changed any of them."""


class Snapshot:
    """What a module and everything reachable from it held when the snapshot was taken.

    Not safe to use from several threads at once.

    Args:
        module: The module. No pass of it may run meanwhile.
        copies: Whether to copy the content of tensors. Without copies, in-place writes are noticed
            only if torch counts them, and can't be undone.

    Attributes:
        nodes: What it follows.
        outside: Paths of the modules that ``named_modules`` doesn't see, as they are not
            registered.
    """

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, module: nn.Module, *, copies: bool = True) -> None:
        walk = Walk(module, copies=copies)
        self.nodes = walk.nodes
        self._modules = {path: id(part) for path, part in module.named_modules()}
        self.outside = tuple(walk.outside)

    def changes(self, *, hooks: bool = True) -> list[Change]:
        """Return what differs now, each path once; ``hooks`` includes the hooks of modules."""
        return self._differing(
            lambda node: (hooks or not isinstance(node, HooksNode)) and node.suspect()
        )

    def deep_changes(self) -> list[Change]:
        """Return what differs now, after reading the whole content that was copied.

        This is slower than ``changes``, which relies on torch's count of in-place writes; torch
        does not count ``x.data.add_(1)``.
        """
        return self._differing(lambda node: node.suspect() or node.written_unseen())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything that can be restored and that ``changes`` sees."""
        for node in self.nodes:
            if node.suspect():
                node.restore()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def deep_restore(self) -> None:
        """Restore everything that can be restored and that ``deep_changes`` sees."""
        for node in self.nodes:
            if node.suspect() or node.written_unseen():
                node.restore()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def deep_undo(self) -> list[Change]:
        """Return ``deep_changes``, and undo them as ``deep_restore`` does."""
        nodes = [node for node in self.nodes if node.suspect() or node.written_unseen()]
        if not nodes:
            return []  # The content is read only once, as nearly always.
        changes = self.deep_changes()
        self.deep_restore()
        return changes

    def settle(self, written: Iterable[str] = ()) -> None:
        """Free the copies of tensors that no pass was seen to write to.

        Args:
            written: Paths that passes changed. Their copies are kept, and ``changes`` and
                ``restore`` read their whole content too.
        """
        written = set(written)
        tensors = [node for node in self.nodes if isinstance(node, TensorNode)]
        others = sum(t.copied_bytes for t in tensors if not t.is_parameter)
        for node in self.nodes:
            node.always |= node.path in written
        for tensor in tensors:
            droppable = tensor.is_parameter or (not written and others > OTHER_BYTES)
            if droppable and not tensor.always:
                tensor.forget()

    def by_owner(self) -> dict[int, list[Node]]:
        """Map the id of each module to its nodes; nodes of classes belong to every module."""
        owned: dict[int, list[Node]] = {part: [] for part in self._modules.values()}
        shared = [node for node in self.nodes if node.everywhere]
        for node in self.nodes:
            path = node.path.partition("[")[0]
            while path and path not in self._modules:
                path = path.rpartition(".")[0]
            if not node.everywhere:
                owned[self._modules[path]].append(node)
        return {part: [*nodes, *shared] for part, nodes in owned.items()}

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def rewritten(self) -> set[str]:
        """Return the paths at which something was stored, even if the value is the same."""
        return {
            node.change(key).path for node in self.nodes if node.suspect() for key in node.stored()
        }

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _differing(self, ask: Callable[[Node], bool]) -> list[Change]:
        found: dict[str, Change] = {}
        for node in filter(ask, self.nodes):
            for key in node.differing():
                change = node.change(key)
                found.setdefault(change.path, change)
        return list(found.values())
