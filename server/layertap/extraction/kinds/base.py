"""The interface of an extractor kind: one way to take layers' values out of a model.

Everything that depends on the kind is a method or attribute of its object, so a new kind is one
file here and one value of ``Extractor``. ``registry`` explains how it is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.measurement import Measurement
from layertap.extraction.obstacles import (
    DRAWS_NUMBERS,
    SOMETIMES,
    no_guard,
    runs_python,
    takes_step,
)
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import KeptState, PassScope, ScopedExtractor
from layertap.extraction.pause import Pause
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.script_taps import programs
from layertap.extraction.symbolic import GraphNames
from layertap.extraction.taps import Taps
from layertap.extraction.verify import compiled_tolerance
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture, Extractor

__all__ = [
    "BuildContext",
    "CompiledKind",
    "DirectKind",
    "ExtractorKind",
    "ReferenceKind",
    "Take",
    "Verdict",
    "cloned",
]

P = TypeVar("P")
"""The program of a compiled kind: compiled, but not yet finished, so that it can be saved."""

Take = Callable[[int, torch.Tensor], tuple[torch.Tensor, ...]]
"""Takes (index of a capture point, its tensor); returns the tensors that a program returns for it.

It is compiled into the program. It must copy, because the tensor may be overwritten later.
"""


def _unwatched(_: Batch) -> AbstractContextManager[object]:
    return nullcontext()


def cloned(_: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a copy of the whole value; the usual ``Take``."""
    return (value.clone(),)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a kind serves a value.

    Attributes:
        reason: Why it doesn't, as a clause after "X can't serve the layer: "; empty if it does.
    """

    reason: str = ""


@dataclass(frozen=True)
class BuildContext:
    """What is needed to build extractors of one model.

    Attributes:
        model: The model.
        taps: The model's taps.
        scope: The model's scope, in which every pass of the model must run.
        graph: The node names of its symbolic graph; None if it has none.
        watching: Returns the block in which a compiled kind must run the pass that it records,
            given that pass's batch.
    """

    model: LoadedModel
    taps: Taps
    scope: PassScope
    graph: GraphNames | None
    watching: Callable[[Batch], AbstractContextManager[object]] = _unwatched

    def traced(self) -> GraphNames:
        """Return the names of the graph; raise ExtractorUnsupportedError if there is no graph."""
        if self.graph is None:
            raise ExtractorUnsupportedError(
                f"model {self.model.name!r} can't be traced symbolically"
            )
        return self.graph

    def guarded(self, built: BuiltExtractor) -> BuiltExtractor:
        """Return an extractor that enters the scope in each of its passes."""
        return ScopedExtractor(built, self.scope)


class ExtractorKind(ABC):
    """One way to take layers' values out of a model. Kinds have no state.

    Attributes:
        id: The value of ``Extractor`` by which requests name it.
        compiled: Whether it is a ``CompiledKind``, which runs compiled programs, or else a
            ``DirectKind``. Compiling takes long, so AUTO uses a compiled plan only once it is
            ready. Plans are compiled for declared layers, or in the background for layers that are
            requested often. They are warmed before they serve, and the plans of declared layers
            are stored on disk.
        reference: Whether it runs the model itself, so that its values are right by definition and
            need no proof. Exactly one kind does; see ``ReferenceKind``.
        captures: The sides of a layer that it can capture.
        nodes: Whether it serves nodes of the symbolic graph.
        members: Whether it serves members of containers, such as one tensor of a tuple.
        gradients: Whether it computes gradients; see ``extraction.gradients``.
        edits: Whether it applies interventions; see ``extraction.interventions``.
        finite_only: Whether its values for NaN and infinity differ from the model's, so that its
            input must be finite.
    """

    id: ClassVar[Extractor]
    compiled: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    captures: ClassVar[frozenset[Capture]] = frozenset({Capture.OUTPUT})
    nodes: ClassVar[bool] = False
    members: ClassVar[bool] = False
    gradients: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    finite_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name that messages use."""
        return self.id.name

    @property
    def letter(self) -> str:
        """The letter that ``layertap layers`` shows.

        ``Extractor`` defines it, so that the command line can show it without importing torch.
        """
        return self.id.letter

    @property
    def automatic(self) -> bool:
        """Whether AUTO uses it; else a request must name it. ``Extractor`` defines this as well."""
        return self.id.automatic

    def warm_up_runs(self, device: torch.device) -> int:
        """Return after how many runs a pass at a new batch size has reached its full speed.

        Args:
            device: Where it runs. The runs are on the thread that will run it later.
        """
        del device
        return 3

    def variants(self, device: torch.device) -> tuple[str, ...]:
        """Return the names of the other ways to finish the kind's program; none by default.

        AUTO uses them only where a race shows that one of them is faster. A request that names the
        extractor gets the usual way, or the one that it names, so it gets the same bits for ever.

        Args:
            device: Where the program runs.
        """
        del device
        return ()

    def tolerance(self, reference: torch.Tensor) -> float:
        """Return how far a value may be from the model's own.

        Args:
            reference: The model's own value, on the device that computed it.

        Returns:
            The largest allowed error as a share of the value's largest magnitude; 0.0 if every bit
            must be equal.
        """
        del reference
        return 0.0

    def refuses(self, found: Measurement) -> str:
        """Return why the kind serves no layer of a model; empty if it may serve some."""
        del found
        return ""

    def claims(self, point: CapturePoint, found: Measurement) -> Verdict:
        """Decide whether the kind serves a value.

        A claim may be wrong, because each plan is proven before it serves. But faults that the
        input of a proof can't show must be refused here, such as a branch for other input.

        Args:
            point: Where the value is captured: a side in ``captures`` of a call that was measured.
            found: The measurement of the model, which ``refuses`` did not refuse as a whole.
        """
        if point.kind is PointKind.NODE and not self.nodes:
            return Verdict("it is a node of the symbolic graph, not a module")
        if point.member and not self.members:
            return Verdict("it captures plain tensors only, not members of a container")
        if self.reference:
            return Verdict()
        if point in found.random:
            return Verdict(DRAWS_NUMBERS)
        if point.kind is PointKind.MODULE and point.path in found.varying:
            return Verdict("the module runs only for some inputs")
        return Verdict(SOMETIMES if point in found.sometimes else self.obstacle(point, found))

    def obstacle(self, point: CapturePoint, found: Measurement) -> str:
        """Return why this kind would compute a wrong value; empty if nothing indicates that.

        ``claims`` asks this last. Kinds override it.
        """
        del point, found
        return ""


