"""One served model: its taps, its catalogue and its plans."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.contest import Contest, Entrant
from layertap.engine.kept_races import KeptRaces
from layertap.engine.lengths import Lengths
from layertap.engine.promotion import Promoter
from layertap.engine.races import RACE_AFTER, Races
from layertap.engine.resolve import Resolved, resolve
from layertap.engine.sharing import MAX_CALLERS, Sharing, Trial
from layertap.engine.slow_plans import SlowPlans
from layertap.engine.staging import proven_staging
from layertap.engine.text_batch import names_of_texts
from layertap.errors import (
    ExtractorUnsupportedError,
    InvalidInputError,
    LayertapError,
    OverloadedError,
)
from layertap.extraction.catalogue import Catalogue, side_name
from layertap.extraction.checkpoints import Checkpoints
from layertap.extraction.claims import kept_claims
from layertap.extraction.cpu_twin import with_twin
from layertap.extraction.guards import GuardTree, Outcome, in_words
from layertap.extraction.kept_catalogue import CatalogueFile
from layertap.extraction.kinds.base import CompiledKind, ExtractorKind
from layertap.extraction.kinds.registry import KINDS, REFERENCE, kind_of
from layertap.extraction.measure import measure_with_graph
from layertap.extraction.padding import TokenAxis
from layertap.extraction.padding_proof import PaddingFindings
from layertap.extraction.passes import KeptState, PassScope
from layertap.extraction.pause import Pause, run_to_end, wait
from layertap.extraction.plan import Plan, PlanKey, quoted
from layertap.extraction.plan_builder import PlanBuilder
from layertap.extraction.plan_cache import PlanCache, fingerprint
from layertap.extraction.points import CapturePoint
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.taps import Taps
from layertap.extraction.towers import check_tower
from layertap.extraction.trial import tried
from layertap.intervention import SiteKey
from layertap.listing import listed
from layertap.malloc import return_memory
from layertap.models import Batch, BatchKey, LoadedModel
from layertap.models.compiler_import import import_compiler
from layertap.objective import TermKey
from layertap.selection import Extractor, LayerSelection
from layertap.settings import BatchPolicy, HostOptions, Limits

__all__ = ["ModelHost", "RefusedPlan"]

_log = logging.getLogger(__name__)

Refusal = InvalidInputError | ExtractorUnsupportedError
K = TypeVar("K")
V = TypeVar("V")

MAX_PROMOTED = 24
"""Maximum number of layers in a set that is compiled while requests are served.

A program's first run in torch can't be divided into steps. For the hundreds of layers of a large
transformer it takes minutes, in which no other request would be served.
"""

MAX_OUTCOMES = 8
"""Maximum number of compiled plans per layer set and item shape, one for each outcome.

Code that looks at a length, for example, has an outcome for each length; requests of any other
outcome are served by HOOK.
"""

MAX_DECLARED_OUTCOMES = 4
"""Maximum number of outcomes for which a declared layer set is compiled at the start."""

MAX_SIZES_PROVEN = 8
"""Every batch size up to this is proven before a model is ready; above it only 16, 32 and so on.

