"""What an extractor kind is: one way to take layers' values out of a model.

Everything that depends on the kind is asked of its object, so that a new kind is one file here and
one value of ``Extractor``. See ``registry`` for how it is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import GuardedExtractor, PassGuard
from layertap.extraction.symbolic import GraphNames
from layertap.extraction.taps import Taps
from layertap.extraction.verify import compiled_tolerance
from layertap.models import LoadedModel
from layertap.selection import Capture, Extractor

__all__ = [
    "BuildContext",
    "CompiledKind",
    "DirectKind",
    "ExtractorKind",
    "ReferenceKind",
    "Take",
    "cloned",
]

P = TypeVar("P")
"""A compiled kind's program: compiled, and still in a form that can be saved."""

Take = Callable[[int, torch.Tensor], tuple[torch.Tensor, ...]]
"""Takes (index of a capture point, its live tensor); gives what a program returns of it.

It is compiled as part of the program, and must copy: the tensor may be overwritten later.
"""


def cloned(_: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Have a program return the value itself."""
    return (value.clone(),)


@dataclass(frozen=True)
class BuildContext:
    """What the extractors of one model are built from.

    Attributes:
        model: The model.
        taps: Its taps.
        guard: Its guard, to be held in each pass of the model.
        graph: The node names of its symbolic graph; None where it has none.
    """

    model: LoadedModel
    taps: Taps
    guard: PassGuard
    graph: GraphNames | None

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
        compiled: Whether it runs a compiled program, which takes long to make: such plans are
            proven and warmed before they serve, stored on disk, and made beside requests for
            layers that AUTO is asked for often. Whether it is a ``CompiledKind``; else it is a
            ``DirectKind``.
        reference: Whether it runs the model itself, so that its values are right by definition and
            need no proof. Exactly one kind is; see ``ReferenceKind``.
        captures: The sides of a layer that it can take.
        nodes: Whether it serves nodes of the symbolic graph.
        members: Whether it serves members of containers, such as one tensor of a tuple.
        finite_only: Whether it takes NaN and infinity otherwise than the model does, so that it
            must not be given any.
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


class DirectKind(ExtractorKind):
    """A kind that runs the model's own modules, so that it is built in no time."""

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

    @abstractmethod
    def oracle(self, context: BuildContext, pass_spec: PassSpec) -> BuiltExtractor:
        """Build the extractor whose values prove those of other kinds.

        Its passes run to their end and are watched for state that no pass wrote before.
        """


class CompiledKind(ExtractorKind, Generic[P]):
    """A kind that compiles a program for each pass spec, item shape and dtype.

    The program is saved before it is finished, as the last optimisation may lose what saving needs.
    """

    compiled = True

    def tolerance(self, oracle: torch.Tensor) -> float:
        """See ExtractorKind; compilers reorder arithmetic."""
        return compiled_tolerance(oracle)

    @abstractmethod
    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: torch.Tensor,
        take: Take = cloned,
    ) -> P:
        """Compile a program. It is not proven yet, and whatever is raised refuses it.

        Args:
            context: The model and what belongs to it. The caller holds its guard.
            pass_spec: What to do: points that the kind claims to serve.
            example: ``[B, ...]`` on the model's device. The program must serve its item shape and
                dtype, at every batch size.
            take: What the program returns of each point, in the order of the points.
        """

    @abstractmethod
    def run_once(self, program: P, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run a program that is not finished, and return what it returns.

        As cheaply as one run can be: nothing is recorded or compiled for runs to come. Whatever is
        raised refuses the program.

        Args:
            program: The program; it stays as it is.
            x: ``[B, ...]``; the program may write into it.
        """

    @abstractmethod
    def finish(self, program: P) -> BuiltExtractor:
        """Make a program ready to run. It can't be saved any more."""

    @abstractmethod
    def save(self, program: P) -> bytes | memoryview:
        """Return a program that is not finished as the bytes of a file.

        Raises:
            RuntimeError: The program can't be saved; it can still be finished.
        """

    @abstractmethod
    def load(self, data: bytes, device: torch.device) -> P:
        """Return the program that ``save`` gave. Whatever is raised means that the file is damaged.

        Loading may run code from the file, so a file that somebody else can write is never loaded.
        """

    def may_end_the_process(self, program: P) -> bool:
        """Tell whether a program has native code that could end the process; ``run_apart`` if so.

        See Note [Unchecked operations] in ``apart``.
        """
        del program
        return False

    def run_apart(
        self, program: P, batches: Sequence[torch.Tensor], device: torch.device
    ) -> Generator[None, None, list[Values]]:
        """Run a program in a process of its own, in steps; return its values for each batch.

        Raises:
            ProgramEndedError: The program raised, ended the process or took too long.
        """
        raise NotImplementedError(f"{self.name} programs are never run in another process")
