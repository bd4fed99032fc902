"""EXPORT: exports the model under its taps, and compiles the program to a package of native code.

Note [Export the taps]
    ``torch.export`` records the model while it runs under its taps, on tensors without elements
    (non-strict mode: the model's own Python code runs). Each value is cloned at its capture, and
    the pass ends at the last one, so nothing after it is in the program. The number of items is
    free, and so are the dimensions that the model's signature names as free, if export finds that
    nothing depends on their sizes; images of the usual size are the exception below. AOTInductor
    then compiles the program; see ``packager``.

Note [Images of the model's own size]
    Nearly all images have the size for which the model was loaded, and code for one size is better:
    squeezenet1_1 took 33 instead of 81 seconds to compile, and its passes 21 to 26 % less time. So
    images and videos of that size get a package for it alone, and those of all other sizes share
    one. The length of a text is free in every package: hardly two texts have the same.

Note [Stopped while it is recorded]
    The tracer keeps a stack of the modules that are running, and expects each to return. A pass
    that ends early leaves some on the stack. So the stack is cut to what it was before the pass.

Note [Alone in the process]
    While torch exports, the parameters of the model are replaced by tensors without elements, and
    ``torch.compiler.is_exporting()`` is true in every thread. So no other pass may run meanwhile.

Note [Constants have their names]
    A tensor that the model uses and torch does not know, such as one in a list or one that
    ``forward`` makes of numbers, is a constant of the exported program. AOTInductor gives constants
    names of its own that lead back to nothing, but leaves buffers theirs. So such constants are
    declared to be buffers that are not saved with the weights, which are stored in the same place.

Only CPUs are supported: a package for a GPU was not tried.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.apart import ProgramEndedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.kinds.base import BuildContext, CompiledKind, Take, cloned
from layertap.extraction.measurement import Measurement
from layertap.extraction.package import InputShape, LoadedPackage, Package
from layertap.extraction.packager import (
    SideProcessError,
    compile_package,
    compiler,
    run_package,
)
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.pause import Pause
from layertap.extraction.points import Sink
from layertap.extraction.processor import processor
from layertap.models import Batch, InputSpec, LoadedModel
from layertap.selection import Capture, Extractor
from layertap.silence import warnings_ignored

__all__ = ["KIND", "ExportExtractor", "ExportKind", "ExportProgram"]

_BATCH = "batch"
_INSIDE = "module."
"""How the names of the model's tensors begin in an exported program."""


