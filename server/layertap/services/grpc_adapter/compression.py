"""Compresses replies for calls that request it."""

from __future__ import annotations

import grpc

from layertap.errors import InvalidInputError
from layertap.wire.messages import REPLY_COMPRESSION_KEY, REPLY_COMPRESSIONS

__all__ = ["compress_replies"]

_ALGORITHMS = dict(
    zip(
        REPLY_COMPRESSIONS,
        (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate),
        strict=True,
    )
)


def compress_replies(context: grpc.ServicerContext) -> None:
    """Have gRPC compress the replies of a call if the call's metadata requests it.

    Every gRPC client reports that it can decompress, so that alone is no reason to compress. Call
    this before anything is sent.

    Raises:
        InvalidInputError: For an unknown algorithm.
    """
    for key, value in context.invocation_metadata() or ():
        if key == REPLY_COMPRESSION_KEY:
            if value not in _ALGORITHMS:
                raise InvalidInputError(
                    f"{REPLY_COMPRESSION_KEY}: got {str(value)[:64]!r}, expected one of "
                    f"{', '.join(REPLY_COMPRESSIONS)}"
                )
            context.set_compression(_ALGORITHMS[value])
