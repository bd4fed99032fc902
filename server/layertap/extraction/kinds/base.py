"""What an extractor kind is: one way to take layers' values out of a model.

Everything that depends on the kind is asked of its object, so that a new kind is one file here and
one value of ``Extractor``. See ``registry`` for how it is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.measurement import Measurement
from layertap.extraction.obstacles import RANDOM, SOMETIMES, calls_function, no_guard, takes_step
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import GuardedExtractor, KeptState, PassGuard
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
"""A compiled kind's program: compiled, and still in a form that can be saved."""

Take = Callable[[int, torch.Tensor], tuple[torch.Tensor, ...]]
"""Takes (index of a capture point, its live tensor); gives what a program returns of it.

It is compiled as part of the program, and must copy: the tensor may be overwritten later.
"""


def _unwatched(_: Batch) -> AbstractContextManager[object]:
    return nullcontext()


def cloned(_: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Have a program return the value itself."""
    return (value.clone(),)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a kind serves a value.

    Attributes:
        reason: Why not, as a clause after "X can't serve the layer: "; empty if it serves it.
    """

    reason: str = ""


@dataclass(frozen=True)
class BuildContext:
    """What the extractors of one model are built from.

    Attributes:
        model: The model.
        taps: Its taps.
        guard: Its guard, to be held in each pass of the model.
        graph: The node names of its symbolic graph; None if it has none.
        watching: Returns the block in which a compiled kind runs the pass that it records, for
            the batch that it gives the model in it.
    """

    model: LoadedModel
    taps: Taps
    guard: PassGuard
    graph: GraphNames | None
    watching: Callable[[Batch], AbstractContextManager[object]] = _unwatched

    def traced(self) -> GraphNames:
        """Return the names of the graph; raise ExtractorUnsupportedError where there is none."""
        if self.graph is None:
            raise ExtractorUnsupportedError(
                f"model {self.model.name!r} can't be traced symbolically"
            )
        return self.graph

    def guarded(self, built: BuiltExtractor) -> BuiltExtractor:
        """Return an extractor that holds the guard in each of its passes."""
        return GuardedExtractor(built, self.guard)


class ExtractorKind(ABC):
    """One way to take layers' values out of a model. Kinds have no state.

    Attributes:
        id: What requests call it.
        compiled: Whether it is a ``CompiledKind`` and runs compiled programs; else it is a
            ``DirectKind``. Compiling takes long. So AUTO uses such a plan only once it is ready:
            it is made when layers are declared, or in the background for layers that are asked
            for often. It is warmed before it serves, and that of declared layers stored on disk.
        reference: Whether it runs the model itself, so that its values are right by definition and
            need no proof. Exactly one kind is; see ``ReferenceKind``.
        captures: The sides of a layer that it can take.
        nodes: Whether it serves nodes of the symbolic graph.
        members: Whether it serves members of containers, such as one tensor of a tuple.
        finite_only: Whether its values for NaN and infinity are not the model's, so that it must
            not be given any.
        warm_up_runs: Runs after which a pass at a new batch size is as fast as it gets, on the
            thread that will run it.
    """

    id: ClassVar[Extractor]
    compiled: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    captures: ClassVar[frozenset[Capture]] = frozenset({Capture.OUTPUT})
    nodes: ClassVar[bool] = False
    members: ClassVar[bool] = False
    finite_only: ClassVar[bool] = False
    warm_up_runs: ClassVar[int] = 3

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.id.name

    @property
    def letter(self) -> str:
        """What ``layertap layers`` calls it.

        The value of ``Extractor`` has it, as the command line shows it without importing torch.
        """
        return self.id.letter

    def tolerance(self, oracle: torch.Tensor) -> float:
        """Return how far a value may be from the model's own.

        Args:
            oracle: The model's own value, on the device that computed it.

        Returns:
            The largest allowed error as a share of the value's largest magnitude; 0.0 if every bit
            must be equal.
        """
        del oracle
        return 0.0

    def refuses(self, found: Measurement) -> str:
        """Return why the kind serves nothing of a model; empty if it may serve some of it."""
        del found
        return ""

    def claims(self, point: CapturePoint, found: Measurement) -> Verdict:
        """Decide whether the kind serves a value.

        A claim need not be certain, as each plan is proven before it serves. But what a proof's
        input can't show must be refused here: code that other input would lead elsewhere.

        Args:
            point: Where the value is captured: a side in ``captures`` of a call that was measured.
            found: What was measured of the model. The kind does not refuse the whole model.
        """
        if point.kind is PointKind.NODE and not self.nodes:
            return Verdict("it is a node of the symbolic graph, not a module")
        if point.member and not self.members:
            return Verdict("it captures plain tensors only, not members of a container")
        if self.reference:
            return Verdict()
        if point in found.random:
            return Verdict(RANDOM)
        if point.kind is PointKind.MODULE and point.path in found.varying:
            return Verdict("the module runs only for some inputs")
        return Verdict(SOMETIMES if point in found.sometimes else self.obstacle(point, found))

    def obstacle(self, point: CapturePoint, found: Measurement) -> str:
        """Return why the kind's own way to a value would be wrong; empty if nothing is in its way.

        The second half of ``claims``, for kinds to replace.
        """
        del point, found
        return ""


class DirectKind(ExtractorKind):
    """A kind that runs the model's own modules, so that it is built in no time."""

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; such a kind runs the modules by code other than their ``forward``."""
        if found.rules.state is KeptState.KEPT:
            return "the model is stateful, so its own forward pass must run to its end"
        if not found.rules.early_stop:
            return "the model's passes must run to their end"
        return ""

    @abstractmethod
    def build(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """Build an extractor. It is not proven yet.

        Args:
            context: The model and what belongs to it. The caller does not hold its guard.
            pass_spec: What to do: points that the kind claims to serve.

        Raises:
            ExtractorUnsupportedError: It can't be built.
        """


class ReferenceKind(DirectKind):
    """The kind that runs the model itself under its taps, and proves the others."""

    reference = True

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; the model itself serves every model."""
        del found
        return ""

    @abstractmethod
    def oracle(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """Build the extractor whose values prove those of other kinds.

        Its passes run to their end and are watched for state that no pass wrote before.
        """


class CompiledKind(ExtractorKind, Generic[P]):
    """A kind that compiles a program for each pass spec and batch key.

    The program is saved before it is finished, as the last optimisation may lose what saving needs.
    """

    compiled = True

    def tolerance(self, oracle: torch.Tensor) -> float:
        """See ExtractorKind; compilers reorder arithmetic."""
        return compiled_tolerance(oracle)

    def refuses(self, found: Measurement) -> str:
        """See ExtractorKind; a program is recorded from a pass of the model on one tensor."""
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
            function=found.looks.functions.get(point, ""),
            step=found.looks.steps.get(point, ""),
        )

    def recording_obstacle(self, *, unguarded: str, function: str, step: str) -> str:
        """Return why a program recorded from one pass would be wrong for other input.

        Args:
            unguarded: Why there is no guard for a look at values on the way; empty if there was no
                look, or there are guards for all of them. See ``guards``.
            function: A Python function of autograd on the way; empty for none.
            step: A discontinuous operation that the value follows from; empty for none.
        """
        if unguarded:
            return no_guard(unguarded)
        if function:
            return calls_function(function)
        return takes_step(step) if step else ""

    @abstractmethod
    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: Batch,
        take: Take = cloned,
    ) -> P:
        """Compile a program. It is not proven yet, and whatever is raised refuses it.

        Args:
            context: The model and what belongs to it. The caller holds its guard. The recorded pass
                runs inside ``context.watching``.
            pass_spec: What to do: points that the kind claims to serve.
            example: On the model's device. The program must serve batches of its key, at every
                batch size.
            take: What the program returns of each point, in the order of the points.
        """

    @abstractmethod
    def run(self, program: P, x: Batch) -> Values:
        """Run a program that is not finished; return what ``take`` gave for each point, in a row.

        Whatever is raised refuses the program.

        Args:
            program: The program; it stays as it is.
            x: A batch of the example's key; the program may write into it.
        """

    def running_once(self) -> AbstractContextManager[object]:
        """Return a context in which nothing is recorded or compiled for runs to come."""
        return nullcontext()

    @abstractmethod
    def finish(self, program: P) -> BuiltExtractor:
        """Make a program ready to run. It can't be saved any more."""

    @abstractmethod
    def save(self, program: P) -> bytes | memoryview:
        """Return a program that is not finished as the bytes of a file.

        It can still be finished. Whatever is raised means that it can't be saved.
        """

    @abstractmethod
    def load(self, data: bytes, device: torch.device) -> P:
        """Return the program that ``save`` gave. Whatever is raised means that the file is damaged.

        Loading may run code from the file, so a file that somebody else can write is never loaded.
        """

    def may_end_the_process(self, program: P) -> bool:
        """Return whether a program has native code that could end the process; ``run_apart`` if so.

        See Note [Unchecked operations] in ``apart``.
        """
        del program
        return False

    def run_apart(
        self, program: P, batches: Sequence[Batch], device: torch.device
    ) -> Generator[None, None, list[Values]]:
        """Run a program in its own process, in steps; return its values for each batch.

        Raises:
            ProgramEndedError: The program raised, ended the process or took too long.
        """
        raise NotImplementedError(f"{self.name} programs are never run in another process")
