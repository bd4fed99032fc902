"""A digest of the code that a model runs and of the values that this code keeps in Python.

Note [What makes two models the same]
    Two models with equal weights may compute different values: the source of a class has changed,
    or a number that a factory put into an attribute, or a table at the top of a file. So the digest
    follows what a pass can reach from the module, as ``state`` does:

    - the attributes of modules and of plain objects, containers, arrays and tensors, by content;
    - functions, by their byte code, defaults, closures and the globals that they name;
    - classes of the author's own, by their attributes and by the source file that defines them, and
      the files which that file imports, wherever in it the import stands;
    - classes and functions of installed packages, by the version of the package and by the file;
    - torch, torchvision, numpy, the standard library and layertap by name only: their versions are
      compared elsewhere (see ``kept_catalogue``).

    Not everything can be compared: a TorchScript program, an object of a compiled library, a random
    generator, a class that was made from a string. Then there is no digest, and the
    caller gets an error.

The digest is for one version of Python, because byte code is.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import pathlib
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from layertap.models.tensor_content import PLAIN, digest_of_elements, plain_tensors

__all__ = ["UnknownCodeError", "code_identity"]

_SCALARS = (
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, np.generic,
    pathlib.PurePath,
)  # fmt: skip
"""Types whose ``repr`` is their content."""

_BUILT_IN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.MethodWrapperType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)  # fmt: skip

_INERT = (logging.Logger, type(threading.Lock()), type(threading.RLock()))
"""Types of which only the name counts, as they don't change what a pass computes."""

_FOREIGN = ("torch", "torchvision", "numpy", "layertap")
_PYTHON = (".py", ".pyw")
_HEAP_TYPE = 1 << 9
"""CPython's flag of a class that was made while the program ran, such as by ``class``."""

_CONTAINERS = (object, dict, list, tuple, set, frozenset, collections.OrderedDict,
               collections.defaultdict, collections.deque, str, int, float)  # fmt: skip
"""Classes written in C whose content this file reads."""

_MAX_OBJECTS = 1_000_000


class UnknownCodeError(Exception):
    """Something that a pass can reach can't be compared; the message names it."""


def code_identity(module: nn.Module, *more: object) -> str:
    """Return a digest of a model's code and of what it keeps in Python.

    See Note [What makes two models the same]. The content of parameters and registered buffers is
    left out, as ``plan_cache.fingerprint`` reads it.

    Args:
        module: The model. No pass of it may run meanwhile.
        more: Other functions and objects that take part in its passes.

    Raises:
        UnknownCodeError: If there can't be one.
    """
    # The list keeps them alive, as an id is unique only while its object lives.
    held = [*module.parameters(), *module.buffers()]
    held += [plain for each in held for plain in plain_tensors(each)]
    walk = _Walk({id(tensor) for tensor in held})
    try:
        walk.visit("the model", module)
        for each in more:
            walk.visit("the model's functions", each)
    except RecursionError:
        raise UnknownCodeError("its objects are nested too deeply") from None
    return walk.digest()


