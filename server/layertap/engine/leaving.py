"""How a version that is no longer served leaves: its hooks, its plans and its memory."""

from __future__ import annotations

import gc
import threading
import weakref

from torch import nn

from layertap.engine.call import Call
from layertap.engine.host import ModelHost
from layertap.engine.versions import Version
from layertap.errors import UnavailableError
from layertap.extraction.gate import no_forward_pass

__all__ = ["let_go"]

TRIES = 5
PAUSE_SECONDS = 0.05


def let_go(former: Version[ModelHost]) -> None:
    """Wait until nobody uses a version, then take its hooks off and free its memory."""
    # A box, for whoever holds a reference beyond its turn (a thread pool does) keeps the model.
    box = [former.take()]
    compute = box[0].compute
    box[0].stop_promoting()
    module = weakref.ref(box[0].model.module)
    try:
        compute.run(lambda: _close_alone(box), Call())
    except UnavailableError:  # The compute threads have ended, and with them all forward passes.
        box.pop().close()
    _collect(module)


def _close_alone(box: list[ModelHost]) -> None:
    """Close a host while no forward pass runs: one whose caller left may still need the hooks."""
    with no_forward_pass():
        box.pop().close()


def _collect(module: weakref.ref[nn.Module]) -> None:
    """Free what a model leaves.

    Modules, hooks and plans refer to each other in circles, and are too large to leave them until
    the collector comes by on its own. A caller's last frame may outlive its lease by a moment.
    """
    for _ in range(TRIES):
        gc.collect()
        if module() is None:
            return
        threading.Event().wait(PAUSE_SECONDS)
