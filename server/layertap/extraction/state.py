"""The state that a model keeps in Python: takes snapshots, finds differences, and restores it.

Note [What a snapshot sees]
    Everything that a forward pass can reach from the module: attributes, lists, dictionaries, sets,
    plain objects inside them (with or without ``__slots__``), tensors and arrays that are written
    in place, the closures and default arguments of functions, random generators, locks, and the
    content of the model's classes and of the files that define them. Each object is visited once,
    so cycles are no problem. Objects of torch, and the standard library's threads and loggers, are
    ignored.

Note [Equal, not identical]
    A pass that stores an equal value again (``self.size = (7, 7)``, or a weight computed again from
    the same parameters) has changed nothing that another pass could see. So if the objects are not
    the same, their content is compared.

Note [What can't be restored]
    A generator or another iterator can't be rewound, we don't rewrite the content of files, and
    very large parameters are not copied. A change of any of these is reported as one that can't be
    restored.
"""

from __future__ import annotations

import array
import concurrent.futures
import enum
import functools
import io
import itertools
import logging
import math
import operator
import pathlib
import pickle
import random
import re
import sys
import threading
import time
import types
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

__all__ = ["Change", "Snapshot", "Watch"]

PARAMETER_BYTES = 512 << 20
"""Above this total size parameters are not copied: changes are noticed, but can't be restored."""

OTHER_BYTES = 16 << 20
"""Copies of other tensors are kept up to this total size even if no pass changed any of them."""

LARGE_BYTES = 1 << 20
"""Larger arrays are read only by ``deep_changes``, unless a pass was seen to write to them."""

MAX_NODES = 200_000
"""Maximum number of objects that a snapshot follows; further objects are not watched."""

WATCH_SECONDS = 3.0
"""Time for comparing during a watched pass. Later changes are seen only when the pass has ended."""

SMALL_NODES = 1000
"""Up to this number of objects, comparing is so fast that it is done at every module."""

MAX_COMPARED_DEPTH = 8
"""Levels of nested containers that are compared by content."""

_INERT = (
    int, float, complex, bool, str, bytes, type(None), type(Ellipsis), type, range, slice,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType, types.GetSetDescriptorType,
    types.MemberDescriptorType, enum.Enum, pathlib.PurePath, re.Pattern, logging.Logger,
    logging.Handler, threading.Thread, concurrent.futures.Executor, concurrent.futures.Future,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, np.generic,
    fx.Graph, fx.Node, property, functools.cached_property,
)  # fmt: skip
"""Types whose objects never change, or whose changes don't matter to a forward pass."""

_SCALARS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)

_SKIPPED_PACKAGES = ("torch._", "torch.fx", "torch.jit", "torch.utils.", "layertap.")
"""Packages whose objects are ignored, unless they are modules."""

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_OTHER_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)  # fmt: skip
_MODULE_TABLES = ("_parameters", "_buffers", "_modules")

_TABLES_OF_ALL_MODELS = ("_CAN_RECORD_REGISTRY",)
"""Globals that are written when any model is made: in transformers, what each class can record.

They are no state of a model's passes, and a restored one would lack what other models have added.
"""

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Change:
    """A difference from a snapshot.

    Attributes:
        path: Where it is, such as ``encoder.features``.
        reason: Why it can't be restored; empty if it can.
        everywhere: Whether it belongs to a class or to a module's globals, so that all models in
            the process that use this code share it.
        in_place: Whether it is a tensor that was written in place.
        of_torch: Whether it belongs to torch, so that it affects every pass in the process.
    """

    path: str
    reason: str = ""
    everywhere: bool = False
    in_place: bool = False
    of_torch: bool = False


