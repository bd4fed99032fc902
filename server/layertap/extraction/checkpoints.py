"""Checkpoints: places in a forward pass where it may be abandoned.

A client may leave while its pass runs, and a pass of a large model takes long. So some of the
model's modules have a pre-hook that asks whether any client still waits. This works with every
extractor that calls the modules: HOOK, FX, CHILDREN and LAYER_GETTER. A compiled program has no
modules, so its passes always run to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from layertap.extraction.catalogue import Catalogue
from layertap.extraction.points import PointKind
from layertap.selection import Capture

__all__ = ["Checkpoints", "checked"]

MAX_CHECKPOINTS = 16
"""Maximum number of checkpoints per model. Each costs about a microsecond in every pass."""

_check: ContextVar[Callable[[], None] | None] = ContextVar("layertap_check", default=None)


class Checkpoints:
    """The pre-hooks of one model, on modules spread evenly over its forward pass.

    Args:
        module: The model.
        catalogue: Its layers, in execution order.
    """

    def __init__(self, module: nn.Module, catalogue: Catalogue) -> None:
        self._handles = []
        modules = dict(module.named_modules())
        for path in _spread(catalogue):
            # torch refuses hooks on modules of TorchScript programs.
            if not isinstance(modules[path], torch.jit.ScriptModule):
                self._handles.append(modules[path].register_forward_pre_hook(_ask))

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@contextmanager
def checked(check: Callable[[], None]) -> Iterator[None]:
    """Call ``check`` at each checkpoint of the passes in the block; it may raise to end a pass."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def _spread(catalogue: Catalogue) -> Sequence[str]:
    points = (
        entry.points[Capture.OUTPUT]
        for entry in catalogue
        if entry.kind is PointKind.MODULE and Capture.OUTPUT in entry.points
    )
    paths = list(dict.fromkeys(point.path for point in points if not point.call))
    return paths[:: -(-len(paths) // MAX_CHECKPOINTS)] if paths else []


def _ask(_: nn.Module, __: tuple[Any, ...]) -> None:
    check = _check.get()
    if check is not None:
        check()
