"""The beginning and end of a unary extraction over gRPC, in every protocol."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from layertap.engine import Call, Extraction

__all__ = ["answer"]


def answer(context: grpc.ServicerContext, extract: Callable[[Call], Extraction[bytes]]) -> bytes:
    """Run an extraction for a unary RPC and return the reply's message.

    The extraction is cancelled when the RPC ends. Its bytes are counted until the reply was sent.

    Args:
        context: The RPC.
        extract: Runs the extraction.
    """
    call = Call(context.time_remaining())
    # If this is False, the RPC has already ended, and gRPC will not call the callback.
    if not context.add_callback(call.cancel):
        call.cancel()
    extraction = extract(call)
    # gRPC calls this when it is done with the RPC, however slowly the client reads.
    if not context.add_callback(extraction.release):
        extraction.release()
    return extraction.payload
