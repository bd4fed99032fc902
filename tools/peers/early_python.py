"""Prints a Python for PyTriton's environment.

PyTriton's wheel runs models through a program with a CPython of its own, of the environment's
minor version and an early patch level. It imports the environment's standard library, and fails
where that calls ``RLock._recursion_count``, which its own CPython does not have yet: with Python
3.11.7 it does not start, with 3.11.2 it does. So this prints the first Python of its own minor
version whose library has no such call, or else itself, with which PyTriton then fails to start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECK = "import threading; print(hasattr(threading._PyRLock, '_recursion_count'))"


def candidates() -> list[Path]:
    """Return the Pythons of this one's minor version, this one first."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [Path("/usr/bin"), Path("/usr/local/bin")]
    return [Path(sys.executable), *(folder / name for folder in folders)]


def is_early(python: Path) -> bool:
    """Return whether PyTriton's program can import a Python's standard library."""
    if not python.exists():
        return False
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "False"


if __name__ == "__main__":
    print(next(filter(is_early, candidates()), Path(sys.executable)))
