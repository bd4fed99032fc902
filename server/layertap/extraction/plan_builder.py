"""Builds plans: an extractor for one pass spec and batch key, proven before it serves.

Note [Programs for several sizes]
    A traced program may hold the sizes of its example as constants (``x[:, : int(x.shape[1])]``,
    windows, position biases) or follow the sizes of its input. Nothing in the program says which.
    So a plan for items of another size begins with the programs that there are for the same layers:
    one that passes the whole proof at the new size serves it too, which saves compiling and the
    memory of another copy of the weights. If none does, the size gets a program of its own. Two
    kinds of programs are never tried at another size: those with native operations that check no
    sizes, which could end the process there, and those whose recorded pass looked at values, as the
    guard of another size may look at others. A package of EXPORT refuses sizes for which it was not
    compiled, and runs in a child process before it is tried at another size.

Note [Examples to record from]
    Code may treat a batch of one item as a special case. The decoders of transformers do: ``if
    x.shape[0] != positions.shape[0]: positions = positions.expand(x.shape[0], -1)``. A program that
    is recorded from one item lacks the expansion and fails for two. A program that is recorded from
    two items serves one item, too, as expanding to one item changes nothing. So programs are
    recorded from a batch of several items, if there is one with the right outcome.

    Where the number of items becomes a constant of the program, it is the other way round: a tensor
    for one item is broadcast to any number, and one for two items is not. So if the program of two
    items fails its proof, one of a single item is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from layertap.errors import (
    ExtractorUnsupportedError,
    InvalidInputError,
    LayertapError,
    OverloadedError,
)
from layertap.extraction.apart import ProgramEndedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.edit_plan import EditPlanner
from layertap.extraction.gate import no_forward_pass
from layertap.extraction.gradient_plan import GradientPlanner
from layertap.extraction.guards import Look, Outcome, Tape, in_words, is_subsequence
from layertap.extraction.kept_programs import KeptPrograms, Part
from layertap.extraction.kinds.base import (
    BuildContext,
    CompiledKind,
    ExtractorKind,
    ReferenceKind,
)
from layertap.extraction.kinds.registry import REFERENCE, AnyKind, kind_of
from layertap.extraction.looks import watch_looks
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.outcomes import Outcomes, Recorded
from layertap.extraction.own_words import compiler_words, own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.pause import Pause, run_to_end, wait
from layertap.extraction.plan import Findings, Plan, PlanKey, quoted
from layertap.extraction.plan_cache import PlanCache, PlanFile
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.predicted import placed, predicted_plan, unmeasured_plan
from layertap.extraction.proof import prove
from layertap.extraction.prover import Prover
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.taps import Taps
from layertap.extraction.verify import mismatch
from layertap.models import Batch, BatchKey, LoadedModel
from layertap.selection import Extractor

__all__ = ["PlanBuilder"]

_log = logging.getLogger(__name__)

_MAX_ADOPTED = 2
"""Programs for other sizes that are tried before one is compiled for a new size."""

_LARGER = 7
"""A batch size above those of a proof, to test programs that could end their process."""


class _WatchedError(Exception):
    """Gives up a recording that was made only to watch the recorded pass."""


@dataclass
class _Proof:
    """What an extractor is compared with: batches, and the reference values for each.

    The batches have one outcome; see ``guards``. The variant says how a program is finished.
    """

    kind: ExtractorKind
    pass_spec: PassSpec
    cases: list[tuple[Batch, Values]]
    outcome: Outcome = ()
    variant: str = ""

    @property
    def example(self) -> Batch:
        """The smallest batch."""
        return self.cases[0][0]

    @property
    def examples(self) -> list[Batch]:
        """The batches to record programs from; see Note [Examples to record from]."""
        several = [x for x, _ in self.cases if x.size > self.example.size][:1]
        one = not isinstance(self.kind, CompiledKind) or self.kind.records_one_item
        return [*several, self.example] if one or not several else several

    def specs(self) -> list[ValueSpec]:
        """Return the type and shape of each value, by the first batches of one and two items."""
        one, two = (
            next((values for x, values in self.cases if x.size == size), None) for size in (1, 2)
        )
        return [
            ValueSpec.from_batches(
                value.dtype,
                (one or self.cases[0][1])[index].shape,
                two[index].shape if one and two else None,
            )
            for index, value in enumerate(self.cases[0][1])
        ]

    def steps(self, built: BuiltExtractor) -> Iterator[None]:
        for x, expected in self.cases:
            prove(self.kind, built, self.pass_spec.points, x, expected)
            yield None


@dataclass(frozen=True)
class _Candidate:
    """A program that is to be proven.

    Attributes:
        kind: Its kind.
        program: As the kind made or loaded it, unfinished; None for a part.
        part: Part of a proven and finished program, which needs no finishing; None for a program.
        unsafe: Whether it must run in a child process first.
        portable: Whether it may be tried at other sizes of the inputs.
    """

    kind: CompiledKind[Any]
    program: Any
    part: BuiltExtractor | None
    unsafe: bool
    portable: bool

    @classmethod
    def of_program(cls, kind: CompiledKind[Any], program: Any) -> _Candidate:
        """Return the candidate of an unfinished program."""
        unsafe = kind.may_end_the_process(program)
        portable = not kind.is_for_one_size(program) and (kind.checks_sizes or not unsafe)
        return cls(kind, program, None, unsafe, portable)

    @classmethod
    def of_part(cls, kind: CompiledKind[Any], part: Part) -> _Candidate:
        """Return the candidate of a part: the whole has run the same operations in a child."""
        return cls(kind, None, part.built, unsafe=False, portable=part.portable)

    @property
    def kept_proof_holds(self) -> bool:
        """Whether a kept proof says that it does not end the process."""
        return self.part is not None or self.kind.kept_proof_holds(self.program)

    def finished(self, example: Batch, variant: str) -> BuiltExtractor:
        """Return what serves; the program can't be saved any more."""
        return self.part or self.kind.finish(self.program, example, variant)


