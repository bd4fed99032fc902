"""The serialized reply to one request."""

from __future__ import annotations

from dataclasses import dataclass

from layertap.engine import Reservation

__all__ = ["Answer"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one request or one item of a stream.

    Attributes:
        message: The serialized reply.
        reservation: Its bytes of the engine's budget; None for a reply that counts for nothing.
    """

    message: bytes
    reservation: Reservation | None = None

    def release(self) -> None:
        """Give the bytes back."""
        if self.reservation is not None:
            self.reservation.release()
