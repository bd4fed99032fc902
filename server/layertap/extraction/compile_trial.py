"""Trial compilation: what compiled programs can't serve is refused before the first request.

Note [Tried before the first request]
    The catalogue claims that TORCHSCRIPT serves a layer wherever nothing speaks against it. Whether
    a trace can be made of the model's code, whether its program runs on batches of other sizes, and
    whether its values are the model's, only trying shows. So once a model was measured, one program
    of all layers that would be claimed is traced, and run on the batches with which a plan is
    proven. Where it can't be traced, or fails, parts of the layers are tried: a program ends at its
    last layer, so the layers before a fault are served, and one odd layer does not cost the others.
    Where single values differ, those layers are refused.

    It costs a trace and about a dozen items' passes. So that it takes little memory, the program
    returns not the values but what is compared of them (see Note [Digests]), and each program is
    dropped once it was held against the model. Its runs are not profiled, as no later run
    profits from that. Optimising copies the weights, as each backend wants them in an order
    of its own. It can fail too, so it is tried, but not where the weights are large.

    What no batch that is tried here shows is refused by the plan of the first request for it: a
    branch on a batch's size beyond three, or code that does something else for another item shape.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from layertap.extraction.apart import ProgramEndedError, may_end_the_process, run_apart
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.digest import Digest, digest_pass, sample_step
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import PassGuard
from layertap.extraction.points import CapturePoint
from layertap.extraction.samples import bytes_input, reaching_inputs
from layertap.extraction.survey import sample_input, wide_input
from layertap.extraction.taps import Taps
from layertap.extraction.torchscript import optimized, run_unprofiled, trace_taps
from layertap.extraction.verify import compiled_tolerance
from layertap.models import LoadedModel
from layertap.selection import Capture, Extractor

__all__ = ["with_programs_tried"]

_log = logging.getLogger(__name__)

MAX_TRACES = 24
"""Programs that are traced of one model to find out which of its layers are at fault."""

MAX_APART = 4
"""How many of them run in a process of their own, which takes seconds."""

MAX_COPIED_BYTES = 256 << 20
"""Bytes of weights up to which a program is optimised, or run apart, which copies them."""

LARGER = 7
"""A batch size at which a program that may end its process is tried besides."""


def with_programs_tried(model: LoadedModel, catalogue: Catalogue) -> Iterator[Catalogue | None]:
    """Try compiled programs of a model in steps; the last yields what may be claimed of it.

    See Note [Tried before the first request]. For a compute thread, where no other pass of the
    model may run meanwhile. Each step takes about as long as a forward pass of a few items.

    Args:
        model: The model that was measured.
        catalogue: What measuring it gave.

    Yields:
        None for each step, then the catalogue without the claims that no program kept.
    """
    claimed = _claimed(catalogue)
    if not claimed:
        yield catalogue
        return
    taps = Taps(model.module)
    try:
        faults = yield from _Trial(model, taps, catalogue).faults(claimed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _log.warning(
            "model %s: there is not the memory to try compiled programs of it (%s); what they "
            "can't serve is refused by the first request for it", model.name, own_words(error),
        )  # fmt: skip
        faults = {}
    finally:
        taps.close()
    entries = {name: _without(entry, faults) for name, entry in catalogue.entries.items()}
    yield replace(catalogue, entries=entries)


def _claimed(catalogue: Catalogue) -> list[CapturePoint]:
    """Return the points that TORCHSCRIPT would serve, in execution order."""
    return list(
        dict.fromkeys(
            point
            for entry in catalogue
            # The input of a call exists before its output does.
            for side in (Capture.INPUT, Capture.OUTPUT)
            for point in _points(entry, side)
        )
    )


def _points(entry: LayerEntry, side: Capture) -> Iterator[CapturePoint]:
    if side in entry.points and entry.serves(Extractor.TORCHSCRIPT, side):
        yield entry.points[side]


def _without(entry: LayerEntry, faults: Mapping[CapturePoint, str]) -> LayerEntry:
    output, given = (
        faults.get(entry.points[side], "") if side in entry.points else ""
        for side in (Capture.OUTPUT, Capture.INPUT)
    )
    if not output and not given:
        return entry
    support = entry.support[Extractor.TORCHSCRIPT].without(output, given)
    return replace(entry, support={**entry.support, Extractor.TORCHSCRIPT: support})


Faults = dict[CapturePoint, str]
"""Why a compiled program can't serve a point, for those that it can't."""


class _FailedError(Exception):
    """A program could not be made or run; the message says why, in words for the catalogue."""


@dataclass(frozen=True)
class _Failure:
    """Why a program of some points could not be made or run."""

    reason: str


@dataclass(frozen=True)
class _Case:
    """A batch, and what the model computed for it.

    Attributes:
        x: ``[B, ...]``.
        digests: By point; without those that are not there on this input.
        ordinary: Whether values that are not finite count as well.
    """

    x: torch.Tensor
    digests: Mapping[CapturePoint, Digest]
    ordinary: bool


class _Trial:
    """Tries programs of one model.

    Args:
        model: The model.
        taps: Taps of it for this trial only.
        catalogue: Its catalogue.
    """

    def __init__(self, model: LoadedModel, taps: Taps, catalogue: Catalogue) -> None:
        self._model = model
        self._taps = taps
        self._guard: PassGuard = catalogue.guard
        self._specs = catalogue.specs
        self._small = model.weight_bytes() <= MAX_COPIED_BYTES
        self._left = MAX_TRACES
        self._left_apart = MAX_APART
        self._last = _Failure("")
        self._cases: list[_Case] = []

    def faults(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Return why some of the points can't be served by a compiled program."""
        self._steps = {point: sample_step(self._specs[point]) for point in points}
        yield from self._run_model()
        faults = {point: reason for point in points if (reason := self._missing(point))}
        rest = [point for point in points if point not in faults]
        if rest:
            faults.update((yield from self._tried(rest)))
        return faults

    def _run_model(self) -> Iterator[None]:
        """Fill the cases. What a model need not be able to take is left out."""
        shape = self._model.input.item_shape
        self._add(sample_input(self._model, 1, shape), ordinary=True)
        yield
        self._add(sample_input(self._model, 2, shape), ordinary=True)
        yield
        wide = wide_input(self._model, 3, shape)
        if wide is None or not self._add(wide):
            yield
            self._add(sample_input(self._model, 3, shape), ordinary=True)
        yield
        others = [bytes_input(self._model, shape)]
        if not self._model.input.dtype.is_floating_point:
            others.extend(reaching_inputs(self._model, shape))
        for x in others:
            if x is not None:
                self._add(x)
                yield

    def _add(self, x: torch.Tensor, *, ordinary: bool = False) -> bool:
        """Run the model on a batch and keep what it computed; tell whether it runs on it."""
        try:
            with self._guard as guard:
                digests = digest_pass(self._model, x, self._steps)
                guard.learn(self._model.name)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # A model need not take such input; what it raises is its own business.
            return False
        self._cases.append(_Case(x, digests, ordinary))
        return True

    def _missing(self, point: CapturePoint) -> str:
        """Return what is said of a point that is not there on every input; empty for others."""
        missed = [case for case in self._cases if point not in case.digests]
        return "the layer has that value for some inputs only" if missed else ""

    def _tried(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Return the faults of some points; where a program of them all fails, of parts of it.

        A program ends at its last layer. So the longest row of layers, from the first one on, is
        found of which a program works; then the layers behind the one that broke it are tried.
        """
        found = yield from self._attempt(points)
        if isinstance(found, dict):
            return found
        if len(points) == 1:
            return {points[0]: found.reason}
        works, faults, breaks = yield from self._longest_row(points, found)
        faults = {**faults, points[works]: breaks.reason}
        rest = points[works + 1 :]
        # Either one layer is odd by itself, or whatever follows from it fails as well.
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

    def _longest_row(
        self, points: Sequence[CapturePoint], failure: _Failure
    ) -> Generator[None, None, tuple[int, Faults, _Failure]]:
        """Find how many points, from the first one on, one program serves.

        Args:
            points: Two or more.
            failure: Why a program of them all fails.

        Returns:
            How many, their faults, and why a program of one more fails.
        """
        works, fails, faults = 0, len(points), Faults()
        size = 1  # Where the model can't be traced at all, that shows at once.
        while works + 1 < fails:
            found = yield from self._attempt(points[:size])
            if isinstance(found, dict):
                works, faults = size, found
            else:
                fails, failure = size, found
            size = (works + fails) // 2
        return works, faults, failure

    def _attempt(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults | _Failure]:
        """Return the faults of some points by one program, or why that fails."""
        if self._left < 1:
            return self._last
        self._left -= 1
        try:
            return (yield from self._compared(points))
        except _FailedError as error:
            self._last = _Failure(str(error))
            _log.info("model %s: %s (%d layers)", self._model.name, error, len(points))
            return self._last

    def _compared(self, points: Sequence[CapturePoint]) -> Generator[None, None, Faults]:
        """Hold one program of some points against the model; raise _FailedError where it fails."""
        program = self._program(points)
        yield
        apart = may_end_the_process(program)
        if apart and not self._small:
            # Its weights would be copied to the other process, several times over.
            return {}
        if apart:
            answers = yield from self._run_apart(program)
        elif self._small:
            program = self._optimized(program)
            yield
        faults: Faults = {}
        for index, case in enumerate(self._cases):
            values = answers[index] if apart else self._run(program, case.x)
            found = _differences(case, points, values, self._steps)
            faults = {**found, **faults}
            yield
        return faults

    def _program(self, points: Sequence[CapturePoint]) -> torch.jit.ScriptModule:
        steps = [self._steps[point] for point in points]

        def compared(index: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if steps[index] == 1:
                return (value.clone(),)
            return value.reshape(-1)[:: steps[index]].clone(), torch._shape_as_tensor(value)

        example = self._cases[0].x.clone()
        try:
            with self._guard:
                return trace_taps(self._model, self._taps, points, example, compared)
        except Exception as error:
            _log.info("model %s can't be traced", self._model.name, exc_info=True)
            raise _failed("the model can't be traced", error) from error

    def _optimized(self, program: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        try:
            return optimized(program)
        except Exception as error:
            raise _failed("a compiled program of it can't be optimised", error) from error

    def _run(self, program: torch.jit.ScriptModule, x: torch.Tensor) -> Sequence[torch.Tensor]:
        try:
            # The program may write into its batch, and other programs run on it again.
            return run_unprofiled(program, x.clone())
        except Exception as error:
            raise _failed(f"a compiled program fails at batch size {len(x)}", error) from error

    def _run_apart(
        self, program: torch.jit.ScriptModule
    ) -> Generator[None, None, list[list[torch.Tensor]]]:
        """Run a program in a process of its own; see ``apart``."""
        if self._left_apart < 1:
            raise _FailedError(self._last.reason)
        self._left_apart -= 1
        if all(len(case.x) != LARGER for case in self._cases):
            x = sample_input(self._model, LARGER, self._model.input.item_shape)
            self._add(x, ordinary=True)
            yield
        batches = [case.x for case in self._cases]
        try:
            return (yield from run_apart(program, batches, self._model.device, runs=1))
        except ProgramEndedError as error:
            raise _FailedError(f"a compiled program fails ({error})") from error


def _failed(what: str, error: Exception) -> Exception:
    """Return the failure to raise for what a program raised."""
    return error if is_out_of_memory(error) else _FailedError(f"{what} ({own_words(error)})")


def _differences(
    case: _Case,
    points: Sequence[CapturePoint],
    values: Sequence[torch.Tensor],
    steps: Mapping[CapturePoint, int],
) -> Faults:
    """Return how a program's values differ from the model's, for those that do."""
    faults = {}
    parts = iter(values)
    for point in points:
        elements = next(parts)
        shape = tuple(elements.shape) if steps[point] == 1 else tuple(next(parts).tolist())
        true = case.digests.get(point)
        if true is None:  # The batch was tried when the point was known to be missing elsewhere.
            continue
        # The last bits decide where a root of some noise is NaN.
        if not case.ordinary and not true.finite:
            continue
        tolerance = compiled_tolerance(true.elements)
        if fault := true.fault_of_sample(shape, elements.to(true.elements.device), tolerance):
            faults[point] = (
                f"at batch size {len(case.x)} a compiled program differs from the model: {fault}"
            )
    return faults