Other sizes are proven when they are first used.
"""

MAX_PREDICTED = 1024
"""Plans that run the model itself and whose shapes the catalogue predicts; they take no memory."""

MAX_REFUSALS = 256
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
    """A loaded model and everything that was learnt about it.

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
        compute: The compute threads of its device.
        preparing: The threads that make batches of decoded images.
        weight_bytes: Bytes of the model's parameters and buffers on its device.
        staging: Copies values from a GPU to the host; None if values are written at once.
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
        scope = compute.run(lambda: PassScope(model.module), call)
        self.model = model = compute.run(lambda: with_twin(tried(model, scope)), call)
        self.preparing = preparing or compute
        self.options = options or HostOptions()
        self.declared: list[LayerSelection] = []
        self.weight_bytes = model.weight_bytes()
        self.compute = compute
        self._taps = Taps(model.module)
        self._fingerprint = self._facts = ""
        self.catalogue = self._catalogue(model, scope, cache, call)
        proving = None
        if again is not None and scope.rules.state is KeptState.KEPT:
            fresh = compute.run(lambda: _fresh(model, again), call)
            if fresh is not None:
                proving = model, self._taps
                self.model, self._taps = fresh, Taps(fresh.module)
                model = fresh
        self.staging = compute.run(lambda: proven_staging(model.device), call)
        self._checkpoints = Checkpoints(model.module, self.catalogue)
        for note in self.catalogue.scope.rules.notes:
            _log.warning("model %s: %s", model.name, note)
        if self.catalogue.non_finite:
            _log.warning(
                "model %s: layer %r returns NaN or infinity for random input in [0, 1)",
                model.name, self.catalogue.non_finite,
            )  # fmt: skip
        for note in self.catalogue.notes:
            _log.info("model %s: %s", model.name, note)
        self._builder = PlanBuilder(
            model,
            self._taps,
            self.catalogue,
            cache,
            proving=proving,
            known_fingerprint=self._fingerprint,
            facts=self._facts,
        )
        self._lock = threading.Lock()
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._declared_plans: dict[PlanKey, Plan] = {}
        self._predictions: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._refusals: OrderedDict[PlanKey, Refusal] = OrderedDict()
        # The points whose values are known not to depend on other items of the batch.
        self._independent: OrderedDict[BatchKey, frozenset[CapturePoint]] = OrderedDict()
        self._max_plans = limits.plans
        # A compiled program has its own weights, at most as large as the model's.
        self._fits = self.weight_bytes <= limits.plan_bytes
        self._max_compiled = max(1, limits.plan_bytes // max(1, self.weight_bytes))
        self._promoter: Promoter[PlanKey | Contest] = Promoter(self._beside_requests)
        self._slow_plans: SlowPlans[PlanKey] = SlowPlans(self._compile)
        self.lengths = self._lengths(call)
        self.sharing = Sharing(
            model.name, self.options.batching, self._trial, self._served, self._names_of
        )
        self.races = Races(
            compute, self._contenders, self._race_batch, self._names_of,
            KeptRaces(cache, self._facts),
        )  # fmt: skip
        self._resolve = lru_cache(maxsize=MAX_RESOLVED)(
            partial(resolve, self.model, self.catalogue, max_layers=limits.layers)
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
    ) -> Resolved:
        """Match what a request names against the catalogue; see ``layertap.engine.resolve``."""
        return self._resolve(
            selections, extractor, objective=objective, interventions=interventions
        )

    def declare(self, selections: Sequence[LayerSelection], call: Call | None = None) -> None:
        """Build and keep the plans of layers that will be requested: all together and each alone.

        AUTO then serves them with a compiled plan, for the model's default items. If the model
        can't be compiled, the log says so and AUTO serves them with the next best extractor. Other
        requests run between the steps. The call cancels the remaining steps.

        Raises:
            LayertapError: Any error that a request for these layers would raise.
        """
        if any(selection.projection is not None for selection in selections):
            raise InvalidInputError("layers: got a declared layer with a projection, expected none")
        self.declared = list(selections)
        sets = [tuple(selections), *((selection,) for selection in selections)]
        with self._builder.kept.sharing():  # All together come first, as the others are parts.
            for chosen in dict.fromkeys(filter(None, sets)):
                self._declare(chosen, call or Call())

    def _declare(self, selections: tuple[LayerSelection, ...], call: Call) -> None:
        """Build and keep the plans of one set of declared layers."""
        resolved = self.resolve(selections, Extractor.AUTO)
        self._log_uncompiled(resolved)
        for batch_key in self._declared_keys(resolved):
            for plan in self._build_best(resolved, batch_key, call):
                self._warm_batches(plan)
                recorded = self._record(plan)
                self.sharing.decide(recorded, call)
                with self._lock:
                    self._declared_plans[plan.key] = recorded

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
        outcome = self._outcome(resolved, batch_key, x, call)
        chosen = self._choose(resolved, batch_key, x, outcome)
        mine = outcome if kind_of(chosen.extractor).compiled else ()
        key = PlanKey(chosen.extractor, resolved.pass_spec, batch_key, mine, chosen.variant)

        def own() -> Batch | None:
            # Of a plan for one outcome of the model's looks, the request itself is a sample.
            return self.on_device(x) if mine else None

        known = self._known(key) or self._predicted(key)
        if known is not None and known.predicted and known.dynamic:
            _log.warning(
                "model %s: a value has another shape than the catalogue predicts for items of %s; "
                "shapes of such items are measured", self.model.name, batch_key,
            )  # fmt: skip
            known = self.measure(known, call)
        plan = known or self._built(key, own, call)
        if plan.refusal(size) is None:
            prove_size = self._builder.prover.prove_size
            self.compute.run(lambda: prove_size(plan, size, own()), call)
        refusal = plan.refusal(size)
        if not refusal:
            return plan
        if self._choose(resolved, batch_key, x, outcome) != chosen:
            return self.plan(resolved, x, call)
        raise ExtractorUnsupportedError(
            f"{chosen.extractor.name} can't serve {quoted(plan.points)} of model "
            f"{self.model.name!r} at batch size {size}: {refusal}"
        )

    def _built(self, key: PlanKey, own: Callable[[], Batch | None], call: Call) -> Plan:
        """Build a plan on a compute thread; if that takes long, other requests run meanwhile."""
        kind = kind_of(key.extractor)
        if not isinstance(kind, CompiledKind) or not kind.slow:
            return self.compute.run(lambda: self._build(key, own()), call)
        self._slow_plans.wait_for(key, own(), call)
        plan = self._known(key)
        return plan or self._built(key, own, call)  # It was dropped for others meanwhile.

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
        if self.compute.run(partial(self._builder.prover.prove_shared, values), call):
            known = known.union(values.points)
            self._remember(self._independent, plan.batch_key, known, MAX_PREDICTED)

    def measure(self, plan: Plan, call: Call) -> Plan:
        """Replace a plan whose shapes were predicted by one whose shapes are measured.

        Raises:
            InvalidInputError: If the model can't run on such items at all.
        """
        with self._lock:
            self._predictions.pop(plan.key, None)
        return self.compute.run(lambda: self._build(plan.key, None), call)

    def finite_only(self, resolved: Resolved, x: Batch) -> ExtractorKind | None:
        """Return a kind that may serve a request by the outcome of its looks, but not NaN.

        None if there is none, or the model looks at no values.
        """
        kinds = map(kind_of, resolved.candidates)
        kind = next((kind for kind in kinds if kind.compiled and kind.finite_only), None)
        key = self.model.signature.key_of(x)
        looks = kind and self._builder.outcomes.looks(resolved.pass_spec, key)
        return None if looks is False else kind

    def on_device(self, x: Batch) -> Batch:
        """Return a batch on the model's device, in the model's dtypes.

        A copy from page-locked memory is only launched here; PyTorch's allocator keeps that memory
        until the copy is done.
        """
        device = self.model.device
        return self.model.signature.converted(
            x.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))
        )

    def prove_shared(self, plan: Plan, items: int, x: Batch | None = None) -> bool:
        """Return whether requests may share a pass of this many items; call it on a compute thread.

        Args:
            plan: The plan of each request.
            items: The total number of items.
            x: The joined batch, on the model's device and in its dtypes; None if there is none yet.
        """
        prover = self._builder.prover
        if x is not None and plan.outcome and not self._has_outcome(plan, x):
            return False
        # A plan may fit each of two requests, and not both together.
        prover.prove_size(plan, items, x)
        return plan.refusal(items) == "" and prover.prove_shared(plan, items, x)

    def _has_outcome(self, plan: Plan, x: Batch) -> bool:
        """Return whether a joined batch has the outcome for which the plan was made."""
        outcomes = self._builder.outcomes
        tree = outcomes.guard(plan.pass_spec, x.key, x.size)
        found = tree.outcome(x) if tree is not None else None
        return (outcomes.observe(plan.pass_spec, x) if found is None else found) == plan.outcome

    def _outcome(
        self, resolved: Resolved, batch_key: BatchKey, x: Batch, call: Call
    ) -> Outcome | None:
        """Return the outcome of a batch; None if it is not known yet.

        Empty also where no compiled plan comes into question. For a request that names a compiled
        kind, and where there is a plan for another outcome or batch size already, the model runs to
        find it out.
        """
        pass_spec, outcomes = resolved.pass_spec, self._builder.outcomes
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
        if free and not self._of_family(resolved, batch_key):
            return None
        try:
            return self.compute.run(lambda: outcomes.observe(pass_spec, self.on_device(x)), call)
        except ExtractorUnsupportedError:
            if free:
                return None
            raise

    def _asked(self, tree: GuardTree, x: Batch, call: Call) -> Outcome | None:
        def ask() -> Outcome | None:
            return tree.outcome(self.on_device(x))

        # It may take less time than to wait for a compute thread's turn.
        here = tree.cheap and self.model.device.type == "cpu"
        return ask() if here else self.compute.run(ask, call)

    def _of_family(self, resolved: Resolved, batch_key: BatchKey) -> list[PlanKey]:
        """Return the keys of the compiled plans that differ only in their outcome."""
        with self._lock:
            keys = [*self._declared_plans, *self._plans]
        return [
            key
            for key in dict.fromkeys(keys)
            if key.batch_key == batch_key
            and key.pass_spec == resolved.pass_spec
            and kind_of(key.extractor).compiled
        ]

    def refuse(self, plan: Plan, reason: str) -> ExtractorUnsupportedError:
        """Stop using a plan whose program failed although the model did not.

        Returns:
            The error that requests for it get from now on.
        """
        refusal = ExtractorUnsupportedError(
            f"{plan.extractor.name} can't serve {quoted(plan.points)} of model "
            f"{self.model.name!r}: its program failed but the model itself did not ({reason}); "
            f"{REFERENCE.name} can"
        )
        with self._lock:
            self._plans.pop(plan.key, None)
            self._declared_plans.pop(plan.key, None)
        self._refuse(plan.key, refusal)
        _log.warning("%s", refusal)
        return refusal

    def refused_plans(self) -> list[RefusedPlan]:
        """Return the layer sets that an extractor was tested with and could not serve."""
        with self._lock:
            refused = list(self._refusals.items())
        return [
            RefusedPlan(
                key.extractor,
                tuple(self.catalogue.name_of(point) for point in key.pass_spec.points),
                key.batch_key,
                str(refusal),
            )
            for key, refusal in refused
            if isinstance(refusal, ExtractorUnsupportedError) and not key.variant
        ]

    def stop_promoting(self) -> None:
        """Stop compiling layer sets, races and measuring shared passes in the background.

        Call this before a compute thread closes the host. Otherwise closing would wait for a
        compiling step that waits for this compute thread.
        """
        self.races.close()
        self._promoter.close()
        self.sharing.close()
        self._slow_plans.close()

    def close(self) -> None:
        """Remove the hooks from the model, and drop its plans."""
        self.stop_promoting()
        self._taps.close()
        self._checkpoints.close()
        with self._lock:
            self._plans.clear()
            self._predictions.clear()
            self._declared_plans.clear()

    def _lengths(self, call: Call) -> Lengths | None:
        """Test which layers may be padded, if the settings allow passes of different lengths."""
        most = self.options.batching.max_tokens
        axis = TokenAxis.of(self.model) if most else None
        if axis is None:
            return None

        def prove(names: Sequence[str], call: Call) -> PaddingFindings:
            job = partial(self._builder.prover.prove_padding, self.catalogue, names, most)
            return self.compute.run(job, call)

        return Lengths(axis, self.catalogue, prove, names_of_texts(self.model), call)

    def _catalogue(
        self, model: LoadedModel, scope: PassScope, cache: PlanCache | None, call: Call
    ) -> Catalogue:
        """Return a model's catalogue: the one that is kept, or else one that is measured."""
        if cache is None or not cache.catalogues:
            return self._measured(model, scope, call)
        file = self.compute.run(lambda: CatalogueFile(cache, model, scope), call)
        self._fingerprint = file.fingerprint
        kept = self.compute.run(file.read, call)
        if kept is not None:
            self._facts = file.facts
            if kept.looks.looked:
                import_compiler()  # Its requests watch passes.
            return kept
        catalogue = self._measured(model, scope, call)
        if self.compute.run(lambda: file.store(catalogue), call):
            self._facts = file.facts
        return catalogue

    def _measured(self, model: LoadedModel, scope: PassScope, call: Call) -> Catalogue:
        """Return a model's catalogue, with all its claims tested.

        This is done in steps, and requests for other models run between them.
        """
        import_compiler()  # Not on a compute thread, where requests would wait for it.
        measured = self.compute.run(lambda: measure_with_graph(model, scope), call)
        steps = kept_claims(model, *measured)
        catalogue: Catalogue | None = None
        while catalogue is None:
            return_memory()
            catalogue = self.compute.run(partial(next, steps), call)
        return_memory()
        return catalogue

    def _log_uncompiled(self, resolved: Resolved) -> None:
        """Log why declared layers can't be compiled, according to the catalogue."""
        for extractor, kind in KINDS.items():
            if not kind.compiled or not kind.automatic or extractor in resolved.candidates:
                continue
            for layer, point in (each for output in resolved.outputs for each in output.members):
                side = resolved.points[point].capture
                reason = self.catalogue.entry(layer).refusal(extractor, side)
                if reason:
                    _log.warning(
                        "model %s: %s can't serve the declared layer %r: %s",
                        self.model.name, kind.name, side_name(layer, side), reason,
                    )  # fmt: skip

    def _declared_keys(self, resolved: Resolved) -> list[BatchKey]:
        """Return what requests for declared layers give: all inputs, or those of one tower."""
        signature, points = self.model.signature, resolved.pass_spec.points
        towers = [
            signature.of_tower(tower).key
            for tower, own in self.catalogue.towers.items()
            if all(point in own for point in points)
        ]
        return [signature.key, *towers]

    def _build_best(self, resolved: Resolved, batch_key: BatchKey, call: Call) -> list[Plan]:
        """Build the plans of the first candidate that can be built.

        A compiled one has a plan for each outcome of the model's looks that samples show.
        """
        for extractor in resolved.candidates:
            key = PlanKey(extractor, resolved.pass_spec, batch_key)
            try:
                return self._declared_outcomes(key, call)
            except (ExtractorUnsupportedError, OverloadedError) as refusal:
                if extractor is resolved.candidates[-1]:
                    raise
                _log.warning("model %s: %s", self.model.name, refusal)
        raise AssertionError("a resolved request has candidates")

    def _declared_outcomes(self, key: PlanKey, call: Call) -> list[Plan]:
        """Build a declared plan for each outcome that samples show; raise if none can be built."""
        outcomes: list[Outcome] = [()]
        if kind_of(key.extractor).compiled and self._builder.outcomes.looks(*key[1:3]):
            find = partial(self._builder.prover.outcomes_of_samples, *key[1:3])
            outcomes = self.compute.run(find, call)[:MAX_DECLARED_OUTCOMES]
        plans, last = [], None
        for outcome in outcomes:
            mine = key._replace(outcome=outcome)
            try:
                plans.append(run_to_end(self._stepped(self._builder.steps(mine, keep=True), call)))
                return_memory()
            except (ExtractorUnsupportedError, OverloadedError) as refusal:
                # Lack of memory is not recorded as a refusal, as memory may be free later. Nor is
                # the refusal of one outcome: a request may show more of it than the samples do.
                if isinstance(refusal, ExtractorUnsupportedError) and not outcome:
                    self._refuse(mine, refusal)
                _log.info("model %s: %s", self.model.name, refusal)
                last = refusal
        if not plans and last is not None:
            raise last
        return plans

    def _warm_batches(self, plan: Plan) -> None:
        """Prove and run a declared plan at the batch sizes that its passes may have."""
        most, prover = self.options.batching.most, self._builder.prover
        if most == 1:
            return
        if not self.compute.run(partial(prover.prove_shared, plan), Call()):
            _log.warning(
                "model %s: requests for %s don't share passes: the items of a batch are not "
                "independent", self.model.name, self._names_of(plan),
            )  # fmt: skip
            return
        doubling = {*(1 << bit for bit in range(1, (most - 1).bit_length())), most}
        for size in sorted(doubling | set(range(2, min(most, MAX_SIZES_PROVEN) + 1))):
            self.compute.run(partial(self.prove_shared, plan, size), Call())
            if size in doubling:  # The other sizes have run twice by now.
                self.compute.run(partial(prover.warm, plan, size), Call())

    def _trial(self, plan: Plan, policy: BatchPolicy, call: Call) -> Trial | None:
        """Return what measures shared passes of a plan; None if its requests must not share any."""
        if policy.max_size == 1 or plan.dynamic or plan.gradients or plan.edits:
            return None
        prover = self._builder.prover

        def samples() -> list[Batch]:
            if plan.outcome:
                return prover.of_outcome(plan.key, 1)
            return [ordinary_batch(self.model, 1, plan.batch_key)]

        for size in range(2, min(policy.max_size, MAX_CALLERS) + 1):
            if not self.compute.run(partial(self.prove_shared, plan, size), call):
                return None
        items = [x.map(lambda tensor: tensor.cpu()) for x in self.compute.run(samples, call)]
        return Trial(plan, items, self.compute, policy, self.on_device) if items else None

    def _served(self, key: PlanKey) -> Plan | None:
        with self._lock:
            return (
                self._declared_plans.get(key) or self._plans.get(key) or self._predictions.get(key)
            )

    def _names_of(self, plan: Plan) -> str:
        return listed(map(self.catalogue.name_of, plan.points))

    def _record(self, plan: Plan) -> Plan:
        """Return a declared plan that replays the batch sizes of the option ``cuda_graphs``."""
        sizes = self.options.cuda_graphs
        if not sizes or self.model.device.type != "cuda":
            return plan
        record = partial(self._builder.prover.record, plan, sizes)
        replayed, recorded = self.compute.run(record, Call())
        _log.info(
            "model %s: CUDA graphs of %s at batch sizes %s",
            self.model.name, self._names_of(plan), recorded,
        )  # fmt: skip
        return replayed

    def _choose(
        self, resolved: Resolved, batch_key: BatchKey, x: Batch, outcome: Outcome | None
    ) -> Entrant:
        if len(resolved.candidates) == 1:
            return Entrant(resolved.candidates[0])
        compiles = self._fits and len(resolved.points) <= MAX_PROMOTED
        for extractor in resolved.candidates:
            if not kind_of(extractor).compiled:
                return Entrant(extractor)
            key = PlanKey(extractor, resolved.pass_spec, batch_key, outcome)
            with self._lock:
                # It counts as used even if the winner of its race serves.
                plan = self._declared_plans.get(key) or _touch(self._plans, key)
                refused = key in self._refusals
            if plan is not None and not plan.refusal(x.size):
                return self._fastest(key, plan, x.size)
            if compiles and plan is None and not refused:
                # A copy: the request's own memory goes with the request.
                self._promoter.note(key, x.clone if outcome != () else lambda: None)
                compiles = False  # The next kind is compiled only if this one is refused.
        return Entrant(resolved.candidates[0])

    def _fastest(self, key: PlanKey, plan: Plan, size: int) -> Entrant:
        """Return what won the race of a compiled plan; the plan's extractor if there was none."""
        own = Entrant.of(plan.key)
        # Further passes of a stateful model would change later answers.
        stateful = self.catalogue.scope.rules.state is KeptState.KEPT
        if not self.options.race or key.outcome or stateful:
            return own
        contest = Contest.of(key, size, self._others(key))
        race = self.races.result(contest)
        if race is None or not race.had(contest.others):
            self._promoter.note(contest, lambda: size, after=RACE_AFTER)
        if race is None or race.winner == own:
            return own
        if race.winner.extractor is REFERENCE.id:
            return race.winner
        if race.winner.variant and race.winner not in contest.others:
            return own  # It was refused.
        winner = race.winner.key(key)
        other = self._served(winner)
        if other is None:
            self._promoter.note(winner, after=1)  # It may be in the plan cache.
        return own if other is None or other.refusal(size) else race.winner

    def _others(self, key: PlanKey) -> list[Entrant]:
        """Return what else may race a compiled plan, besides the model itself.

        These are other ways to finish its program, unless they were refused, and the other
        compilers that have a plan for the same layers.
        """
        compilers = [
            Entrant(other)
            for other, kind in KINDS.items()
            if kind.compiled and other is not key.extractor
            if self._served(key._replace(extractor=other))
        ]
        return [*self._variants(key), *compilers]

    def _variants(self, key: PlanKey) -> list[Entrant]:
        kind = kind_of(key.extractor)
        if not isinstance(kind, CompiledKind):
            return []
        found = [Entrant(key.extractor, each) for each in kind.variants(self.model.device)]
        with self._lock:
            return [each for each in found if each.key(key) not in self._refusals]

    def _contenders(self, contest: Contest, size: int) -> list[Plan]:
        """Return the plans for a contest, proven at a batch size, the preferred one first."""
        keys = [contest.key, *(each.key(contest.key) for each in contest.others)]
        found = [self._served(key) for key in keys]
        model = self._built(contest.key._replace(extractor=REFERENCE.id), lambda: None, Call())
        plans = [plan for plan in (*found, model) if plan is not None and not plan.dynamic]
        for plan in plans:
            prove = partial(self._builder.prover.prove_size, plan, size)
            self.compute.run(prove, Call())
        proven = [plan for plan in plans if plan.refusal(size) == ""]
        return proven if proven and proven[0].key == contest.key else []

    def _race_batch(self, plan: Plan, size: int) -> Batch:
        return ordinary_batch(self.model, size, plan.batch_key)

    def _known(self, key: PlanKey) -> Plan | None:
        with self._lock:
            plan = self._declared_plans.get(key) or _touch(self._plans, key)
            plan = plan or _touch(self._predictions, key)
            refusal = None if plan else _touch(self._refusals, key)
        if refusal is not None:
            raise type(refusal)(str(refusal))
        return plan

    def _predicted(self, key: PlanKey) -> Plan | None:
        """Return a plan for which the model need not run; None if there can't be one."""
        if key.extractor is not REFERENCE.id or key.batch_key == self.catalogue.key:
            return None
        if key.pass_spec.objective is not None or key.pass_spec.sites:
            return None  # Whether it can be differentiated or changed there must be tried.
        plan = self._builder.predicted(key.pass_spec, key.batch_key)
        if plan is not None:
            self._remember(self._predictions, key, plan, MAX_PREDICTED)
        return plan

    def _build(self, key: PlanKey, own: Batch | None) -> Plan:
        known = self._known(key)  # Another request may have built it while this one was queued.
        if known is not None:
            return known
        self._refuse_another_outcome(key)
        try:
            plan = self._builder.build(
                key.extractor, key.pass_spec, key.batch_key, key.outcome or (), example=own
            )
        except (InvalidInputError, ExtractorUnsupportedError) as refusal:
            self._refuse(key, refusal)
            raise
        self._keep(key, plan)
        return plan

    def _refuse_another_outcome(self, key: PlanKey) -> None:
        """Refuse to build a plan for another outcome if there are as many as are kept."""
        with self._lock:
            keys = {*self._declared_plans, *self._plans}
        outcomes = {
            each.outcome for each in keys if each._replace(outcome=()) == key._replace(outcome=())
        }
        if key.outcome and len(outcomes) >= MAX_OUTCOMES:
            raise ExtractorUnsupportedError(
                f"{key.extractor.name} can't serve {quoted(key.pass_spec.points)} of model "
                f"{self.model.name!r} for input for which its looks at values give "
                f"{in_words(key.outcome)}: {len(outcomes)} other outcomes have a compiled plan, "
                f"the most that are kept; {REFERENCE.name} can"
            )

    def _beside_requests(self, key: PlanKey | Contest, noted: Any) -> Iterator[None]:
        """Compile a layer set that is requested often, or race what is; see ``_compile``.

        A program that AUTO does not compile by itself, but that won a race, is only loaded.
        """
        if isinstance(key, Contest):
            try:
                yield from self._finish_variants(key)
                yield from self.races.steps(key, noted)
            finally:
                self._drop_losers(key)
        elif kind_of(key.extractor).automatic or self._is_stored(key):
            yield from self._compile(key, noted)

    def _finish_variants(self, contest: Contest) -> Iterator[None]:
        """Compile a contest's program again for each other way to finish it, if there is room."""
        for key in [each.key(contest.key) for each in contest.others if each.variant]:
            with self._lock:
                full = len(_programs(self._plans.values())) >= self._max_compiled
            if full or self._served(key) is not None:
                continue
            try:
                yield from self._compile(key, None)
            except LayertapError as error:
                _log.info("not in the race: %s", error)

    def _drop_losers(self, contest: Contest) -> None:
        """Drop the programs that were finished for a race only, and that have won none."""
        winners = self.races.winners(contest.key)
        with self._lock:
            for each in contest.others:
                if each.variant and each not in winners:
                    self._plans.pop(each.key(contest.key), None)

    def _is_stored(self, key: PlanKey) -> bool:
        kind = kind_of(key.extractor)
        if not isinstance(kind, CompiledKind):
            return False
        file = self._builder.kept.file(kind, *key[1:3])
        return file is not None and file.exists()

    def _compile(self, key: PlanKey, example: Batch | None) -> Iterator[None]:
        """Compile a layer set in steps; requests run between them.

        Args:
            key: What to compile; the outcome may be unknown.
            example: The batch of a request for it; None if it is not needed.
        """
        import_compiler()
        given = (
            None if example is None else self.compute.run(partial(self.on_device, example), Call())
        )
        if key.outcome is None:
            if given is None:
                raise AssertionError("an outcome is found out with an example")
            observe = partial(self._builder.outcomes.observe, key.pass_spec, given)
            key = key._replace(outcome=self.compute.run(observe, Call()))
            yield
        if self._known(key) is not None:
            return
        self._refuse_another_outcome(key)
        steps = self._builder.steps(key, example=given if key.outcome else None)
        try:
            plan = yield from self._stepped(steps, Call())
        except (InvalidInputError, ExtractorUnsupportedError) as refusal:
            self._refuse(key, refusal)
            raise
        self._keep(key, plan)

    def _stepped(
        self, steps: Iterator[Plan | Pause | None], call: Call
    ) -> Generator[None, None, Plan]:
        """Run the steps of a builder on a compute thread, and yield between them; return the plan.

        Where a step only waits, this waits for it, and the compute thread is free.
        """
        while not isinstance(step := self.compute.run(partial(next, steps), call), Plan):
            wait(step)
            yield
        return step

    def _keep(self, key: PlanKey, plan: Plan) -> None:
        """Keep a plan, and drop the least recently used ones if there are too many."""
        self._remember(self._plans, key, plan, self._max_plans)
        with self._lock:
            programs: set[int] = set()
            for used, each in reversed(list(self._plans.items())):
                its = _programs([each])
                if len(programs | its) > self._max_compiled:
                    del self._plans[used]
                else:
                    programs |= its

    def _refuse(self, key: PlanKey, refusal: Refusal) -> None:
        """Record a copy of a refusal, because the original's traceback keeps the batches alive."""
        self._remember(self._refusals, key, type(refusal)(str(refusal)), MAX_REFUSALS)

    def _remember(self, cache: OrderedDict[K, V], key: K, value: V, most: int) -> None:
        with self._lock:
            cache[key] = value
            while len(cache) > most:
                cache.popitem(last=False)


def _fresh(model: LoadedModel, again: Callable[[], LoadedModel]) -> LoadedModel | None:
    """Return the model with a module that never ran; None if no such module can be loaded."""
    try:
        module = again().module
        reason = "its factory returns the same module each time" if module is model.module else ""
    except LayertapError as error:
        reason = f"it can't be loaded a second time ({error})"
    if reason:
        _log.warning(
            "model %s: %s, so it may not be in its initial state for the first request",
            model.name,
            reason,
        )
        return None
    return replace(model, module=module)


def _programs(plans: Iterable[Plan]) -> set[int]:
    """Return the ids of the compiled programs of plans; several sizes may have one together."""
    return {id(plan.built) for plan in plans if plan.kind.compiled}


def _touch(cache: OrderedDict[PlanKey, V], key: PlanKey) -> V | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)
