"""Proves which requests may share a pass, and that the items of a batch are independent."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from functools import partial

from layertap.call import Call
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.request_outcomes import RequestOutcomes
from layertap.engine.sharing import MAX_CALLERS, Trial
from layertap.extraction.plan import Plan
from layertap.extraction.points import CapturePoint
from layertap.extraction.samples import ordinary_batch
from layertap.models import Batch, BatchKey
from layertap.settings import BatchPolicy

__all__ = ["SharedProof"]

_log = logging.getLogger(__name__)

MAX_SIZES_PROVEN = 8
"""Every batch size up to this is proven before a model is ready; above it only 16, 32 and so on.

Other sizes are proven when they are first used.
"""

MAX_BATCH_KEYS = 1024
"""Kinds of batches whose independent layers are remembered."""


class SharedProof:
    """Proves which requests of one model may share a pass.

    Args:
        measured: The model.
        outcomes: Finds the outcomes of its requests.
    """

    def __init__(self, measured: MeasuredModel, outcomes: RequestOutcomes) -> None:
        self._measured = measured
        self._compute = measured.compute
        self._prover = measured.builder.prover
        self._outcomes = outcomes
        self._lock = threading.Lock()
        # The points whose values are known not to depend on other items of the batch.
        self._independent: OrderedDict[BatchKey, frozenset[CapturePoint]] = OrderedDict()

    def prove(self, plan: Plan, items: int, x: Batch | None = None) -> bool:
        """Return whether requests may share a pass of this many items; call it on a compute thread.

        Args:
            plan: The plan of each request.
            items: The total number of items.
            x: The joined batch, on the model's device and in its dtypes; None if there is none yet.
        """
        if x is not None and plan.outcome and not self._outcomes.is_of(plan, x):
            return False
        # A plan may fit each of two requests, and not both together.
        self._prover.prove_size(plan, items, x)
        return plan.refusal(items) == "" and self._prover.prove_shared(plan, items, x)

    def warm(self, plan: Plan, most: int) -> None:
        """Prove and run a plan at the batch sizes that its passes may have.

        Args:
            plan: The plan.
            most: Maximum number of items in a pass.
        """
        if most == 1:
            return
        if not self._compute.run(partial(self._prover.prove_shared, plan), Call()):
            _log.warning(
                "model %s: requests for %s don't share passes: the items of a batch are not "
                "independent", self._measured.model.name, self._measured.names_of(plan),
            )  # fmt: skip
            return
        doubling = {*(1 << bit for bit in range(1, (most - 1).bit_length())), most}
        for size in sorted(doubling | set(range(2, min(most, MAX_SIZES_PROVEN) + 1))):
            self._compute.run(partial(self.prove, plan, size), Call())
            if size in doubling:  # The other sizes have run twice by now.
                self._compute.run(partial(self._prover.warm, plan, size), Call())

    def trial(self, plan: Plan, policy: BatchPolicy, call: Call) -> Trial | None:
        """Return what measures shared passes of a plan; None if its requests must not share any."""
        if policy.max_size == 1 or plan.dynamic or plan.gradients or plan.edits:
            return None
        prover, measured = self._prover, self._measured

        def samples() -> list[Batch]:
            if plan.outcome:
                return prover.of_outcome(plan.key, 1)
            return [ordinary_batch(measured.model, 1, plan.batch_key)]

        for size in range(2, min(policy.max_size, MAX_CALLERS) + 1):
            if not self._compute.run(partial(self.prove, plan, size), call):
                return None
        items = [x.map(lambda tensor: tensor.cpu()) for x in self._compute.run(samples, call)]
        return Trial(plan, items, self._compute, policy, measured.on_device) if items else None

    def find_independence(self, plan: Plan, size: int, call: Call) -> None:
        """Find out whether the items of a batch influence each other, if that matters.

        It does for several items with gradients, and where a pass has an item several times. The
        result is in the findings of the values of the plan's gradients or interventions.

        Args:
            plan: The plan, with gradients or interventions.
            size: The number of items of the request.
            call: The deadline and cancellation state of the request.
        """
        facts, edits = plan.gradients, plan.edits
        once = facts is None or (size == 1 and not facts.extractor.sweeps)
        found = edits or facts
        if found is None or (once and plan.pass_spec.sets == 1):
            return  # Each item runs once, and by itself or with those that it came with.
        values = found.values
        if values.findings.alone is not None:
            return
        with self._lock:
            known = self._independent.get(plan.batch_key, frozenset())
        if known.issuperset(values.points):
            values.findings.found_alone(alone=False)
            return
        if self._compute.run(partial(self._prover.prove_shared, values), call):
            self._found_independent(plan.batch_key, values.points)

    def _found_independent(self, key: BatchKey, points: tuple[CapturePoint, ...]) -> None:
        with self._lock:
            known = self._independent.get(key, frozenset())
            self._independent[key] = known.union(points)
            if len(self._independent) > MAX_BATCH_KEYS:
                self._independent.popitem(last=False)