class _Purpose(NamedTuple):
    """What programs have in common that may take each other's place at other sizes of the inputs.

    Attributes:
        extractor: The kind of the program.
        pass_spec: What it captures.
        inputs: The names of the inputs that it takes.
        variant: How the program is finished.
    """

    extractor: Extractor
    pass_spec: PassSpec
    inputs: tuple[str, ...]
    variant: str

    @classmethod
    def of(cls, kind: ExtractorKind, proof: _Proof) -> _Purpose:
        """Return what a program that passes a proof is for."""
        return cls(kind.id, proof.pass_spec, tuple(proof.example), proof.variant)


class PlanBuilder:
    """Builds and proves the plans of one model.

    Every method runs the model, so each must be called on a compute thread.

    Args:
        model: The model.
        taps: The model's taps.
        catalogue: The model's catalogue.
        cache: Stores the compiled plans that are kept; None if plans are not stored.
        proving: Another instance of the model for measuring, with its taps, if a pass of the model
            itself would change later answers.
        known_fingerprint: The model's fingerprint, if it is known already; else empty.
        facts: A digest of what the proofs of stored programs depend on; empty to repeat each proof
            in full. See Note [Proofs that are kept] in ``plan_cache``.

    Attributes:
        prover: Compares plans with the model, during building and later.
        outcomes: Finds the outcomes of batches.
        kept: Finds programs that need not be recorded.
    """

    def __init__(
        self,
        model: LoadedModel,
        taps: Taps,
        catalogue: Catalogue,
        cache: PlanCache | None = None,
        *,
        proving: tuple[LoadedModel, Taps] | None = None,
        known_fingerprint: str = "",
        facts: str = "",
    ) -> None:
        self._facts = facts
        self._model = model
        self._taps = taps
        self._catalogue = catalogue
        # Never held while the model is traced symbolically: tracing waits for the passes of other
        # threads to end, and those may be waiting for this scope.
        self._scope = catalogue.scope
        self._context = BuildContext(model, taps, catalogue.scope, catalogue.graph)
        self.kept = KeptPrograms(model, cache, known_fingerprint)
        measured, its_taps = proving or (model, taps)
        measuring = replace(self._context, model=measured, taps=its_taps)
        self.outcomes = Outcomes(measuring, catalogue.looks.looked)
        self.prover = Prover(measuring, self.outcomes)
        self._gradients = GradientPlanner(self._context, self.prover, self._placed)
        self._edits = EditPlanner(self._context, self.prover, catalogue, self._plain_steps)
        # Programs whose recorded pass looked at nothing: they may hold for other outcomes as well.
        self._general: WeakValueDictionary[PlanKey, BuiltExtractor] = WeakValueDictionary()
        # Programs that may be tried at other sizes, as long as some plan has them.
        self._portable: WeakKeyDictionary[BuiltExtractor, _Purpose] = WeakKeyDictionary()
        # Those of them that run in a child process first, at each such size.
        self._tried_first: WeakKeyDictionary[BuiltExtractor, Any] = WeakKeyDictionary()

    def build(
        self,
        extractor: Extractor,
        pass_spec: PassSpec,
        batch_key: BatchKey,
        outcome: Outcome = (),
        *,
        variant: str = "",
        example: Batch | None = None,
        keep: bool = False,
    ) -> Plan:
        """Build an extractor and compare it with the reference at three batch sizes.

        The reference is the kind HOOK, which itself is only measured. The values of other kinds
        must equal its values: bit for bit, or within the tolerance if the kind is compiled.

        Args:
            extractor: Any but AUTO.
            pass_spec: What to capture: points that the catalogue says the extractor serves.
            batch_key: What the batches to serve have in common.
            outcome: What the model's looks give for the batches to serve, for a compiled plan.
            variant: How the program is finished; empty for the usual way.
            example: A batch of that outcome, as the model takes it; None if samples are to show it.
            keep: Whether to use a compiled plan stored on disk, or else to store the new one. This
                is always done for a kind that compiles slowly, and never for a variant, as proofs
                and parts of programs are kept of the usual way only.

        Raises:
            InvalidInputError: If the model itself can't run on such items.
            ExtractorUnsupportedError: If the extractor can't be built or its values differ.
        """
        key = PlanKey(extractor, pass_spec, batch_key, outcome, variant)
        for step in self.steps(key, example=example, keep=keep):
            if isinstance(step, Plan):
                return step
            wait(step)
        raise AssertionError("the last step yields the plan")

    def steps(
        self, key: PlanKey, *, example: Batch | None = None, keep: bool = False
    ) -> Iterator[Plan | Pause | None]:
        """Do what ``build`` does in steps of about one forward pass; yield the plan at the end."""
        extractor, pass_spec, batch_key, outcome, _ = key
        if pass_spec.sites:
            yield from self._edits.steps(key)
            return
        if pass_spec.objective is not None:
            yield from self._gradients.steps(key)
            return
        kind, points = kind_of(extractor), pass_spec.points
        keep = (keep or (isinstance(kind, CompiledKind) and kind.slow)) and not key.variant
        if isinstance(kind, ReferenceKind) and batch_key == self._model.signature.key:
            # Measuring has already run this kind at this size, so nothing needs to be learnt.
            specs = tuple(self._catalogue.specs[point] for point in points)
            built: BuiltExtractor = kind.build(self._context, pass_spec)
            yield Plan(kind, pass_spec, batch_key, specs, built, Findings())
            return
        if isinstance(kind, CompiledKind) and outcome:
            yield from self._of_outcome(kind, key, example, keep=keep)
            return
        if isinstance(kind, CompiledKind) and keep:
            plan = yield from self._of_kept_proof(kind, key)
            if plan is not None:
                yield plan
                return
        yield from self._proven(kind, key, keep=keep)

    def _plain_steps(self, key: PlanKey) -> Iterator[Plan | None]:
        """Do the same for a kind that never waits for another process."""
        for step in self.steps(key):
            wait(step)
            yield step if isinstance(step, Plan) else None

    def _proven(
        self, kind: AnyKind, key: PlanKey, *, keep: bool
    ) -> Generator[Plan | Pause | None, None, None]:
        """Build a plan for items on which no looks are known, and prove it in full."""
        pass_spec, batch_key, points = key.pass_spec, key.batch_key, key.pass_spec.points
        truth = partial(self._truth, kind, pass_spec)
        batches = [ordinary_batch(self._model, size, batch_key) for size in (1, 2)]
        reference = []
        for x in batches:
            try:
                reference.append(truth(x))
            except ExtractorUnsupportedError:
                if not isinstance(kind, ReferenceKind):
                    raise
                context, catalogue = self._context, self._catalogue
                yield unmeasured_plan(context, self.prover, catalogue, pass_spec, batch_key)
                return
            yield None
        specs = tuple(
            self._placed(point, ValueSpec.from_batches(one.dtype, one.shape, two.shape), batch_key)
            for point, one, two in zip(points, *reference, strict=True)
        )
        cases = list(zip(batches, reference, strict=True))
        proof = _Proof(kind, pass_spec, cases, variant=key.variant)
        if not kind.reference:
            proof.cases.extend(self.prover.reaching_cases(kind, batch_key, truth))
            yield None
        if isinstance(kind, CompiledKind):
            built = yield from self._compiled(kind, proof, keep=keep)
        else:
            built = kind.build(self._context, pass_spec)
            yield None
            if not kind.reference:
                yield from proof.steps(built)
        findings = Findings(x.size for x, _ in proof.cases)
        yield Plan(kind, pass_spec, batch_key, specs, built, findings, variant=key.variant)

    def _of_kept_proof(
        self, kind: CompiledKind[Any], key: PlanKey
    ) -> Generator[Pause | None, None, Plan | None]:
        """Return the plan of a stored program whose proof is kept; None if there is none.

        See Note [Proofs that are kept] in ``plan_cache``. The program is compared on one item.
        """
        x = ordinary_batch(self._model, 1, key.batch_key)
        points = key.pass_spec.points
        stored = self.kept.file(kind, key.pass_spec, x.key)
        if not stored or not self._facts or key.batch_key != self._model.signature.key:
            return None
        candidate = self._stored(kind, key.pass_spec, x.key, stored)
        if candidate is None or not candidate.kept_proof_holds:
            return None
        sizes = stored.proven_sizes(self._facts)
        if not sizes:
            return None
        yield None
        try:
            proof = _Proof(kind, key.pass_spec, [(x, self._truth(kind, key.pass_spec, x))])
            built = yield from self._warm(candidate, proof, apart=False)
        except (ExtractorUnsupportedError, InvalidInputError) as error:
            _log.warning("model %s: a kept proof no longer holds: %s", self._model.name, error)
            stored.forget()
            return None
        self._share(candidate, built, proof, stored)
        specs = tuple(self._catalogue.specs[point] for point in points)
        return Plan(kind, key.pass_spec, key.batch_key, specs, built, Findings(sizes))

    def _truth(self, kind: AnyKind, pass_spec: PassSpec, x: Batch) -> Values:
        """Return the reference values for a batch, of an earlier proof if there is one."""
        known = None
        if isinstance(kind, CompiledKind):
            known = self.kept.reference(kind, pass_spec, x)
        return known or self.prover.truth(pass_spec, x)

    def predicted(self, pass_spec: PassSpec, batch_key: BatchKey) -> Plan | None:
        """Return a plan of the reference kind without running the model; None if that can't be.

        See ``layertap.extraction.predicted``. Any thread may call this method.
        """
        return predicted_plan(self._context, self.prover, self._catalogue, pass_spec, batch_key)

    def _of_outcome(
        self, kind: CompiledKind[Any], key: PlanKey, example: Batch | None, *, keep: bool
    ) -> Iterator[Plan | Pause | None]:
        """Build a compiled plan for one outcome; see ``guards``."""
        cases = yield from self.prover.cases(kind, key, example)
        outcome = key.outcome or ()
        proof = _Proof(kind, key.pass_spec, cases, outcome, key.variant)
        specs = tuple(
            self._placed(point, spec, key.batch_key)
            for point, spec in zip(key.pass_spec.points, proof.specs(), strict=True)
        )
        # Another outcome's program may hold for this one as well, which its proof shows.
        general = self._general.get(key._replace(outcome=()))
        if general is not None:
            yield from proof.steps(general)
            built = general
        else:
            built = yield from self._compiled(kind, proof, keep=keep)
        findings = Findings(x.size for x, _ in proof.cases)
        yield Plan(
            kind, key.pass_spec, key.batch_key, specs, built, findings, outcome, variant=key.variant
        )

    def _placed(self, point: CapturePoint, spec: ValueSpec, batch_key: BatchKey) -> ValueSpec:
        return placed(self._model.signature, self._catalogue, point, spec, batch_key)

    def _compiled(
        self, kind: CompiledKind[Any], proof: _Proof, *, keep: bool
    ) -> Generator[Pause | None, None, BuiltExtractor]:
        """Return a compiled, proven and warm extractor: the stored one, or else a new one."""
        stored = candidate = None
        if keep:
            what = (kind, proof.pass_spec, proof.example.key)
            stored = self.kept.file(*what, proof.outcome)
            candidate = self._stored(*what, stored)
        if candidate is not None:
            try:
                built = yield from self._warm(candidate, proof)
                if not proof.outcome:
                    self._share(candidate, built, proof, stored)
                self._keep_proof(stored, proof)
                return built
            except ExtractorUnsupportedError:
                _log.warning("model %s: a stored plan no longer fits it", self._model.name)
                if stored:
                    stored.forget()
        adopted = yield from self._adopted(kind, proof)
        if adopted is not None:
            return adopted
        failed: ExtractorUnsupportedError | None = None
        for example in proof.examples:
            try:
                return (yield from self._recorded(kind, proof, example, stored))
            except ExtractorUnsupportedError as error:
                failed = failed or error
        raise failed or AssertionError("a proof has examples")

    def _recorded(
        self, kind: CompiledKind[Any], proof: _Proof, example: Batch, stored: PlanFile | None
    ) -> Generator[Pause | None, None, BuiltExtractor]:
        """Return the extractor of a program that is recorded from one example."""
        recorded, general = self._compile(kind, proof.pass_spec, example, proof.outcome)
        yield None
        try:
            program = yield from kind.assemble(recorded)
        except ProgramEndedError as error:
            reason = f"compiling failed ({error})"
            raise self._refusal(kind, proof.pass_spec, reason) from error
        candidate = _Candidate.of_program(kind, program)
        with stored.storing(kind, program) if stored else nullcontext():
            built = yield from self._warm(candidate, proof)
        if general or not proof.outcome:
            self._share(candidate, built, proof, stored)
        self._keep_proof(stored, proof)
        if general:
            purpose = PlanKey(kind.id, proof.pass_spec, proof.example.key, variant=proof.variant)
            self._general[purpose] = built
        return built

    def _stored(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        batch_key: BatchKey,
        stored: PlanFile | None,
    ) -> _Candidate | None:
        """Return the program of a file, or part of one for more layers; None if there is none."""
        program = stored.load(kind, self._model) if stored else None
        if program is not None:
            return _Candidate.of_program(kind, program)
        part = self.kept.part(kind, pass_spec, batch_key, stored)
        return None if part is None else _Candidate.of_part(kind, part)

    def _warm(
        self, candidate: _Candidate, proof: _Proof, *, apart: bool = True
    ) -> Generator[Pause | None, None, BuiltExtractor]:
        """Finish, prove and warm a program. Any exception means that this plan can't be built.

        Args:
            candidate: The program.
            proof: What it is compared with.
            apart: Whether a program that could end the process runs in a child process first.
        """
        kind = candidate.kind
        try:
            if candidate.unsafe and proof.variant:
                # The child process finishes programs in the usual way.
                reason = "its native code could end the process"
                raise self._refusal(kind, proof.pass_spec, reason)
            if apart and candidate.unsafe:
                yield from self._tried_apart(kind, candidate.program, proof)
            built = candidate.finished(proof.example, proof.variant)
            yield None
            yield from proof.steps(built)
            # Comparing has run it as well; after other sizes it may be slow again at this one.
            ran = (
                len(proof.cases) if {x.size for x, _ in proof.cases} == {proof.example.size} else 0
            )
            for _ in range(kind.warm_up_runs(proof.example.device) - ran):
                built.run(proof.example.clone(), lambda index, value: None)
                yield None
        except (LayertapError, GeneratorExit):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise self.prover.out_of_memory(proof.example) from error
            _log.info("a program of model %s fails", self._model.name, exc_info=True)
            reason = f"its program fails ({own_words(error)})"
            raise self._refusal(kind, proof.pass_spec, reason) from error
        return built

    def _adopted(
        self, kind: CompiledKind[Any], proof: _Proof
    ) -> Generator[Pause | None, None, BuiltExtractor | None]:
        """Return a program compiled for items of another size that holds for these as well.

        See Note [Programs for several sizes]. None if there is no such program.
        """
        purpose = _Purpose.of(kind, proof)
        programs = [each for each, of in list(self._portable.items()) if of == purpose]
        if programs:
            # At this size the code may look at values, which the proof's input need not show.
            self._refuse_obstacles(kind, proof.pass_spec, proof.example, proof.outcome)
            yield None
        for built in programs[-_MAX_ADOPTED:]:
            try:
                if built in self._tried_first:
                    yield from self._tried_apart(kind, self._tried_first[built], proof)
                yield from proof.steps(built)
                for _ in range(kind.warm_up_runs(proof.example.device)):
                    built.run(proof.example.clone(), lambda index, value: None)
                    yield None
            except (OverloadedError, GeneratorExit):
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise self.prover.out_of_memory(proof.example) from error
                _log.info(
                    "model %s: a program for another size does not hold for items of %s: %s",
                    self._model.name, proof.example.key, own_words(error),
                )  # fmt: skip
            else:
                return built
        return None

    def _share(
        self,
        candidate: _Candidate,
        built: BuiltExtractor,
        proof: _Proof,
        stored: PlanFile | None,
    ) -> None:
        """Let a proven program be tried at other sizes, and parts be made of it."""
        kind, portable = candidate.kind, candidate.portable
        if not proof.outcome and not proof.variant:
            self.kept.offer(kind, proof.pass_spec, built, stored, proof.cases, portable=portable)
        if portable:
            self._portable[built] = _Purpose.of(kind, proof)
            if candidate.unsafe:
                self._tried_first[built] = candidate.program

    def _tried_apart(
        self, kind: CompiledKind[Any], program: Any, proof: _Proof
    ) -> Iterator[Pause | None]:
        """Compare a program with the reference in a child process; see ``apart``."""
        key = PlanKey(kind.id, proof.pass_spec, proof.example.key, proof.outcome)
        larger = (
            self.prover.of_outcome(key, _LARGER, most=1)
            if proof.outcome
            else [ordinary_batch(self._model, _LARGER, proof.example.key)]
        )
        cases = [*proof.cases, *((x, self.prover.truth(proof.pass_spec, x)) for x in larger)]
        yield None
        try:
            answers = yield from kind.run_apart(program, [x for x, _ in cases], self._model.device)
        except ProgramEndedError as error:
            reason = f"its program fails ({error})"
            raise self._refusal(kind, proof.pass_spec, reason) from error
        for (x, expected), values in zip(cases, answers, strict=True):
            self._check(proof, x, values, expected)

    def _check(self, proof: _Proof, x: Batch, values: Values, expected: Values) -> None:
        for value, right in zip(values, expected, strict=True):
            fault = mismatch(value, right.cpu(), proof.kind.tolerance(right))
            if fault:
                reason = f"at batch size {x.size} {fault}"
                raise self._refusal(proof.kind, proof.pass_spec, reason)

    def _keep_proof(self, stored: PlanFile | None, proof: _Proof) -> None:
        if stored and self._facts and not proof.outcome:
            stored.keep_proof(self._facts, (x.size for x, _ in proof.cases))

    def construct(
        self, extractor: Extractor, pass_spec: PassSpec, example: Batch, variant: str = ""
    ) -> BuiltExtractor:
        """Build an extractor without proving it.

        Args:
            extractor: Any but AUTO.
            pass_spec: What to capture: points that the extractor claims to serve.
            example: A batch on the model's device. Compiled programs serve batches with its key.
            variant: How the program is finished; empty for the usual way.

        Raises:
            ExtractorUnsupportedError: It can't be built.
        """
        kind = kind_of(extractor)
        if isinstance(kind, CompiledKind):
            outcome = self.outcomes.observe(pass_spec, example)
            program = self._compile(kind, pass_spec, example, outcome)[0]
            return kind.finish(self._assembled(kind, pass_spec, program), example, variant)
        return kind.build(self._context, pass_spec)

    def _assembled(self, kind: CompiledKind[Any], pass_spec: PassSpec, recorded: Any) -> Any:
        """Return the compiled program, and wait for it here."""
        try:
            return run_to_end(kind.assemble(recorded))
        except ProgramEndedError as error:
            raise self._refusal(kind, pass_spec, f"compiling failed ({error})") from error

    def _compile(
        self, kind: CompiledKind[Any], pass_spec: PassSpec, example: Batch, outcome: Outcome
    ) -> tuple[Any, bool]:
        """Return a program, and whether the code looked at no value while it was recorded."""
        try:
            found = self._refuse_obstacles(kind, pass_spec, example, outcome)
            looks = self._looks_recorded(kind, pass_spec, example) if outcome else []
            with self._recording(kind):
                program = kind.compile(self._context, pass_spec, example.clone())
        except ExtractorUnsupportedError:
            raise
        except Exception as error:
            _log.info("model %s can't be compiled", self._model.name, exc_info=True)
            if is_out_of_memory(error):
                raise self.prover.out_of_memory(example) from error
            reason = f"compiling failed ({compiler_words(error)})"
            raise self._refusal(kind, pass_spec, reason) from error
        if not is_subsequence(looks, found.looks):
            # The guard's looks say nothing about these.
            reason = "while it is recorded, the model looks at other values than when it runs"
            raise self._refusal(kind, pass_spec, reason)
        return program, bool(outcome) and not looks

    def _looks_recorded(
        self, kind: CompiledKind[Any], pass_spec: PassSpec, example: Batch
    ) -> list[Look]:
        """Return the looks of a pass while it is being recorded, which may be others.

        That recording is given up: where operations are watched, a recorder may miss some.
        """
        tapes: list[Tape] = []
        context = replace(self._context, watching=partial(self._watched, tapes))
        with self._recording(kind), suppress(_WatchedError):
            kind.compile(context, pass_spec, example.clone())
            raise self._refusal(kind, pass_spec, "its recording can't be watched")
        return tapes[0].looks

    @contextmanager
    def _recording(self, kind: CompiledKind[Any]) -> Iterator[None]:
        """Enter the scope to record a program, and keep other passes out if the kind needs that."""
        # The scope of such a model does it itself.
        alone = kind.records_alone and not self._scope.rules.exclusive
        # Before the scope, for which the pass of another thread may be waiting.
        with no_forward_pass() if alone else nullcontext(), self._scope as scope:
            try:
                yield
            finally:
                if kind.records_alone:
                    # The model may have kept something of it, such as tensors without elements.
                    scope.learn(self._model.name)

    @contextmanager
    def _watched(self, tapes: list[Tape], x: Batch) -> Iterator[None]:
        """Watch the pass that runs in the block, then give its recording up."""
        module = self._model.module
        tapes.append(Tape(module, x))
        with watch_looks(module, x.tensors, tapes[-1]):
            yield
        raise _WatchedError

    def _refuse_obstacles(
        self, kind: CompiledKind[Any], pass_spec: PassSpec, example: Batch, outcome: Outcome
    ) -> Recorded:
        """Refuse to compile if the program would be wrong for inputs unlike the example.

        The catalogue says so too, but only for the item shape at which it was measured. At other
        shapes the model's code may do something else.
        """
        found = self.outcomes.record(pass_spec, example)
        obstacle = kind.recording_obstacle(
            unguarded=found.unguarded, python=found.python, step=found.step
        )
        if not obstacle and found.outcome != outcome:
            obstacle = (
                f"for the example its looks at values give {in_words(found.outcome) or 'nothing'}, "
                f"expected {in_words(outcome) or 'no looks'}"
            )
        if obstacle:
            raise self._refusal(kind, pass_spec, obstacle)
        return found

    def _refusal(
        self, kind: ExtractorKind, pass_spec: PassSpec, reason: str
    ) -> ExtractorUnsupportedError:
        return ExtractorUnsupportedError(
            f"{kind.name} can't serve {quoted(pass_spec.points)} of model {self._model.name!r}: "
            f"{reason}; {REFERENCE.name} can"
        )
