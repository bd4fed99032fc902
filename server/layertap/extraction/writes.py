"""Follows a model's Python code line by line, in functions that may write state.

Note [Between two modules]
    Hooks run only when modules are called. State that is written and removed again between two
    calls (``self.scale = x.max()`` … ``self.scale = None``) exists at none of these moments, but a
    pass in another thread may still read it. So those of the model's own functions that have
    statements which can write state are followed line by line.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["each_line"]

_STORES = {
    dis.opmap[name]
    for name in (
        "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_GLOBAL",
        "DELETE_GLOBAL", "STORE_DEREF", "STORE_SLICE",
    )
    if name in dis.opmap
}  # fmt: skip

_WRITERS = {
    "append", "appendleft", "extend", "extendleft", "insert", "pop", "popleft", "popitem", "remove",
    "clear", "update", "add", "discard", "setdefault", "put", "get", "put_nowait", "get_nowait",
    "acquire", "release", "push", "send", "write", "read", "next", "setattr", "delattr", "vars",
    "__setattr__", "__dict__", "__setitem__", "__next__", "heappush", "heappop", "rotate", "sort",
    "register_forward_hook", "register_forward_pre_hook", "register_buffer", "set_state", "data",
    "setstate", "shuffle", "fill", "set_default_dtype", "use_deterministic_algorithms",
}  # fmt: skip
"""Names of functions and attributes that change an object."""

_TORCH = f"{Path(torch.__file__).parent}/"
_OURS = f"{Path(__file__).parent.parent}/"
_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_PACKAGES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
"""Folders of installed packages, which may be inside the standard library's folder."""


@contextmanager
def each_line(look: Callable[[object], None]) -> Iterator[None]:
    """Call ``look`` inside the block, at the lines of this thread's code that may write state.

    Code of torch, of the standard library and of this package is ignored.

    Args:
        look: Called with the running function's ``self``, or None if it has none. It must not
            raise.
    """
    # Keyed by id, with the code kept alive: hashing a code object would read all of it.
    may_write: dict[int, tuple[bool, CodeType]] = {}

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        look(frame.f_locals.get("self"))
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        known = may_write.get(id(code))
        if known is None:
            known = may_write[id(code)] = _may_write(code) and not _made_for_us(frame), code
        return line if known[0] else None

    former = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(former)


def _made_for_us(frame: FrameType) -> bool:
    """Return whether this is generated code, such as a dataclass's, that our own code calls."""
    caller = frame.f_back
    generated = frame.f_code.co_filename.startswith("<")
    return generated and caller is not None and caller.f_code.co_filename.startswith(_OURS)


def _may_write(code: CodeType) -> bool:
    file = code.co_filename
    if file.startswith((_TORCH, _OURS, "<frozen")):
        return False
    if file.startswith(_LIBRARY) and not file.startswith(_PACKAGES):
        return False
    return bool(_STORES & set(code.co_code[::2])) or any(
        name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
        for name in code.co_names
    )
