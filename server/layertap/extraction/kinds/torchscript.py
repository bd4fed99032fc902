"""TORCHSCRIPT: traces the model under its taps, then truncates, freezes and optimises the trace.

Note [Trace the taps]
    ``torch.jit.trace`` records the model while it runs under its taps. The pass ends at the last
    capture, so nothing after it is in the program. Each value is cloned at its capture, so later
    in-place operations do not change it. Freezing removes the names of modules, so the taps come
    first and optimisation last. This also works for models that can't be traced symbolically.

Note [A compilation unit of its own]
    torch keeps the types and functions of everything that it traces in one compilation unit, which
    lives as long as the process. Freezing turns the weights into constants of a function in that
    unit, so each dropped program would leak a copy of its weights: 12 MiB for a program of 12 MiB,
    24 MiB once it is optimised (torch 2.14). A program that is loaded from a file has its own
    compilation unit, which is freed with the program. So the traced program is saved to memory
    without its weights, loaded again, given its weights back, and then frozen.

    The functions of the trace itself would stay as well: 8 MiB for each trace of all layers of a
    ResNet-50, 170 MiB for those of an EfficientNetV2-L. Nothing runs them once the program was
    saved, so their graphs are emptied, which frees three quarters of that (torch 2.14).

Note [Programs run without profiling]
    torch's executor records the types of a program's tensors in its first run, and optimises for
    these types in the second, mostly by fusing operations. For the CPU, torch's packages fuse
    nothing (``torch._C._jit_can_fuse_on_cpu()`` is False), so those two slow runs are for nothing.
    With the executor's optimisations off, the second run has full speed, the first nearly so, and
    all return the same bits: ``benchmarks/bench_first_runs.py`` compares both ways on seven models.
    The switch belongs to the thread, so it is set for each run. On CUDA torch fuses operations, so
    there it stays on.

Note [Channels last instead of torch's optimisation]
    On a CPU, torch's ``optimize_for_inference`` gives convolutions to oneDNN, in memory layouts of
    oneDNN's own, and much of what is between the convolutions, too. Mostly that is the fastest way
    to run a program. But where cheap operations stand between many convolutions, as in EfficientNet
    and DenseNet, values are converted to and fro, and element-wise operations are slow in these
    layouts. A convolution whose weights have channels last returns channels last, and so does what
    follows, by torch's usual operations. A program that is only frozen and has such weights took
    0.4 to 0.7 of the time for EfficientNet-B0, 0.8 for DenseNet-121, and 1.0 to 1.3 for ResNet-18
    and VGG-11 on two cores with AVX-512 (``benchmarks/bench_races.py``). So this is a variant,
    which AUTO takes where it wins a race, and which a request can name.

torch.jit is deprecated upstream in favour of torch.export. Only this file compiles with torch.jit;
another compiler would be another kind.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.extraction.apart import may_end_the_process, run_apart
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.channels_last import lay_out_channels_last
from layertap.extraction.kinds.base import BuildContext, CompiledKind, Take, cloned
from layertap.extraction.packed_linears import pack_linears
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, Sink
from layertap.extraction.script_parts import part_of
from layertap.extraction.taps import Taps
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture, Extractor
from layertap.silence import warnings_ignored

__all__ = ["CHANNELS_LAST", "KIND", "TorchScriptExtractor", "TorchScriptKind", "trace_taps"]

CHANNELS_LAST = "channels_last"
"""A variant; see Note [Channels last instead of torch's optimisation]."""

_tracing = threading.Lock()
"""Held while a model is traced.

torch.jit keeps the modules of a trace in a global variable. If two traces overlap, one restores the
modules of the other, which keeps that model alive.
"""


def trace_taps(
    model: LoadedModel,
    taps: Taps,
    points: Sequence[CapturePoint],
    example: Batch,
    take: Take = cloned,
    *,
    to_end: bool = False,
    fold: bool = True,
    watching: Callable[[Batch], AbstractContextManager[object]] = nullcontext,
) -> torch.jit.ScriptModule:
    """Return the truncated program for some points, traced and frozen but not yet optimised.

    Args:
        model: The model.
        taps: Its taps.
        points: What to capture.
        example: A batch on the model's device. The program serves batches with its key.
        take: Decides what the program returns for each point.
        to_end: Whether the traced pass must run to its end. What comes after the last capture is
            dropped from the program in any case.
        fold: Whether batch norms are folded into convolutions, which copies these weights.
        watching: Returns the block in which the pass runs, for the batch that it is given.

    Passes on any exception of the tracer.
    """
    tapped = _Tapped(model, taps, points, list(example), take, to_end=to_end, watching=watching)
    # Not eval(): the model is in evaluation mode already, and its own train() may have effects.
    tapped.training = False
    # Also ignores TracerWarning for shapes that become constants: a plan serves one item shape.
    with _tracing, _deprecated():
        traced = torch.jit.trace(tapped, tuple(example.values()), check_trace=False)
        own = _in_unit_of_its_own(traced.eval(), model.device)
        _empty(traced)
        frozen: torch.jit.ScriptModule = torch.jit.freeze(own, optimize_numerics=fold)
    return frozen


def _in_unit_of_its_own(
    traced: torch.jit.ScriptModule, device: torch.device
) -> torch.jit.ScriptModule:
    """Return the program in a new unit; see Note [A compilation unit of its own].

    It shares the weights' memory with the model.
    """
    weights = [
        (path, name, value)
        for path, module in traced.named_modules(remove_duplicate=False)
        for values in (module.named_parameters, module.named_buffers)
        for name, value in values(recurse=False, remove_duplicate=False)
    ]
    # The traced program has its own slots for weights, so the model's modules are not changed.
    _set(traced, ((path, name, torch.empty(0)) for path, name, _ in weights))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    own: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device)
    _set(own, weights)
    return own


