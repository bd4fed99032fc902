"""The private extension: bytes in, bytes out, no torch. Built from csrc/.

``layertap._pure`` is its twin in plain Python: the oracle of its tests, and its stand-in where the
extension was not built. Dtypes are the numbers of ``layertap.v1.DataType``; arrays come through
the buffer protocol, with any strides, as the dtype's bit pattern (bfloat16 as uint16).
"""

from collections.abc import Iterable, Sequence
from typing import Final, final

from typing_extensions import Buffer

MAX_RANK: Final[int]
"""The most dimensions a tensor may have: 32."""

MAX_MESSAGE_BYTES: Final[int]
"""The most bytes of one message, protobuf's own limit: 2**31 - 1."""

@final
class ReplyLayout:
    """Where each byte of a message with tensors stands: ``head`` first, then the tensors.

    A tensor's payload starts at an offset of 16 modulo 64, so that it lands on a 64-byte boundary
    in a large ``bytes`` object, whose data CPython puts at 48 modulo 64.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, int, Sequence[int]]],
        *,
        field: int,
        head_size: int,
        apart: bool = False,
    ) -> None:
        """Lay out (name, dtype, shape) tensors as submessages ``field``.

        With ``apart`` the payloads stand in a buffer of their own, each at a multiple of 64, and
        the message refers to them (``layertap.v1.SharedSlice``).

        Raises ValueError for an unknown dtype, a rank over MAX_RANK, a negative size, an overflow
        (of the sizes that are not 0, which numpy refuses too) or a message over MAX_MESSAGE_BYTES.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the finished message, head included."""

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the buffer that payloads stand in; 0 where they stand in the message."""

    def __len__(self) -> int:
        """How many tensors there are."""

@final
class ReplyBuilder:
    """An unpublished message: tensors are written in place, each in one pass, without the GIL.

    ``write`` may be called from several threads at once for different tensors. Nothing waits: a
    ``write`` or ``finish`` that another write is in the way of is refused. The GIL is kept for
    tensors under 32 KiB, which take less time than getting it back.
    """

    def __init__(
        self,
        layout: ReplyLayout,
        payloads: Buffer | None = None,
        *,
        region: int = 0,
        generation: int = 0,
    ) -> None:
        """Begin a message; where its layout is ``apart``, tensors are written to ``payloads``.

        ``payloads`` is held until the message is finished; ``region`` and ``generation`` say in the
        message which memory it is. Raises ValueError for a buffer that is too small, missing, or
        there without a use, BufferError for one that is not writable and contiguous.
        """
    def write(self, index: int, array: Buffer, dtype: int) -> None:
        """Put a tensor in its place: cast to the layout's dtype, made contiguous on the way.

        Floating-point types cast to one another (rounded once, to nearest even; NaN stays NaN); any
        other type only to itself. A tensor may be written again.

        Raises ValueError for a shape other than the layout's, an item size other than the dtype's,
        a cast that is not offered, a tensor that another thread is writing, or a builder that is
        finished; IndexError for an index out of range.
        """

    def finish(self, head: bytes) -> bytes:
        """Write the head and publish the message; the builder can't be used again.

        Raises ValueError where a tensor was never written or is being written, the head has not the
        size laid out, or the builder is finished already. A refused builder can be used on.
        """

def encode(tensors: Iterable[tuple[str, int, Buffer]], *, field: int, head: bytes) -> bytes:
    """Layout, build, write and finish in one call: (name, dtype, array) tensors, no casts."""

def decode(
    message: bytes, *, field: int, most: int = ..., counted: Iterable[int] = ()
) -> tuple[bytes, list[tuple[str, int, tuple[int, ...], memoryview | tuple[int, int, int, int]]]]:
    """Split a message into its small rest and its tensors, without a copy of their payloads.

    Submessages ``field`` are read as tensors: (name, dtype, shape, data), ``data`` a read-only
    memoryview over ``message``; or the (region, generation, offset, size) of a tensor that stands
    in shared memory, which says nothing about whether there is such a place. The rest, every other
    top-level field in order, goes to an ordinary protobuf parser. Agrees with that parser on what
    is well-formed and what it means: the last of a repeated scalar wins, unknown fields (groups
    included) are skipped. ``counted`` are the length-delimited fields that hold a list, such as one
    of images, whose members count as fields of the message do.

    Raises ValueError for a malformed message, one over MAX_MESSAGE_BYTES, more than ``most``
    tensors (by default there is no limit), more than 65,536 other fields, a tensor with an unknown
    dtype, a rank over MAX_RANK, a negative size, sizes that overflow, data or a shared slice of
    another length than shape and dtype say, both of them, or a byte of a bool tensor that is
    neither 0 nor 1.
    """

def raw_layout(
    tensors: Iterable[tuple[int, Sequence[int]]], *, field: int, head_size: int
) -> ReplyLayout:
    """Lay out (dtype, shape) tensors after the head, each as bytes of the repeated field ``field``.

    What they are is said in the head, so they have no names here. Their payloads are not aligned.
    Raises ValueError as ``ReplyLayout`` does.
    """

def split(message: bytes, *, field: int, most: int) -> tuple[bytes, list[memoryview]]:
    """Split a message into its small rest and the bytes of its repeated field ``field``.

    Those are read-only memoryviews over ``message``; the rest, every other top-level field in
    order, goes to an ordinary protobuf parser. Agrees with that parser on what is well-formed.

    Raises ValueError for a malformed message, one over MAX_MESSAGE_BYTES, more than ``most`` of the
    fields or more than 65,536 others.
    """

def keep_memory(bound: int) -> bool:
    """Have the C library's malloc keep freed memory for the next large block.

    For the whole process and the rest of its life: every block comes from one heap, and of its free
    end ``bound`` bytes stay. Returns False, with nothing changed, where malloc is not that of glibc
    2.33 or newer. Raises ValueError for a bound below 1.
    """

def trim_memory() -> bool:
    """Give every free page of malloc's back to the system; False where that can't be done."""

def malloc_usage() -> tuple[int, int] | None:
    """Return malloc's bytes in use and free; None where it does not tell.

    Free bytes count whether or not memory stands behind them: pages that were never touched, or
    were given back by ``trim_memory``, are among them.
    """
