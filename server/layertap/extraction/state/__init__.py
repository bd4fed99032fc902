"""The state that a model keeps in Python: takes snapshots, finds differences, and restores it."""

from layertap.extraction.state.node import Change
from layertap.extraction.state.snapshot import Snapshot
from layertap.extraction.state.watch import Watch

__all__ = ["Change", "Snapshot", "Watch"]
