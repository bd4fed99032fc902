"""The taps in TorchScript programs: operators in the graph, as forward hooks don't run there.

Note [Hooks in a program]
    A program calls its submodules by ``prim::CallMethod`` nodes, which the interpreter runs without
    Python. We insert operators around each such node: ``given`` for each tensor argument, ``enter``
    with the submodule's path, and afterwards ``leave`` with the result, or ``exit`` if the result
    is not a tensor. The operators report to the current watcher, which keeps a stack of paths, as
    submodules of one class share one graph. The operators count as having side effects, so
    dead-code elimination does not remove them.

A frozen program has no submodules left, and so no layers.

Note [Programs inside a model]
    An eager model may have TorchScript programs as submodules. Python calls a program, so ordinary
    hooks see the call. They tell the watcher the program's path in the model, so that the operators
    inside can be located. If a program is entered in another way, such as by a method other than
    ``forward``, its path is unknown and nothing is reported. A program that a model holds at
    several paths is reported at the first one, as any module is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.jit import ScriptModule

from layertap.extraction.points import ValueObserver
from layertap.selection import Capture

__all__ = [
    "begin_program",
    "end_program",
    "first_paths",
    "instrument",
    "programs",
    "watch",
    "writes_attributes",
]

_watcher: ContextVar[_Watcher | None] = ContextVar("layertap_watcher", default=None)
_instrumented: WeakSet[ScriptModule] = WeakSet()


class _Watcher:
    """Turns the operators' reports of one forward pass into an observer's events."""

    def __init__(self, observer: ValueObserver, first_paths: Mapping[str, str]) -> None:
        self._observer = observer
        self._first_paths = first_paths
        # A path is None if the path of its program is not known.
        self._paths: list[str | None] = []
        self._outside: list[list[str | None]] = []
        self._arguments: list[torch.Tensor] = []
        self.raised: BaseException | None = None

    def begin(self, path: str) -> None:
        """Begin the call of a program at a path of the model."""
        self._outside.append(self._paths)
        self._paths = [path]

    def end(self) -> None:
        """End the call of a program."""
        if self._outside:
            self._paths = self._outside.pop()

    def report(self, method: str, *values: Any) -> None:
        """Handle an operator's report, and remember an exception of the observer."""
        try:
            getattr(self, method)(*values)
        except BaseException as error:
            self.raised = error
            raise

    def given(self, value: torch.Tensor) -> None:
        """Record an argument of the call that is about to begin."""
        self._arguments.append(value)

    def enter(self, name: str) -> None:
        """Begin the call of a submodule of the current one."""
        arguments, self._arguments = self._arguments, []
        parent = self._paths[-1] if self._paths else None
        path = None if parent is None else f"{parent}.{name}" if parent else name
        path = self._first_paths.get(path, path) if path else path
        self._paths.append(path)
        value = arguments[0] if len(arguments) == 1 else tuple(arguments)
        if path is not None:
            self._observer(path, Capture.INPUT, value)

    def leave(self, value: torch.Tensor | None = None) -> None:
        """End the current call."""
        path = self._paths.pop()
        if path is not None:
            self._observer(path, Capture.OUTPUT, value)


@contextmanager
def watch(observer: ValueObserver, first_paths: Mapping[str, str]) -> Iterator[None]:
    """Report the calls of instrumented programs that run inside the block, on this thread.

    Args:
        observer: Is called for each.
        first_paths: What the function of that name returns.
    """
    watcher = _Watcher(observer, first_paths)
    token = _watcher.set(watcher)
    try:
        yield
    except RuntimeError as error:
        # The interpreter replaces an operator's exception with its own error.
        if watcher.raised is None:
            raise
        raise watcher.raised from error
    finally:
        _watcher.reset(token)


def begin_program(path: str) -> None:
    """Tell the current watcher that the program at this path of the model begins."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.begin(path)


def end_program() -> None:
    """Tell the current watcher that the program that began most recently ends."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.end()


