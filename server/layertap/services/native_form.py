"""The native form of a reply: an ExtractResponse that contains its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layertap.engine.reply_form import NamedTensor, ReplyBuilder
from layertap.selection import Extractor
from layertap.timings import Timings
from layertap.v1 import feature_service_pb2
from layertap.wire import codec
from layertap.wire.enums import to_proto
from layertap.wire.messages import REPLY_TENSOR_FIELD

__all__ = ["REPLY_HEAD_SIZE", "NativeForm", "encode_reply_head"]


def encode_reply_head(extractor: Extractor, timings: Timings, variant: str = "") -> bytes:
    """Return an ExtractResponse without tensors; its size does not depend on the timings."""
    response = feature_service_pb2.ExtractResponse(
        extractor=to_proto(extractor, "EXTRACTOR"),
        timings=feature_service_pb2.Timings(
            prepare_ns=timings.prepare_ns,
            queue_ns=timings.queue_ns,
            compute_ns=timings.compute_ns,
            total_ns=timings.total_ns,
        ),
        variant=variant,
    )
    return response.SerializeToString()


REPLY_HEAD_SIZE = len(encode_reply_head(next(iter(Extractor)), Timings()))
"""The size of such a head in bytes, without a variant."""


class NativeForm:
    """The form of ``layertap.v1``, a ``layertap.engine.reply_form.ReplyForm``.

    Args:
        extractor: The extractor that serves the request.
        variant: How its program is finished; empty for the usual way.
        fields: Serialized fields to add to the message, such as the id of an item.
    """

    def __init__(self, extractor: Extractor, variant: str = "", *, fields: bytes = b"") -> None:
        self.shared_bytes = 0
        self._extractor = extractor
        self._variant = variant
        self._head_size = REPLY_HEAD_SIZE
        if variant:
            self._head_size = len(encode_reply_head(extractor, Timings(), variant))
        self._fields = fields
        self._tensors: Sequence[NamedTensor] = ()
        self._laid_out: codec.ReplyLayout

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """See ``ReplyForm``."""
        self._tensors = tensors
        self._laid_out = self._layout(apart=False)
        return self._laid_out.nbytes

    def builder(self, admit: Callable[[int], object]) -> ReplyBuilder[bytes]:
        """See ``ReplyForm``."""
        admit(self._laid_out.nbytes)
        return codec.ReplyBuilder(self._laid_out)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return encode_reply_head(self._extractor, timings, self._variant) + self._fields

    def nbytes(self, payload: bytes) -> int:
        """See ``ReplyForm``."""
        return len(payload)

    def _layout(self, *, apart: bool) -> codec.ReplyLayout:
        """Compute the message's layout, with its tensors or (``apart``) references to them."""
        size = self._head_size + len(self._fields)
        return codec.ReplyLayout(
            self._tensors, field=REPLY_TENSOR_FIELD, head_size=size, apart=apart
        )