class Snapshot:
    """What a module and everything reachable from it held when the snapshot was taken.

    Not safe to use from several threads at once.

    Args:
        module: The module. No pass of it may run meanwhile.
        copies: Whether to copy the content of tensors. Without copies, in-place writes are noticed
            only if torch counts them, and can't be undone.
    """

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, module: nn.Module, *, copies: bool = True) -> None:
        walk = _Walk(module, copies=copies)
        self._nodes = walk.nodes
        self._modules = {path: id(part) for path, part in module.named_modules()}
        self.outside = tuple(walk.outside)
        """Paths of the modules that ``named_modules`` doesn't see, as they are not registered."""

    def changes(self, *, hooks: bool = True) -> list[Change]:
        """Return what differs now, each path once; ``hooks`` includes the hooks of modules."""
        return self._differing(
            lambda node: (hooks or not isinstance(node, _Hooks)) and node.suspect()
        )

    def deep_changes(self) -> list[Change]:
        """Return what differs now, after reading the whole content that was copied.

        This is slower than ``changes``, which relies on torch's count of in-place writes; torch
        does not count ``x.data.add_(1)``.
        """
        return self._differing(lambda node: node.suspect() or node.written_unseen())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything that can be restored and that ``changes`` sees."""
        for node in self._nodes:
            if node.suspect():
                node.restore()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def deep_restore(self) -> None:
        """Restore everything that can be restored and that ``deep_changes`` sees."""
        for node in self._nodes:
            if node.suspect() or node.written_unseen():
                node.restore()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def deep_undo(self) -> list[Change]:
        """Return ``deep_changes``, and undo them as ``deep_restore`` does."""
        nodes = [node for node in self._nodes if node.suspect() or node.written_unseen()]
        if not nodes:
            return []  # The content is read only once, as nearly always.
        changes = self.deep_changes()
        self.deep_restore()
        return changes

    def settle(self, written: Iterable[str] = ()) -> None:
        """Free the copies of tensors that no pass was seen to write to.

        Args:
            written: Paths that passes changed. Their copies are kept, and ``changes`` and
                ``restore`` read their whole content too.
        """
        written = set(written)
        tensors = [node for node in self._nodes if isinstance(node, _Tensor)]
        others = sum(t.copied_bytes for t in tensors if not t.is_parameter)
        for node in self._nodes:
            node.always |= node.path in written
        for tensor in tensors:
            droppable = tensor.is_parameter or (not written and others > OTHER_BYTES)
            if droppable and not tensor.always:
                tensor.forget()

    def by_owner(self) -> dict[int, list[_Node]]:
        """Map the id of each module to its nodes; nodes of classes belong to every module."""
        owned: dict[int, list[_Node]] = {part: [] for part in self._modules.values()}
        shared = [node for node in self._nodes if node.everywhere]
        for node in self._nodes:
            path = node.path.partition("[")[0]
            while path and path not in self._modules:
                path = path.rpartition(".")[0]
            if not node.everywhere:
                owned[self._modules[path]].append(node)
        return {part: [*nodes, *shared] for part, nodes in owned.items()}

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def rewritten(self) -> set[str]:
        """Return the paths at which something was stored, even if the value is the same."""
        return {
            node.change(key).path for node in self._nodes if node.suspect() for key in node.stored()
        }

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _differing(self, ask: Callable[[_Node], bool]) -> list[Change]:
        found: dict[str, Change] = {}
        for node in filter(ask, self._nodes):
            for key in node.differing():
                change = node.change(key)
                found.setdefault(change.path, change)
        return list(found.values())


class Watch:
    """Records what differs from a snapshot while passes run, even if only briefly.

    Args:
        snapshot: The state before the passes.

    Attributes:
        changes: The differences seen so far, by path.
        threads: The ids of the threads on which modules ran.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.changes: dict[str, Change] = {}
        self.threads: set[int] = set()
        self._nodes = list(snapshot._nodes)
        self._by_owner = snapshot.by_owner()
        self._lock = threading.Lock()
        self._spent = 0.0
        self._next = 0.0

    def look(self) -> None:
        """Compare now, unless the time for comparing is used up."""
        # Don't wait for the lock: comparing may itself run code that is followed line by line.
        if not self._lock.acquire(blocking=False):
            return
        try:
            begun = time.perf_counter()
            if self._spent < WATCH_SECONDS:
                self._compare(self._nodes)
                ended = time.perf_counter()
                self._spent += ended - begun
                self._next = ended + 2 * (ended - begun)
        finally:
            self._lock.release()

    def look_at(self, owner: object) -> None:
        """Compare one module's state; in a small model, or now and then, compare all of it.

        In a large model, a write by one module's code to another module may be noticed late.
        """
        if len(self._nodes) <= SMALL_NODES or time.perf_counter() >= self._next:
            self.look()
        elif id(owner) in self._by_owner and self._lock.acquire(blocking=False):
            try:
                self._compare(self._by_owner[id(owner)])
            finally:
                self._lock.release()

    def look_now_and_then(self) -> None:
        """Compare: always in a small model, in others for at most a third of the time."""
        if torch.compiler.is_compiling():
            return  # torch.compile would trace the comparison as part of the model.
        self.threads.add(threading.get_ident())
        if len(self._nodes) > SMALL_NODES and time.perf_counter() < self._next:
            return
        # Don't trace our own code line by line, which would take most of the time.
        tracing = sys.gettrace()
        sys.settrace(None)
        try:
            self.look()
        finally:
            sys.settrace(tracing)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _compare(self, nodes: list[_Node]) -> None:
        differing = []
        for node in nodes:
            keys = node.differing() if node.suspect() else ()
            for key in keys:
                change = node.change(key)
                self.changes.setdefault(change.path, change)
            if keys:
                differing.append(node)
        # Once is enough: an object that changes on every line need not be compared every time.
        for node in differing:
            for known in (self._nodes, *self._by_owner.values()):
                if node in known:
                    known.remove(node)


