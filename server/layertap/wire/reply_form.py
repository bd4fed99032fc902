"""The forms that a reply can have: how its tensors become a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from layertap.selection import Extractor
from layertap.wire.codec import ReplyBuilder, ReplyLayout
from layertap.wire.messages import REPLY_HEAD_SIZE, REPLY_TENSOR_FIELD, Timings, encode_reply_head
from layertap.wire.shared.hub import Space
from layertap.wire.shared.leases import Loan

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
    def shared_bytes(self) -> int:
        """Bytes of the tensors that stand in shared memory, once there is a builder."""

    def lay_out(self, tensors: Sequence[NamedTensor]) -> ReplyLayout:
        """Lay the message out; may be called again where the shapes turn out to be others.

        Raises:
            ValueError: For a message over 2 GiB.
            InvalidInputError: Where the tensors don't fit where the request wants them.
        """

    def builder(self, layout: ReplyLayout, admit: Callable[[int], object]) -> Builder:
        """Allocate the message that was laid out last.

        Args:
            layout: What ``lay_out`` returned.
            admit: Is told first how many bytes of memory that takes; what it raises goes through.
        """

    def head(self, timings: Timings) -> bytes:
        """Return what ``Builder.finish`` takes, of the size that was laid out."""


class NativeForm:
    """The form of ``layertap.v1``: an ExtractResponse, its tensors in it or in shared memory.

    Args:
        extractor: Which extractor serves it.
        fields: Serialized fields that it bears besides its own, such as an item's id.
        space: The shared memory that its tensors may stand in; None for the message only.
    """

    def __init__(
        self, extractor: Extractor, fields: bytes = b"", space: Space | None = None
    ) -> None:
        self.shared_bytes = 0
        self._extractor = extractor
        self._fields = fields
        self._space = space
        self._tensors: Sequence[NamedTensor] = ()

    def lay_out(self, tensors: Sequence[NamedTensor]) -> ReplyLayout:
        """See ``ReplyForm``."""
        self._tensors = tensors
        return self._layout(apart=False)

    def builder(self, layout: ReplyLayout, admit: Callable[[int], object]) -> Builder:
        """See ``ReplyForm``."""
        if self._space is not None and layout.nbytes >= self._space.least:
            apart = self._layout(apart=True)
            loan = self._space.lend(apart.payload_nbytes)
            if loan is not None:
                admit(apart.nbytes)
                self.shared_bytes = loan.nbytes
                return _LentBuilder(apart, loan)
        admit(layout.nbytes)
        return ReplyBuilder(layout)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return encode_reply_head(self._extractor, timings) + self._fields

    def _layout(self, *, apart: bool) -> ReplyLayout:
        size = REPLY_HEAD_SIZE + len(self._fields)
        return ReplyLayout(self._tensors, field=REPLY_TENSOR_FIELD, head_size=size, apart=apart)


class _LentBuilder:
    """Writes tensors into a region that is lent to the client, and refers to them."""

    def __init__(self, layout: ReplyLayout, loan: Loan) -> None:
        # Kept until the end: without it the region would be lent to somebody else.
        self._loan = loan
        self._builder = ReplyBuilder(
            layout, loan.buffer, region=loan.region, generation=loan.generation
        )

    def write(self, index: int, array: Any, dtype: int) -> None:
        """See ``Builder``."""
        self._builder.write(index, array, dtype)

    def finish(self, head: bytes) -> bytes:
        """See ``Builder``."""
        message = self._builder.finish(head)
        self._loan.publish()
        return message
