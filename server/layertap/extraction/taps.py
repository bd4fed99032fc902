"""Taps: forward hooks that stay on a model and pass captures to the pass that is running.

Hooks that are registered per request on a shared model race: each request's hooks see the other
requests' activations. So a hook is installed once and stays. It asks a ContextVar which session, if
any, the current forward pass belongs to. Model code is never changed.

Note [What the value is]
    The captured value is what the module returned, or was given, at that moment. The sink copies
    it before the hook returns, so a later in-place operation doesn't change it. Inputs are read in
    a pre-hook, because a forward hook runs after the module may have changed them.

Note [A model's own threads]
    A model may run its modules in its own thread pool, where no ContextVar says which pass a call
    belongs to. It belongs to the only pass that is running: the passes of such a model run one at a
    time and to their end, so that none of its threads still runs modules of an earlier pass.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layertap.errors import ModelRunError
from layertap.extraction.attention import attended
from layertap.extraction.containers import pick, plain, replaced
from layertap.extraction.points import CapturePoint, Sink, ValueObserver
from layertap.extraction.script_taps import (
    begin_program,
    end_program,
    first_paths,
    instrument,
    programs,
    watch,
)
from layertap.selection import Capture

__all__ = ["Edit", "StopForward", "Taps", "Watch", "call_input", "observe"]

_session: ContextVar[_Session | None] = ContextVar("layertap_session", default=None)

X = TypeVar("X")
"""The type of a forward pass's argument: a batch."""


