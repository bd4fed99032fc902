"""The private extension: bytes in, bytes out, without torch. Built from csrc/.

``layertap._pure`` is its equivalent in plain Python: the extension is tested against it, and it is
used where the extension was not built. Dtypes are the numbers of ``layertap.v1.DataType``. Arrays
are passed through the buffer protocol, with any strides, as the dtype's bit pattern (bfloat16 as
uint16).
"""

from collections.abc import Iterable, Sequence
from typing import Final, final

from typing_extensions import Buffer

MAX_RANK: Final[int]
"""Maximum number of dimensions of a tensor: 32."""

MAX_MESSAGE_BYTES: Final[int]
"""Maximum size of a message in bytes, protobuf's own limit: 2**31 - 1."""

@final
class ReplyLayout:
    """The place of each byte of a message with tensors: ``head`` first, then the tensors.

    A tensor's payload starts at an offset of 16 modulo 64. CPython puts the data of a large
    ``bytes`` object at 48 modulo 64, so the payload starts on a 64-byte boundary.
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

        With ``apart``, the payloads are in a separate buffer, each at a multiple of 64, and the
        message refers to them (``layertap.v1.SharedSlice``).

        Raises ValueError for an unknown dtype, a rank over MAX_RANK, a negative size, an overflow
        (of the sizes that are not 0, which numpy refuses too) or a message over MAX_MESSAGE_BYTES.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the finished message, including the head."""

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the separate buffer for payloads; 0 if they are in the message."""

    def __len__(self) -> int:
        """The number of tensors."""

@final
class ReplyBuilder:
    """An unfinished message: tensors are written to their places, in one pass, without the GIL.

    Several threads may call ``write`` at once, for different tensors. No call waits: a ``write`` or
    ``finish`` that conflicts with another write is refused. For tensors under 32 KiB the GIL is
    kept, because getting it back would take longer than the copy.
    """

    def __init__(
        self,
        layout: ReplyLayout,
        payloads: Buffer | None = None,
        *,
        region: int = 0,
        generation: int = 0,
    ) -> None:
        """Begin a message; if its layout is ``apart``, tensors are written to ``payloads``.

        ``payloads`` is held until the message is finished. In the message, ``region`` and
        ``generation`` identify that memory. Raises ValueError if the buffer is too small, missing
        or not needed, and BufferError if it is not writable and contiguous.
        """
    def write(self, index: int, array: Buffer, dtype: int) -> None:
        """Write a tensor to its place, cast to the layout's dtype and contiguous.

        Floating-point dtypes can be cast to each other (rounded once, to nearest even; NaN stays
        NaN), any other dtype only to itself. A tensor may be written again.

        Raises ValueError for a shape other than the layout's, an item size other than the dtype's,
        an unsupported cast, a tensor that another thread is writing, or a finished builder;
        IndexError for an index out of range.
        """

    def finish(self, head: bytes) -> bytes:
        """Write the head and return the message; the builder can't be used again.

        Raises ValueError if a tensor was never written or is being written, the head does not have
        the size in the layout, or the builder is already finished. After the other errors, the
        builder can still be used.
        """

def encode(tensors: Iterable[tuple[str, int, Buffer]], *, field: int, head: bytes) -> bytes:
    """Lay out, build, write and finish (name, dtype, array) tensors in one call, without casts."""

def decode(
    message: bytes, *, field: int, most: int = ..., counted: Iterable[int] = ()
) -> tuple[bytes, list[tuple[str, int, tuple[int, ...], memoryview | tuple[int, int, int, int]]]]:
    """Split a message into its small fields and its tensors, without copying the payloads.

    The submessages in ``field`` are read as tensors: (name, dtype, shape, data). ``data`` is a
    read-only memoryview of ``message``, or for a tensor in shared memory (region, generation,
    offset, size), which is not checked. All other top-level fields are returned in order, for an
    ordinary protobuf parser. This function agrees with that parser on which messages are
    well-formed and what they mean: the last value of a repeated scalar wins, unknown fields
    (including groups) are skipped. ``counted`` are length-delimited fields that hold a list, such
    as a list of images; members of the list are counted like fields of the message.

    Raises ValueError for a malformed message, one over MAX_MESSAGE_BYTES, more than ``most``
    tensors (by default there is no limit), more than 65,536 other fields, or a tensor with an
    unknown dtype, a rank over MAX_RANK, a negative size, sizes that overflow, data or a shared
    slice whose length doesn't match shape and dtype, both of these, or a byte of a bool tensor that
    is neither 0 nor 1.
    """

def raw_layout(
    tensors: Iterable[tuple[int, Sequence[int]]], *, field: int, head_size: int
) -> ReplyLayout:
    """Lay out (dtype, shape) tensors after the head, each as bytes of the repeated field ``field``.

    The head describes the tensors, so they have no names here. Their payloads are not aligned.
    Raises ValueError in the same cases as ``ReplyLayout``.
    """

def split(message: bytes, *, field: int, most: int) -> tuple[bytes, list[memoryview]]:
    """Split a message into its small fields and the bytes of its repeated field ``field``.

    The bytes are read-only memoryviews of ``message``. All other top-level fields are returned in
    order, for an ordinary protobuf parser. This function agrees with that parser on which messages
    are well-formed.

    Raises ValueError for a malformed message, one over MAX_MESSAGE_BYTES, more than ``most``
    occurrences of the field, or more than 65,536 other fields.
    """

def image_values(
    pixels: Buffer,
    *,
    size: Sequence[int],
    window: Sequence[int],
    interpolation: str,
    vertical_first: bool,
    tables: Buffer,
    target: Buffer,
) -> None:
    """Resize an 8-bit image, keep a window of it, and look its bytes up in tables; without the GIL.

    ``pixels`` is ``[H, W, C] uint8``, contiguous, with ``C`` 1 or 4. ``size`` is the height and the
    width that the image is resized to; ``window`` is the part that is kept: top, left, height and
    width in the resized image. The resized pixels are those of Pillow's ``Image.resize`` with the
    filter ``box``, ``bilinear``, ``hamming``, ``bicubic`` or ``lanczos``, if ``vertical_first``
    tells the order of its two passes. ``tables`` is ``[N, 256] float32``: ``target``, a writable
    ``[N, height, width] float32``, gets the entry of table ``n`` for each byte of channel ``n``, or
    of the only channel.

    Raises ValueError for another size of a buffer, a window that isn't inside the resized image,
    sides over 2**24, an unknown filter, or more tables than channels; BufferError, or the buffer's
    own error, if ``target`` is not writable and contiguous.
    """

def keep_memory(bound: int) -> bool:
    """Make the C library's malloc keep freed memory for the next large block.

    This affects the whole process for the rest of its life: every block comes from one heap, and
    up to ``bound`` bytes of its free end are kept. Returns False, with nothing changed, if malloc
    is not that of glibc 2.33 or newer. Raises ValueError for a bound below 1.
    """

def map_large_blocks(least: int) -> bool:
    """Make malloc map each block of ``least`` bytes or more, and return it as soon as it is freed.

    This affects the whole process, until ``keep_memory`` is called; every other block comes from
    one heap. Returns False, with nothing changed, if malloc is not that of glibc 2.33 or newer, or
    does not take that number. Raises ValueError for a number below 1.
    """

def trim_memory() -> bool:
    """Return all of malloc's free pages to the system; return False if that is not possible."""

def malloc_usage() -> tuple[int, int] | None:
    """Return (bytes in use, free bytes) of malloc; None if it doesn't report them.

    The free bytes include pages without memory behind them, because they were never touched or
    were returned by ``trim_memory``.
    """
