"""The form of a reply: how its tensors are written, and what the caller gets.

The engine writes each captured value once, into a builder that the form made. Each transport has
its own form for its messages; ``tensor_form.py`` has the form for callers in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from layertap.timings import Timings

__all__ = ["NamedTensor", "P", "ReplyBuilder", "ReplyForm"]

P = TypeVar("P")
"""The payload: what the caller gets as the reply, such as the bytes of a message."""

P_co = TypeVar("P_co", covariant=True)

NamedTensor = tuple[str, int, tuple[int, ...]]
"""The name, dtype number (``layertap.wire.dtypes``) and shape of one tensor of a reply."""


class ReplyBuilder(Protocol[P_co]):
    """Receives the tensors of a reply; see ``layertap._core.ReplyBuilder``."""

    def write(self, index: int, array: Any, dtype: int) -> None:
        """Write a tensor to its place, cast to the dtype that was laid out.

        Args:
            index: The index of the tensor in the layout.
            array: A numpy array with any strides; bfloat16 as uint16.
            dtype: The number of the array's own dtype.
        """

    def finish(self, head: bytes) -> P_co:
        """Return the payload; the builder can't be used again."""


class ReplyForm(Protocol[P]):
    """Lays out one reply before its values are computed."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tensors in shared memory; valid once there is a builder."""

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """Lay the reply out. May be called again if the shapes turn out to be different.

        Returns:
            The bytes that count towards the limit of a reply.

        Raises:
            ValueError: If the message would exceed 2 GiB.
            InvalidInputError: If the tensors don't fit into the places that the request names.
        """

    def builder(self, admit: Callable[[int], object]) -> ReplyBuilder[P]:
        """Allocate the reply with the last layout.

        Args:
            admit: Called first with the bytes of memory that this takes. Its exceptions are passed
                on.
        """

    def head(self, timings: Timings) -> bytes:
        """Return the argument of ``ReplyBuilder.finish``, of the size that was laid out."""

    def nbytes(self, payload: P) -> int:
        """Return the bytes of memory that a payload keeps alive, except shared memory."""
