"""Makes the plans of one model: on compute threads, in steps where that takes long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial

from layertap.call import Call
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.plans import Plans
from layertap.engine.slow_plans import SlowPlans
from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction.guards import in_words
from layertap.extraction.kinds.base import CompiledKind
from layertap.extraction.kinds.registry import REFERENCE, kind_of
from layertap.extraction.pause import Pause, wait
from layertap.extraction.plan import Plan, PlanKey, quoted
from layertap.models import Batch
from layertap.models.compiler_import import import_compiler

__all__ = ["PlanMaker"]

_log = logging.getLogger(__name__)

MAX_OUTCOMES = 8
"""Maximum number of compiled plans per layer set and item shape, one for each outcome.

Code that looks at a length, for example, has an outcome for each length; requests of any other
outcome are served by HOOK.
"""


class PlanMaker:
    """Makes plans and keeps them, or keeps why they are refused.

    Args:
        measured: The model.
        plans: Keeps its plans.
    """

    def __init__(self, measured: MeasuredModel, plans: Plans) -> None:
        self._measured = measured
        self._compute = measured.compute
        self._builder = measured.builder
        self._plans = plans
        self._slow_plans: SlowPlans[PlanKey] = SlowPlans(self.compile)

    def plan(self, key: PlanKey, own: Callable[[], Batch | None], call: Call) -> Plan:
        """Return the plan that is kept, that needs no building, or else a new one.

        If the building takes long, other requests run meanwhile.

        Args:
            key: What the plan is for.
            own: Returns the batch of the request on the model's device, if it is to be a sample.
            call: The deadline and cancellation state of the request.

        Raises:
            InvalidInputError: If the model can't run on such items.
            ExtractorUnsupportedError: If the extractor can't serve the layers.
        """
        known = self._plans.use(key) or self._predicted(key)
        if known is not None and known.predicted and known.dynamic:
            _log.warning(
                "model %s: a value has another shape than the catalogue predicts for items of %s; "
                "shapes of such items are measured", self._measured.model.name, key.batch_key,
            )  # fmt: skip
            known = self._measure(known, call)
        return known or self.built(key, own, call)

    def built(self, key: PlanKey, own: Callable[[], Batch | None], call: Call) -> Plan:
        """Return the plan that is kept, or else a new one whose shapes are measured."""
        kind = kind_of(key.extractor)
        if not isinstance(kind, CompiledKind) or not kind.slow:
            return self._compute.run(lambda: self._build(key, own()), call)
        self._slow_plans.wait_for(key, own(), call)
        plan = self._plans.use(key)
        return plan or self.built(key, own, call)  # It was dropped for others meanwhile.

    def compile(self, key: PlanKey, example: Batch | None) -> Iterator[None]:
        """Compile a layer set in steps; requests run between them.

        Args:
            key: What to compile; the outcome may be unknown.
            example: The batch of a request for it; None if it is not needed.
        """
        import_compiler()
        on_device, given = self._measured.on_device, None
        if example is not None:
            given = self._compute.run(partial(on_device, example), Call())
        if key.outcome is None:
            if given is None:
                raise AssertionError("an outcome is found out with an example")
            observe = partial(self._builder.outcomes.observe, key.pass_spec, given)
            key = key._replace(outcome=self._compute.run(observe, Call()))
            yield
        if self._plans.use(key) is not None:
            return
        self._refuse_another_outcome(key)
        steps = self._builder.steps(key, example=given if key.outcome else None)
        try:
            plan = yield from self.stepped(steps, Call())
        except (InvalidInputError, ExtractorUnsupportedError) as refusal:
            self._plans.refuse(key, refusal)
            raise
        self._plans.add(key, plan)

    def stepped(
        self, steps: Iterator[Plan | Pause | None], call: Call
    ) -> Generator[None, None, Plan]:
        """Run the steps of a builder on a compute thread, and yield between them; return the plan.

        Where a step only waits, this waits for it, and the compute thread is free.
        """
        while not isinstance(step := self._compute.run(partial(next, steps), call), Plan):
            wait(step)
            yield
        return step

    def is_stored(self, key: PlanKey) -> bool:
        """Return whether the plan cache has a compiled program for a plan."""
        kind = kind_of(key.extractor)
        if not isinstance(kind, CompiledKind):
            return False
        file = self._builder.kept.file(kind, *key[1:3])
        return file is not None and file.exists()

    def close(self) -> None:
        """Give up what is being compiled for requests that wait for it."""
        self._slow_plans.close()

    def _measure(self, plan: Plan, call: Call) -> Plan:
        """Replace a plan whose shapes were predicted by one whose shapes are measured.

        Raises:
            InvalidInputError: If the model can't run on such items at all.
        """
        self._plans.drop_predicted(plan.key)
        return self._compute.run(lambda: self._build(plan.key, None), call)

    def _predicted(self, key: PlanKey) -> Plan | None:
        """Return a plan for which the model need not run; None if there can't be one."""
        if key.extractor is not REFERENCE.id or key.batch_key == self._measured.catalogue.key:
            return None
        if key.pass_spec.objective is not None or key.pass_spec.sites:
            return None  # Whether it can be differentiated or changed there must be tried.
        plan = self._builder.predicted(key.pass_spec, key.batch_key)
        if plan is not None:
            self._plans.add_predicted(key, plan)
        return plan

    def _build(self, key: PlanKey, own: Batch | None) -> Plan:
        known = self._plans.use(key)  # Another request may have built it while this one waited.
        if known is not None:
            return known
        self._refuse_another_outcome(key)
        try:
            plan = self._builder.build(
                key.extractor, key.pass_spec, key.batch_key, key.outcome or (),
                variant=key.variant, example=own,
            )  # fmt: skip
        except (InvalidInputError, ExtractorUnsupportedError) as refusal:
            self._plans.refuse(key, refusal)
            raise
        self._plans.add(key, plan)
        return plan

    def _refuse_another_outcome(self, key: PlanKey) -> None:
        """Refuse to build a plan for another outcome if there are as many as are kept."""
        alike = key._replace(outcome=())
        outcomes = {
            each.outcome for each in self._plans.built() if each._replace(outcome=()) == alike
        }
        if key.outcome and len(outcomes) >= MAX_OUTCOMES:
            raise ExtractorUnsupportedError(
                f"{key.extractor.name} can't serve {quoted(key.pass_spec.points)} of model "
                f"{self._measured.model.name!r} for input for which its looks at values give "
                f"{in_words(key.outcome)}: {len(outcomes)} other outcomes have a compiled plan, "
                f"the most that are kept; {REFERENCE.name} can"
            )
