"""The kinds of nodes: containers, hooks, places, and objects whose state is a value."""

# ruff: noqa: D102 - Node says what the methods do.

from __future__ import annotations

import operator
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from layertap.extraction.state.equality import SCALARS, equal
from layertap.extraction.state.node import Node
from layertap.extraction.state.places import MISSING, Place

__all__ = [
    "HOOKS",
    "CellsNode",
    "HooksNode",
    "ProbeNode",
    "ScriptNode",
    "SequenceNode",
    "SetNode",
    "TableNode",
    "ThreadLocalNode",
    "is_ours",
    "key_text",
]


LARGE_BYTES = 1 << 20
"""Larger arrays are read only by ``deep_changes``, unless a pass was seen to write to them."""

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class TableNode(Node):
    """Values by key: the entries of a dictionary, or the attributes of an object."""

    def __init__(
        self, path: str, values: dict[Any, Any], *, everywhere: bool, attributes: bool
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        # Use the base class's methods: a subclass may forbid writing, as a read-only dict does.
        self._base: Any = OrderedDict if isinstance(values, OrderedDict) else dict
        self._values = values
        self._attributes = attributes
        self._keys = list(self._base.keys(values))
        self._held = list(self._base.values(values))

    def suspect(self) -> bool:
        values = self._values
        if len(values) != len(self._keys):
            return True
        if not all(map(operator.is_, self._base.values(values), self._held)):
            return True
        return not all(map(operator.is_, self._base.keys(values), self._keys))

    def differing(self) -> list[str]:
        former, now = dict(zip(self._keys, self._held, strict=True)), self._now()
        keys = [key for key in former if key not in now or not equal(former[key], now[key])]
        keys += [key for key in now if key not in former]
        if not keys and not self._attributes and list(now) != self._keys:
            return [""]  # The order of the entries differs.
        return [key_text(key, attribute=self._attributes) for key in keys]

    def stored(self) -> list[str]:
        former, now = dict(zip(self._keys, self._held, strict=True)), self._now()
        keys = [k for k in {**former, **now} if former.get(k, MISSING) is not now.get(k, MISSING)]
        return [key_text(key, attribute=self._attributes) for key in keys]

    def restore(self) -> None:
        former, now = dict(zip(self._keys, self._held, strict=True)), self._now()
        if not self._attributes and list(now) != self._keys:
            self._base.clear(self._values)
            now = {}
        for key in now.keys() - former.keys():
            self._base.__delitem__(self._values, key)
        for key, value in former.items():
            if now.get(key, MISSING) is not value:
                self._base.__setitem__(self._values, key, value)

    def entries(self) -> list[tuple[Any, Any]]:
        """Return the keys and values of now."""
        return list(self._base.items(self._values))

    def _now(self) -> dict[Any, Any]:
        return dict(self.entries())


class ThreadLocalNode(TableNode):
    """The attributes that a ``threading.local`` has in the calling thread."""

    def __init__(self, path: str, local: threading.local, *, everywhere: bool) -> None:
        super().__init__(path, vars(local), everywhere=everywhere, attributes=True)
        self._local = local

    def suspect(self) -> bool:
        self._values = vars(self._local)
        return super().suspect()


class SequenceNode(Node):
    """The members of a list or a deque."""

    def __init__(self, path: str, values: list[Any] | deque[Any], *, everywhere: bool) -> None:
        super().__init__(path, everywhere=everywhere)
        self._values = values
        self._held = list(values)

    def suspect(self) -> bool:
        values = self._values
        return len(values) != len(self._held) or not all(map(operator.is_, values, self._held))

    def differing(self) -> list[str]:
        same = len(self._values) == len(self._held) and all(map(equal, self._values, self._held))
        return [] if same else [""]

    def restore(self) -> None:
        if isinstance(self._values, deque):
            deque.clear(self._values)
            deque.extend(self._values, self._held)
        else:
            list.__setitem__(self._values, slice(None), self._held)


class SetNode(Node):
    """The members of a set."""

    def __init__(self, path: str, values: set[Any], *, everywhere: bool) -> None:
        super().__init__(path, everywhere=everywhere)
        self._values = values
        self._held = list(values)
        self._ids = set(map(id, self._held))

    def suspect(self) -> bool:
        return len(self._values) != len(self._ids) or set(map(id, self._values)) != self._ids

    def differing(self) -> list[str]:
        if all(isinstance(value, SCALARS) for value in (*self._values, *self._held)):
            return [] if self._values == set(self._held) else [""]
        return [""]

    def restore(self) -> None:
        set.clear(self._values)
        set.update(self._values, self._held)


class HooksNode(Node):
    """The hooks on a module, except this package's own."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, everywhere=False)
        self._tables: list[dict[int, Any]] = [vars(module)[name] for name in HOOKS]
        self._held = self._now()

    def _now(self) -> list[dict[int, Any]]:
        calls = [dict(table) for table in self._tables[:2]]
        own = {key for table in calls for key, hook in table.items() if is_ours(hook)}
        return [{k: v for k, v in table.items() if k not in own} for table in self._tables]

    def suspect(self) -> bool:
        return (any(self._tables) or any(self._held)) and self._now() != self._held

    def differing(self) -> list[str]:
        return [".hooks"] if self.suspect() else []

    def restore(self) -> None:
        for table, held, now in zip(self._tables, self._held, self._now(), strict=True):
            own = {key: value for key, value in table.items() if key not in now}
            table.clear()
            table.update(held)
            table.update(own)


class CellsNode(Node):
    """Places that hold one value each: slots, cells of closures, attributes of a class."""

    def __init__(
        self,
        path: str,
        places: Mapping[str, Place],
        *,
        everywhere: bool,
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self._places = places
        self._held = {name: read() for name, (read, _) in places.items()}

    @property
    def held(self) -> Mapping[str, Any]:
        """The values; empty places are left out."""
        return {name: value for name, value in self._held.items() if value is not MISSING}

    def suspect(self) -> bool:
        return any(read() is not self._held[name] for name, (read, _) in self._places.items())

    def differing(self) -> list[str]:
        return [
            f".{name}"
            for name, (read, _) in self._places.items()
            if not equal(read(), self._held[name])
        ]

    def restore(self) -> None:
        for name, (read, write) in self._places.items():
            if read() is not self._held[name]:
                write(self._held[name])


class ProbeNode(Node):
    """An object whose state can be read as a value, such as a random generator or a lock."""

    def __init__(
        self,
        path: str,
        read: Callable[[], Any],
        write: Callable[[Any], None] | None,
        *,
        everywhere: bool,
        reason: str = "",
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self.reason = reason
        self._read = read
        self._write = write
        self._held = read()
        self._large = isinstance(self._held, bytes) and len(self._held) > LARGE_BYTES

    def suspect(self) -> bool:
        return (self.always or not self._large) and self.written_unseen()

    def written_unseen(self) -> bool:
        return bool(self._read() != self._held)

    def differing(self) -> list[str]:
        return [""] if self.written_unseen() else []

    def restore(self) -> None:
        if self._write is not None:
            self._write(self._held)


class ScriptNode(Node):
    """The attributes of a TorchScript module, which only its program can reach."""

    def __init__(self, path: str, module: torch.jit.ScriptModule, names: Iterable[str]) -> None:
        super().__init__(path, everywhere=False)
        self._program: Any = module._c
        self._held = {name: _copied(value) for name, value in self._read(names).items()}

    def _read(self, names: Iterable[str]) -> dict[str, Any]:
        read = {}
        for name in names:
            try:
                value = self._program.getattr(name)
            except (AttributeError, RuntimeError):  # No such attribute, or no Python object.
                continue
            if not isinstance(value, (nn.Module, torch._C.ScriptModule, torch._C.ScriptObject)):
                read[name] = value
        return read

    def suspect(self) -> bool:
        return bool(self.differing())

    def differing(self) -> list[str]:
        now = self._read(self._held)
        return [f".{name}" for name, held in self._held.items() if not equal(now.get(name), held)]

    def restore(self) -> None:
        for key in self.differing():
            self._program.setattr(key[1:], _copied(self._held[key[1:]]))


def key_text(key: Any, *, attribute: bool) -> str:
    """Return what a key of a dictionary, or the name of an attribute, adds to a path."""
    return f".{key}" if attribute else f"[{str(key)[:40]!r}]" if isinstance(key, str) else "[…]"


def is_ours(hook: Any) -> bool:
    """Return whether a hook belongs to this package."""
    return str(getattr(hook, "__module__", "")).startswith("layertap.")


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(member) for member in value)
    if isinstance(value, dict):
        return {key: _copied(member) for key, member in value.items()}
    return value
