"""What a snapshot holds of one object, and how it differs now."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Change", "Node"]


@dataclass(frozen=True, slots=True)
class Change:
    """A difference from a snapshot.

    Attributes:
        path: Where it is, such as ``encoder.features``.
        reason: Why it can't be restored; empty if it can.
        everywhere: Whether it belongs to a class or to a module's globals, so that all models in
            the process that use this code share it.
        in_place: Whether it is a tensor that was written in place.
        of_torch: Whether it belongs to torch, so that it affects every pass in the process.
    """

    path: str
    reason: str = ""
    everywhere: bool = False
    in_place: bool = False
    of_torch: bool = False


class Node(ABC):
    """One object whose content may change, as it was when the snapshot was taken."""

    reason = ""
    in_place = False
    of_torch = False

    def __init__(self, path: str, *, everywhere: bool) -> None:
        self.path = path
        self.everywhere = everywhere
        self.always = False
        """Whether its whole content is read each time, because a pass was seen to write to it."""

    @abstractmethod
    def suspect(self) -> bool:
        """Return quickly whether it may differ; this may miss what ``written_unseen`` finds."""

    def written_unseen(self) -> bool:
        """Return whether it differs in a way that only reading its whole content shows."""
        return False

    def change(self, key: str) -> Change:
        """Return the change of one of its parts, as named by ``differing``."""
        path = (self.path + key).removeprefix(".")
        return Change(path, self.reason, self.everywhere, self.in_place, self.of_torch)

    @abstractmethod
    def differing(self) -> list[str]:
        """Return, for each part that differs, what to append to the path; empty if none does."""

    def stored(self) -> list[str]:
        """Do the same as ``differing``, but include parts that were replaced by an equal object."""
        return self.differing() or [""]

    @abstractmethod
    def restore(self) -> None:
        """Restore it."""
