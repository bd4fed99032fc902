"""Finds every object that a snapshot must follow.

Note [What a snapshot sees]
    Everything that a forward pass can reach from the module: attributes, lists, dictionaries, sets,
    plain objects inside them (with or without ``__slots__``), tensors and arrays that are written
    in place, the closures and default arguments of functions, random generators, locks, and the
    content of the model's classes and of the files that define them. Each object is visited once,
    so cycles are no problem. Objects of torch, and the standard library's threads and loggers, are
    ignored.
"""

from __future__ import annotations

import concurrent.futures
import enum
import functools
import logging
import pathlib
import re
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from layertap.extraction.state.node import Node
from layertap.extraction.state.nodes import (
    HOOKS,
    CellsNode,
    HooksNode,
    ProbeNode,
    ScriptNode,
    SequenceNode,
    SetNode,
    TableNode,
    ThreadLocalNode,
    is_ours,
    key_text,
)
from layertap.extraction.state.places import (
    MISSING,
    Place,
    attribute_place,
    cell_place,
    item_place,
    slot_place,
)
from layertap.extraction.state.probes import probe_of
from layertap.extraction.state.tensor_node import TensorNode, bytes_of, digest_of
from layertap.extraction.state.torch_nodes import FunctionsNode, SettingsNode
from layertap.models.tensor_content import PLAIN, is_wrapper, plain_tensors

__all__ = ["Walk"]

PARAMETER_BYTES = 256 << 20
"""Above this total size parameters are not copied: changes are noticed, but can't be restored.

See Note [Digests of large weights]. From this size on measuring spares memory in other ways, too
(``malloc.sparing_memory``).
"""

MAX_NODES = 200_000
"""Maximum number of objects that a snapshot follows; further objects are not watched."""

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

_SKIPPED_PACKAGES = ("torch._", "torch.fx", "torch.jit", "torch.utils.", "layertap.")
"""Packages whose objects are ignored, unless they are modules."""

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