class _Walk:
    """Feeds everything that can be reached from some objects to a digest, each object once.

    Args:
        known: The ids of the tensors whose content is left out.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._digest = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # An id is unique only while its object lives.
        self._files = _Files()
        self._visitors: tuple[tuple[Any, Callable[[str, Any], None]], ...] = (
            (_SCALARS, self._scalar),
            (enum.Enum, self._enum),
            (torch.Tensor, self._tensor),
            ((torch.jit.ScriptModule, torch.jit.ScriptFunction, fx.GraphModule), self._unknown),
            (nn.Module, self._module),
            (np.ndarray, self._array),
            ((dict, types.MappingProxyType), self._mapping),
            ((list, tuple, collections.deque), self._sequence),
            ((set, frozenset), self._set),
            (types.FunctionType, self._function),
            ((types.MethodType, functools.partial, staticmethod, classmethod, property,
              functools.cached_property), self._callable),
            (_BUILT_IN, self._built_in),
            (type, self._class),
            (types.ModuleType, self._python_module),
            (re.Pattern, lambda _, value: self._feed(value.pattern, value.flags)),
            (weakref.ref, lambda path, value: self.visit(path, value())),
            (types.CellType, self._cell),
            (types.CodeType, self._code),
            (_INERT, lambda _, value: self._feed(getattr(value, "name", ""))),
        )  # fmt: skip

    def digest(self) -> str:
        """Return the digest of everything visited, and of the files that define it."""
        for name, content in sorted(self._files.contents().items()):
            self._feed(name, content)
        return self._digest.hexdigest()

    def visit(self, path: str, value: object) -> None:
        """Feed an object; raise UnknownCodeError if it can't be compared."""
        if not isinstance(value, _SCALARS):
            if id(value) in self._seen:
                self._feed("again", self._seen[id(value)])
                return
            if len(self._seen) >= _MAX_OBJECTS:
                raise UnknownCodeError(f"it has more than {_MAX_OBJECTS} objects")
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
        self._feed(type(value).__qualname__)
        visit = next((v for kinds, v in self._visitors if isinstance(value, kinds)), self._object)
        visit(path, value)

    def _feed(self, *facts: object) -> None:
        self._digest.update(repr(facts).encode("utf-8", "backslashreplace"))

    def _unknown(self, path: str, value: object) -> None:
        kind = type(value)
        raise UnknownCodeError(f"{path} is a {kind.__module__}.{kind.__qualname__}")

    def _scalar(self, _: str, value: object) -> None:
        self._feed(value)

    def _enum(self, path: str, value: enum.Enum) -> None:
        self.visit(path, type(value))
        self._feed(value.name)

    def _tensor(self, path: str, value: torch.Tensor) -> None:
        if value.is_meta:
            self._unknown(path, value)
        stride = value.stride() if value.layout is torch.strided else value.layout
        self._feed(value.dtype, tuple(value.shape), stride, value.requires_grad)
        if type(value) not in PLAIN:
            self.visit(path, type(value))
            for name, member in vars(value).items():
                self._feed(name)
                self.visit(f"{path}.{name}", member)
        if id(value) not in self._known:
            self._feed([digest_of_elements(plain) for plain in plain_tensors(value)])

    def _array(self, path: str, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            self._unknown(path, value)
        self._feed(value.dtype, value.shape)
        self._digest.update(np.ascontiguousarray(value).tobytes())

    def _module(self, path: str, value: nn.Module) -> None:
        self.visit(path, type(value))
        for name, member in vars(value).items():
            self._feed(name)
            if "_hooks" in name and isinstance(member, dict):
                # The keys are numbers that the whole process counts.
                self.visit(f"{path}.{name}", [v for v in member.values() if not _is_ours(v)])
            else:
                self.visit(f"{path}.{name}", member)

    def _mapping(self, path: str, value: Mapping[Any, Any]) -> None:
        self._feed(len(value))
        for key, member in list(value.items()):
            self.visit(f"a key of {path}", key)
            self.visit(f"{path}[{str(key)[:40]!r}]", member)
        self._subclass(path, value)

    def _sequence(self, path: str, value: Any) -> None:
        self._feed(len(value))
        for index, member in enumerate(list(value)):
            self.visit(f"{path}[{index}]", member)
        self._subclass(path, value)

    def _set(self, path: str, value: Any) -> None:
        for member in value:
            if not isinstance(member, _SCALARS):
                self._unknown(f"a member of {path}", member)
        self._feed(sorted(map(repr, value)))
        self._subclass(path, value)

    def _subclass(self, path: str, value: Any) -> None:
        """Feed what a subclass of a container has besides the members."""
        if type(value) not in _CONTAINERS and not isinstance(value, types.MappingProxyType):
            self._object(path, value)

    def _object(self, path: str, value: object) -> None:
        kind = type(value)
        if kind.__module__ == "torch.utils.hooks":
            return  # A handle that removes a hook; the hook itself is with its module.
        if kind.__module__ == "torch._ops":
            self._feed(str(value))
            return
        for part in kind.__mro__:
            if part not in _CONTAINERS and not part.__flags__ & _HEAP_TYPE:
                self._unknown(path, value)
        slots = list(_slots(value))
        attributes = getattr(value, "__dict__", None)
        if attributes is None and not slots and not isinstance(value, _CONTAINERS[1:]):
            self._unknown(path, value)
        self.visit(path, kind)
        for name, member in (*(attributes or {}).items(), *slots):
            self._feed(name)
            self.visit(f"{path}.{name}", member)

    def _callable(self, path: str, value: Any) -> None:
        if isinstance(value, types.MethodType):
            parts: tuple[object, ...] = (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
        elif isinstance(value, property):
            parts = (value.fget, value.fset)
        elif isinstance(value, functools.cached_property):
            parts = (value.func,)
        else:
            parts = (value.__func__,)
        for part in parts:
            self.visit(path, part)

    def _built_in(self, path: str, value: Any) -> None:
        self._feed(getattr(value, "__module__", ""), value.__qualname__)
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.visit(path, owner)

    def _function(self, path: str, value: types.FunctionType) -> None:
        self._feed(value.__module__, value.__qualname__)
        if not self._is_followed(path, value.__module__):
            return
        self.visit(path, value.__code__)
        self.visit(path, value.__defaults__)
        self.visit(path, value.__kwdefaults__)
        self.visit(path, value.__closure__)
        self.visit(path, vars(value))
        held = value.__globals__
        # A function made by another package's decorator has the author's name and not his globals.
        if not self._is_followed(path, str(held.get("__name__", ""))):
            return
        for name in sorted(set(_names_in(value.__code__))):
            if name in held:
                self._feed(name)
                self.visit(f"{value.__module__}.{name}", held[name])

    def _code(self, path: str, value: types.CodeType) -> None:
        self._feed(value.co_code, value.co_names, value.co_varnames, value.co_flags)
        for constant in value.co_consts:
            self.visit(path, constant)

    def _cell(self, path: str, value: types.CellType) -> None:
        try:
            held = value.cell_contents
        except ValueError:
            self._feed("empty")
            return
        self.visit(path, held)

    def _class(self, path: str, value: type) -> None:
        self._feed(value.__module__, value.__qualname__)
        for part in value.__mro__:
            if not self._is_followed(path, part.__module__):
                self._feed(part.__module__, part.__qualname__)
                continue
            self._feed(part.__qualname__)
            for name, member in list(vars(part).items()):
                if name == "_abc_impl" or (name.startswith("__") and not callable(member)):
                    continue
                self._feed(name)
                self.visit(f"{part.__qualname__}.{name}", member)

    def _python_module(self, path: str, value: types.ModuleType) -> None:
        self._feed(value.__name__)
        self._is_followed(path, value.__name__)

    def _is_followed(self, path: str, module: str | None) -> bool:
        """Note the file of some code, and return whether its objects are followed, too."""
        if _is_foreign(module):
            return False
        try:
            return self._files.note(module or "")
        except OSError:
            raise UnknownCodeError(
                f"{path} is defined in {module or 'no module'}, whose source file can't be read"
            ) from None


class _Files:
    """The files that define code: of the author's own also those that they import."""

    def __init__(self) -> None:
        self._installed: dict[str, str] = {}
        self._own: dict[str, bytes] = {}

    def note(self, module: str) -> bool:
        """Add a module; return whether it is the author's own, and not an installed package's.

        Raises:
            OSError: If its file can't be read.
        """
        if module in self._own:
            return True
        if module in self._installed:
            return False
        file = _file_of(module)
        if file is None:
            raise FileNotFoundError(module)
        content = file.read_bytes()
        if _is_installed(file):
            package = module.partition(".")[0]
            self._installed[module] = f"{_version(package)} {_digest(content)}"
            return False
        self._own[module] = content
        if file.suffix in _PYTHON:
            for name in _imported(content, module, is_package=file.name == "__init__.py"):
                self._note_import(name)
        return True

    def contents(self) -> dict[str, str]:
        """Return a digest for each module."""
        return self._installed | {name: _digest(content) for name, content in self._own.items()}

    def _note_import(self, name: str) -> None:
        # The last part of ``from a.b import c`` may be a module or not.
        if _is_foreign(name):
            return
        try:
            self.note(name)
        except OSError:
            return


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _file_of(module: str) -> Path | None:
    """Return the file of a module, without importing it; None if it has none."""
    loaded = sys.modules.get(module)
    name = getattr(loaded, "__file__", None)
    if name:
        return Path(name)
    parent = module.rpartition(".")[0]
    if loaded is not None or (parent and parent not in sys.modules):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _imported(source: bytes, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield the names of what a file imports that may be modules."""
    package = module if is_package else module.rpartition(".")[0]
    try:
        # Not ast.parse, which fails if two threads parse at once (python/cpython#106905).
        code = compile(source, module, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return
    for level, name, members in _imports_in(code):
        base = name
        if level:
            above = package.split(".")
            above = above[: len(above) - level + 1]
            base = ".".join([*above, *([name] if name else [])])
        yield base
        yield from (f"{base}.{member}" for member in members)


def _imports_in(code: types.CodeType) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield (dots in front, module, names) for each import statement, also inside functions."""
    before: list[Any] = [0, None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level, members = before
            yield level, instruction.argval, members or ()
        if instruction.opname.startswith("LOAD_"):
            before = [before[1], instruction.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports_in(constant)


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # The distribution has another name.
        return str(getattr(sys.modules.get(package), "__version__", ""))


@functools.cache
def _site_folders() -> tuple[Path, ...]:
    return tuple({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})


def _is_installed(file: Path) -> bool:
    whole = file.resolve()
    return any(whole.is_relative_to(folder) for folder in _site_folders())


def _slots(value: object) -> Iterator[tuple[str, object]]:
    for part in type(value).__mro__:
        for name, descriptor in vars(part).items():
            if isinstance(descriptor, types.MemberDescriptorType) and "__slots__" in vars(part):
                try:
                    yield name, descriptor.__get__(value, type(value))
                except AttributeError:
                    yield name, "empty"


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _is_foreign(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    if package.startswith("namedtuple_"):
        return True  # collections.namedtuple makes it, from names that the class has too.
    return package in _FOREIGN or (package in sys.stdlib_module_names and package != "__main__")


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("layertap.")