class DirectKind(ExtractorKind):
    """A kind that runs the model's own modules, so building one takes no time."""

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; most direct kinds don't run the modules through ``forward``."""
        if found.rules.state is KeptState.KEPT:
            return "the model is stateful, so its own forward pass must run to its end"
        if not found.rules.early_stop:
            return "the model's passes must run to their end"
        return ""

    @abstractmethod
    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """Build an extractor, which is not proven yet.

        Args:
            context: The model, its taps, scope and graph. The caller must not be in the scope.
            pass_spec: What to capture: points that the kind claims to serve.

        Raises:
            ExtractorUnsupportedError: It can't be built.
        """


class ReferenceKind(DirectKind):
    """The kind that runs the model itself under its taps. Other kinds are compared with it."""

    reference = True

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; the model itself serves every model."""
        del found
        return ""

    @abstractmethod
    def build_reference(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """Build the extractor whose values those of other kinds are compared with.

        Its passes run to their end, and are watched for state that no earlier pass wrote.
        """


class CompiledKind(ExtractorKind, Generic[P]):
    """A kind that compiles a program for each pass spec and batch key.

    The program is saved before it is finished, as finishing it may lose what saving needs.

    Attributes:
        slow: Whether compiling takes so long, even in another process, that it must not keep
            anyone else waiting. Then no program is compiled when a model is loaded, a compute
            thread is free while ``assemble`` waits, and every plan is stored on disk.
        records_alone: Whether recording changes the model or the process for other threads, so
            that no pass may run meanwhile.
        checks_sizes: Whether every program refuses batches of sizes for which it was not compiled.
        follows_branches: Whether code that branches on values has a program for each way it can go.
        records_one_item: Whether a program that is recorded from one item may hold where one of
            several does not.
    """

    compiled = True
    slow: ClassVar[bool] = False
    records_alone: ClassVar[bool] = False
    checks_sizes: ClassVar[bool] = False
    records_one_item: ClassVar[bool] = True
    follows_branches: ClassVar[bool] = True

    def tolerance(self, reference: torch.Tensor) -> float:
        """See ExtractorKind; compilers reorder arithmetic."""
        return compiled_tolerance(reference)

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; a program is recorded from a pass of the model on tensors."""
        module = found.model.module
        if found.model.takes_list:
            return "the model takes a list of images, not a tensor"
        if isinstance(module, torch.jit.ScriptModule):
            return "the model is already a TorchScript program, which HOOK runs unchanged"
        inner = next(iter(programs(module)), "")
        if inner:
            return f"a part of the model, {inner!r}, is a TorchScript program already"
        if found.model.differentiates:
            return "the model computes gradients in its forward pass, which a trace does not record"
        return found.rules.uncompiled

    def obstacle(self, point: CapturePoint, found: Measurement) -> str:
        """See ExtractorKind."""
        return self.recording_obstacle(
            unguarded=found.looks.unguarded.get(point, ""),
            python=found.looks.python.get(point, ""),
            step=found.looks.steps.get(point, ""),
        )

    def recording_obstacle(self, *, unguarded: str, python: str, step: str) -> str:
        """Return why a program recorded from one pass would be wrong for other input.

        Args:
            unguarded: Why there is no guard for a look at tensor values on the way; empty if there
                was no look, or if each has a guard. See ``guards``.
            python: What the model runs in Python before this value, as a clause; empty for nothing.
            step: A discontinuous operation that this value depends on; empty for none.
        """
        if unguarded:
            return no_guard(unguarded)
        if python:
            return runs_python(python)
        return takes_step(step) if step else ""

    @abstractmethod
    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: Batch,
        take: Take = cloned,
        *,
        copies_weights: bool = True,
    ) -> P:
        """Compile a program, which is not proven yet. Any exception refuses the points.

        Args:
            context: The model, its taps, scope and graph. The caller is in the scope. The
                recorded pass runs inside ``context.watching``.
            pass_spec: What to capture: points that the kind claims to serve.
            example: A batch on the model's device. The program must serve every batch with its
                key, at every batch size.
            take: Decides what the program returns for each point, in the order of the points.
            copies_weights: Whether the program may have a copy of the weights that is optimised.
        """

    def assemble(self, program: P) -> Generator[Pause | None, None, P]:
        """Do what is left of compiling after recording, in steps; return the program.

        The model's passes may run meanwhile, so that it must not use the model. A kind that waits
        for another process yields a ``Pause``.

        Raises:
            ProgramEndedError: The program can't be compiled.
        """
        yield from ()
        return program

    def facts(self) -> str:
        """Return what stored programs depend on besides the model, torch and the device's type."""
        return ""

    @abstractmethod
    def run(self, program: P, x: Batch) -> Values:
        """Run an unfinished program; return what ``take`` gave for each point, as one flat list.

        Any exception refuses the program.

        Args:
            program: The program; it is not changed.
            x: A batch with the example's key; the program may write into it.
        """

    def running_once(self) -> AbstractContextManager[object]:
        """Return a context in which nothing is recorded or compiled for later runs."""
        return nullcontext()

    @abstractmethod
    def finish(self, program: P, typical: Batch | None = None, variant: str = "") -> BuiltExtractor:
        """Make a program ready to run. It can't be saved afterwards.

        Args:
            program: The program; it may be changed in place.
            typical: A batch of sizes for which it should be fast; None if it will run a few times
                only.
            variant: One of ``variants``, or empty for the usual way.
        """

    def part(self, built: BuiltExtractor, indexes: Sequence[int]) -> BuiltExtractor | None:
        """Return an extractor of some values of another one only, which shares its weights.

        Any exception means that it can't be made.

        Args:
            built: An extractor that ``finish`` returned. It is not changed.
            indexes: Which of its points to serve, in that order.

        Returns:
            The extractor, or None if this kind can't make one.
        """
        del built, indexes
        return None

    @abstractmethod
    def save(self, program: P) -> bytes | memoryview:
        """Return an unfinished program as the bytes of a file.

        The program can still be finished. Any exception means that it can't be saved.
        """

    @abstractmethod
    def load(self, path: Path, model: LoadedModel) -> P:
        """Return the program of a file that ``save`` gave; any exception means that it is damaged.

        Loading may run code from the file, so a file that other users can write is never loaded.
        """

    def may_end_the_process(self, program: P) -> bool:
        """Return whether a program's native code could end the process.

        If so, ``run_apart`` runs it before this process does. See Note [Unchecked operations] in
        ``apart``.
        """
        del program
        return False

    def is_for_one_size(self, program: P) -> bool:
        """Return whether a program is known to refuse items of any other size."""
        del program
        return False

    def kept_proof_holds(self, program: P) -> bool:
        """Return whether a kept proof says that a stored program does not end the process.

        If not, it runs in a child process again. See Note [Proofs that are kept] in ``plan_cache``.
        """
        return not self.may_end_the_process(program)

    def run_apart(
        self, program: P, batches: Sequence[Batch], device: torch.device
    ) -> Generator[Pause | None, None, list[Values]]:
        """Run a program in a child process and return its values for each batch; yield meanwhile.

        This is called only for programs for which ``may_end_the_process`` returns True, so a kind
        that has no such programs doesn't define it.

        Raises:
            ProgramEndedError: The program raised, ended the process or took too long.
        """
        raise NotImplementedError(f"{self.name} programs are never run in another process")