class _Node(ABC):
    """One object whose content may change, as it was when the snapshot was taken."""

    reason = ""
    in_place = False
    of_torch = False

    def __init__(self, path: str, *, everywhere: bool) -> None:
        self.path = path
        self.everywhere = everywhere
        self.always = False
        """Whether its whole content is read each time, because a pass was seen to write to it."""

    @abstractmethod
    def suspect(self) -> bool:
        """Return quickly whether it may differ; this may miss what ``written_unseen`` finds."""

    def written_unseen(self) -> bool:
        """Return whether it differs in a way that only reading its whole content shows."""
        return False

    def change(self, key: str) -> Change:
        """Return the change of one of its parts, as named by ``differing``."""
        path = (self.path + key).removeprefix(".")
        return Change(path, self.reason, self.everywhere, self.in_place, self.of_torch)

    @abstractmethod
    def differing(self) -> list[str]:
        """Return, for each part that differs, what to append to the path; empty if none does."""

    def stored(self) -> list[str]:
        """Do the same as ``differing``, but include parts that were replaced by an equal object."""
        return self.differing() or [""]

    @abstractmethod
    def restore(self) -> None:
        """Restore it."""


class _Table(_Node):
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
        keys = [key for key in former if key not in now or not _equal(former[key], now[key])]
        keys += [key for key in now if key not in former]
        if not keys and not self._attributes and list(now) != self._keys:
            return [""]  # The order of the entries differs.
        return [_key_text(key, attribute=self._attributes) for key in keys]

    def stored(self) -> list[str]:
        former, now = dict(zip(self._keys, self._held, strict=True)), self._now()
        keys = [k for k in {**former, **now} if former.get(k, _MISSING) is not now.get(k, _MISSING)]
        return [_key_text(key, attribute=self._attributes) for key in keys]

    def restore(self) -> None:
        former, now = dict(zip(self._keys, self._held, strict=True)), self._now()
        if not self._attributes and list(now) != self._keys:
            self._base.clear(self._values)
            now = {}
        for key in now.keys() - former.keys():
            self._base.__delitem__(self._values, key)
        for key, value in former.items():
            if now.get(key, _MISSING) is not value:
                self._base.__setitem__(self._values, key, value)

    def _now(self) -> dict[Any, Any]:
        return dict(self._base.items(self._values))


class _ThreadLocal(_Table):
    """The attributes that a ``threading.local`` has in the calling thread."""

    def __init__(self, path: str, local: threading.local, *, everywhere: bool) -> None:
        super().__init__(path, vars(local), everywhere=everywhere, attributes=True)
        self._local = local

    def suspect(self) -> bool:
        self._values = vars(self._local)
        return super().suspect()


class _Sequence(_Node):
    """The members of a list or a deque."""

    def __init__(self, path: str, values: list[Any] | deque[Any], *, everywhere: bool) -> None:
        super().__init__(path, everywhere=everywhere)
        self._values = values
        self._held = list(values)

    def suspect(self) -> bool:
        values = self._values
        return len(values) != len(self._held) or not all(map(operator.is_, values, self._held))

    def differing(self) -> list[str]:
        same = len(self._values) == len(self._held) and all(map(_equal, self._values, self._held))
        return [] if same else [""]

    def restore(self) -> None:
        if isinstance(self._values, deque):
            deque.clear(self._values)
            deque.extend(self._values, self._held)
        else:
            list.__setitem__(self._values, slice(None), self._held)


class _Set(_Node):
    """The members of a set."""

    def __init__(self, path: str, values: set[Any], *, everywhere: bool) -> None:
        super().__init__(path, everywhere=everywhere)
        self._values = values
        self._held = list(values)
        self._ids = set(map(id, self._held))

    def suspect(self) -> bool:
        return len(self._values) != len(self._ids) or set(map(id, self._values)) != self._ids

    def differing(self) -> list[str]:
        if all(isinstance(value, _SCALARS) for value in (*self._values, *self._held)):
            return [] if self._values == set(self._held) else [""]
        return [""]

    def restore(self) -> None:
        set.clear(self._values)
        set.update(self._values, self._held)


