"""Observers of extractions: the interface between the servicers and metrics, logs and traces."""

from __future__ import annotations

from typing import Protocol

from layertap.engine import Extraction
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode

__all__ = ["Observer", "Observers"]


class Observer(Protocol):
    """Is notified how each extraction ended, from many threads and before each reply is sent."""

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """An extraction has succeeded, and its reply is ready to be sent."""

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """A request was refused or failed.

        ``model`` is the name of a served model. It is empty if the request named no such model,
        since text from a caller must not become a label of a metric.
        """


class Observers:
    """Notifies several observers in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """Notify each of them."""
        for observer in self._observers:
            observer.succeeded(model, extraction, caller)

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """Notify each of them."""
        for observer in self._observers:
            observer.failed(model, code, caller)
