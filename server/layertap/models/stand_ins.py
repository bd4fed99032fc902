"""Reads checkpoints without importing or running code of the classes in them."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import torch

__all__ = ["StandIn", "load_pickled"]

# torch keeps the classes that a weights-only load may build in one set for the whole process.
_LOCK = threading.Lock()


class StandIn:
    """A placeholder for an object that is not a tensor, number, text or container.

    Attributes:
        origin: The class's full name, such as ``"argparse.Namespace"``.
        content: The pickled state of the object: usually its attributes by name.
    """

    origin = ""
    content: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Ignore the arguments, which are for the class's own code."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep the pickled state."""
        self.content = state


class _DictStandIn(StandIn):
    """A placeholder for an object of a dict subclass, into which the unpickler puts items."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


def load_pickled(file: Path) -> Any:
    """Load a ``torch.save`` file onto the CPU with torch's weights-only unpickler.

    That unpickler builds only tensors and plain containers, and refuses files with other classes.
    But training scripts save settings and counters next to the weights, as objects of such classes.
    So each of these classes is replaced by a placeholder that does nothing. The weights can then be
    read, and no code that the file names is imported or run.

    Raises:
        Exception: Any exception of torch's unpickler.
    """
    stand_ins = {name: _stand_in(name, StandIn) for name in _foreign_classes(file)}
    with _LOCK:
        # Only the unpickler's refusal shows that a class is a dict, into which items are put.
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
    """Return the names of the classes in the file that the weights-only unpickler would refuse."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    # Files of torch's old format, of other kinds, and damaged ones; loading them gives the error.
    except Exception:  # noqa: BLE001
        return []


def _stand_in(name: str, kind: type) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (kind,), {"__module__": module, "__qualname__": short, "origin": name})
