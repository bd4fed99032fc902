"""Placeholders for other objects in a checkpoint, read without importing or running their code."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import torch

__all__ = ["StandIn", "load_pickled"]

# torch keeps the classes that a weights-only load may build in one set for the process.
_LOCK = threading.Lock()


class StandIn:
    """Takes the place of an object of any class but tensors, numbers, texts and containers.

    Attributes:
        origin: The class's full name, such as ``"argparse.Namespace"``.
        content: What the object was saved with: mostly its attributes by name.
    """

    origin = ""
    content: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Ignore the arguments that the class's own code would take."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep what the object was saved with."""
        self.content = state


class _DictStandIn(StandIn):
    """The same for a class derived from dict, into which the unpickler puts items."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


def load_pickled(file: Path) -> Any:
    """Load a ``torch.save`` file onto the CPU, by torch's weights-only unpickler.

    That unpickler builds tensors and plain containers only and refuses a file with any other class.
    Training scripts save settings and counters next to the weights, as objects of such classes.
    Each of these classes is stood in for by one that does nothing, so the weights can be read: no
    code that the file names is imported or run.

    Raises:
        Exception: whatever torch's unpickler trips over.
    """
    stand_ins = {name: _stand_in(name, StandIn) for name in _foreign_classes(file)}
    with _LOCK:
        # A class that items are put into is known to be a dict by the unpickler's refusal only.
        for _ in stand_ins:
            try:
                return _load(file, stand_ins)
            except pickle.UnpicklingError as error:
                filled = [
                    name
                    for name, each in stand_ins.items()
                    if "SETITEM" in str(error) and repr(each) in str(error)
                ]
                if not filled:
                    raise
                stand_ins |= {name: _stand_in(name, _DictStandIn) for name in filled}
        return _load(file, stand_ins)


def _load(file: Path, stand_ins: dict[str, type]) -> Any:
    allowed: list[Any] = [(each, name) for name, each in stand_ins.items()]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign_classes(file: Path) -> list[str]:
    """Return the names in the file that the weights-only unpickler would refuse."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    # Files of torch's old format, of other kinds, and damaged ones; loading says what is wrong.
    except Exception:  # noqa: BLE001
        return []


def _stand_in(name: str, kind: type) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (kind,), {"__module__": module, "__qualname__": short, "origin": name})