def _empty(traced: torch.jit.ScriptModule) -> None:
    """Empty the graphs of a traced program, which can't run any more.

    See Note [A compilation unit of its own]. A TorchScript program inside the model would lose its
    graphs, too, but such a model isn't traced (``CompiledKind.refuses``).
    """
    # There is no public way to the graphs of methods other than forward.
    compiled: list[Any] = [module._c for module in traced.modules()]
    for part in compiled:
        for name in part._method_names():
            graph = part._get_method(name).graph
            for _ in list(graph.outputs()):
                graph.eraseOutput(0)
            for node in reversed(list(graph.nodes())):
                node.destroy()


def _set(program: torch.jit.ScriptModule, values: Iterable[tuple[str, str, torch.Tensor]]) -> None:
    modules = dict(program.named_modules(remove_duplicate=False))
    for path, name, value in values:
        modules[path]._c.setattr(name, value)


def _deprecated() -> AbstractContextManager[None]:
    """Ignore torch's warnings that torch.jit is deprecated; see this module's docstring."""
    return warnings_ignored()


def _executor(device: torch.device) -> AbstractContextManager[object]:
    """Return the block in which programs run; see Note [Programs run without profiling]."""
    return _unoptimized() if device.type == "cpu" else nullcontext()


def _unoptimized() -> AbstractContextManager[object]:
    """Turn the executor's optimisations off for this thread."""
    context: AbstractContextManager[object] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    return context


class TorchScriptExtractor:
    """Serves a set of layers with a compiled program of its own.

    Args:
        program: The optimised program.
        packed: Packed weights of the program, which are held so that other programs of the model
            share them.
    """

    def __init__(
        self, program: torch.jit.ScriptModule, packed: Sequence[torch.Tensor] = ()
    ) -> None:
        self._program = program
        self._packed = packed

    def part(self, indexes: Sequence[int]) -> TorchScriptExtractor:
        """Return an extractor of some of the values, which shares the weights."""
        with _deprecated():
            return TorchScriptExtractor(part_of(self._program, indexes), self._packed)

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        with _executor(x.device):
            values = self._program(*x.values())
        for index, value in enumerate(values):
            sink(index, value)


