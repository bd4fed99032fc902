"""Building plans: an extractor for one layer set and item shape, proven before it is used."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from layertap.errors import ExtractorUnsupportedError, LayertapError
from layertap.extraction.apart import ProgramEndedError, may_end_the_process, run_apart
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.fx import FxExtractor
from layertap.extraction.hook import HookExtractor
from layertap.extraction.looks import watch_looks
from layertap.extraction.obstacles import LOOKS, calls_function, takes_step
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import GuardedExtractor
from layertap.extraction.plan import Findings, Plan, quoted
from layertap.extraction.plan_cache import PlanCache, PlanFile, fingerprint, plan_digest
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.proof import Values, prove
from layertap.extraction.prover import Prover
from layertap.extraction.survey import sample_input
from layertap.extraction.taps import Taps
from layertap.extraction.torchscript import WARM_UP_RUNS, TorchScriptExtractor, trace_taps
from layertap.extraction.verify import compiled_tolerance, mismatch
from layertap.extraction.walk import ChildrenExtractor, LayerGetterExtractor
from layertap.models import LoadedModel
from layertap.selection import Extractor

__all__ = ["PlanBuilder"]

_log = logging.getLogger(__name__)

_LARGER = 7
"""A batch size beyond those of a proof, at which a program that may end its process is tried."""


@dataclass
class _Proof:
    """What an extractor is held against: batches, and what the oracle gave for each."""

    extractor: Extractor
    points: Sequence[CapturePoint]
    cases: list[tuple[torch.Tensor, Values]]

    @property
    def example(self) -> torch.Tensor:
        return self.cases[0][0]

    def steps(self, built: BuiltExtractor) -> Iterator[None]:
        for x, expected in self.cases:
            prove(self.extractor, built, self.points, x, expected)
            yield None


class PlanBuilder:
    """Builds and proves the plans of one model.

    Every method runs the model, so each must be called on a compute thread.

    Args:
        model: The model.
        taps: Its taps.
        catalogue: Its catalogue.
        cache: Where the compiled plans that are to be kept are stored.
        proving: A module of its own for what is only measured, and its taps, where a pass of the
            model itself would change later answers.

    Attributes:
        prover: Holds the plans against the model, now and later.
    """

    def __init__(
        self,
        model: LoadedModel,
        taps: Taps,
        catalogue: Catalogue,
        cache: PlanCache | None = None,
        *,
        proving: tuple[LoadedModel, Taps] | None = None,
    ) -> None:
        self._model = model
        self._taps = taps
        self._catalogue = catalogue
        # Not to be held while the model is traced symbolically, which waits for the passes of
        # others, who may wait for this guard.
        self._guard = catalogue.guard
        self._cache = cache
        self.prover = Prover(*(proving or (model, taps)), catalogue)

    def build(
        self,
        extractor: Extractor,
        points: Sequence[CapturePoint],
        item_shape: tuple[int, ...],
        *,
        keep: bool = False,
    ) -> Plan:
        """Build an extractor and hold it against the oracle at three batch sizes.

        The oracle is HOOK, so HOOK itself is only measured. FX, CHILDREN and LAYER_GETTER must be
        equal to it bit for bit, TORCHSCRIPT within ``compiled_tolerance``.

        Args:
            extractor: Any but AUTO.
            points: Distinct capture points of the catalogue that the extractor claims to serve.
            item_shape: The sizes of one item, without the batch.
            keep: Whether to store a compiled plan on disk, or use the one stored there.

        Raises:
            InvalidInputError: Where the model itself can't run on such items.
            ExtractorUnsupportedError: Where the extractor can't be built or its values differ.
        """
        *_, plan = self.steps(extractor, points, item_shape, keep=keep)
        if plan is None:
            raise AssertionError("the last step yields the plan")
        return plan

    def steps(
        self,
        extractor: Extractor,
        points: Sequence[CapturePoint],
        item_shape: tuple[int, ...],
        *,
        keep: bool = False,
    ) -> Iterator[Plan | None]:
        """Build as ``build`` does, in steps of about one forward pass; the last yields the plan."""
        if extractor is Extractor.HOOK and item_shape == self._model.input.item_shape:
            # The oracle at the size at which the catalogue was measured: nothing is left to learn.
            specs = tuple(self._catalogue.specs[point] for point in points)
            built: BuiltExtractor = HookExtractor(self._model, self._taps, points, self._guard)
            yield Plan(extractor, tuple(points), item_shape, specs, built, Findings())
            return
        batches = [sample_input(self._model, size, item_shape) for size in (1, 2)]
        oracle = []
        for x in batches:
            oracle.append(self.prover.truth(points, x))
            yield None
        specs = tuple(
            self._placed(point, ValueSpec.from_batches(one.dtype, one.shape, two.shape), item_shape)
            for point, one, two in zip(points, *oracle, strict=True)
        )
        proof = _Proof(extractor, points, list(zip(batches, oracle, strict=True)))
        if extractor is not Extractor.HOOK:
            proof.cases.extend(self.prover.reaching_cases(extractor, points, item_shape))
            yield None
        if extractor is Extractor.TORCHSCRIPT:
            built = yield from self._compiled(points, proof, keep=keep)
        else:
            built = self.construct(extractor, points, batches[0])
            yield None
            if extractor is not Extractor.HOOK:
                yield from proof.steps(built)
        findings = Findings(len(x) for x, _ in proof.cases)
        yield Plan(extractor, tuple(points), item_shape, specs, built, findings)

    def _placed(
        self, point: CapturePoint, spec: ValueSpec, item_shape: tuple[int, ...]
    ) -> ValueSpec:
        """Return a spec with what the catalogue has found out about the point."""
        measured = self._catalogue.specs.get(point)
        if measured is None or len(measured.dims) != len(spec.dims):
            return spec
        spec = replace(spec, interleaved=measured.interleaved)
        if spec.batch_axis is None:
            return spec
        shape = [1, *(dim.size for dim in spec.dims if not dim.batch)]
        geometry = measured.geometry.at(shape, item_shape, self._model.input.item_shape)
        return replace(spec, geometry=geometry)

    def _compiled(
        self, points: Sequence[CapturePoint], proof: _Proof, *, keep: bool
    ) -> Generator[None, None, BuiltExtractor]:
        """Return a compiled, proven and warm plan: the stored one, or else a new one."""
        example = proof.example
        stored = self._stored(points, example) if keep else None
        program = stored.load(self._model.device) if stored else None
        if stored and program:
            try:
                return (yield from self._warm(points, program, proof))
            except ExtractorUnsupportedError:
                _log.warning("model %s: a stored plan no longer fits it", self._model.name)
                stored.forget()
        frozen = self._trace(points, example)
        yield None
        with stored.storing(frozen) if stored else nullcontext():
            return (yield from self._warm(points, frozen, proof))

    def _warm(
        self, points: Sequence[CapturePoint], frozen: torch.jit.ScriptModule, proof: _Proof
    ) -> Generator[None, None, BuiltExtractor]:
        """Optimise, prove and warm a program. Whatever it raises costs this plan only."""
        try:
            if may_end_the_process(frozen):
                yield from self._tried_apart(points, frozen, proof)
            built = TorchScriptExtractor(frozen)
            yield None
            yield from proof.steps(built)
            for _ in range(WARM_UP_RUNS):
                built.run(proof.example.clone(), lambda index, value: None)
                yield None
        except (LayertapError, GeneratorExit):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise self.prover.out_of_memory(proof.example) from error
            _log.info("a program of model %s fails", self._model.name, exc_info=True)
            raise self._refusal(points, f"its program fails ({own_words(error)})") from error
        return built

    def _tried_apart(
        self, points: Sequence[CapturePoint], frozen: torch.jit.ScriptModule, proof: _Proof
    ) -> Iterator[None]:
        """Hold a program against the oracle in a process of its own; see ``apart``."""
        larger = sample_input(self._model, _LARGER, tuple(proof.example.shape[1:]))
        cases = [*proof.cases, (larger, self.prover.truth(points, larger))]
        yield None
        try:
            answers = yield from run_apart(
                frozen, [x for x, _ in cases], self._model.device, WARM_UP_RUNS
            )
        except ProgramEndedError as error:
            raise self._refusal(points, f"its program fails ({error})") from error
        for (x, expected), values in zip(cases, answers, strict=True):
            self._check(points, x, values, expected)

    def _check(
        self, points: Sequence[CapturePoint], x: torch.Tensor, values: Values, expected: Values
    ) -> None:
        for value, right in zip(values, expected, strict=True):
            fault = mismatch(value, right.cpu(), compiled_tolerance(right))
            if fault:
                raise self._refusal(points, f"at batch size {len(x)} {fault}")

    def _stored(self, points: Sequence[CapturePoint], example: torch.Tensor) -> PlanFile | None:
        if self._cache is None:
            return None
        digest = plan_digest(self._fingerprint, points, example.shape[1:], example.dtype)
        return self._cache.file(digest)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._model)

    def construct(
        self, extractor: Extractor, points: Sequence[CapturePoint], example: torch.Tensor
    ) -> BuiltExtractor:
        """Build an extractor without proving it.

        Args:
            extractor: Any but AUTO.
            points: Distinct capture points that it claims to serve.
            example: ``[B, ...]`` on the model's device; compiled programs hold for its item shape.

        Raises:
            ExtractorUnsupportedError: Where it can't be built.
        """
        match extractor:
            case Extractor.HOOK:
                return HookExtractor(self._model, self._taps, points, self._guard)
            case Extractor.CHILDREN:
                return GuardedExtractor(ChildrenExtractor(self._model, points), self._guard)
            case Extractor.LAYER_GETTER:
                return GuardedExtractor(LayerGetterExtractor(self._model, points), self._guard)
            case Extractor.FX:
                names = self._catalogue.traced(self._model.name)
                built = FxExtractor(self._model, names, names.nodes_of(points))
                return GuardedExtractor(built, self._guard)
            case Extractor.TORCHSCRIPT:
                return TorchScriptExtractor(self._trace(points, example))
            case Extractor.AUTO:
                raise ValueError("AUTO is a choice between extractors, not an extractor")

    def _trace(
        self, points: Sequence[CapturePoint], example: torch.Tensor
    ) -> torch.jit.ScriptModule:
        try:
            with self._guard:
                self._refuse_obstacles(points, example)
            with self._guard:
                return trace_taps(self._model, self._taps, points, example.clone())
        except ExtractorUnsupportedError:
            raise
        except Exception as error:
            _log.info("model %s can't be traced", self._model.name, exc_info=True)
            if is_out_of_memory(error):
                raise self.prover.out_of_memory(example) from error
            raise self._refusal(points, f"tracing failed ({own_words(error)})") from error

    def _refuse_obstacles(self, points: Sequence[CapturePoint], example: torch.Tensor) -> None:
        """Refuse to trace what a trace would get wrong for inputs unlike the example.

        The catalogue says so too, of the item shape at which it was measured; at others the model's
        code may do something else.
        """
        x = example.clone()
        steps: list[str] = []
        with watch_looks(self._model.module, x) as looks:
            self._taps.run(
                self._model.forward, x, points, lambda _, value: steps.append(looks.step(value))
            )
        step = next(filter(None, steps), "")
        if looks.count:
            raise self._refusal(points, LOOKS)
        if looks.functions:
            raise self._refusal(points, calls_function(looks.functions[0]))
        if step:
            raise self._refusal(points, takes_step(step))

    def _refusal(self, points: Sequence[CapturePoint], reason: str) -> ExtractorUnsupportedError:
        return ExtractorUnsupportedError(
            f"TORCHSCRIPT can't serve {quoted(points)} of model {self._model.name!r}: {reason}; "
            f"HOOK can"
        )