@dataclass(frozen=True)
class ExportProgram:
    """An exported program of a model, or the package that it was compiled to.

    Attributes:
        tensors: The tensors of the model, by name. A package uses them where they are.
        exported: The exported program; None once it is compiled.
        package: The package; None until it is compiled.
    """

    tensors: dict[str, torch.Tensor]
    exported: torch.export.ExportedProgram | None = None
    package: Package | None = None

    @property
    def compiled(self) -> Package:
        """The package, which must be there."""
        if self.package is None:
            raise AssertionError("the program is not compiled yet")
        return self.package

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the tensor of each constant of the package."""
        package = self.compiled
        shared = {name: self.tensors[path] for name, path in package.shared.items()}
        return {**shared, **package.own}


class ExportExtractor:
    """Serves a set of layers with a package, without the GIL.

    Args:
        program: The compiled program.
    """

    def __init__(self, program: ExportProgram) -> None:
        package = program.compiled
        self._package = LoadedPackage(package.library)
        self._package.bind(program.constants(), package.inputs, package.outputs)

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        for index, value in enumerate(self._package.run(list(x.values()))):
            sink(index, value)


class ExportKind(CompiledKind[ExportProgram]):
    """Serves a set of layers with an exported program, compiled to native code."""

    id = Extractor.EXPORT
    captures = frozenset({Capture.OUTPUT, Capture.INPUT})
    members = True
    # Vectorised code may treat NaN in another way, and proofs have finite numbers only.
    finite_only = True
    slow = True
    records_alone = True
    checks_sizes = True
    records_one_item = False
    follows_branches = False

    def warm_up_runs(self, device: torch.device) -> int:
        """See ExtractorKind."""
        del device
        return 1

    def refuses(self, found: Measurement) -> str:
        """See CompiledKind."""
        if found.model.device.type != "cpu":
            return "it compiles programs for the CPU only"
        return super().refuses(found)

    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: Batch,
        take: Take = cloned,
        *,
        copies_weights: bool = True,
    ) -> ExportProgram:
        """See CompiledKind; the program that this returns is exported, and not compiled yet."""
        if not compiler():
            raise ExtractorUnsupportedError(
                f"{self.name} can't serve this layer set of model {context.model.name!r}: to "
                "compile a package takes a C++ compiler, and there is none: expected g++, or the "
                "one that the environment variable CXX names"
            )
        # A batch of one item would make the number of items a constant.
        several = example if example.size > 1 else Batch.cat([example, example])
        tensors = tuple(tensor.contiguous() for tensor in several.values())
        tapped = _Tapped(context, pass_spec, list(several), take)
        # Not eval(): the model is in evaluation mode already, and its own train() may have effects.
        tapped.training = False
        with torch.inference_mode(False), torch.no_grad(), warnings_ignored():
            plain = tuple(tensor.clone() for tensor in tensors)
            exported = torch.export.export(
                tapped, plain, dynamic_shapes=_free(context.model, several), strict=False
            )
        _make_constants_buffers(exported)
        return ExportProgram(_tensors_of(context.model), exported)

    def assemble(self, program: ExportProgram) -> Generator[Pause, None, ExportProgram]:
        """See CompiledKind."""
        exported = program.exported
        if exported is None:
            return program
        inputs = _inputs_of(exported)
        try:
            library, constants = yield from compile_package(exported)
        except SideProcessError as error:
            raise ProgramEndedError(str(error)) from error
        known = {**exported.state_dict, **exported.constants}
        shared, own = {}, {}
        for name, full in constants.items():
            if full not in known:
                raise ProgramEndedError(f"nothing is known about the constant {full!r} of its code")
            tensor, path = known[full], full.removeprefix(_INSIDE)
            mine = program.tensors.get(path)
            if mine is not None and _is_same(mine, tensor):
                shared[name] = path
            else:
                own[name] = tensor.detach().clone()
        outputs = len(exported.graph_signature.user_outputs)
        return ExportProgram(program.tensors, None, Package(library, inputs, outputs, shared, own))

    def run(self, program: ExportProgram, x: Batch) -> Values:
        """See CompiledKind; this runs the exported program, which is not compiled yet."""
        if program.exported is None:
            raise AssertionError("a package runs once it is finished")
        return list(program.exported.module()(*x.values()))

    def finish(
        self, program: ExportProgram, typical: Batch | None = None, variant: str = ""
    ) -> BuiltExtractor:
        """See CompiledKind."""
        return ExportExtractor(program)

    def save(self, program: ExportProgram) -> memoryview:
        """See CompiledKind; the weights are not part of the file."""
        package = program.compiled
        content = {
            "library": torch.frombuffer(bytearray(package.library), dtype=torch.uint8),
            "inputs": [(each.dtype, each.sizes, each.least) for each in package.inputs],
            "outputs": package.outputs,
            "shared": dict(package.shared),
            "own": dict(package.own),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getbuffer()

    def load(self, path: Path, model: LoadedModel) -> ExportProgram:
        """See CompiledKind."""
        content = torch.load(path, weights_only=True)
        package = Package(
            content["library"].numpy().tobytes(),
            tuple(InputShape(*each) for each in content["inputs"]),
            content["outputs"],
            content["shared"],
            content["own"],
        )
        program = ExportProgram(_tensors_of(model), None, package)
        program.constants()  # Raises KeyError if the model has no such tensors.
        return program

    def facts(self) -> str:
        """See CompiledKind."""
        return processor()

    def may_end_the_process(self, program: ExportProgram) -> bool:
        """See CompiledKind; any package might."""
        return True

    def is_for_one_size(self, program: ExportProgram) -> bool:
        """See CompiledKind."""
        free = {size for each in program.compiled.inputs for size in each.sizes[1:]}
        return not any(isinstance(size, str) for size in free)

    def kept_proof_holds(self, program: ExportProgram) -> bool:
        """See CompiledKind; the same library has run on this machine, with the same weights."""
        return True

    def run_apart(
        self, program: ExportProgram, batches: Sequence[Batch], device: torch.device
    ) -> Generator[Pause, None, list[Values]]:
        """See CompiledKind."""
        package = program.compiled
        try:
            return (
                yield from run_package(
                    package.library,
                    program.constants(),
                    package.inputs,
                    package.outputs,
                    batches,
                )
            )
        except SideProcessError as error:
            raise ProgramEndedError(str(error)) from error


KIND = ExportKind()


class _Tapped(nn.Module):
    """A module that takes a batch's tensors, runs the model and returns the captured values."""

    def __init__(
        self, context: BuildContext, pass_spec: PassSpec, names: Sequence[str], take: Take
    ) -> None:
        super().__init__()
        self.module = context.model.module
        self._context = context
        self._points = pass_spec.points
        self._names = names
        self._take = take
        for point in pass_spec.points:
            # Not while it is recorded: the tracer works on copies of the modules' dictionaries.
            context.taps.install(point.path, point.capture)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model under its taps."""
        captured: dict[int, tuple[torch.Tensor, ...]] = {}

        def keep(index: int, value: torch.Tensor) -> None:
            captured[index] = self._take(index, value)

        x = Batch(dict(zip(self._names, tensors, strict=True)))
        context = self._context
        to_end = not context.scope.rules.early_stop
        cut = _stack_cutter()
        with context.watching(x):
            context.taps.run(context.model.forward, x, self._points, keep, to_end=to_end)
        cut()
        return tuple(part for index in range(len(self._points)) for part in captured[index])


def _stack_cutter() -> Callable[[], None]:
    """Return a function that makes the tracer's stack of modules what it is now.

    See Note [Stopped while it is recorded].
    """
    # Here, because it imports sympy.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # noqa: PLC0415

    mode: Any = get_proxy_mode()
    stack = getattr(getattr(mode, "tracer", None), "module_stack", {})
    depth = len(stack)

    def cut() -> None:
        while len(stack) > depth:
            stack.popitem()

    return cut


def _free(model: LoadedModel, x: Batch) -> tuple[tuple[dict[int, Any], ...]]:
    """Return which dimensions of the inputs are free, as ``torch.export`` takes it.

    See Note [Images of the model's own size].
    """
    batch = torch.export.Dim(_BATCH, min=1)
    specs = {spec.name: spec for spec in model.signature.inputs}
    return (tuple({0: batch, **_free_sizes(specs[name], tensor)} for name, tensor in x.items()),)


def _free_sizes(spec: InputSpec, tensor: torch.Tensor) -> dict[int, Any]:
    is_image = len(spec.free) > 1
    if is_image and tensor.shape[1:] == spec.shape:
        return {}
    return {axis + 1: torch.export.Dim.AUTO for axis in spec.free if tensor.shape[axis + 1] > 1}


def _make_constants_buffers(exported: torch.export.ExportedProgram) -> None:
    """Declare a program's constants to be buffers; see Note [Constants have their names]."""
    from torch.export.graph_signature import InputKind  # noqa: PLC0415 - it imports sympy

    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def _inputs_of(exported: torch.export.ExportedProgram) -> tuple[InputShape, ...]:
    """Return what a program takes, as found by export."""
    names = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    return tuple(_shape_of(node.meta["val"], exported) for node in nodes)


def _shape_of(value: torch.Tensor, exported: torch.export.ExportedProgram) -> InputShape:
    sizes: list[int | str] = []
    least: list[int] = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
            least.append(size)
            continue
        symbol: Any = size.node.expr
        bounds: Any = exported.range_constraints.get(symbol)
        if bounds is None:  # A multiple of something, say: only the size of the example is sure.
            sizes.append(int(size.node.hint))
            least.append(int(size.node.hint))
            continue
        sizes.append(str(symbol))
        least.append(max(1, int(bounds.lower)))
    return InputShape(str(value.dtype).removeprefix("torch."), tuple(sizes), tuple(least))


def _tensors_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    module = model.module
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _is_same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        mine.data_ptr() == other.data_ptr()
        and mine.shape == other.shape
        and mine.stride() == other.stride()
        and mine.dtype == other.dtype
    )