class Walk:
    """Finds every object that a snapshot must follow, starting at a module."""

    def __init__(self, root: nn.Module, *, copies: bool) -> None:
        self.nodes: list[Node] = [SettingsNode(), FunctionsNode()]
        self.outside: list[str] = []
        self._registered = {id(module): path for path, module in root.named_modules()}
        self._seen: set[int] = set()
        self._kept_alive: list[Any] = []
        self._todo: deque[tuple[str, Any, bool]] = deque([("", root, False)])
        parameters = list(root.parameters())
        plain = [tensor for parameter in parameters for tensor in plain_tensors(parameter)]
        size = sum(tensor.nbytes for tensor in plain)
        self._digested = {id(tensor) for tensor in plain} if size > PARAMETER_BYTES else set()
        self._parameters = {id(tensor) for tensor in (*parameters, *plain)}
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
        self._contents: dict[tuple[int, bool], torch.Tensor | bytes] | None = {} if copies else None
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
        if probe_of(value) is not None:
            return self._probe
        return None if type(value).__module__.startswith(_SKIPPED_PACKAGES) else self._object

    def _add(self, path: str, value: Any, everywhere: bool) -> None:
        if not isinstance(value, _INERT):
            self._todo.append((path, value, everywhere))

    def _tensor(self, path: str, value: torch.Tensor, everywhere: bool) -> None:
        content = None
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if plain and self._contents is not None and not is_wrapper(value):
            try:
                content = self._content_of(value, self._contents)
            except (RuntimeError, NotImplementedError):  # Another kind of tensor without storage.
                content = None
        self.nodes.append(
            TensorNode(
                path,
                value,
                content,
                everywhere=everywhere,
                is_parameter=id(value) in self._parameters,
            )
        )
        if type(value) not in PLAIN:  # The tensors that a wrapper holds are its attributes.
            self._instance(path, value, everywhere)

    def _content_of(
        self, value: torch.Tensor, contents: dict[tuple[int, bool], torch.Tensor | bytes]
    ) -> torch.Tensor | bytes:
        """Return a copy of a tensor's memory, or a digest if it is of large parameters."""
        digested = id(value) in self._digested
        # One for each memory: views and expanded tensors share it.
        key = value.untyped_storage()._cdata, digested
        if key not in contents:
            contents[key] = digest_of(value) if digested else bytes_of(value).clone()
        return contents[key]

    def _module(self, path: str, value: nn.Module, everywhere: bool) -> None:
        if id(value) not in self._registered:
            self.outside.append(path)
        if isinstance(value, torch.jit.ScriptModule):
            self._script(path, value, everywhere)
            return
        attributes = vars(value)
        own = {k: v for k, v in attributes.items() if k not in HOOKS and k not in _OTHER_HOOKS}
        node = TableNode(path, attributes, everywhere=everywhere, attributes=True)
        self.nodes.append(node)
        for name in _MODULE_TABLES:
            table = own.pop(name, None)
            if table is not None:
                self._seen.add(id(table))
                self.nodes.append(TableNode(path, table, everywhere=everywhere, attributes=True))
                self._each(path, table, everywhere)
        if all(name in attributes for name in HOOKS):
            self.nodes.append(HooksNode(path, value))
            for name in HOOKS[:2]:
                for hook in attributes[name].values():
                    if not is_ours(hook):
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
            self.nodes.append(ScriptNode(path, value, names))
        for name, tensor in tensors.items():
            # Each access makes a new Python object for the tensor, which nothing else holds.
            self._tensor(_join(path, name), tensor, everywhere)
        self._each(path, dict(value.named_children()), everywhere)

    def _each(self, path: str, values: Mapping[str, Any], everywhere: bool) -> None:
        for name, value in values.items():
            self._add(_join(path, str(name)), value, everywhere)

    def _dict(self, path: str, value: dict[Any, Any], everywhere: bool) -> None:
        node = TableNode(path, value, everywhere=everywhere, attributes=False)
        self.nodes.append(node)
        for key, member in node.entries():
            self._add(path + key_text(key, attribute=False), member, everywhere)
        self._instance(path, value, everywhere)

    def _sequence(self, path: str, value: list[Any] | deque[Any], everywhere: bool) -> None:
        self.nodes.append(SequenceNode(path, value, everywhere=everywhere))
        self._members(path, value, everywhere)
        self._instance(path, value, everywhere)

    def _members(self, path: str, value: Iterable[Any], everywhere: bool) -> None:
        for index, member in enumerate(value):
            self._add(f"{path}[{index}]", member, everywhere)

    def _set(self, path: str, value: set[Any], everywhere: bool) -> None:
        self.nodes.append(SetNode(path, value, everywhere=everywhere))
        self._members(path, value, everywhere)

    def _probe(self, path: str, value: Any, everywhere: bool) -> None:
        made = probe_of(value)
        if made is not None:
            read, write, reason = made
            self.nodes.append(ProbeNode(path, read, write, everywhere=everywhere, reason=reason))

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
                name: cell_place(cell)
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
        places: dict[str, Place] = {}
        for name in _names_in(function.__code__):
            value = held.get(name, MISSING)
            if value is MISSING or isinstance(value, type | types.ModuleType):
                continue
            if name in _TABLES_OF_ALL_MODELS and file.startswith("transformers."):
                continue
            if isinstance(value, types.FunctionType) and value.__module__ != file:
                continue  # Don't follow the globals that another file's functions use.
            if (id(held), name) not in self._places:
                self._places.add((id(held), name))
                if not callable(value) or isinstance(value, nn.Module):
                    places[name] = item_place(held, name)
                self._add(f"{file}.{name}", value, True)
        if places:
            self.nodes.append(CellsNode(file, places, everywhere=True))

    def _object(self, path: str, value: Any, everywhere: bool) -> None:
        self._instance(path, value, everywhere)
        if not _is_foreign(type(value).__module__):
            self._classes(type(value))

    def _instance(self, path: str, value: Any, everywhere: bool) -> None:
        """Follow the attributes of an object, both in its dictionary and in its slots."""
        if isinstance(value, threading.local):
            self.nodes.append(ThreadLocalNode(path, value, everywhere=everywhere))
            return
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self.nodes.append(TableNode(path, attributes, everywhere=everywhere, attributes=True))
            self._each(path, attributes, everywhere)
        slots = {
            name: slot_place(descriptor, value)
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
        places: Mapping[str, Place],
        everywhere: bool,
    ) -> None:
        if places:
            node = CellsNode(path, places, everywhere=everywhere)
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
                    places[name] = attribute_place(part, name)
            if places:
                self.nodes.append(CellsNode(part.__name__, places, everywhere=True))


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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
