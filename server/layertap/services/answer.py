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
        reservation: The reply's bytes in the engine's budget; None if they are not counted.
    """

    message: bytes
    reservation: Reservation | None = None

    def release(self) -> None:
        """Release the reply's bytes."""
        if self.reservation is not None:
            self.reservation.release()
