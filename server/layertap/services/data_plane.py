"""The one use case of every protocol: run one request on one version of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from layertap.engine import Call, Engine, Extraction, ExtractionRequest, ModelHost, Reservation
from layertap.services.observer import Observer
from layertap.services.status import code_of

__all__ = ["Converted", "DataPlane", "release_when_sent"]

D = TypeVar("D")

Converted = tuple[str, Callable[[ModelHost], ExtractionRequest]]
"""The name of a request's model, and what gives the engine's form of the request for a version."""


class DataPlane:
    """Runs requests, whichever protocol they came by. Safe to share between threads.

    Args:
        engine: Runs them.
        observer: Told how each extraction ended.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self._engine = engine
        self._observer = observer

    def extract(
        self, received: Reservation, call: Call, convert: Callable[[], Converted]
    ) -> Extraction:
        """Convert a request and run it, all of it on one version of its model.

        Args:
            received: The bytes of the request; released when this returns or raises.
            call: The deadline and cancellation state of the request.
            convert: Parses the request. It runs here so that its errors are observed as well.

        Returns:
            The reply. Its owner has to release it once it was sent.

        Raises:
            Exception: What ``convert`` and ``Engine.extract`` raise; the observer is told first.
        """
        model = ""
        try:
            call.check()
            name, request_for = convert()
            with self._engine.lease(name) as host:
                model = host.model.name
                extraction = self._engine.extract(request_for(host), call, host, received)
        except Exception as error:
            self._observer.failed(model, code_of(error))
            raise
        finally:
            received.release()
        self._observer.succeeded(model, extraction)
        return extraction

    def decode(self, received: Reservation, call: Call, decode: Callable[[], D]) -> D:
        """Return what ``decode`` does; if it raises, release the bytes and tell the observer.

        Args:
            received: The bytes of the request.
            call: The deadline and cancellation state of the request.
            decode: Splits the request's message. Not called for a request that nobody waits for.
        """
        try:
            call.check()
            return decode()
        except Exception as error:
            received.release()
            self._observer.failed("", code_of(error))
            raise

    def receive(self, nbytes: int) -> Reservation:
        """Count the bytes of a request that was received.

        Raises:
            OverloadedError: Where they would be over the limit; the observer is told first.
        """
        try:
            return self._engine.reserve(nbytes)
        except Exception as error:
            self._observer.failed("", code_of(error))
            raise


def release_when_sent(extraction: Extraction, context: grpc.ServicerContext) -> None:
    """Release a reply at the end of its RPC, which comes after the reply was sent.

    gRPC calls back when it is done with the call, however slowly the client reads.
    """
    reservation = extraction.reservation
    if reservation is None:
        return
    # False: the call has ended already, and gRPC will not call back any more.
    if not context.add_callback(reservation.release):
        reservation.release()
