"""Unloads versions that no longer serve: waits for their requests and frees their memory."""

from __future__ import annotations

import gc
import threading
import weakref

from torch import nn

from layertap.call import Call
from layertap.engine.host import ModelHost
from layertap.engine.versions import Version, Versions
from layertap.errors import UnavailableError
from layertap.extraction.gate import no_forward_pass

__all__ = ["Unloading"]

TRIES = 5
PAUSE_SECONDS = 0.05


class Unloading:
    """Unloads the versions that ``Versions`` has replaced or withdrawn.

    Not safe to share between threads: only the thread that changes the models may use it.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def run(self, former: Version[ModelHost]) -> None:
        """Unload a version; return once its requests are answered and its memory is free."""
        _unload(former)

    def start(self, former: Version[ModelHost]) -> None:
        """Unload a version in the background."""
        thread = threading.Thread(
            target=_unload, args=(former,), name="layertap-unload", daemon=True
        )
        self._threads = [each for each in self._threads if each.is_alive()]
        try:
            # Start it before adding it, because threads that are not alive are removed above.
            thread.start()
        except RuntimeError:
            # The system allows no more threads. The next version already serves, so this only makes
            # the caller who replaced the model wait.
            _unload(former)
        else:
            self._threads.append(thread)

    def end_all(self, versions: Versions[ModelHost]) -> None:
        """Unload all serving versions, and wait for those that are being unloaded.

        Call this after the compute threads, and so all forward passes, have ended.
        """
        for host in versions.hosts():
            versions.withdraw(host.model.name)
            host.close()
        for thread in self._threads:
            thread.join()


def _unload(former: Version[ModelHost]) -> None:
    """Wait until no request uses a version, then remove its hooks and free its memory."""
    # In a list, because a thread pool keeps a reference to its last argument, here the model.
    box = [former.take()]
    compute = box[0].compute
    box[0].stop_promoting()
    module = weakref.ref(box[0].model.module)
    try:
        compute.run(lambda: _close_alone(box), Call())
    except UnavailableError:  # The compute threads, and so all forward passes, have ended.
        box.pop().close()
    _collect(module)


def _close_alone(box: list[ModelHost]) -> None:
    """Close a host while no forward pass runs, as an abandoned pass may still use the hooks."""
    with no_forward_pass():
        box.pop().close()


def _collect(module: weakref.ref[nn.Module]) -> None:
    """Free the memory of a model that was closed.

    Modules, hooks and plans refer to each other in cycles, and are too large to wait for the next
    automatic collection. The last frame of a caller may live slightly longer than its lease, so
    this tries several times.
    """
    for _ in range(TRIES):
        gc.collect()
        if module() is None:
            return
        threading.Event().wait(PAUSE_SECONDS)
