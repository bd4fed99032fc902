"""Unloads a version that no longer serves: its requests, hooks, plans and memory."""

from __future__ import annotations

import gc
import threading
import weakref

from torch import nn

from layertap.engine.call import Call
from layertap.engine.host import ModelHost
from layertap.engine.versions import Version, Versions
from layertap.errors import UnavailableError
from layertap.extraction.gate import no_forward_pass

__all__ = ["Unloading"]

TRIES = 5
PAUSE_SECONDS = 0.05


class Unloading:
    """Ends versions that ``Versions`` has replaced or withdrawn.

    Not safe to share between threads: one thread changes the models.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def run(self, former: Version[ModelHost]) -> None:
        """End a version now; returns once its requests are answered and its memory is free."""
        _unload(former)

    def start(self, former: Version[ModelHost]) -> None:
        """End a version in the background."""
        thread = threading.Thread(
            target=_unload, args=(former,), name="layertap-unload", daemon=True
        )
        self._threads = [each for each in self._threads if each.is_alive()]
        try:
            # Started before it is kept: only then is it alive.
            thread.start()
        except RuntimeError:
            # The system allows no more threads. The next version serves already, so this only takes
            # the time of the caller who replaced the model.
            _unload(former)
        else:
            self._threads.append(thread)

    def end_all(self, versions: Versions[ModelHost]) -> None:
        """End what still serves, and wait for the versions that ``start`` was given.

        Call it once the compute threads have ended, and with them all forward passes.
        """
        for host in versions.hosts():
            versions.withdraw(host.model.name)
            host.close()
        for thread in self._threads:
            thread.join()


def _unload(former: Version[ModelHost]) -> None:
    """Wait until no request uses a version, then remove its hooks and free its memory."""
    # In a list: a thread pool keeps a reference to its last argument, and would keep the model.
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
    """Close a host while no forward pass runs: an abandoned one may still use the hooks."""
    with no_forward_pass():
        box.pop().close()


def _collect(module: weakref.ref[nn.Module]) -> None:
    """Free the memory of a model that was closed.

    Modules, hooks and plans refer to each other in cycles, and are too large to wait for the next
    automatic collection. A caller's last frame may outlive its lease by a moment, so try again.
    """
    for _ in range(TRIES):
        gc.collect()
        if module() is None:
            return
        threading.Event().wait(PAUSE_SECONDS)
