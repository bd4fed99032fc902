"""Compares plans with the model: when they are built, and again at each new batch size.

Note [Each batch size is proven]
    A model's code may depend on the batch size: ``if len(x) > 4``, or a loop over parts of the
    batch, whose number a trace records as a constant. An example at one size doesn't show that. So
    a plan is compared with the reference when a batch size is first used, which costs that request
    two more passes. Passes that several requests share are tested at each total size. The
    reference kind, HOOK, runs the model itself and needs no proof.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from layertap.errors import (
    ExtractorUnsupportedError,
    InvalidInputError,
    ModelRunError,
    OverloadedError,
)
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.cuda_graph import GraphedExtractor
from layertap.extraction.guards import Outcome, in_words
from layertap.extraction.kinds.base import BuildContext, ExtractorKind
from layertap.extraction.kinds.registry import REFERENCE, kind_of
from layertap.extraction.looks import watch_looks
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.outcomes import Outcomes
from layertap.extraction.own_words import own_words
from layertap.extraction.padding_proof import PaddingFindings, prove_padding
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import KeptState
from layertap.extraction.plan import Plan, PlanKey, quoted
from layertap.extraction.proof import collect, prove, shares_passes
from layertap.extraction.samples import (
    bytes_batch,
    ordinary_batch,
    reaching_batches,
    unlike_batch,
    wide_batch,
)
from layertap.extraction.symbolic import WholeGraphExtractor
from layertap.extraction.variations import paddings, resized, variations
from layertap.models import Batch, BatchKey

__all__ = ["Prover"]

_log = logging.getLogger(__name__)

FEWEST = 3
"""Minimum number of different batches with an outcome that must prove a plan for it."""

ENOUGH = 6
"""Maximum number of batches with an outcome that prove a plan for it."""

AT_SIZE = 3
"""Number of batches with an outcome that are tested at a further batch size."""

_SHARED = 3
"""Items of the first shared pass that is tested: the smallest number with two unequal parts."""


class Prover:
    """Compares the plans of one model with the model.

    Every method runs the model, so each must be called on a compute thread.

    Args:
        context: The model, its taps, scope and graph.
        outcomes: Finds the outcomes of the model's passes.

    Attributes:
        outcomes: The same.
    """

    def __init__(self, context: BuildContext, outcomes: Outcomes | None = None) -> None:
        self._context = context
        self._model = context.model
        self._scope = context.scope
        self.outcomes = outcomes or Outcomes(context)

    def truth(self, pass_spec: PassSpec, x: Batch) -> Values:
        """Return the reference values for a batch, in the order of the points.

        Raises:
            InvalidInputError: If the model can't run on the batch.
            ExtractorUnsupportedError: If some of the layers don't run on it.
            OverloadedError: If there is not enough memory to run it.
        """
        try:
            return collect(self._reference(pass_spec), pass_spec.points, x)
        except ModelRunError as error:
            # The model runs, but for some inputs a layer does not run or returns no tensor.
            raise ExtractorUnsupportedError(
                f"the values of {quoted(pass_spec.points)} can't be proven: {error}; "
                f"{REFERENCE.name} serves them for inputs for which they run"
            ) from error
        except Exception as error:
            words = own_words(error)
            _log.info("model %s fails on %d of %s: %s", self._model.name, x.size, x.key, words)
            if is_out_of_memory(error):
                raise self.out_of_memory(x) from error
            raise InvalidInputError(
                f"inputs: model {self._model.name!r} can't run on items of {x.key}: {words}; it "
                f"was measured at {self._model.signature.key}"
            ) from error

    def out_of_memory(self, x: Batch) -> OverloadedError:
        """Return the error for a batch for which there was not enough memory."""
        return OverloadedError(
            f"out of memory while running model {self._model.name!r} on a batch of {x.size}"
        )

    def reaching_cases(
        self,
        kind: ExtractorKind,
        batch_key: BatchKey,
        truth: Callable[[Batch], Values],
    ) -> list[tuple[Batch, Values]]:
        """Return batches of unusual input that the model takes, each with its reference values.

        See Note [Samples that reach]. A kind that takes only finite input is never given NaN or
        infinity (see ``engine.pipeline``), so its batches hold none. They also hold no items of
        several magnitudes, as its tolerance would hide errors in the small ones.

        Args:
            kind: The kind of the plan that is to be proven.
            batch_key: The key of the batches.
            truth: Returns the reference values for a batch, as ``truth`` of this class does.
        """
        batches = [wide_batch(self._model, 3, batch_key), bytes_batch(self._model, batch_key)]
        if not kind.finite_only or not self._model.signature.has_floats:
            batches.extend(reaching_batches(self._model, batch_key))
        cases = []
        for x in batches:
            if x is None:
                continue
            try:
                values = truth(x)
            except (InvalidInputError, ExtractorUnsupportedError):
                continue  # A model may refuse such input, or not run every layer on it.
            # Rounding may decide where the square root of noise is NaN.
            if not kind.finite_only or all(v.isfinite().all() for v in values):
                cases.append((x, values))
        return cases

    def cases(
        self, kind: ExtractorKind, key: PlanKey, example: Batch | None
    ) -> Generator[None, None, list[tuple[Batch, Values]]]:
        """Find batches with one outcome, of several sizes, in steps; add the reference values.

        The example comes first, then samples, then batches like the example.

        Args:
            kind: The kind of the plan that is to be proven.
            key: What the plan is for.
            example: A batch with that outcome, on the model's device; None to use samples only.

        Raises:
            ExtractorUnsupportedError: If there are fewer than `FEWEST`, or there is no guard.
        """
        found: list[tuple[Batch, Values]] = []
        tried = self._candidates(kind, key.batch_key, (1, 2, 3), example)
        while True:
            for x in tried:
                if len(found) >= ENOUGH and {1, 2, 3} <= {case.size for case, _ in found}:
                    break
                case = self._case(kind, key, x)
                if case is not None and not any(x.equals(other) for other, _ in found):
                    found.append(case)
                yield
            if example is not None or not found:
                break
            # Of a rare outcome, the first sample that has it leads to others.
            example = found[0][0]
            tried = variations(self._model, example)
        if len(found) < FEWEST:
            raise ExtractorUnsupportedError(
                f"{kind.name} can't serve {quoted(key.pass_spec.points)} of model "
                f"{self._model.name!r} for input for which its looks at values give "
                f"{in_words(key.outcome or ())}: only {len(found)} batches with that outcome were "
                f"found, and a proof takes {FEWEST}; {REFERENCE.name} can"
            )
        return sorted(found, key=lambda case: case[0].size)

    def _candidates(
        self, kind: ExtractorKind, batch_key: BatchKey, sizes: tuple[int, ...], own: Batch | None
    ) -> Iterator[Batch]:
        for x in self._samples(batch_key, sizes, own):
            for each in (x, x.map(_negated)) if self._model.signature.has_floats else (x,):
                if not kind.finite_only or each.is_finite:
                    yield each

    def _samples(
        self, batch_key: BatchKey, sizes: tuple[int, ...], own: Batch | None
    ) -> Iterator[Batch]:
        model = self._model
        if own is not None:
            yield own
        for make in (ordinary_batch, wide_batch, unlike_batch):
            for size in sizes:
                x = make(model, size, batch_key)
                if x is not None:
                    yield x
                    yield from paddings(model, x)
        if own is not None:
            yield from variations(model, own, sizes)
        if len(sizes) > 1:
            yield from filter(None, (bytes_batch(model, batch_key),))
            yield from reaching_batches(model, batch_key)

    def _case(self, kind: ExtractorKind, key: PlanKey, x: Batch) -> tuple[Batch, Values] | None:
        """Return a batch with the reference values if it has a plan's outcome; else None."""
        try:
            if self.outcomes.observe(key.pass_spec, x) != key.outcome:
                return None
            values = self.truth(key.pass_spec, x)
        except (ModelRunError, InvalidInputError):
            return None  # A model may refuse such input.
        # Rounding may decide where the square root of noise is NaN.
        finite = not kind.finite_only or all(v.isfinite().all() for v in values)
        return (x, values) if finite else None

    def of_outcome(
        self, key: PlanKey, size: int, own: Batch | None = None, most: int = AT_SIZE
    ) -> list[Batch]:
        """Return batches of a size that have a plan's outcome, the given one first.

        Args:
            key: What the plan is for.
            size: The number of items.
            own: A batch of that size with that outcome; None if there is none.
            most: The maximum number of batches.
        """
        found: list[Batch] = []
        for x in self._candidates(kind_of(key.extractor), key.batch_key, (size,), own):
            if len(found) >= most:
                break
            with suppress(ModelRunError):
                if self.outcomes.observe(key.pass_spec, x) == key.outcome:
                    found.append(x)
        return found

    def outcomes_of_samples(self, pass_spec: PassSpec, batch_key: BatchKey) -> list[Outcome]:
        """Return the outcomes that samples of up to three items show, the ordinary one first."""
        found: list[Outcome] = []
        for x in self._candidates(REFERENCE, batch_key, (1, 2, 3), None):
            with suppress(ModelRunError):
                found.append(self.outcomes.observe(pass_spec, x))
        return list(dict.fromkeys(found))

    def _size_cases(self, plan: Plan, size: int, own: Batch | None) -> list[tuple[Batch, Values]]:
        if not plan.outcome:
            x = ordinary_batch(self._model, size, plan.batch_key)
            return [(x, self.truth(plan.pass_spec, x))]
        batches = self.of_outcome(plan.key, size, own)
        return [(x, self.truth(plan.pass_spec, x)) for x in batches]

    def prove_size(self, plan: Plan, size: int, own: Batch | None = None) -> None:
        """Test whether a plan serves a batch size, and record the result in its findings.

        Args:
            plan: The plan.
            size: The batch size.
            own: A batch of that size that has the plan's outcome, if there is one at hand.

        Raises:
            OverloadedError: If there is not enough memory for the test.
        """
        if plan.refusal(size) is not None:
            return
        x = ordinary_batch(self._model, size, plan.batch_key)
        try:
            if plan.kind.compiled and not plan.outcome and self.outcomes.observe(plan.pass_spec, x):
                raise ExtractorUnsupportedError("there the model's code branches on tensor values")
            cases = self._size_cases(plan, size, own)
            if not cases:
                return  # A request of that size will show.
            for case, expected in cases:
                prove(plan.kind, plan.built, plan.points, case, expected)
        except OverloadedError:
            raise
        except (InvalidInputError, ModelRunError):
            reason = "the model itself fails on it"
        except ExtractorUnsupportedError as error:
            reason = f"{error}{_advice(plan.pass_spec)}"
        except Exception as error:
            if is_out_of_memory(error):
                raise self.out_of_memory(x) from error
            # A program that was compiled for another size may raise anything.
            reason = f"it failed there ({own_words(error)}){_advice(plan.pass_spec)}"
        else:
            reason = ""
        reason = plan.findings.found_size(size, reason)
        if reason:
            _log.warning(
                "model %s: %s of %s does not serve batch size %d: %s", self._model.name,
                plan.kind.name, quoted(plan.points), size, reason,
            )  # fmt: skip

    def prove_shared(self, plan: Plan, items: int = _SHARED, own: Batch | None = None) -> bool:
        """Test whether requests may share passes of that many items; record and return the result.

        The answer is no in three more cases. A model that keeps state after a pass may remember
        other requests. Code that branches on values takes one branch for the whole batch. A layer
        that does not run for some input would fail every request of the pass.

        Args:
            plan: The plan.
            items: The items of the shared pass.
            own: A batch of that many items that has the plan's outcome, if there is one at hand.
        """
        findings = plan.findings
        known = findings.shares(items)
        if known is not None:
            return known
        if plan.outcome and not self._batches_to_share(plan, items, own):
            return False  # A request will show.
        if findings.alone is None:
            try:
                alone = not self._scope.rules.shared or not self._shares(plan, own)
            except ModelRunError as error:
                _log.info("model %s: passes are not shared: %s", self._model.name, error)
                alone = True
            findings.found_alone(alone=alone)
            findings.found_shares(_SHARED, shares=not alone)
        if findings.shares(items) is None:
            findings.found_shares(items, shares=self._shares_at(plan, items, own))
        return bool(findings.shares(items))

    def prove_padding(
        self, catalogue: Catalogue, names: Sequence[str], max_tokens: int
    ) -> PaddingFindings:
        """Test which layers keep their values if items are padded; see ``padding_proof``."""
        return prove_padding(self._context, self.outcomes, catalogue, names, max_tokens)

    def warm(self, plan: Plan, size: int) -> None:
        """Run a plan on a batch of that many items, as the first runs of a size are slow."""
        x = ordinary_batch(self._model, size, plan.batch_key)
        for _ in range(plan.kind.warm_up_runs(x.device)):
            plan.built.run(x.clone(), lambda index, value: None)

    def record(self, plan: Plan, sizes: Sequence[int]) -> tuple[Plan, list[int]]:
        """Record a plan's passes as CUDA graphs at some batch sizes; for models on a CUDA device.

        Return the plan that replays them, and the sizes that work. If none works, return the plan
        unchanged.

        Each graph is compared with the reference on inputs other than the recorded one, and is
        dropped if it differs. Sizes whose pass can't be recorded are logged, and run without graph.
        """
        graphed = GraphedExtractor(plan.built, plan.points)
        recorded = [size for size in sizes if self._records(plan, graphed, size)]
        return (replace(plan, built=graphed) if recorded else plan), recorded

    def _reference(self, pass_spec: PassSpec) -> BuiltExtractor:
        if pass_spec.modules_only:
            return REFERENCE.build_reference(self._context, pass_spec)
        # Hooks can't see nodes. So the whole graph runs instead, without dead-code elimination;
        # the catalogue has compared it with the modules.
        names = self._context.traced()
        whole = WholeGraphExtractor(self._model, names, names.nodes_of(pass_spec.points))
        return self._context.guarded(whole)

    def _batches_to_share(self, plan: Plan, items: int, own: Batch | None) -> list[Batch]:
        mine = None if own is None else resized(own, items)
        return self.of_outcome(plan.key, items, mine)

    def _shares(self, plan: Plan, own: Batch | None) -> bool:
        if plan.outcome:
            batches = self._batches_to_share(plan, _SHARED, own)
            return bool(batches) and all(self._divides(plan, x) for x in batches)
        x = ordinary_batch(self._model, _SHARED, plan.batch_key)
        if self._looks(plan, x) or not shares_passes(plan.built, plan.points, plan.specs, x):
            return False
        return all(
            self._shares_on(plan, items)
            for batch in (wide_batch(self._model, _SHARED, plan.batch_key),
                          *reaching_batches(self._model, plan.batch_key))
            # As batches are split after the first item, each kind of item comes first once.
            if batch is not None and not (plan.kind.finite_only and not batch.is_finite)
            for items in (batch, batch.map(lambda tensor: tensor.flip(0)))
        )  # fmt: skip

    def _shares_on(self, plan: Plan, x: Batch) -> bool:
        try:
            return shares_passes(plan.built, plan.points, plan.specs, x)
        except Exception as error:  # noqa: BLE001 - a model may refuse such input
            _log.info("model %s fails on unusual input: %s", self._model.name, own_words(error))
            return True

    def _divides(self, plan: Plan, x: Batch) -> bool:
        """Return whether the values of a batch are those of its parts, on a batch that it takes."""
        try:
            return all(
                shares_passes(plan.built, plan.points, plan.specs, batch)
                for batch in (x, x.map(lambda tensor: tensor.flip(0)))
            )
        except Exception:  # noqa: BLE001 - then each request runs alone, and says why it fails
            _log.info("model %s fails on %d items", self._model.name, x.size, exc_info=True)
            return False

    def _shares_at(self, plan: Plan, items: int, own: Batch | None) -> bool:
        """Test one total size; see Note [Each batch size is proven]."""
        if plan.outcome:
            batches = self._batches_to_share(plan, items, own)
            return bool(batches) and all(self._divides(plan, x) for x in batches)
        ordinary = ordinary_batch(self._model, items, plan.batch_key)
        try:
            shares = shares_passes(plan.built, plan.points, plan.specs, ordinary)
        except Exception:  # noqa: BLE001 - each request then runs alone, and reports its failure
            _log.info("model %s fails on %d items", self._model.name, items, exc_info=True)
            return False
        return shares and self._shares_on(plan, unlike_batch(self._model, items, plan.batch_key))

    def _looks(self, plan: Plan, x: Batch) -> bool:
        if plan.kind.compiled:
            return False  # A program can't look; it stands for one outcome of the model's looks.
        # A value that depends on a discontinuous step may change with the batch size.
        x = x.clone()
        steps: list[str] = []
        with watch_looks(self._model.module, x.tensors) as looks:
            plan.built.run(x, lambda _, value: steps.append(looks.step(value)))
        return looks.count > 0 or any(steps)

    def _records(self, plan: Plan, graphed: GraphedExtractor, size: int) -> bool:
        x = ordinary_batch(self._model, size, plan.batch_key)
        try:
            self._refuse_replays(plan, x)
            graphed.record(x)
            # Replay twice: the second replay shows whether the first one left something behind.
            for other in (x.map(lambda tensor: tensor.flip(-1)), x):
                expected = self.truth(plan.pass_spec, other)
                prove(plan.kind, graphed, plan.points, other, expected)
        except Exception as error:  # noqa: BLE001 - a model may raise anything when recording fails
            graphed.forget(x.shapes)
            _log.warning(
                "model %s: no CUDA graph of %s at batch size %d: %s",
                self._model.name, quoted(plan.points), size, error,
            )  # fmt: skip
            return False
        return True

    def _refuse_replays(self, plan: Plan, x: Batch) -> None:
        """Raise if a replay would not repeat the pass; see Note [What a graph holds]."""
        if self._scope.rules.state is not KeptState.NONE:
            raise ExtractorUnsupportedError("its modules write state while they run")
        if plan.dynamic:
            raise ExtractorUnsupportedError("its shapes depend on the content")
        if plan.outcome or self._looks(plan, x):
            raise ExtractorUnsupportedError("its code branches on tensor values")


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor if tensor.is_floating_point() else tensor


def _advice(pass_spec: PassSpec) -> str:
    return f"; {REFERENCE.name} can" if pass_spec.modules_only else ""