class TorchScriptKind(CompiledKind[torch.jit.ScriptModule]):
    """Serves a set of layers with a traced, frozen and optimised program of its own."""

    id = Extractor.TORCHSCRIPT
    captures = frozenset({Capture.OUTPUT, Capture.INPUT})
    members = True
    # Fused kernels turn NaN into 0 (``relu``), or spread it to other elements.
    finite_only = True

    def warm_up_runs(self, device: torch.device) -> int:
        """See ExtractorKind and Note [Programs run without profiling]."""
        return 1 if device.type == "cpu" else 2

    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: Batch,
        take: Take = cloned,
        *,
        copies_weights: bool = True,
    ) -> torch.jit.ScriptModule:
        """See CompiledKind."""
        to_end = not context.scope.rules.early_stop
        return trace_taps(
            context.model,
            context.taps,
            pass_spec.points,
            example,
            take,
            to_end=to_end,
            fold=copies_weights,
            watching=context.watching,
        )

    def run(self, program: torch.jit.ScriptModule, x: Batch) -> Values:
        """See CompiledKind."""
        with _deprecated():
            return list(program(*x.values()))

    def running_once(self) -> AbstractContextManager[object]:
        """See CompiledKind."""
        return _unoptimized()

    def variants(self, device: torch.device) -> tuple[str, ...]:
        """See CompiledKind and Note [Channels last instead of torch's optimisation]."""
        return (CHANNELS_LAST,) if device.type == "cpu" else ()

    def finish(
        self, program: torch.jit.ScriptModule, typical: Batch | None = None, variant: str = ""
    ) -> BuiltExtractor:
        """See CompiledKind."""
        with _deprecated():
            packed = [] if typical is None else pack_linears(program, typical)
            if variant == CHANNELS_LAST:
                lay_out_channels_last(program)
            else:
                program = torch.jit.optimize_for_inference(program)
            return TorchScriptExtractor(program, packed)

    def part(self, built: BuiltExtractor, indexes: Sequence[int]) -> BuiltExtractor | None:
        """See CompiledKind."""
        return built.part(indexes) if isinstance(built, TorchScriptExtractor) else None

    def save(self, program: torch.jit.ScriptModule) -> memoryview:
        """See CompiledKind.

        It writes to memory, never directly to a file: on a full disk, the destructor of torch's
        own writer throws, which ends the process (``std::terminate``; pytorch/pytorch#156955).
        """
        buffer = io.BytesIO()
        with _deprecated():
            torch.jit.save(program, buffer)
        return buffer.getbuffer()

    def load(self, path: Path, model: LoadedModel) -> torch.jit.ScriptModule:
        """See CompiledKind."""
        with _deprecated():
            # Of a file in memory, torch makes three copies.
            program: torch.jit.ScriptModule = torch.jit.load(path, map_location=model.device)
        return program

    def may_end_the_process(self, program: torch.jit.ScriptModule) -> bool:
        """See CompiledKind."""
        return may_end_the_process(program)

    def run_apart(
        self, program: torch.jit.ScriptModule, batches: Sequence[Batch], device: torch.device
    ) -> Generator[None, None, list[Values]]:
        """See CompiledKind."""
        return run_apart(program, batches, device, self.warm_up_runs(device))


KIND = TorchScriptKind()


class _Tapped(nn.Module):
    """A module that takes a batch's tensors, runs the model and returns the captured values."""

    def __init__(
        self,
        model: LoadedModel,
        taps: Taps,
        points: Sequence[CapturePoint],
        names: Sequence[str],
        take: Take,
        *,
        to_end: bool,
        watching: Callable[[Batch], AbstractContextManager[object]],
    ) -> None:
        super().__init__()
        self.module = model.module
        self._model = model
        self._taps = taps
        self._points = points
        self._names = names
        self._take = take
        self._to_end = to_end
        self._watching = watching

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model under its taps."""
        captured: dict[int, tuple[torch.Tensor, ...]] = {}

        def keep(index: int, value: torch.Tensor) -> None:
            captured[index] = self._take(index, value)

        x = Batch(dict(zip(self._names, tensors, strict=True)))
        with self._watching(x):
            self._taps.run(self._model.forward, x, self._points, keep, to_end=self._to_end)
        return tuple(part for index in range(len(self._points)) for part in captured[index])
