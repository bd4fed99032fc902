"""Trial compilation: finds the layers that a compiled program can serve.

Note [One program for all]
    Only a trial shows whether a model can be compiled, whether the program runs at other batch
    sizes, and whether its values are the model's. So one program is compiled for all layers that
    the kind claims to serve, and run on every batch of the trial. If it can't be compiled or fails,
    programs for fewer layers are tried. A program ends at its last layer, so the layers before a
    fault are still served, and one odd layer does not cost the others. If only some values differ,
    only their layers are refused.

    That costs one compilation, and one pass for each item of the batches. To save memory, the
    program returns a sample of each value instead of the value (see Note [Digests]), and each
    program is dropped after it was compared. If a layer's input is the very tensor that another
    module returned, the input is served whenever that output is. Finishing a program can fail, too,
    so finished programs are run. But finishing copies the weights, and so do folding batch norms
    into convolutions and running in another process, so none of that is tried if the weights are
    large. Before a plan serves, the proof does all of it in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from layertap.extraction.apart import ProgramEndedError
from layertap.extraction.base import Values
from layertap.extraction.digest import Digest, digest_pass
from layertap.extraction.kinds.base import BuildContext, CompiledKind
from layertap.extraction.obstacles import SOMETIMES
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import compiler_words, own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassScope
from layertap.extraction.pause import waiting
from layertap.extraction.points import CapturePoint
from layertap.extraction.samples import ordinary_batch
from layertap.malloc import return_memory
from layertap.models import Batch, LoadedModel

__all__ = ["Case", "CompileTrial", "Faults", "depends_on_size", "run_case", "sometimes"]

_log = logging.getLogger(__name__)

MAX_PROGRAMS = 24
"""Maximum number of programs compiled per model while looking for the layers that fail."""

MAX_TOGETHER = 10
"""Programs that may be compiled in any case to test the remaining layers together."""

MAX_APART = 4
"""Maximum number of these programs that run in a child process, which takes seconds."""

MAX_COPIED_BYTES = 256 << 20
"""Bytes of weights above which nothing is done in a trial that copies them."""

LARGER = 7
"""An additional batch size for programs that could end the process."""

_AT_SIZE = "at batch size"

Run = Callable[[Batch], Values]

Faults = dict[CapturePoint, str]
"""Why an extractor can't serve a point, for the points that it can't serve."""


@dataclass(frozen=True)
class Case:
    """A batch, and what the model computed for it.

    Attributes:
        x: The batch.
        digests: The digest of each point that exists for this input.
        twins: For each input that is the very tensor that another module returned: that output.
        ordinary: Whether the batch has ordinary numbers. Only then are values that are not finite
            compared: for extreme numbers, rounding may decide whether a square root is NaN.
        astray: Points before which the model's code takes another branch for this batch than for
            the example that programs are recorded from; see ``guards``.
    """

    x: Batch
    digests: Mapping[CapturePoint, Digest]
    twins: Mapping[CapturePoint, CapturePoint]
    ordinary: bool
    astray: frozenset[CapturePoint] = frozenset()


def run_case(
    model: LoadedModel,
    scope: PassScope,
    x: Batch,
    steps: Mapping[CapturePoint, int],
    *,
    ordinary: bool,
) -> Case | None:
    """Run a model on a batch and return what to compare with; None if it can't take the batch.

    Args:
        model: The model.
        scope: The model's scope.
        x: The batch; it is not changed.
        steps: The distance between the elements that are compared, for each point.
        ordinary: See Case.
    """
    try:
        with scope:
            digested = digest_pass(model, x, steps)
            scope.learn(model.name)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A model may refuse such input; its error does not matter here.
        return None
    return Case(x, digested.digests, digested.twins, ordinary)


def sometimes(points: Sequence[CapturePoint], cases: Sequence[Case]) -> Faults:
    """Return the points that do not exist for every batch; no program can serve these."""
    return {
        point: SOMETIMES for point in points if any(point not in case.digests for case in cases)
    }


class _FailedError(Exception):
    """A program could not be made or run; the message says why, in words for the catalogue."""


@dataclass(frozen=True)
class _Failure:
    """Why a program for some points could not be made or run."""

    reason: str


class CompileTrial:
    """Compiles programs of one model and compares them with it.

    Args:
        context: The model, with taps that only this trial uses.
        kind: The kind that compiles.
        steps: The distance between the elements that are compared, for each point.
        example: The batch from which programs are recorded.
        cases: The batches, with the values that the programs must compute.
    """

    def __init__(
        self,
        context: BuildContext,
        kind: CompiledKind[Any],
        steps: Mapping[CapturePoint, int],
        example: Batch,
        cases: Sequence[Case],
    ) -> None:
        self._context = context
        self._kind = kind
        self._steps = steps
        self._example = example
        self._cases = cases
        self._small = context.model.weight_bytes() <= MAX_COPIED_BYTES
        self._left = MAX_PROGRAMS
        self._left_apart = MAX_APART
        self._last = _Failure("")

    def faults(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Return why some of the points, in execution order, can't be served."""
        faults = sometimes(points, self._cases)
        rest = [point for point in points if point not in faults]
        twins = self._twins(rest)
        tried = [point for point in rest if point not in twins]
        found = (yield from self._attempt(tried)) if tried else Faults()
        if isinstance(found, dict):
            faults.update(found)
            faults.update({point: found[twin] for point, twin in twins.items() if twin in found})
            return faults
        faults.update((yield from self._parts(rest, found)))
        served = [point for point in rest if point not in faults]
        faults.update((yield from self._together(served)))
        return faults

    def _twins(self, points: Sequence[CapturePoint]) -> dict[CapturePoint, CapturePoint]:
        """Map each input to the point whose output it is in every case, if there is one."""
        first, *others = self._cases
        return {
            point: twin
            for point in points
            if (twin := first.twins.get(point)) in points
            and twin is not None
            and all(case.twins.get(point) == twin for case in others)
        }

    def _tried(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Return the faults of some points, found with one program or several."""
        found = yield from self._attempt(points)
        if isinstance(found, dict):
            return found
        return (yield from self._parts(points, found))

    def _parts(
        self, points: Sequence[CapturePoint], failure: _Failure
    ) -> Generator[None, None, Faults]:
        """Return the faults of points for which one program fails, found with smaller programs.

        A program ends at its last layer. So we search for the longest run of layers, from the first
        one on, that one program can serve. Then we try the layers after the one that broke it.
        """
        if len(points) == 1:
            return {points[0]: failure.reason}
        works, faults, breaks = yield from self._longest_row(points, failure)
        faults = {**faults, points[works]: breaks.reason}
        rest = points[works + 1 :]
        # Either only that one layer fails, or everything that depends on it fails as well.
        fails = 0
        singles = list(dict.fromkeys((rest[0], rest[len(rest) // 2], rest[-1]))) if rest else []
        for single in singles:
            found = yield from self._attempt([single])
            if isinstance(found, dict):
                break
            fails += 1
        if fails == len(singles):
            return {**dict.fromkeys(rest, breaks.reason), **faults}
        middle = len(rest) // 2 if fails else 0
        for part in filter(None, (rest[:middle], rest[middle:])):
            faults.update((yield from self._tried(part)))
        return faults

    def _together(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Return the faults that points have only when one program serves all of them."""
        if not points:
            return {}
        self._left = max(self._left, MAX_TOGETHER)
        found = yield from self._attempt(points)
        if isinstance(found, dict):
            return found
        if len(points) == 1:
            return {points[0]: found.reason}
        works, faults, breaks = yield from self._longest_row(points, found)
        return {**faults, **dict.fromkeys(points[works:], breaks.reason)}

    def _longest_row(
        self, points: Sequence[CapturePoint], failure: _Failure
    ) -> Generator[None, None, tuple[int, Faults, _Failure]]:
        """Find how many points, counted from the first, one program can serve.

        Args:
            points: Two points or more.
            failure: Why a program for all of them fails.

        Returns:
            Their number, their faults, and why a program for one more point fails.
        """
        works, fails, faults = 0, len(points), Faults()
        size = 1  # If the model can't be traced at all, one layer is enough to show it.
        while works + 1 < fails:
            found = yield from self._attempt(points[:size])
            if isinstance(found, dict):
                works, faults = size, found
            else:
                fails, failure = size, found
            size = (works + fails) // 2
        return works, faults, failure

    def _attempt(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults | _Failure]:
        """Return the faults of some points in one program, or why that program fails."""
        if self._left < 1:
            return self._last
        self._left -= 1
        try:
            return (yield from self._compared(points))
        except _FailedError as error:
            self._last = _Failure(str(error))
            _log.info("model %s: %s (%d layers)", self._context.model.name, error, len(points))
            return self._last

    def _compared(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Compare one program for some points with the model; raise _FailedError if it fails."""
        program = self._compiled(points)
        yield
        if self._kind.may_end_the_process(program):
            return (yield from self._compared_apart(points, program))
        if not self._small:
            return_memory()  # What recording has freed, before large batches need as much.
        run = self._finished(program) if self._small else partial(self._kind.run, program)
        yield
        faults: Faults = {}
        for case in self._cases:
            try:
                values = self._values(run, case.x)
            except _FailedError:
                if not case.astray:
                    raise
                continue  # The program was recorded from a pass that went another way.
            faults = {**self._differences(case, points, values), **faults}
            yield
        return faults

    def _compared_apart(
        self, points: Sequence[CapturePoint], program: Any
    ) -> Generator[None, None, Faults]:
        """Compare a program by running it in a child process; see ``apart``."""
        if not self._small:
            return {}  # The proof of the first request's plan compares it.
        if self._left_apart < 1:
            raise _FailedError(self._last.reason)
        self._left_apart -= 1
        model = self._context.model
        cases = [case for case in self._cases if not case.astray]
        if len(cases) == len(self._cases):
            x = ordinary_batch(model, LARGER)
            larger = run_case(model, self._context.scope, x, self._steps, ordinary=True)
            cases.extend([larger] if larger else [])
        yield
        try:
            answers = yield from waiting(
                self._kind.run_apart(program, [case.x for case in cases], model.device)
            )
        except ProgramEndedError as error:
            raise _FailedError(f"a compiled program fails ({error})") from error
        faults: Faults = {}
        for case, values in zip(cases, answers, strict=True):
            faults = {**self._differences(case, points, values), **faults}
        return faults

    def _compiled(self, points: Sequence[CapturePoint]) -> Any:
        steps = [self._steps[point] for point in points]

        def compared(index: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if steps[index] == 1:
                return (value.clone(),)
            # The second tensor has the value's shape but takes the memory of one element.
            return value.reshape(-1)[:: steps[index]].clone(), value.new_zeros(()).expand_as(value)

        example = self._example.clone()
        # Earlier requests leave hooks like these on the model; a compiler may fail because of them.
        for point in points:
            self._context.taps.install(point.path, point.capture)
        try:
            with self._context.scope:
                return self._kind.compile(
                    self._context, PassSpec(tuple(points)), example, compared,
                    copies_weights=self._small,
                )  # fmt: skip
        except Exception as error:
            _log.info("model %s can't be compiled", self._context.model.name, exc_info=True)
            if is_out_of_memory(error):
                raise
            reason = f"the model can't be compiled ({compiler_words(error)})"
            raise _FailedError(reason) from error

    def _finished(self, program: Any) -> Run:
        try:
            built = self._kind.finish(program)
        except Exception as error:
            raise _failed("a compiled program can't be optimised", error) from error

        def run(x: Batch) -> Values:
            values: Values = []
            built.run(x, lambda _, value: values.append(value))
            return values

        return run

    def _values(self, run: Run, x: Batch) -> Values:
        try:
            with self._kind.running_once():
                # The program may write into its batch, which other programs use again.
                return run(x.clone())
        except Exception as error:
            raise _failed(f"a compiled program fails {_AT_SIZE} {x.size}", error) from error

    def _differences(
        self, case: Case, points: Sequence[CapturePoint], values: Sequence[torch.Tensor]
    ) -> Faults:
        """Return how a program's values differ from the model's, for the points that do."""
        faults: Faults = {}
        parts = iter(values)
        for point in points:
            elements = next(parts)
            whole = self._steps[point] == 1
            shape = tuple(elements.shape if whole else next(parts).shape)
            true = case.digests.get(point)
            if true is None or point in case.astray or (not case.ordinary and not true.finite):
                continue
            tolerance = self._kind.tolerance(true.elements)
            if fault := true.fault_of_sample(shape, elements.to(true.elements.device), tolerance):
                faults[point] = (
                    f"{_AT_SIZE} {case.x.size} a compiled program differs from the model: {fault}"
                )
        return faults


def depends_on_size(reason: str) -> bool:
    """Return whether a program fails or differs at some batch size, which its example decides."""
    return _AT_SIZE in reason


def _failed(what: str, error: Exception) -> Exception:
    """Return the exception to raise after a program raised ``error``."""
    return error if is_out_of_memory(error) else _FailedError(f"{what} ({own_words(error)})")
