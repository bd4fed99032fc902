"""Finds the outcome of a request: which way the model's code goes where it looks at values."""

from __future__ import annotations

from layertap.call import Call
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.plans import Plans
from layertap.engine.resolve import Resolved
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.guards import GuardTree, Outcome
from layertap.extraction.kinds.base import ExtractorKind
from layertap.extraction.kinds.registry import kind_of
from layertap.extraction.plan import Plan
from layertap.models import Batch, BatchKey

__all__ = ["RequestOutcomes"]


class RequestOutcomes:
    """Finds the outcomes of one model's requests; see ``layertap.extraction.outcomes``.

    Args:
        measured: The model.
        plans: Its plans.
    """

    def __init__(self, measured: MeasuredModel, plans: Plans) -> None:
        self._measured = measured
        self._compute = measured.compute
        self._plans = plans
        self._outcomes = measured.builder.outcomes

    def find(self, resolved: Resolved, batch_key: BatchKey, x: Batch, call: Call) -> Outcome | None:
        """Return the outcome of a batch; None if it is not known yet.

        Empty also where no compiled plan comes into question. For a request that names a compiled
        kind, and where there is a plan for another outcome or batch size already, the model runs to
        find it out.
        """
        pass_spec, outcomes = resolved.pass_spec, self._outcomes
        compiled = any(kind_of(extractor).compiled for extractor in resolved.candidates)
        if not compiled or outcomes.looks(pass_spec, batch_key) is False:
            return ()
        tree = outcomes.guard(pass_spec, batch_key, x.size)
        if tree is not None:
            found = self._asked(tree, x, call)
            if found is not None:
                return found
        free = len(resolved.candidates) > 1  # Another extractor may serve it.
        known = tree is not None and tree.full
        if free and (known or outcomes.refusal(pass_spec, batch_key)):
            return None
        if free and not self._plans.compiled(pass_spec, batch_key):
            return None
        observe, on_device = outcomes.observe, self._measured.on_device
        try:
            return self._compute.run(lambda: observe(pass_spec, on_device(x)), call)
        except ExtractorUnsupportedError:
            if free:
                return None
            raise

    def is_of(self, plan: Plan, x: Batch) -> bool:
        """Return whether a batch has the outcome for which a plan was made.

        Call it on a compute thread, with a batch on the model's device.
        """
        tree = self._outcomes.guard(plan.pass_spec, x.key, x.size)
        found = tree.outcome(x) if tree is not None else None
        return (
            self._outcomes.observe(plan.pass_spec, x) if found is None else found
        ) == plan.outcome

    def finite_only(self, resolved: Resolved, x: Batch) -> ExtractorKind | None:
        """Return a kind that may serve a request by the outcome of its looks, but not NaN.

        None if there is none, or the model looks at no values.
        """
        kinds = map(kind_of, resolved.candidates)
        kind = next((kind for kind in kinds if kind.compiled and kind.finite_only), None)
        key = self._measured.model.signature.key_of(x)
        looks = kind and self._outcomes.looks(resolved.pass_spec, key)
        return None if looks is False else kind

    def _asked(self, tree: GuardTree, x: Batch, call: Call) -> Outcome | None:
        def ask() -> Outcome | None:
            return tree.outcome(self._measured.on_device(x))

        # It may take less time than to wait for a compute thread's turn.
        here = tree.cheap and self._measured.model.device.type == "cpu"
        return ask() if here else self._compute.run(ask, call)
