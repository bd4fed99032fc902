"""The form of a reply: what its tensors are written into, and what becomes of that.

The engine writes each captured value once, into a builder that the form made. A transport has the
form of its messages; ``tensor_form.py`` has the form for callers in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from layertap.timings import Timings

__all__ = ["NamedTensor", "P", "ReplyBuilder", "ReplyForm"]

P = TypeVar("P")
"""The payload: what a form makes of a reply, such as the bytes of a message."""

P_co = TypeVar("P_co", covariant=True)

NamedTensor = tuple[str, int, tuple[int, ...]]
"""The name, dtype number (``layertap.wire.dtypes``) and shape of one tensor of a reply."""


class ReplyBuilder(Protocol[P_co]):
    """Takes a reply's tensors; see ``layertap._core.ReplyBuilder``."""

    def write(self, index: int, array: Any, dtype: int) -> None:
        """Put a tensor in its place, cast to the type that was laid out.

        Args:
            index: Which of the tensors that were laid out.
            array: A numpy array with any strides; bfloat16 as uint16.
            dtype: The number of the array's own dtype.
        """

    def finish(self, head: bytes) -> P_co:
        """Return the payload; the builder can't be used again."""


class ReplyForm(Protocol[P]):
    """Lays one reply out, before there are values."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tensors that stand in shared memory, once there is a builder."""

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """Lay the reply out; may be called again where the shapes turn out to be others.

        Returns:
            The bytes that count against the limit of a reply.

        Raises:
            ValueError: For a message over 2 GiB.
            InvalidInputError: Where the tensors don't fit where the request wants them.
        """

    def builder(self, admit: Callable[[int], object]) -> ReplyBuilder[P]:
        """Allocate the reply that was laid out last.

        Args:
            admit: Is told first how many bytes of memory that takes; what it raises goes through.
        """

    def head(self, timings: Timings) -> bytes:
        """Return what ``ReplyBuilder.finish`` takes, of the size that was laid out."""

    def nbytes(self, payload: P) -> int:
        """Return the bytes of memory that a payload keeps, without those in shared memory."""
