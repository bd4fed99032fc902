"""Commands import PyTorch without the garbage collector, which runs again afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

from layertap.cli.importing import without_collecting

PROGRAM = """
import gc, weakref
from layertap.cli.importing import without_collecting

class Node:
    def __init__(self):
        self.own = self

runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
with without_collecting():
    import torch
    assert not runs
    kept = weakref.ref(Node())
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
later = weakref.ref(Node())
gc.collect()
assert kept() is not None
assert later() is None
before = gc.get_freeze_count()
with without_collecting():
    assert gc.isenabled()
assert gc.get_freeze_count() == before
"""


def test_the_collector_skips_what_was_imported_and_nothing_else() -> None:
    """No collection runs meanwhile; cycles that are made later are freed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_program_that_has_imported_pytorch_is_left_alone() -> None:
    """Its own objects stay the collector's."""
    frozen, enabled = gc.get_freeze_count(), gc.isenabled()
    with without_collecting():
        assert gc.isenabled() == enabled
    assert gc.get_freeze_count() == frozen
