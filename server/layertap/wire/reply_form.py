"""The forms that a reply can have: how its tensors become a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from layertap.selection import Extractor
from layertap.v1 import feature_service_pb2
from layertap.wire.codec import ReplyBuilder, ReplyLayout
from layertap.wire.enums import to_proto
from layertap.wire.messages import REPLY_TENSOR_FIELD, Timings

__all__ = [
    "REPLY_HEAD_SIZE",
    "MessageBuilder",
    "NamedTensor",
    "NativeForm",
    "ReplyForm",
    "encode_reply_head",
]

NamedTensor = tuple[str, int, tuple[int, ...]]
"""The name, dtype number and shape of one tensor of a reply."""


class MessageBuilder(Protocol):
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
            InvalidInputError: If the tensors don't fit where the request wants them.
        """

    def builder(self, layout: ReplyLayout, admit: Callable[[int], object]) -> MessageBuilder:
        """Allocate the message that was laid out last.

        Args:
            layout: What ``lay_out`` returned.
            admit: Is told first how many bytes of memory that takes; what it raises goes through.
        """

    def head(self, timings: Timings) -> bytes:
        """Return what ``MessageBuilder.finish`` takes, of the size that was laid out."""


def encode_reply_head(extractor: Extractor, timings: Timings) -> bytes:
    """Return an ExtractResponse without tensors; always of REPLY_HEAD_SIZE bytes."""
    response = feature_service_pb2.ExtractResponse(
        extractor=to_proto(extractor, "EXTRACTOR"),
        timings=feature_service_pb2.Timings(
            prepare_ns=timings.prepare_ns,
            queue_ns=timings.queue_ns,
            compute_ns=timings.compute_ns,
            total_ns=timings.total_ns,
        ),
    )
    return response.SerializeToString()


REPLY_HEAD_SIZE = len(encode_reply_head(next(iter(Extractor)), Timings()))


class NativeForm:
    """The form of ``layertap.v1``: an ExtractResponse with its tensors in it.

    Args:
        extractor: The extractor that serves the request.
        fields: Serialized fields that the message has besides its own, such as an item's id.
    """

    def __init__(self, extractor: Extractor, fields: bytes = b"") -> None:
        self.shared_bytes = 0
        self._extractor = extractor
        self._fields = fields
        self._tensors: Sequence[NamedTensor] = ()

    def lay_out(self, tensors: Sequence[NamedTensor]) -> ReplyLayout:
        """See ``ReplyForm``."""
        self._tensors = tensors
        return self._layout(apart=False)

    def builder(self, layout: ReplyLayout, admit: Callable[[int], object]) -> MessageBuilder:
        """See ``ReplyForm``."""
        admit(layout.nbytes)
        return ReplyBuilder(layout)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return encode_reply_head(self._extractor, timings) + self._fields

    def _layout(self, *, apart: bool) -> ReplyLayout:
        """Lay the message out, with its tensors or with references to shared memory (``apart``)."""
        size = REPLY_HEAD_SIZE + len(self._fields)
        return ReplyLayout(self._tensors, field=REPLY_TENSOR_FIELD, head_size=size, apart=apart)
