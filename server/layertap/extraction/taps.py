"""The tap: forward hooks that stay on a model and pass captures to the pass that is running.

Hooks that are registered per request on a shared model race: each request's hooks see the other
requests' activations. So a hook is installed once, stays, and asks a ContextVar which session, if
any, the current forward pass belongs to. Model code is never changed.

Note [What the value is]
    The captured value is what the module returned, or was given, at that moment. The sink copies
    it before the hook returns, so that a later in-place operation can't show in it. Inputs are
    read in a pre-hook, since a forward hook sees them after the module may have changed them.

Note [A model's own threads]
    A model may run its modules in a thread pool of its own, where no ContextVar says to which pass
    a call belongs. It belongs to the one pass that runs: the passes of such a model run one at a
    time and to their end, so that none of its threads still runs modules of the pass before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layertap.errors import ModelRunError
from layertap.extraction.attention import attended
from layertap.extraction.containers import pick, plain
from layertap.extraction.points import CapturePoint, Sink, ValueObserver
from layertap.extraction.script_taps import (
    begin_program,
    end_program,
    instrument,
    programs,
    watch,
)
from layertap.selection import Capture

__all__ = ["StopForward", "Taps", "call_input", "observe"]

_session: ContextVar[_Session | None] = ContextVar("layertap_session", default=None)

X = TypeVar("X")
"""What a forward pass is given: a batch."""


class StopForward(BaseException):
    """Ends a forward pass once everything wanted is captured.

    A BaseException, so that a model's own ``except Exception`` doesn't swallow it.
    """


class _Session:
    """The captures of one forward pass, which its own taps report."""

    def __init__(
        self, owner: Taps, points: Sequence[CapturePoint], sink: Sink, *, to_end: bool
    ) -> None:
        self.owner = owner
        self._to_end = to_end
        self._wanted: dict[tuple[str, Capture, int], list[int]] = {}
        for index, point in enumerate(points):
            self._wanted.setdefault((point.path, point.capture, point.call), []).append(index)
        self._points = points
        self._sink = sink
        self._calls: Counter[tuple[str, Capture]] = Counter()
        # Modules may run on several threads; see Note [A model's own threads].
        self._lock = threading.RLock()
        self.refused: BaseException | None = None

    def see(self, path: str, side: Capture, value: Any) -> None:
        """Pass on what is wanted of a call; end the forward pass after the last, if it may end."""
        with self._lock:
            self._see(path, side, value)

    def _see(self, path: str, side: Capture, value: Any) -> None:
        call = self._calls[path, side]
        self._calls[path, side] = call + 1
        for index in self._wanted.pop((path, side, call), ()):
            if self.refused is not None:
                continue  # The pass continues only because it may not end here.
            try:
                self._take(index, value)
            except BaseException as error:
                self.refused = error
                if not self._to_end:
                    raise
        if not self._wanted and not self._to_end:
            raise StopForward

    def _take(self, index: int, value: Any) -> None:
        point = self._points[index]
        tensor = pick(value, point.member)
        if tensor is None:
            raise ModelRunError(f"layer {point.path!r}: returned no tensor on this input")
        self._sink(index, plain(tensor))

    def returned(self, value: Any) -> None:
        """Pass on what is wanted of the model's own result.

        Hooks on the model would see the calls of one that calls itself, the outermost one last.
        """
        for key in [key for key in self._wanted if key[:2] == ("", Capture.OUTPUT)]:
            for index in self._wanted.pop(key):
                if self.refused is None:
                    self._take(index, value)

    def end(self) -> None:
        """Raise our own error that the model caught, or ModelRunError if a capture is missing."""
        refused, self.refused = self.refused, None
        try:
            if refused is not None:
                raise refused
        finally:
            del refused
        if self._wanted:
            raise ModelRunError(f"layers {self.missed()} did not run on this input")

    def missed(self) -> list[str]:
        """Return the paths of wanted calls that did not happen."""
        return sorted({path for path, _, _ in self._wanted})


class Taps:
    """The hooks of one model.

    Args:
        module: The model. Its submodules are found by their first path.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = dict(module.named_modules())
        self._handles: dict[tuple[str, Capture], RemovableHandle] = {}
        self._lock = threading.Lock()
        self._running: _Session | None = None
        self._in_programs: set[str] = set()
        for path, program in programs(module).items():
            instrument(program)
            inside = (name for name, _ in program.named_modules())
            self._in_programs.update(_join(path, name) for name in inside)
            for side, handle in _hook_program(path, program, partial(self._route, path)):
                self._handles[path, side] = handle
        # torch runs these layers by a fused path that calls no submodule, unless one has a hook.
        # A hook from the start keeps answers from depending on what was requested before.
        for path, submodule in self._modules.items():
            if isinstance(submodule, nn.TransformerEncoderLayer):
                self.install(path, Capture.OUTPUT)

    def install(self, path: str, side: Capture) -> None:
        """Put a hook on a module once; further calls do nothing."""
        if not path or path in self._in_programs:
            # The result is taken where the pass returns it; programs report their calls
            # themselves, see Note [Programs inside a model].
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
    ) -> None:
        """Run a forward pass until every point was captured.

        Args:
            forward: Runs the model.
            x: The batch.
            points: What to capture; hooks are installed where they are missing.
            sink: Called at the moment of each capture.
            to_end: Whether the pass continues to its end; what the sink raises is raised there.
            own_threads: Whether the model runs modules in its own threads. No other pass of it
                may run meanwhile; see Note [A model's own threads].

        Raises:
            ModelRunError: If the pass ended without some capture.
        """
        for point in points:
            self.install(point.path, point.capture)
        session = _Session(self, points, sink, to_end=to_end)
        token = _session.set(session)
        self._running = session if own_threads else None
        try:
            with watch(session.see):
                session.returned(forward(x))
        except StopForward:
            pass
        except Exception:
            # Behind the last capture it concerns nobody, as where the pass may end there.
            if session.missed() or not to_end:
                session.refused = None  # Or it would refer to itself, and keep what was captured.
                raise
        except BaseException:
            session.refused = None  # Or it would refer to itself, and keep what was captured.
            raise
        finally:
            _session.reset(token)
            self._running = None
        session.end()

    def _route(self, path: str, side: Capture, value: Any) -> None:
        # In a thread of the model's own there is no session; see Note [A model's own threads].
        session = _session.get() or self._running
        # Other taps may be on the same model, and see the same calls.
        if session is not None and session.owner is self:
            session.see(path, side, value)

    def close(self) -> None:
        """Take every hook off the model."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()


@contextmanager
def observe(module: nn.Module, observer: ValueObserver) -> Iterator[None]:
    """Call ``observer`` at every call of every submodule; the hooks go when the block ends."""
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
        with watch(observer) if found else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a call's input: its one positional argument, else all arguments by index and name."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return {**{str(index): arg for index, arg in enumerate(args)}, **kwargs}


def _hook(module: nn.Module, side: Capture, see: Callable[[Capture, Any], None]) -> RemovableHandle:
    # Neither hook returns anything: a value returned would replace the input or the output.
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(Capture.INPUT, call_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(Capture.OUTPUT, attended(module, args, kwargs, output))

    if side is Capture.INPUT:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _hook_program(
    path: str, program: nn.Module, see: Callable[[Capture, Any], None]
) -> list[tuple[Capture, RemovableHandle]]:
    """Hook the calls of a TorchScript program; see Note [Programs inside a model]."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_program(path)
        see(Capture.INPUT, call_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        end_program()
        see(Capture.OUTPUT, output)

    # torch refuses hooks on programs, for those inside of one would never run. The outermost one is
    # called as any module is.
    first = nn.Module.register_forward_pre_hook(program, before, with_kwargs=True)
    last = nn.Module.register_forward_hook(program, after)
    return [(Capture.INPUT, first), (Capture.OUTPUT, last)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