class StopForward(BaseException):
    """Ends a forward pass once every requested value is captured.

    A BaseException, so that a model's own ``except Exception`` doesn't swallow it.
    """


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of a value in a pass: the model goes on with another tensor in its place.

    Attributes:
        point: The value.
        change: Returns the tensor to go on with. It must not be the tensor that it was given.
    """

    point: CapturePoint
    change: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Watch:
    """A look at every call of a module, which changes nothing.

    Attributes:
        path: The module's path.
        side: Whether it is given what the module is given, after edits, or what it returned, before
            edits.
        look: Takes the whole value.
    """

    path: str
    side: Capture
    look: Callable[[Any], None]


class _Session:
    """The captures and edits of one pass; receives the reports of its own taps only."""

    def __init__(
        self,
        owner: Taps,
        points: Sequence[CapturePoint],
        sink: Sink,
        *,
        to_end: bool,
        edits: Sequence[Edit] = (),
        watches: Sequence[Watch] = (),
        raw: bool = False,
    ) -> None:
        self.owner = owner
        self._to_end = to_end
        self._raw = raw
        self._edits: dict[tuple[str, Capture, int], list[Edit]] = {}
        for edit in edits:
            place = (edit.point.path, edit.point.capture, edit.point.call)
            self._edits.setdefault(place, []).append(edit)
        self._watches: dict[tuple[str, Capture], list[Watch]] = {}
        for each in watches:
            self._watches.setdefault((each.path, each.side), []).append(each)
        self._edits_any = bool(edits or watches)
        self._wanted: dict[tuple[str, Capture, int], list[int]] = {}
        for index, point in enumerate(points):
            self._wanted.setdefault((point.path, point.capture, point.call), []).append(index)
        self._points = points
        self._sink = sink
        self._calls: Counter[tuple[str, Capture]] = Counter()
        # Modules may run on several threads; see Note [A model's own threads].
        self._lock = threading.RLock()
        self.refused: BaseException | None = None

    def see(self, path: str, side: Capture, value: Any) -> Any:
        """Edit and capture what is requested of a call; return the value if it was edited.

        This ends the pass after the last capture if allowed.
        """
        with self._lock:
            return self._see(path, side, value)

    def _see(self, path: str, side: Capture, value: Any) -> Any:
        call = self._calls[path, side]
        self._calls[path, side] = call + 1
        edited = False
        if self._edits_any and self.refused is None:
            try:
                value, edited = self._edit(path, side, call, value)
            except BaseException as error:
                # Kept, because the model's own code may catch it.
                self.refused = error
                if not self._to_end:
                    raise
        for index in self._wanted.pop((path, side, call), ()):
            if self.refused is not None:
                continue  # After an error the pass only continues because it must run to its end.
            try:
                self._take(index, value)
            except BaseException as error:
                self.refused = error
                if not self._to_end:
                    raise
        if not self._wanted and not self._to_end:
            raise StopForward
        return value if edited else None

    def _edit(self, path: str, side: Capture, call: int, value: Any) -> tuple[Any, bool]:
        """Return the value after watches and edits, and whether there were edits."""
        edits = self._edits.pop((path, side, call), ())
        watches = self._watches.get((path, side), ())
        if side is Capture.OUTPUT:
            for each in watches:
                each.look(value)
        for edit in edits:
            value = self._edited(edit, value)
        if side is Capture.INPUT:
            for each in watches:
                each.look(value)
        return value, bool(edits)

    def _edited(self, edit: Edit, value: Any) -> Any:
        tensor = pick(value, edit.point.member)
        if tensor is None:
            raise ModelRunError(f"layer {edit.point.path!r}: returned no tensor on this input")
        return replaced(value, edit.point.member, edit.change(tensor))

    def _take(self, index: int, value: Any) -> None:
        point = self._points[index]
        tensor = pick(value, point.member)
        if tensor is None:
            raise ModelRunError(f"layer {point.path!r}: returned no tensor on this input")
        self._sink(index, tensor if self._raw else plain(tensor))

    def returned(self, value: Any) -> None:
        """Capture what is requested of the model's own result.

        Hooks on the model don't suit this: if the model calls itself, they see the inner calls too.
        """
        for place in [place for place in self._edits if place[:2] == ("", Capture.OUTPUT)]:
            for edit in self._edits.pop(place):
                value = self._edited(edit, value)
        for key in [key for key in self._wanted if key[:2] == ("", Capture.OUTPUT)]:
            for index in self._wanted.pop(key):
                if self.refused is None:
                    self._take(index, value)

    def end(self) -> None:
        """Raise our own error if the model caught it, or ModelRunError if a capture is missing."""
        refused, self.refused = self.refused, None
        try:
            if refused is not None:
                raise refused
        finally:
            del refused
        if self._wanted:
            raise ModelRunError(f"layers {self.missed()} did not run on this input")

    def missed(self) -> list[str]:
        """Return the paths of the requested calls that did not happen."""
        return sorted({path for path, _, _ in self._wanted})


class Taps:
    """The hooks of one model.

    Args:
        module: The model. A submodule is found by its first path only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = dict(module.named_modules())
        self._handles: dict[tuple[str, Capture], RemovableHandle] = {}
        self._lock = threading.Lock()
        self._running: _Session | None = None
        self._in_programs: set[str] = set()
        self._first_paths = first_paths(module)
        for path, program in programs(module).items():
            instrument(program)
            inside = (name for name, _ in program.named_modules())
            self._in_programs.update(_join(path, name) for name in inside)
            for side, handle in _hook_program(path, program, partial(self._route, path)):
                self._handles[path, side] = handle
        # torch runs these layers in a fused path that calls no submodule, unless one has a hook.
        # With a hook from the start, answers don't depend on what was requested before.
        for path, submodule in self._modules.items():
            if isinstance(submodule, nn.TransformerEncoderLayer):
                self.install(path, Capture.OUTPUT)

    def install(self, path: str, side: Capture) -> None:
        """Put a hook on a module, unless it has one already."""
        if not path or path in self._in_programs:
            # The model's result is captured where the pass returns it, and programs report their
            # own calls; see Note [Programs inside a model].
            return
        with self._lock:
            if (path, side) not in self._handles:
                self._handles[path, side] = _hook(
                    self._modules[path], side, partial(self._route, path)
                )

    def run(
        self,
        forward: Callable[[X], Any],
        x: X,
        points: Sequence[CapturePoint],
        sink: Sink,
        *,
        to_end: bool = False,
        own_threads: bool = False,
        edits: Sequence[Edit] = (),
        watches: Sequence[Watch] = (),
        raw: bool = False,
    ) -> None:
        """Run a forward pass until every point is captured.

        Args:
            forward: Runs the model.
            x: The batch.
            points: What to capture; missing hooks are installed.
            sink: Called at the moment of each capture.
            to_end: Whether the pass must run to its end. Exceptions of the sink are raised then.
            own_threads: Whether the model runs modules in its own threads. No other pass of it
                may run meanwhile; see Note [A model's own threads].
            edits: Changes of values, which come before captures of the same value. An edit whose
                call never happens has no effect: the caller must notice.
            watches: Looks at calls.
            raw: Whether the sink gets tensors as the model has them: quantised, if they are, and
                with the graph for differentiating them.

        Raises:
            ModelRunError: If the pass ended without one of the captures.
        """
        for point in (*points, *(edit.point for edit in edits)):
            self.install(point.path, point.capture)
        for each in watches:
            self.install(each.path, each.side)
        session = _Session(self, points, sink, to_end=to_end, edits=edits, watches=watches, raw=raw)
        token = _session.set(session)
        self._running = session if own_threads else None
        try:
            with watch(session.see, self._first_paths):
                session.returned(forward(x))
        except StopForward:
            pass
        except Exception:
            # After the last capture an exception doesn't matter: the pass could have ended there.
            if session.missed() or not to_end:
                session.refused = None  # It would refer to itself and keep the captures alive.
                raise
        except BaseException:
            session.refused = None  # It would refer to itself and keep the captures alive.
            raise
        finally:
            _session.reset(token)
            self._running = None
        session.end()

    def _route(self, path: str, side: Capture, value: Any) -> Any:
        # On one of the model's own threads there is no session; see Note [A model's own threads].
        session = _session.get() or self._running
        # The model may also have other taps, which see the same calls.
        if session is not None and session.owner is self:
            return session.see(path, side, value)
        return None

    def close(self) -> None:
        """Remove every hook from the model."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()


@contextmanager
def observe(module: nn.Module, observer: ValueObserver) -> Iterator[None]:
    """Call ``observer`` at every call of every submodule; remove the hooks after the block."""
    found = programs(module)
    handles: list[RemovableHandle] = []
    for path, submodule in module.named_modules():
        see = partial(observer, path)
        if path in found:
            instrument(found[path])
            handles.extend(handle for _, handle in _hook_program(path, submodule, see))
        elif not isinstance(submodule, torch.jit.ScriptModule):
            handles.extend(_hook(submodule, side, see) for side in (Capture.INPUT, Capture.OUTPUT))
    try:
        with watch(observer, first_paths(module)) if found else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a call's input: its only argument, or else all arguments by index and name."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return {**{str(index): arg for index, arg in enumerate(args)}, **kwargs}


def _given(
    value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with those of an edited input; see ``call_input``."""
    if len(args) == 1 and not kwargs:
        return (value,), {}
    return tuple(value[str(index)] for index in range(len(args))), {
        name: value[name] for name in kwargs
    }


def _hook(module: nn.Module, side: Capture, see: Callable[[Capture, Any], Any]) -> RemovableHandle:
    # What a hook returns replaces the input or the output. It is None unless the value was edited.
    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        edited = see(Capture.INPUT, call_input(args, kwargs))
        return None if edited is None else _given(edited, args, kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return see(Capture.OUTPUT, attended(module, args, kwargs, output))

    if side is Capture.INPUT:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _hook_program(
    path: str, program: nn.Module, see: Callable[[Capture, Any], Any]
) -> list[tuple[Capture, RemovableHandle]]:
    """Hook the calls of a TorchScript program; see Note [Programs inside a model]."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_program(path)
        see(Capture.INPUT, call_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        end_program()
        see(Capture.OUTPUT, output)

    # torch forbids hooks on programs, because hooks inside a program would never run. But the
    # outermost program is called like any module.
    first = nn.Module.register_forward_pre_hook(program, before, with_kwargs=True)
    last = nn.Module.register_forward_hook(program, after)
    return [(Capture.INPUT, first), (Capture.OUTPUT, last)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
