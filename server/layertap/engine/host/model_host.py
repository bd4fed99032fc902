"""One served model: what answers requests for its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.contest import Entrant
from layertap.engine.host.choice import Choice
from layertap.engine.host.declaring import Declaring
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.plan_maker import PlanMaker
from layertap.engine.host.plans import Plans
from layertap.engine.host.request_outcomes import RequestOutcomes
from layertap.engine.host.shared_proof import SharedProof
from layertap.engine.kept_races import KeptRaces
from layertap.engine.lengths import Lengths
from layertap.engine.resolve import Resolved, resolve
from layertap.engine.sharing import Sharing
from layertap.engine.staging import proven_staging
from layertap.engine.text_batch import names_of_texts
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.checkpoints import Checkpoints
from layertap.extraction.kinds.registry import REFERENCE, kind_of
from layertap.extraction.padding import TokenAxis
from layertap.extraction.padding_proof import PaddingFindings
from layertap.extraction.plan import Plan, PlanKey, quoted
from layertap.extraction.plan_cache import PlanCache, fingerprint
from layertap.extraction.towers import check_tower
from layertap.intervention import SiteKey
from layertap.models import Batch, BatchKey, LoadedModel
from layertap.objective import TermKey
from layertap.selection import Extractor, LayerSelection
from layertap.settings import HostOptions, Limits

__all__ = ["ModelHost", "RefusedPlan"]

_log = logging.getLogger(__name__)

MAX_RESOLVED = 256


@dataclass(frozen=True, slots=True)
class RefusedPlan:
    """A layer set that an extractor could not serve, and why.

    Attributes:
        extractor: The extractor.
        layers: The layers' names in the catalogue, with the suffix ``:input`` for inputs.
        batch_key: The key of the batches that it would have served.
        reason: The reason, as in the error of a request for these layers.
    """

    extractor: Extractor
    layers: tuple[str, ...]
    batch_key: BatchKey
    reason: str


class ModelHost:
    """A loaded model, what was measured of it, and its plans.

    Args:
        model: The model.
        compute: The threads that run it. The model is measured there, so construction takes time.
        limits: The limits of requests.
        cache: Stores the compiled plans of declared layers.
        options: How to serve the model.
        call: Cancels the measuring.
        preparing: The threads that make batches of decoded images; the compute threads if not
            given.
        again: Loads the model once more. If the model is stateful, it is served by a module that
            never ran, instead of the one that was measured.

    Attributes:
        model: The model.
        catalogue: Its layers.
        compute: The compute threads of its device.
        preparing: The threads that make batches of decoded images.
        options: How it is served.
        declared: The layers whose plans were made before it served.
        weight_bytes: Bytes of the model's parameters and buffers on its device.
        staging: Copies values from a GPU to the host; None if values are written at once.
        plans: Its plans.
        outcomes: Finds the outcomes of its requests.
        shared_proof: Proves which requests may share a pass.
        lengths: Which requests may share passes with items of other lengths; None if none may.
        sharing: Whose requests share passes with others for the same items.
        races: Which extractor AUTO takes where there is a compiled plan.

    Raises:
        ModelLoadError: If the model can't run on sample input of its own signature.
        CancelledError: If the call was cancelled.
    """

    def __init__(
        self,
        model: LoadedModel,
        compute: ComputeThreads,
        limits: Limits,
        cache: PlanCache | None = None,
        *,
        options: HostOptions | None = None,
        call: Call | None = None,
        preparing: ComputeThreads | None = None,
        again: Callable[[], LoadedModel] | None = None,
    ) -> None:
        call = call or Call()
        self._measured = MeasuredModel.measure(model, compute, cache, call, again)
        self.model = model = self._measured.model
        self.catalogue = self._measured.catalogue
        self.compute = compute
        self.preparing = preparing or compute
        self.options = options or HostOptions()
        self.declared: list[LayerSelection] = []
        self.weight_bytes = model.weight_bytes()
        self.staging = compute.run(lambda: proven_staging(model.device), call)
        self._checkpoints = Checkpoints(model.module, self.catalogue)
        self._fingerprint = self._measured.fingerprint
        # A compiled program has its own weights, at most as large as the model's.
        most_programs = max(1, limits.plan_bytes // max(1, self.weight_bytes))
        self.plans = Plans(limits.plans, most_programs)
        self._maker = PlanMaker(self._measured, self.plans)
        self.outcomes = RequestOutcomes(self._measured, self.plans)
        self.shared_proof = SharedProof(self._measured, self.outcomes)
        self._choice = Choice(
            self._measured,
            self.plans,
            self._maker,
            KeptRaces(cache, self._measured.facts),
            compiles=self.weight_bytes <= limits.plan_bytes,
            races=self.options.race,
        )
        self.races = self._choice.races
        self.lengths = self._lengths(call)
        self.sharing = Sharing(
            model.name,
            self.options.batching,
            self.shared_proof.trial,
            self.plans.find,
            self._measured.names_of,
        )
        self._resolve = lru_cache(maxsize=MAX_RESOLVED)(
            partial(resolve, model, self.catalogue, max_layers=limits.layers)
        )

    def fingerprint(self, call: Call | None = None) -> str:
        """Return a digest of the model's modules and weights; see ``plan_cache.fingerprint``.

        It is computed once, on a compute thread, so that no pass writes buffers meanwhile.
        """
        if not self._fingerprint:
            self._fingerprint = self.compute.run(lambda: fingerprint(self.model), call or Call())
        return self._fingerprint

    def resolve(
        self,
        selections: tuple[LayerSelection, ...],
        extractor: Extractor,
        objective: tuple[TermKey, ...] = (),
        interventions: tuple[SiteKey, ...] = (),
        variant: str = "",
    ) -> Resolved:
        """Match what a request names against the catalogue; see ``layertap.engine.resolve``."""
        return self._resolve(
            selections, extractor, variant=variant,
            objective=objective, interventions=interventions,
        )  # fmt: skip

    def declare(self, selections: Sequence[LayerSelection], call: Call | None = None) -> None:
        """Build and keep the plans of layers that will be requested: all together and each alone.

        AUTO then serves them with a compiled plan, for the model's default items. If the model
        can't be compiled, the log says so and AUTO serves them with the next best extractor. Other
        requests run between the steps. The call cancels the remaining steps.

        Raises:
            LayertapError: Any error that a request for these layers would raise.
        """
        self.declared = list(selections)
        declaring = Declaring(
            self._measured,
            self.plans,
            self._maker,
            shared_proof=self.shared_proof,
            sharing=self.sharing,
            options=self.options,
        )
        declaring.declare(selections, self.resolve, call or Call())

    def plan(self, resolved: Resolved, x: Batch, call: Call) -> Plan:
        """Return the plan that serves a request's batch.

        A new plan is built on a compute thread, and is proven there for each new batch size.

        Args:
            resolved: The request.
            x: Its batch, on the CPU.
            call: The deadline and cancellation state of the request.

        Raises:
            InvalidInputError: If the model can't run on such items.
            ModelRunError: If the model fails on this batch and that shows here.
            ExtractorUnsupportedError: If the requested extractor can't serve the layers, or can't
                serve this batch size.
        """
        batch_key, size = self.model.signature.key_of(x), x.size
        check_tower(self.model.signature, self.catalogue, resolved.pass_spec.values, batch_key)
        outcome = self.outcomes.find(resolved, batch_key, x, call)
        chosen = self._choice.choose(resolved, batch_key, x, outcome)
        mine = outcome if kind_of(chosen.extractor).compiled else ()
        key = PlanKey(chosen.extractor, resolved.pass_spec, batch_key, mine, chosen.variant)

        def own() -> Batch | None:
            # Of a plan for one outcome of the model's looks, the request itself is a sample.
            return self.on_device(x) if mine else None

        plan = self._maker.plan(key, own, call)
        if plan.refusal(size) is None:
            prove_size = self._measured.builder.prover.prove_size
            self.compute.run(lambda: prove_size(plan, size, own()), call)
        refusal = plan.refusal(size)
        if not refusal:
            return plan
        if self._choice.choose(resolved, batch_key, x, outcome) != chosen:
            return self.plan(resolved, x, call)
        raise ExtractorUnsupportedError(
            f"{chosen} can't serve {quoted(plan.points)} of model "
            f"{self.model.name!r} at batch size {size}: {refusal}"
        )

    def on_device(self, x: Batch) -> Batch:
        """Return a batch on the model's device; see ``MeasuredModel.on_device``."""
        return self._measured.on_device(x)

    def refuse(self, plan: Plan, reason: str) -> ExtractorUnsupportedError:
        """Stop using a plan whose program failed although the model did not.

        Returns:
            The error that requests for it get from now on.
        """
        refusal = ExtractorUnsupportedError(
            f"{Entrant.of(plan.key)} can't serve {quoted(plan.points)} of model "
            f"{self.model.name!r}: its program failed but the model itself did not ({reason}); "
            f"{REFERENCE.name} can"
        )
        self.plans.drop(plan.key)
        self.plans.refuse(plan.key, refusal)
        _log.warning("%s", refusal)
        return refusal

    def refused_plans(self) -> list[RefusedPlan]:
        """Return the layer sets that an extractor was tested with and could not serve."""
        return [
            RefusedPlan(
                key.extractor,
                tuple(self.catalogue.name_of(point) for point in key.pass_spec.points),
                key.batch_key,
                str(refusal),
            )
            for key, refusal in self.plans.refusals()
            if isinstance(refusal, ExtractorUnsupportedError) and not key.variant
        ]

    def stop_promoting(self) -> None:
        """Stop compiling layer sets, races and measuring shared passes in the background.

        Call this before a compute thread closes the host. Otherwise closing would wait for a
        compiling step that waits for this compute thread.
        """
        self._choice.close()
        self.sharing.close()
        self._maker.close()

    def close(self) -> None:
        """Remove the hooks from the model, and drop its plans."""
        self.stop_promoting()
        self._measured.taps.close()
        self._checkpoints.close()
        self.plans.clear()

    def _lengths(self, call: Call) -> Lengths | None:
        """Test which layers may be padded, if the settings allow passes of different lengths."""
        most = self.options.batching.max_tokens
        axis = TokenAxis.of(self.model) if most else None
        if axis is None:
            return None

        def prove(names: Sequence[str], call: Call) -> PaddingFindings:
            job = partial(self._measured.builder.prover.prove_padding, self.catalogue, names, most)
            return self.compute.run(job, call)

        return Lengths(axis, self.catalogue, prove, names_of_texts(self.model), call)
