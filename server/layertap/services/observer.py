"""Who is told how extractions end: the seam between the servicers and whatever counts."""

from __future__ import annotations

from typing import Protocol

import grpc

from layertap.engine import Extraction

__all__ = ["Observer", "Observers"]


class Observer(Protocol):
    """Is told how each extraction ended. Called from many threads, on the way of every reply."""

    def succeeded(self, model: str, extraction: Extraction[bytes]) -> None:
        """An extraction is ready to be sent."""

    def failed(self, model: str, code: grpc.StatusCode) -> None:
        """A request was refused or failed.

        ``model`` is a served model's name, or empty where the request named no such model: what
        strangers write must not become a label.
        """


class Observers:
    """Tells each of several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def succeeded(self, model: str, extraction: Extraction[bytes]) -> None:
        """Tell each of them."""
        for observer in self._observers:
            observer.succeeded(model, extraction)

    def failed(self, model: str, code: grpc.StatusCode) -> None:
        """Tell each of them."""
        for observer in self._observers:
            observer.failed(model, code)
