"""Makes the plans of declared layers before the model serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from layertap.call import Call
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.plan_maker import PlanMaker
from layertap.engine.host.plans import Plans
from layertap.engine.host.shared_proof import SharedProof
from layertap.engine.resolve import Resolved
from layertap.engine.sharing import Sharing
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, OverloadedError
from layertap.extraction.catalogue import side_name
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.registry import KINDS, kind_of
from layertap.extraction.pause import run_to_end
from layertap.extraction.plan import Plan, PlanKey
from layertap.malloc import return_memory
from layertap.models import BatchKey
from layertap.selection import Extractor, LayerSelection
from layertap.settings import HostOptions

__all__ = ["Declaring"]

_log = logging.getLogger(__name__)

MAX_DECLARED_OUTCOMES = 4
"""Maximum number of outcomes for which a declared layer set is compiled at the start."""


class Declaring:
    """Makes the plans of declared layers: all together and each alone.

    Args:
        measured: The model.
        plans: Keeps the plans.
        maker: Makes them.
        shared_proof: Proves that requests for them may share passes.
        sharing: Decides whether they do.
        options: How the model is served.
    """

    def __init__(
        self,
        measured: MeasuredModel,
        plans: Plans,
        maker: PlanMaker,
        *,
        shared_proof: SharedProof,
        sharing: Sharing,
        options: HostOptions,
    ) -> None:
        self._measured = measured
        self._compute = measured.compute
        self._name = measured.model.name
        self._plans = plans
        self._maker = maker
        self._shared_proof = shared_proof
        self._sharing = sharing
        self._options = options

    def declare(
        self,
        selections: Sequence[LayerSelection],
        resolve: Callable[[tuple[LayerSelection, ...], Extractor], Resolved],
        call: Call,
    ) -> None:
        """Make and keep the plans of some layers. Other requests run between the steps.

        Args:
            selections: The layers.
            resolve: Matches selections against the catalogue.
            call: Cancels the remaining steps.

        Raises:
            LayertapError: Any error that a request for these layers would raise.
        """
        if any(selection.projection is not None for selection in selections):
            raise InvalidInputError("layers: got a declared layer with a projection, expected none")
        sets = [tuple(selections), *((selection,) for selection in selections)]
        kept = self._measured.builder.kept
        with kept.sharing():  # All together come first, as the others are parts.
            for chosen in dict.fromkeys(filter(None, sets)):
                self._declare(resolve(chosen, Extractor.AUTO), call)

    def _declare(self, resolved: Resolved, call: Call) -> None:
        """Make and keep the plans of one set of declared layers."""
        self._log_uncompiled(resolved)
        for batch_key in self._batch_keys(resolved):
            for plan in self._best(resolved, batch_key, call):
                self._shared_proof.warm(plan, self._options.batching.most)
                recorded = self._recorded(plan)
                self._sharing.decide(recorded, call)
                self._plans.declare(recorded)

    def _log_uncompiled(self, resolved: Resolved) -> None:
        """Log why declared layers can't be compiled, according to the catalogue."""
        for extractor, kind in KINDS.items():
            if not kind.compiled or not kind.automatic or extractor in resolved.candidates:
                continue
            for layer, point in (each for output in resolved.outputs for each in output.members):
                side = resolved.points[point].capture
                reason = self._measured.catalogue.entry(layer).refusal(extractor, side)
                if reason:
                    _log.warning(
                        "model %s: %s can't serve the declared layer %r: %s",
                        self._name, kind.name, side_name(layer, side), reason,
                    )  # fmt: skip

    def _batch_keys(self, resolved: Resolved) -> list[BatchKey]:
        """Return what requests for declared layers give: all inputs, or those of one tower."""
        signature, points = self._measured.model.signature, resolved.pass_spec.points
        towers = [
            signature.of_tower(tower).key
            for tower, own in self._measured.catalogue.towers.items()
            if all(point in own for point in points)
        ]
        return [signature.key, *towers]

    def _best(self, resolved: Resolved, batch_key: BatchKey, call: Call) -> list[Plan]:
        """Make the plans of the first candidate for which that works.

        A compiled one has a plan for each outcome of the model's looks that samples show.
        """
        for extractor in resolved.candidates:
            key = PlanKey(extractor, resolved.pass_spec, batch_key)
            try:
                return self._of_outcomes(key, call)
            except (ExtractorUnsupportedError, OverloadedError) as refusal:
                if extractor is resolved.candidates[-1]:
                    raise
                _log.warning("model %s: %s", self._name, refusal)
        raise AssertionError("a resolved request has candidates")

    def _of_outcomes(self, key: PlanKey, call: Call) -> list[Plan]:
        """Make a plan for each outcome that samples show; raise if none can be made."""
        builder = self._measured.builder
        outcomes: list[Outcome] = [()]
        if kind_of(key.extractor).compiled and builder.outcomes.looks(*key[1:3]):
            find = partial(builder.prover.outcomes_of_samples, *key[1:3])
            outcomes = self._compute.run(find, call)[:MAX_DECLARED_OUTCOMES]
        plans, last = [], None
        for outcome in outcomes:
            mine = key._replace(outcome=outcome)
            try:
                steps = builder.steps(mine, keep=True)
                plans.append(run_to_end(self._maker.stepped(steps, call)))
                return_memory()
            except (ExtractorUnsupportedError, OverloadedError) as refusal:
                # Lack of memory is not recorded as a refusal, as memory may be free later. Nor is
                # the refusal of one outcome: a request may show more of it than the samples do.
                if isinstance(refusal, ExtractorUnsupportedError) and not outcome:
                    self._plans.refuse(mine, refusal)
                _log.info("model %s: %s", self._name, refusal)
                last = refusal
        if not plans and last is not None:
            raise last
        return plans

    def _recorded(self, plan: Plan) -> Plan:
        """Return a plan that replays the batch sizes of the option ``cuda_graphs``."""
        sizes = self._options.cuda_graphs
        if not sizes or self._measured.model.device.type != "cuda":
            return plan
        record = partial(self._measured.builder.prover.record, plan, sizes)
        replayed, recorded = self._compute.run(record, Call())
        _log.info(
            "model %s: CUDA graphs of %s at batch sizes %s",
            self._name, self._measured.names_of(plan), recorded,
        )  # fmt: skip
        return replayed