class _Hooks(_Node):
    """The hooks on a module, except this package's own."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, everywhere=False)
        self._tables: list[dict[int, Any]] = [vars(module)[name] for name in _HOOKS]
        self._held = self._now()

    def _now(self) -> list[dict[int, Any]]:
        calls = [dict(table) for table in self._tables[:2]]
        own = {key for table in calls for key, hook in table.items() if _is_ours(hook)}
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


class _Cells(_Node):
    """Places that hold one value each: slots, cells of closures, attributes of a class."""

    def __init__(
        self,
        path: str,
        places: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]],
        *,
        everywhere: bool,
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self._places = places
        self._held = {name: read() for name, (read, _) in places.items()}

    @property
    def held(self) -> Mapping[str, Any]:
        """The values; empty places are left out."""
        return {name: value for name, value in self._held.items() if value is not _MISSING}

    def suspect(self) -> bool:
        return any(read() is not self._held[name] for name, (read, _) in self._places.items())

    def differing(self) -> list[str]:
        return [
            f".{name}"
            for name, (read, _) in self._places.items()
            if not _equal(read(), self._held[name])
        ]

    def restore(self) -> None:
        for name, (read, write) in self._places.items():
            if read() is not self._held[name]:
                write(self._held[name])


class _Probe(_Node):
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


class _Script(_Node):
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
        return [f".{name}" for name, held in self._held.items() if not _equal(now.get(name), held)]

    def restore(self) -> None:
        for key in self.differing():
            self._program.setattr(key[1:], _copied(self._held[key[1:]]))


class _Tensor(_Node):
    """A tensor: the memory that it uses, and the content of that memory."""

    in_place = True

    def __init__(
        self,
        path: str,
        tensor: torch.Tensor,
        copy: torch.Tensor | None,
        *,
        everywhere: bool,
        is_parameter: bool,
    ) -> None:
        super().__init__(path, everywhere=everywhere)
        self.is_parameter = is_parameter
        self._tensor = tensor
        # An alias of the memory, in case the model assigns other memory to ``tensor.data``.
        self._alias = tensor.data
        self._copy = copy
        self._mark = self._now()

    @property
    def reason(self) -> str:  # type: ignore[override]
        return "" if self._copy is not None else "no copy of this tensor was kept"

    @property
    def copied_bytes(self) -> int:
        return 0 if self._copy is None else self._copy.nbytes

    def _now(self) -> tuple[Any, ...]:
        tensor = self._tensor
        version = None if tensor.is_inference() else tensor._version
        return _place(tensor), tuple(tensor.shape), tensor.dtype, version

    def suspect(self) -> bool:
        return not self._is_as_marked() or (self.always and self.written_unseen())

    def _is_as_marked(self) -> bool:
        """Return whether ``_now`` is what it was, in less time: this runs at every line of code."""
        tensor, (place, shape, dtype, version) = self._tensor, self._mark
        return (
            _place(tensor) == place
            and tensor.shape == shape
            and tensor.dtype is dtype
            and (None if tensor.is_inference() else tensor._version) == version
        )

    def written_unseen(self) -> bool:
        if self._copy is None:
            return False
        if self._now()[:3] == self._mark[:3]:
            return not _same_bytes(_bytes_of(self._alias), self._copy)
        return not _equal(self._tensor.data, self._original())

    def differing(self) -> list[str]:
        differs = self._now() != self._mark if self._copy is None else self.written_unseen()
        return [""] if differs else []

    def _original(self) -> torch.Tensor:
        """Return a separate tensor with the values at the time of the snapshot."""
        copy = cast(torch.Tensor, self._copy).clone().view(self._alias.dtype)
        return copy.as_strided(
            self._alias.shape, self._alias.stride(), self._alias.storage_offset()
        )

    def restore(self) -> None:
        if self._copy is None:
            self._mark = self._now()  # Report the change only once; it can't be undone.
            return
        if self._now()[:3] != self._mark[:3]:
            self._tensor.data = self._alias
        if not _same_bytes(_bytes_of(self._alias), self._copy):
            _bytes_of(self._alias).copy_(self._copy)
        self._mark = self._now()

    def forget(self) -> None:
        """Free the copy."""
        self._copy = None


class _Functions(_Node):
    """The functions of torch, which a model may replace while it runs.

    They are restored only if a pass was seen to replace them. torch itself replaces
    ``manual_seed`` by a wrapper when its compiler is imported, which changes nothing.
    """

    of_torch = True

    def __init__(self) -> None:
        super().__init__("torch's functions", everywhere=True)
        self._held = [
            (place, {name: value for name, value in vars(place).items() if _is_function(value)})
            for place in (nn.functional, torch, torch.Tensor)
        ]

    def suspect(self) -> bool:
        for place, held in self._held:
            now = vars(place)
            if all(map(operator.is_, map(now.get, held), held.values())):
                continue
            for name, value in held.items():
                if _is_wrapped_by_torch(now.get(name), value):
                    held[name] = now[name]
                elif now.get(name) is not value:
                    return True
        return False

    def differing(self) -> list[str]:
        return [""] if self.suspect() else []

    def restore(self) -> None:
        if not self.always:
            return
        for place, held in self._held:
            for name, value in held.items():
                if vars(place).get(name) is not value:
                    setattr(place, name, value)


class _Settings(_Node):
    """The process-wide settings of torch, which affect other passes too.

    Code that changes a setting is expected to restore it, so settings are restored here only if a
    pass was seen to change them.
    """

    of_torch = True

    def __init__(self) -> None:
        super().__init__("torch's settings", everywhere=True)
        self._held = self._now()

    @staticmethod
    def _now() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        )

    def suspect(self) -> bool:
        return self._now() != self._held

    def differing(self) -> list[str]:
        return [""] if self.suspect() else []

    def restore(self) -> None:
        if self.always:
            dtype, deterministic, mkldnn = self._held
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.mkldnn.enabled = mkldnn


class _Walk:
    """Finds every object that a snapshot must follow, starting at a module."""

    def __init__(self, root: nn.Module, *, copies: bool) -> None:
        self.nodes: list[_Node] = [_Settings(), _Functions()]
        self.outside: list[str] = []
        self._registered = {id(module): path for path, module in root.named_modules()}
        self._seen: set[int] = set()
        self._kept_alive: list[Any] = []
        self._todo: deque[tuple[str, Any, bool]] = deque([("", root, False)])
        parameters = list(root.parameters())
        size = sum(parameter.nbytes for parameter in parameters)
        self._uncopied = {id(p) for p in parameters} if size > PARAMETER_BYTES else set()
        self._parameters = {id(parameter) for parameter in parameters}
        self._places: set[tuple[int, str]] = set()
        self._visitors: tuple[tuple[Any, Callable[[str, Any, bool], None]], ...] = (
            (torch.Tensor, self._tensor),
            (nn.Module, self._module),
            (dict, self._dict),
            ((list, deque), self._sequence),
            ((tuple, frozenset), self._members),
            (set, self._set),
            (types.FunctionType, self._function),
            ((types.MethodType, functools.partial, staticmethod, classmethod), self._callable),
        )
        self._copies: dict[int, torch.Tensor] | None = {} if copies else None
        self._script_names = _script_names(root)
        while self._todo and len(self.nodes) < MAX_NODES:
            path, value, everywhere = self._todo.popleft()
            self._visit(path, value, everywhere)
        # The objects were kept alive until here, as an id is unique only while its object lives.
        self._kept_alive.clear()

    def _visit(self, path: str, value: Any, everywhere: bool) -> None:
        if isinstance(value, _INERT) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept_alive.append(value)
        visit = self._visitor(value)
        if visit is not None:
            visit(path, value, everywhere)

    def _visitor(self, value: Any) -> Callable[[str, Any, bool], None] | None:
        for kinds, visit in self._visitors:
            if isinstance(value, kinds):
                return visit
        if _probe_of(value) is not None:
            return self._probe
        return None if type(value).__module__.startswith(_SKIPPED_PACKAGES) else self._object

    def _add(self, path: str, value: Any, everywhere: bool) -> None:
        if not isinstance(value, _INERT):
            self._todo.append((path, value, everywhere))

    def _tensor(self, path: str, value: torch.Tensor, everywhere: bool) -> None:
        copy = None
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if plain and self._copies is not None and id(value) not in self._uncopied:
            try:
                copy = self._copy_of(value, self._copies)
            except (RuntimeError, NotImplementedError):  # A tensor subclass without storage.
                copy = None
        self.nodes.append(
            _Tensor(
                path, value, copy, everywhere=everywhere, is_parameter=id(value) in self._parameters
            )
        )

    @staticmethod
    def _copy_of(value: torch.Tensor, copies: dict[int, torch.Tensor]) -> torch.Tensor:
        # One copy per memory: views and expanded tensors share it.
        memory = value.untyped_storage()._cdata
        if memory not in copies:
            copies[memory] = _bytes_of(value).clone()
        return copies[memory]

    def _module(self, path: str, value: nn.Module, everywhere: bool) -> None:
        if id(value) not in self._registered:
            self.outside.append(path)
        if isinstance(value, torch.jit.ScriptModule):
            self._script(path, value, everywhere)
            return
        attributes = vars(value)
        own = {k: v for k, v in attributes.items() if k not in _HOOKS and k not in _OTHER_HOOKS}
        node = _Table(path, attributes, everywhere=everywhere, attributes=True)
        self.nodes.append(node)
        for name in _MODULE_TABLES:
            table = own.pop(name, None)
            if table is not None:
                self._seen.add(id(table))
                self.nodes.append(_Table(path, table, everywhere=everywhere, attributes=True))
                self._each(path, table, everywhere)
        if all(name in attributes for name in _HOOKS):
            self.nodes.append(_Hooks(path, value))
            for name in _HOOKS[:2]:
                for hook in attributes[name].values():
                    if not _is_ours(hook):
                        self._add(_join(path, "hook"), hook, everywhere)
        self._each(path, own, everywhere)
        self._classes(type(value))

    def _script(self, path: str, value: torch.jit.ScriptModule, everywhere: bool) -> None:
        tensors = {
            **dict(value.named_parameters(recurse=False)),
            **dict(value.named_buffers(recurse=False)),
        }
        names = [n for n, assigned in self._script_names.items() if assigned or n not in tensors]
        if names:
            self.nodes.append(_Script(path, value, names))
        for name, tensor in tensors.items():
            # Each access makes a new Python object for the tensor, which nothing else holds.
            self._tensor(_join(path, name), tensor, everywhere)
        self._each(path, dict(value.named_children()), everywhere)

    def _each(self, path: str, values: Mapping[str, Any], everywhere: bool) -> None:
        for name, value in values.items():
            self._add(_join(path, str(name)), value, everywhere)

    def _dict(self, path: str, value: dict[Any, Any], everywhere: bool) -> None:
        node = _Table(path, value, everywhere=everywhere, attributes=False)
        self.nodes.append(node)
        for key, member in list(node._base.items(value)):
            self._add(path + _key_text(key, attribute=False), member, everywhere)
        self._instance(path, value, everywhere)

    def _sequence(self, path: str, value: list[Any] | deque[Any], everywhere: bool) -> None:
        self.nodes.append(_Sequence(path, value, everywhere=everywhere))
        self._members(path, value, everywhere)
        self._instance(path, value, everywhere)

    def _members(self, path: str, value: Iterable[Any], everywhere: bool) -> None:
        for index, member in enumerate(value):
            self._add(f"{path}[{index}]", member, everywhere)

    def _set(self, path: str, value: set[Any], everywhere: bool) -> None:
        self.nodes.append(_Set(path, value, everywhere=everywhere))
        self._members(path, value, everywhere)

    def _probe(self, path: str, value: Any, everywhere: bool) -> None:
        made = _probe_of(value)
        if made is not None:
            read, write, reason = made
            self.nodes.append(_Probe(path, read, write, everywhere=everywhere, reason=reason))

    def _callable(self, path: str, value: Any, everywhere: bool) -> None:
        if isinstance(value, functools.partial):
            parts = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            parts = [value.__self__, value.__func__]
        else:
            parts = [value.__func__]
        for part in parts:
            self._add(path, part, everywhere)

    def _function(self, path: str, value: types.FunctionType, everywhere: bool) -> None:
        if _is_foreign(value.__module__):
            return
        if value.__closure__:
            places = {
                name: _cell(cell)
                for name, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True)
            }
            self._cells(path, places, everywhere)
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            self._add(f"{path}.defaults", default, everywhere)
        if vars(value):
            self._dict(path, vars(value), everywhere)
        self._globals(value)

    def _globals(self, function: types.FunctionType) -> None:
        """Follow the globals that a function uses: containers, objects and functions."""
        held = function.__globals__
        file = str(held.get("__name__", ""))
        places: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        for name in _names_in(function.__code__):
            value = held.get(name, _MISSING)
            if value is _MISSING or isinstance(value, type | types.ModuleType):
                continue
            if name in _TABLES_OF_ALL_MODELS and file.startswith("transformers."):
                continue
            if isinstance(value, types.FunctionType) and value.__module__ != file:
                continue  # Don't follow the globals that another file's functions use.
            if (id(held), name) not in self._places:
                self._places.add((id(held), name))
                if not callable(value) or isinstance(value, nn.Module):
                    places[name] = _item(held, name)
                self._add(f"{file}.{name}", value, True)
        if places:
            self.nodes.append(_Cells(file, places, everywhere=True))

    def _object(self, path: str, value: Any, everywhere: bool) -> None:
        self._instance(path, value, everywhere)
        if not _is_foreign(type(value).__module__):
            self._classes(type(value))

    def _instance(self, path: str, value: Any, everywhere: bool) -> None:
        """Follow the attributes of an object, both in its dictionary and in its slots."""
        if isinstance(value, threading.local):
            self.nodes.append(_ThreadLocal(path, value, everywhere=everywhere))
            return
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self.nodes.append(_Table(path, attributes, everywhere=everywhere, attributes=True))
            self._each(path, attributes, everywhere)
        slots = {
            name: _slot(descriptor, value)
            for part in type(value).__mro__
            for name, descriptor in vars(part).items()
            if isinstance(descriptor, types.MemberDescriptorType)
            and "__slots__" in vars(part)
            and name not in ("__dict__", "__weakref__")
        }
        self._cells(path, slots, everywhere)

    def _cells(
        self,
        path: str,
        places: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]],
        everywhere: bool,
    ) -> None:
        if places:
            node = _Cells(path, places, everywhere=everywhere)
            self.nodes.append(node)
            self._each(path, node.held, everywhere)

    def _classes(self, kind: type) -> None:
        """Follow the content of the author's own classes: values, and the functions of methods."""
        for part in kind.__mro__:
            if _is_foreign(part.__module__) or id(part) in self._seen:
                continue
            self._seen.add(id(part))
            self._kept_alive.append(part)
            places = {}
            for name, value in list(vars(part).items()):
                if name.startswith("__") and name.endswith("__") and not callable(value):
                    continue
                inner = value.fget if isinstance(value, property) else value
                self._add(f"{part.__name__}.{name}", inner, True)
                if not callable(value) and not hasattr(type(value), "__get__"):
                    places[name] = _class_attribute(part, name)
            if places:
                self.nodes.append(_Cells(part.__name__, places, everywhere=True))


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_wrapped_by_torch(now: Any, held: Any) -> bool:
    """Return whether a function is the wrapper by which torch keeps its compiler away from it."""
    wrapper = getattr(now, "__globals__", {}).get("__name__") == "torch._compile"
    return wrapper and getattr(now, "__wrapped__", None) is held


