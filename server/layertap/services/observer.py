"""Who is told how extractions end: the seam between the servicers and whatever counts."""

from __future__ import annotations

from typing import Protocol

import grpc

from layertap.engine import Extraction

__all__ = ["Observer", "Unobserved"]


class Observer(Protocol):
    """Is told how each extraction ended. Called from many threads, on the way of every reply."""

    def succeeded(self, model: str, extraction: Extraction) -> None:
        """An extraction is ready to be sent."""

    def failed(self, model: str, code: grpc.StatusCode) -> None:
        """A request was refused or failed.

        ``model`` is a served model's name, or empty where the request named no such model: what
        strangers write must not become a label.
        """


class Unobserved:
    """Takes note of nothing."""

    def succeeded(self, model: str, extraction: Extraction) -> None:
        """Do nothing."""

    def failed(self, model: str, code: grpc.StatusCode) -> None:
        """Do nothing."""
