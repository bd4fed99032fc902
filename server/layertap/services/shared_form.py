"""The native form of a reply whose tensors may go into shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layertap.engine.reply_form import ReplyBuilder
from layertap.selection import Extractor
from layertap.services.native_form import NativeForm
from layertap.shm.leases import Loan
from layertap.shm.shared_memory import SessionMemory
from layertap.wire import codec

__all__ = ["SharedForm"]


class SharedForm(NativeForm):
    """Writes the tensors of a large reply into shared memory, if a region can be lent for it.

    Args:
        extractor: The extractor that serves the request.
        variant: How its program is finished; empty for the usual way.
        fields: Serialized fields to add to the message, such as the id of an item.
        memory: The shared memory of the request's session; None if it has none.
    """

    def __init__(
        self,
        extractor: Extractor,
        variant: str = "",
        *,
        fields: bytes = b"",
        memory: SessionMemory | None = None,
    ) -> None:
        super().__init__(extractor, variant, fields=fields)
        self._memory = memory

    def builder(self, admit: Callable[[int], object]) -> ReplyBuilder[bytes]:
        """See ``ReplyForm``."""
        if self._memory is None or self._laid_out.nbytes < self._memory.least:
            return super().builder(admit)
        apart = self._layout(apart=True)
        loan = self._memory.lend(apart.payload_nbytes)
        if loan is None:
            return super().builder(admit)
        admit(apart.nbytes)
        self.shared_bytes = loan.nbytes
        return _LentBuilder(apart, loan)


class _LentBuilder:
    """Writes tensors into a region that is lent to the client; the message refers to them."""

    def __init__(self, layout: codec.ReplyLayout, loan: Loan) -> None:
        # Keep the loan until the end, or the region could be lent to another client.
        self._loan = loan
        self._builder = codec.ReplyBuilder(
            layout, loan.buffer, region=loan.region, generation=loan.generation
        )

    def write(self, index: int, array: Any, dtype: int) -> None:
        """See ``ReplyBuilder``."""
        self._builder.write(index, array, dtype)

    def finish(self, head: bytes) -> bytes:
        """See ``ReplyBuilder``."""
        message = self._builder.finish(head)
        self._loan.publish()
        return message
