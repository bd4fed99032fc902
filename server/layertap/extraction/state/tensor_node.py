"""What a snapshot holds of a tensor."""

# ruff: noqa: D102 - Node says what the methods do.

from __future__ import annotations

from typing import Any, cast

import torch

from layertap.extraction.state.equality import equal
from layertap.extraction.state.node import Node

__all__ = ["TensorNode", "bytes_of"]


class TensorNode(Node):
    """A tensor: the memory that it uses, and the content of that memory."""

    in_place = True

    def __init__(
        self,
        path: str,
        tensor: torch.Tensor,
        copy: torch.Tensor | None,
        *,
        everywhere: bool,
        is_parameter: bool,
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self.is_parameter = is_parameter
        self._tensor = tensor
        # An alias of the memory, in case the model assigns other memory to ``tensor.data``.
        self._alias = tensor.data
        self._copy = copy
        self._mark = self._now()

    @property
    def reason(self) -> str:  # type: ignore[override]
        return "" if self._copy is not None else "no copy of this tensor was kept"

    @property
    def copied_bytes(self) -> int:
        """The bytes of the copy."""
        return 0 if self._copy is None else self._copy.nbytes

    def _now(self) -> tuple[Any, ...]:
        tensor = self._tensor
        version = None if tensor.is_inference() else tensor._version
        return _place(tensor), tuple(tensor.shape), tensor.dtype, version

    def suspect(self) -> bool:
        return not self._is_as_marked() or (self.always and self.written_unseen())

    def _is_as_marked(self) -> bool:
        """Return whether ``_now`` is what it was, in less time: this runs at every line of code."""
        tensor, (place, shape, dtype, version) = self._tensor, self._mark
        return (
            _place(tensor) == place
            and tensor.shape == shape
            and tensor.dtype is dtype
            and (None if tensor.is_inference() else tensor._version) == version
        )

    def written_unseen(self) -> bool:
        if self._copy is None:
            return False
        if self._now()[:3] == self._mark[:3]:
            return not _same_bytes(bytes_of(self._alias), self._copy)
        return not equal(self._tensor.data, self._original())

    def differing(self) -> list[str]:
        differs = self._now() != self._mark if self._copy is None else self.written_unseen()
        return [""] if differs else []

    def _original(self) -> torch.Tensor:
        """Return a separate tensor with the values at the time of the snapshot."""
        copy = cast(torch.Tensor, self._copy).clone().view(self._alias.dtype)
        return copy.as_strided(
            self._alias.shape, self._alias.stride(), self._alias.storage_offset()
        )

    def restore(self) -> None:
        if self._copy is None:
            self._mark = self._now()  # Report the change only once; it can't be undone.
            return
        if self._now()[:3] != self._mark[:3]:
            self._tensor.data = self._alias
        if not _same_bytes(bytes_of(self._alias), self._copy):
            bytes_of(self._alias).copy_(self._copy)
        self._mark = self._now()

    def forget(self) -> None:
        """Free the copy."""
        self._copy = None


def _place(tensor: torch.Tensor) -> int | None:
    if tensor.layout is not torch.strided:
        return None
    try:
        return tensor.data_ptr()
    except RuntimeError:  # A subclass without memory of its own.
        return None


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all memory that a tensor is a view of, as bytes; writes to it are not counted."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if len(one) != len(other):
        return False
    words = len(one) & ~7  # Eight bytes at a time: torch compares single bytes five times slower.
    return torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64)) and (
        torch.equal(one[words:], other[words:])
    )