def programs(module: nn.Module) -> dict[str, ScriptModule]:
    """Return the outermost TorchScript programs of a model by path.

    A model that is itself a program has the empty path. Each program is returned once, by its first
    path.
    """
    found: dict[str, ScriptModule] = {}
    for path, submodule in module.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if isinstance(submodule, ScriptModule) and not inside:
            found[path] = submodule
    return found


def first_paths(module: nn.Module) -> dict[str, str]:
    """Map each path at which a model holds a module once more to that module's first path."""
    first: dict[nn.Module, str] = {}
    others: dict[str, str] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        if first.setdefault(submodule, path) != path:
            others[path] = first[submodule]
    return others


def instrument(module: ScriptModule) -> None:
    """Insert the operators around every call of a submodule, once. The module stays changed."""
    if module in _instrumented:
        return
    _define_operators()
    seen: set[tuple[str, str]] = set()
    for submodule in module.modules():
        # There is no public way to the graphs of methods other than forward.
        compiled: Any = submodule._c
        for method in compiled._method_names():
            key = (str(compiled._type()), method)
            if key not in seen:
                seen.add(key)
                _instrument_graph(compiled._get_method(method).graph)
    _instrumented.add(module)


def writes_attributes(module: ScriptModule) -> bool:
    """Return whether any method of a program writes attributes of its modules."""
    compiled: Any = [submodule._c for submodule in module.modules()]
    return any(
        part._get_method(name).graph.findAllNodes("prim::SetAttr")
        for part in compiled
        for name in part._method_names()
    )


def _instrument_graph(graph: Any) -> None:
    if graph.findAllNodes("layertap::enter"):
        return  # Instrumented already: programs that are scripted from one class share graphs.
    self_value = next(iter(graph.inputs()))
    for node in _calls(graph):
        called, *arguments = node.inputs()
        name = _attribute_path(called, self_value)
        if not name:  # Another method of the module itself, whose own graph is instrumented.
            continue
        text = graph.insertConstant(name)
        text.node().moveBefore(node)
        for argument in arguments:
            if _is_tensor(argument):
                graph.create("layertap::given", [argument], 0).insertBefore(node)
        graph.create("layertap::enter", [text], 0).insertBefore(node)
        (result,) = node.outputs()
        left = (
            graph.create("layertap::leave", [result], 0)
            if _is_tensor(result)
            else graph.create("layertap::exit", [], 0)
        )
        left.insertAfter(node)


def _calls(block: Any) -> list[Any]:
    """Return the nodes that call a method, including those in branches and loops."""
    found = []
    for node in block.nodes():
        for inner in node.blocks():
            found.extend(_calls(inner))
        if node.kind() == "prim::CallMethod":
            found.append(node)
    return found


def _attribute_path(value: Any, self_value: Any) -> str:
    """Return a submodule's path relative to ``self``; empty for ``self`` or another object."""
    names: list[str] = []
    while value.debugName() != self_value.debugName():
        if value.node().kind() != "prim::GetAttr":
            return ""
        names.append(value.node().s("name"))
        value = next(iter(value.node().inputs()))
    return ".".join(reversed(names))


def _is_tensor(value: Any) -> bool:
    return str(value.type()) == "Tensor"


@cache
def _define_operators() -> torch.library.Library:
    library = torch.library.Library("layertap", "DEF")

    def operator(schema: str, method: str) -> None:
        def report(*values: Any) -> None:
            watcher = _watcher.get()
            if watcher is not None:
                watcher.report(method, *values)

        name = schema.partition("(")[0]
        library.define(schema, alias_analysis="CONSERVATIVE")
        library.impl(name, report, "CompositeExplicitAutograd")

    operator("given(Tensor value) -> ()", "given")
    operator("enter(str name) -> ()", "enter")
    operator("leave(Tensor value) -> ()", "leave")
    operator("exit() -> ()", "leave")
    return library
