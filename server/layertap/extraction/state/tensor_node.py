"""What a snapshot holds of a tensor.

Note [Digests of large weights]
    A copy of all weights doubles the memory that measuring a model takes. So if the parameters are
    large, a snapshot keeps a BLAKE3 digest of each instead. It shows every write, also those that
    torch does not count, but can't undo one.
"""

# ruff: noqa: D102 - Node says what the methods do.

from __future__ import annotations

from typing import Any, cast

import torch
from blake3 import blake3

from layertap.extraction.state.equality import equal
from layertap.extraction.state.node import Node

__all__ = ["TensorNode", "bytes_of", "digest_of"]

_PIECE = 64 << 20
"""Bytes of a tensor on a GPU that are copied to the host at once."""


class TensorNode(Node):
    """A tensor: the memory that it uses, and the content of that memory.

    Args:
        path: See Node.
        tensor: The tensor.
        content: A copy of its memory, as ``bytes_of`` returns it, or a digest of it, as
            ``digest_of`` returns it; None if only writes that torch counts are to be noticed.
        everywhere: See Node.
        is_parameter: Whether it is a parameter of the module.
    """

    in_place = True

    def __init__(
        self,
        path: str,
        tensor: torch.Tensor,
        content: torch.Tensor | bytes | None,
        *,
        everywhere: bool,
        is_parameter: bool,
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self.is_parameter = is_parameter
        self._tensor = tensor
        # An alias of the memory, in case the model assigns other memory to ``tensor.data``.
        self._alias = tensor.data
        self._copy = content if isinstance(content, torch.Tensor) else None
        self._digest = content if isinstance(content, bytes) else None
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
            return self._digest is not None and digest_of(self._alias) != self._digest
        if self._now()[:3] == self._mark[:3]:
            return not _same_bytes(bytes_of(self._alias), self._copy)
        return not equal(self._tensor.data, self._original())

    def differing(self) -> list[str]:
        if self._copy is None:
            differs = self._now() != self._mark or self.written_unseen()
        else:
            differs = self.written_unseen()
        return [""] if differs else []

    def _original(self) -> torch.Tensor:
        """Return a separate tensor with the values at the time of the snapshot."""
        copy = cast(torch.Tensor, self._copy).clone().view(self._alias.dtype)
        return copy.as_strided(
            self._alias.shape, self._alias.stride(), self._alias.storage_offset()
        )

    def restore(self) -> None:
        if self._copy is None:
            # Report the change only once; it can't be undone.
            self._alias, self._mark = self._tensor.data, self._now()
            if self._digest is not None:
                self._digest = digest_of(self._alias)
            return
        if self._now()[:3] != self._mark[:3]:
            self._tensor.data = self._alias
        if not _same_bytes(bytes_of(self._alias), self._copy):
            bytes_of(self._alias).copy_(self._copy)
        self._mark = self._now()

    def forget(self) -> None:
        """Free the copy. From now on only writes that torch counts are noticed."""
        self._copy = self._digest = None


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


def digest_of(tensor: torch.Tensor) -> bytes:
    """Return the digest of all memory that a tensor is a view of."""
    digest = blake3()
    for piece in bytes_of(tensor).split(_PIECE):
        digest.update(piece.cpu().numpy().data)
    return digest.digest()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if len(one) != len(other):
        return False
    words = len(one) & ~7  # Eight bytes at a time: torch compares single bytes five times slower.
    return torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64)) and (
        torch.equal(one[words:], other[words:])
    )
