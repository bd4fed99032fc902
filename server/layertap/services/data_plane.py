"""The use case that all protocols share: run one request on one version of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from layertap.description import ModelDescription
from layertap.engine import (
    Engine,
    Extraction,
    ExtractionRequest,
    ModelHost,
    Reservation,
    describe,
    summarize,
)
from layertap.services.caller import Caller
from layertap.services.error_codes import code_of
from layertap.services.observer import Observer

__all__ = ["Converted", "DataPlane"]

D = TypeVar("D")

Converted = tuple[str, ExtractionRequest[bytes] | Callable[[ModelHost], ExtractionRequest[bytes]]]
"""The name of a request's model, and the engine's form of the request.

The second member may instead be a function of the model's version that returns the form, for a
protocol in which the form depends on the version, such as on its default outputs.
"""


class DataPlane:
    """Runs requests of every protocol. Safe to share between threads.

    A unary call is one ``extract``. A stream does the same in the steps ``receive``, ``decode`` and
    ``run``, because it decodes an item and counts its bytes before a thread is free to run it.

    Args:
        engine: Runs the requests.
        observer: Notified how each extraction ended.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self._engine = engine
        self._observer = observer

    def extract(
        self,
        message: bytes,
        decode: Callable[[bytes], D],
        convert: Callable[[D, Reservation], Converted],
        caller: Caller,
    ) -> Extraction[bytes]:
        """Decode a request, convert it, and run it on one version of its model.

        Args:
            message: The request.
            decode: Decodes the message.
            convert: Converts the result of ``decode``. It must count further bytes that it
                allocates with the reservation.
            caller: Who sent the request.

        Returns:
            The reply. The caller must release it once it was sent.

        Raises:
            Exception: Any exception of ``decode``, ``convert`` or ``Engine.extract``, after the
                observer was notified.
        """
        received = self.receive(len(message), caller)
        return self.run(received, caller, lambda: convert(decode(message), received))

    def models(self) -> list[ModelDescription]:
        """Describe the models that are ready, without their layers."""
        return [summarize(host) for host in self._engine.hosts()]

    def describe(self, model: str, *, fingerprint: bool = False) -> ModelDescription:
        """Describe a model and its layers, with the model's fingerprint on request.

        Raises:
            ModelNotFoundError: If there is no such model.
            UnavailableError: If it is being loaded or could not be loaded.
        """
        return describe(self._engine.host(model), fingerprint=fingerprint)

    def receive(self, nbytes: int, caller: Caller) -> Reservation:
        """Count the bytes of a received request.

        Raises:
            OverloadedError: If they would exceed the limit. The observer is notified first.
        """
        try:
            return self._engine.reserve(nbytes)
        except Exception as error:
            self._observer.failed("", code_of(error), caller)
            raise

    def decode(self, received: Reservation, caller: Caller, decode: Callable[[], D]) -> D:
        """Return the result of ``decode``; if it raises, release the bytes and notify the observer.

        Args:
            received: The bytes of the request.
            caller: Who sent the request.
            decode: Decodes the request. Not called if the request was cancelled or has expired.
        """
        try:
            caller.call.check()
            return decode()
        except Exception as error:
            received.release()
            self._observer.failed("", code_of(error), caller)
            raise

    def run(
        self, received: Reservation, caller: Caller, convert: Callable[[], Converted]
    ) -> Extraction[bytes]:
        """Convert a request and run it; see ``extract``.

        Args:
            received: The bytes of the request; released when this returns or raises.
            caller: Who sent the request.
            convert: Converts the request. Not called if the request was cancelled or has expired.
        """
        model = ""
        try:
            caller.call.check()
            name, request = convert()
            with self._engine.lease(name) as host:
                model = host.model.name
                if not isinstance(request, ExtractionRequest):
                    request = request(host)
                extraction = self._engine.extract(request, caller.call, host, received)
        except Exception as error:
            self._observer.failed(model, code_of(error), caller)
            raise
        finally:
            received.release()
        self._observer.succeeded(model, extraction, caller)
        return extraction
