"""Follows a model's Python code line by line, in functions that may write state.

Note [Between two modules]
    Hooks run only when modules are called. State that is written and removed again between two
    calls (``self.scale = x.max()`` … ``self.scale = None``) exists at none of these moments, but a
    pass in another thread may still read it. So those of the model's own functions that have
    statements which can write state are followed line by line, and the state is compared after
    each line that holds such a statement.
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

_NAMING = frozenset(dis.hasname)

_UNKNOWN = {
    "PUSH_NULL", "CALL_FUNCTION_EX", "FOR_ITER", "BEFORE_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL",
}  # fmt: skip
"""Instructions that may call something of which no name is known, such as a function in a variable.

Functions and methods that are called by their names need no PUSH_NULL, except for those of modules
from Python 3.14 on, as in ``torch.cat(...)``.
"""

_IN_PLACE = range(13, 26)
"""The arguments of BINARY_OP that mean an operator such as ``+=`` (opcode.py, _nb_ops)."""

_NULL_IS_LAST = sys.version_info >= (3, 13)
"""Whether PUSH_NULL comes after the function that is called; before Python 3.13 it comes first."""

_TORCH = f"{Path(torch.__file__).parent}/"
_OURS = f"{Path(__file__).parent.parent}/"
_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_PACKAGES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
"""Folders of installed packages, which may be inside the standard library's folder."""


@contextmanager
def each_line(look: Callable[[object], None]) -> Iterator[None]:
    """Call ``look`` inside the block, after each line of this thread's code that may write state.

    Code of torch, of the standard library and of this package is ignored.

    Args:
        look: Called with the running function's ``self``, or None if it has none. It must not
            raise.
    """
    # Keyed by id, with the code kept alive: hashing a code object would read all of it.
    known: dict[int, tuple[frozenset[int], CodeType]] = {}

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        found = known.get(id(code))
        if found is None:
            lines = frozenset() if _made_for_us(frame) else _writing_lines(code)
            found = known[id(code)] = lines, code
        return _follower(found[0], look) if found[0] else None

    former = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(former)


def _follower(lines: frozenset[int], look: Callable[[object], None]) -> Callable[..., Any]:
    """Return a trace function for one frame, which looks after some of its lines.

    Python calls it before a line, and before the frame is left; the line before has then run.
    """
    running: int | None = None

    def follow(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal running
        if running in lines:
            look(frame.f_locals.get("self"))
        running = frame.f_lineno
        return follow

    return follow


def _made_for_us(frame: FrameType) -> bool:
    """Return whether this is generated code, such as a dataclass's, that our own code calls."""
    caller = frame.f_back
    generated = frame.f_code.co_filename.startswith("<")
    return generated and caller is not None and caller.f_code.co_filename.startswith(_OURS)


def _writing_lines(code: CodeType) -> frozenset[int]:
    """Return the lines of a function that may write state."""
    file = code.co_filename
    if file.startswith((_TORCH, _OURS, "<frozen")):
        return frozenset()
    if file.startswith(_LIBRARY) and not file.startswith(_PACKAGES):
        return frozenset()
    # Most functions do neither, and need not be read instruction by instruction.
    if not _STORES & set(code.co_code[::2]) and not any(map(_changes, code.co_names)):
        return frozenset()
    steps = list(dis.get_instructions(code))
    return frozenset(
        step.positions.lineno
        for former, step in zip([None, *steps], steps, strict=False)
        if step.positions is not None
        and step.positions.lineno is not None
        and _may_write(step, former)
    )


def _may_write(step: dis.Instruction, former: dis.Instruction | None) -> bool:
    """Return whether an instruction may write state, or names or prepares a call that may.

    Args:
        step: The instruction.
        former: The one before it; None for the first.
    """
    if step.opname == "PUSH_NULL" and _NULL_IS_LAST and former and former.opcode in _NAMING:
        return False  # The instruction before it has the name.
    if step.opcode in _STORES or step.opname in _UNKNOWN:
        return True
    if step.opname == "BINARY_OP":
        return step.arg in _IN_PLACE
    return step.opcode in _NAMING and isinstance(step.argval, str) and _changes(step.argval)


def _changes(name: str) -> bool:
    """Return whether a function or an attribute of this name changes an object."""
    return name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
