"""Imports torchvision without torch's compiler, which takes a second or two and is not used.

Note [An import that is put off]
    ``torchvision.ops.roi_align`` (0.20 and later) imports one function of ``torch._dynamo.utils``,
    and with it all of ``torch._dynamo``, sympy among it: two fifths of the time in which torch and
    torchvision are imported. The function is called only where a detection model runs on a device
    without torchvision's own kernel. So while torchvision is imported, another module has that
    name, with a function that imports the real one when it is called. Any other name that is asked
    of it is looked up in the real module. Afterwards the name is free again, and a later
    import of ``torch._dynamo`` gets the real one.

    torch imports it as well, in the first pass in which each operation is watched. So whatever
    watches passes imports it before: measuring a model does, and a model whose catalogue is kept
    (see ``extraction.kept_catalogue``) may be served without.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["import_compiler", "import_torchvision"]

_UTILS = "torch._dynamo.utils"


class _PutOff(ModuleType):
    """Has the name of ``torch._dynamo.utils`` while torchvision is imported."""

    def is_compile_supported(self, device_type: str) -> Any:
        """Call the real function."""
        return _real().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        """Return what the real module has, which is then imported at once."""
        if name.startswith("__"):
            raise AttributeError(name)
        self.end()
        return getattr(_real(), name)

    def end(self) -> None:
        """Give the name back."""
        if sys.modules.get(_UTILS) is self:
            del sys.modules[_UTILS]


def _real() -> Any:
    return importlib.import_module(_UTILS)


def import_compiler() -> None:
    """Import torch's compiler, unless that was done; call it before operations are watched."""
    if "torch._dynamo" not in sys.modules:
        importlib.import_module("torch._dynamo")


def import_torchvision() -> None:
    """Import torchvision; see Note [An import that is put off]. It may be imported already."""
    if "torchvision" in sys.modules or _UTILS in sys.modules:
        return
    importlib.import_module("torch")  # Which must not see the other module.
    put_off = _PutOff(_UTILS)
    sys.modules[_UTILS] = put_off
    try:
        importlib.import_module("torchvision")
    finally:
        put_off.end()