def _place(tensor: torch.Tensor) -> int | None:
    if tensor.layout is not torch.strided:
        return None
    try:
        return tensor.data_ptr()
    except RuntimeError:  # A subclass without memory of its own.
        return None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all memory that a tensor is a view of, as bytes; writes to it are not counted."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if len(one) != len(other):
        return False
    words = len(one) & ~7  # Eight bytes at a time: torch compares single bytes five times slower.
    return torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64)) and (
        torch.equal(one[words:], other[words:])
    )


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(member) for member in value)
    if isinstance(value, dict):
        return {key: _copied(member) for key, member in value.items()}
    return value


def _cell(cell: types.CellType) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # The cell is empty.
            return _MISSING

    def write(value: Any) -> None:
        if value is _MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return read, write


def _slot(descriptor: Any, owner: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def read() -> Any:
        try:
            return descriptor.__get__(owner, type(owner))
        except AttributeError:
            return _MISSING

    def write(value: Any) -> None:
        if value is _MISSING:
            descriptor.__delete__(owner)
        else:
            descriptor.__set__(owner, value)

    return read, write


def _item(values: dict[str, Any], key: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(value: Any) -> None:
        if value is _MISSING:
            values.pop(key, None)
        else:
            values[key] = value

    return lambda: values.get(key, _MISSING), write


def _class_attribute(kind: type, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(value: Any) -> None:
        if value is _MISSING:
            delattr(kind, name)
        else:
            setattr(kind, name, value)

    return lambda: vars(kind).get(name, _MISSING), write


_Made = tuple[Callable[[], Any], Callable[[Any], None] | None, str]


def _probe_of(value: Any) -> _Made | None:
    """Return (read, write, why it can't be written) for an object's state; None if it has none."""
    for kinds, make in _PROBES:
        if isinstance(value, kinds):
            return make(value)
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        return _progress(value), None, "an iterator can't be rewound"
    return None


def _progress(value: Any) -> Callable[[], Any]:
    """Return a function that shows how far an iterator has come, as far as that can be known."""
    if isinstance(value, types.GeneratorType):
        return lambda: (value.gi_frame and value.gi_frame.f_lasti, value.gi_running)
    if isinstance(value, itertools.count):
        return lambda: repr(value)
    return lambda: operator.length_hint(value, -1)


def _random(value: random.Random) -> _Made:
    return value.getstate, value.setstate, ""


def _numpy_random(value: Any) -> _Made:
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator

    def write(state: bytes) -> None:
        bits.state = pickle.loads(state)  # noqa: S301 - our own bytes

    return lambda: pickle.dumps(bits.state), write, ""


def _torch_random(value: torch.Generator) -> _Made:
    def write(state: bytes) -> None:
        value.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    return lambda: value.get_state().numpy().tobytes(), write, ""


def _lock(value: Any) -> _Made:
    def read() -> bool:
        # Before Python 3.14, only its repr shows whether an RLock is taken.
        text = repr(value)
        return not text.startswith("<unlocked")

    def write(held: bool) -> None:
        if not held:
            value.release()

    return read, write, ""


def _file(value: Any) -> _Made:
    def read() -> int:
        try:
            return int(value.tell())
        except (OSError, ValueError):
            return -1

    def write(position: int) -> None:
        if position >= 0 and not value.closed:
            value.seek(position)

    return read, write, ""


def _array(value: Any) -> _Made:
    def write(content: bytes) -> None:
        memoryview(value).cast("B")[:] = content

    return lambda: bytes(memoryview(value).cast("B")), write, ""


def _numpy_array(value: np.ndarray) -> _Made:
    def write(content: bytes) -> None:
        value[...] = pickle.loads(content)  # noqa: S301 - our own bytes

    return lambda: pickle.dumps(value), write, ""


_PROBES: tuple[tuple[Any, Callable[[Any], _Made]], ...] = (
    (random.Random, _random),
    ((np.random.Generator, np.random.RandomState), _numpy_random),
    (torch.Generator, _torch_random),
    (_LOCKS, _lock),
    (io.IOBase, _file),
    (np.ndarray, _numpy_array),
    ((bytearray, array.array), _array),
)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that code uses, including code of functions defined inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _script_names(root: nn.Module) -> dict[str, bool]:
    """Return the attributes that a model's programs use, and whether they assign to them."""
    names: dict[str, bool] = {}
    for module in root.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            continue
        program: Any = module._c
        for method in program._method_names():
            graph = program._get_method(method).graph
            for node in graph.findAllNodes("prim::GetAttr"):
                names.setdefault(node.s("name"), False)
            for node in graph.findAllNodes("prim::SetAttr"):
                names[node.s("name")] = True
    return names


def _is_foreign(module: str | None) -> bool:
    """Return whether code belongs to torch, numpy, the standard library or this package."""
    package = (module or "").partition(".")[0]
    return package in ("torch", "torchvision", "numpy", "layertap") or (
        package in sys.stdlib_module_names and package != "__main__"
    )


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("layertap.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _key_text(key: Any, *, attribute: bool) -> str:
    return f".{key}" if attribute else f"[{str(key)[:40]!r}]" if isinstance(key, str) else "[…]"


def _equal(one: Any, other: Any, depth: int = 0) -> bool:
    """Return whether two values have equal content; False if that can't be determined."""
    if one is other:
        return True
    if type(one) is not type(other) or depth > MAX_COMPARED_DEPTH:
        return False
    for kinds, equal in _EQUAL:
        if isinstance(one, kinds):
            return equal(one, other, depth + 1)
    attributes = getattr(one, "__dict__", None)
    return (
        type(attributes) is dict
        and bool(attributes)
        and (_equal(attributes, vars(other), depth + 1))
    )


def _equal_members(one: Any, other: Any, depth: int) -> bool:
    return len(one) == len(other) and all(
        _equal(a, b, depth) for a, b in zip(one, other, strict=True)
    )


def _equal_entries(one: Any, other: Any, depth: int) -> bool:
    return list(one) == list(other) and all(_equal(one[key], other[key], depth) for key in one)


def _equal_scalars(one: Any, other: Any, depth: int) -> bool:
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


_EQUAL: tuple[tuple[Any, Callable[[Any, Any, int], bool]], ...] = (
    (_SCALARS, _equal_scalars),
    (torch.Tensor, lambda one, other, _: _same_tensor(one, other)),
    (np.ndarray, lambda one, other, _: pickle.dumps(one) == pickle.dumps(other)),
    ((list, tuple, deque), _equal_members),
    (dict, _equal_entries),
    (
        (set, frozenset),
        lambda one, other, _: all(isinstance(m, _SCALARS) for m in (*one, *other)) and one == other,
    ),
    (
        types.MethodType,
        lambda one, other, _: one.__func__ is other.__func__ and one.__self__ is other.__self__,
    ),
    ((nn.Module, types.FunctionType, type), lambda one, other, _: False),
)
"""How to compare two different objects of the same type, by type."""


def _same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    try:
        return torch.equal(one, other) or (
            one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())
        )
    except (RuntimeError, NotImplementedError):  # For example, sparse tensors can't be compared.
        return False
