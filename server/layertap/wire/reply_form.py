"""The forms that a reply can have: how its tensors become a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from layertap.selection import Extractor
from layertap.wire.codec import ReplyBuilder, ReplyLayout
from layertap.wire.messages import REPLY_HEAD_SIZE, REPLY_TENSOR_FIELD, Timings, encode_reply_head

__all__ = ["Builder", "NamedTensor", "NativeForm", "ReplyForm"]

NamedTensor = tuple[str, int, tuple[int, ...]]
"""The name, dtype number and shape of one tensor of a reply."""


class Builder(Protocol):
    """Takes a reply's tensors; see ``layertap._core.ReplyBuilder``."""

    def write(self, index: int, array: Any, dtype: int) -> None:
        """Put a tensor, a numpy array with any strides, in its place."""

    def finish(self, head: bytes) -> bytes:
        """Publish the message."""


class ReplyForm(Protocol):
    """Lays one reply out, before there are values."""

    @property
    def beside(self) -> int:
        """Bytes of memory that the reply may take besides its message, once it is laid out."""

    def lay_out(self, tensors: Sequence[NamedTensor]) -> ReplyLayout:
        """Lay the message out; may be called again where the shapes turn out to be others.

        Raises:
            ValueError: For a message over 2 GiB.
            InvalidInputError: Where the tensors don't fit where the request wants them.
        """

    def builder(self, layout: ReplyLayout) -> Builder:
        """Allocate the message that was laid out last."""

    def head(self, timings: Timings) -> bytes:
        """Return what ``Builder.finish`` takes, of the size that was laid out."""


class NativeForm:
    """The form of ``layertap.v1``: an ExtractResponse.

    Args:
        extractor: Which extractor serves it.
        fields: Serialized fields that it bears besides its own, such as an item's id.
    """

    beside = 0

    def __init__(self, extractor: Extractor, fields: bytes = b"") -> None:
        self._extractor = extractor
        self._fields = fields

    def lay_out(self, tensors: Sequence[NamedTensor]) -> ReplyLayout:
        """See ``ReplyForm``."""
        size = REPLY_HEAD_SIZE + len(self._fields)
        return ReplyLayout(tensors, field=REPLY_TENSOR_FIELD, head_size=size)

    def builder(self, layout: ReplyLayout) -> Builder:
        """See ``ReplyForm``."""
        return ReplyBuilder(layout)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return encode_reply_head(self._extractor, timings) + self._fields
