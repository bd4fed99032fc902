"""A loaded model and what was measured of it before it serves: what a host's parts work with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.errors import LayertapError
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.claims import kept_claims
from layertap.extraction.cpu_twin import with_twin
from layertap.extraction.kept_catalogue import CatalogueFile
from layertap.extraction.measure import measure_with_graph
from layertap.extraction.passes import KeptState, PassScope
from layertap.extraction.plan import Plan
from layertap.extraction.plan_builder import PlanBuilder
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.taps import Taps
from layertap.extraction.trial import tried
from layertap.listing import listed
from layertap.malloc import return_memory
from layertap.models import Batch, LoadedModel
from layertap.models.compiler_import import import_compiler

__all__ = ["MeasuredModel"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A loaded model, its catalogue, and what builds its plans.

    Attributes:
        model: The model.
        compute: The threads that run it.
        catalogue: Its layers, with their shapes and what each extractor can do.
        taps: The hooks of its modules.
        builder: Builds and proves its plans.
        fingerprint: The digest of its modules and weights; empty if it wasn't needed.
        facts: The digest of what the catalogue was measured with; empty if it is not stored.
    """

    model: LoadedModel
    compute: ComputeThreads
    catalogue: Catalogue
    taps: Taps
    builder: PlanBuilder
    fingerprint: str
    facts: str

    @classmethod
    def measure(
        cls,
        model: LoadedModel,
        compute: ComputeThreads,
        cache: PlanCache | None,
        call: Call,
        again: Callable[[], LoadedModel] | None = None,
    ) -> MeasuredModel:
        """Measure a model on a compute thread, or read what is kept of an earlier measurement.

        Args:
            model: The model.
            compute: The threads that run it.
            cache: Stores catalogues and plans.
            call: Cancels the measuring.
            again: Loads the model once more. If the model is stateful, it is served by a module
                that never ran, and the one that was measured proves its plans.

        Raises:
            ModelLoadError: If the model can't run on sample input of its own signature.
            CancelledError: If the call was cancelled.
        """
        scope = compute.run(lambda: PassScope(model.module), call)
        model = compute.run(lambda: with_twin(tried(model, scope)), call)
        taps = Taps(model.module)
        catalogue, fingerprint, facts = _catalogue(model, compute, scope, cache, call)
        proving = None
        if again is not None and scope.rules.state is KeptState.KEPT:
            fresh = compute.run(lambda: _fresh(model, again), call)
            if fresh is not None:
                proving = model, taps
                model, taps = fresh, Taps(fresh.module)
        _log_findings(model, catalogue)
        builder = PlanBuilder(
            model,
            taps,
            catalogue,
            cache,
            proving=proving,
            known_fingerprint=fingerprint,
            facts=facts,
        )
        return cls(model, compute, catalogue, taps, builder, fingerprint, facts)

    @property
    def is_stateful(self) -> bool:
        """Whether a pass changes the answers of later ones."""
        return self.catalogue.scope.rules.state is KeptState.KEPT

    def names_of(self, plan: Plan) -> str:
        """Return the names of a plan's layers, for people."""
        return listed(map(self.catalogue.name_of, plan.points))

    def on_device(self, x: Batch) -> Batch:
        """Return a batch on the model's device, in the model's dtypes.

        A copy from page-locked memory is only launched here; PyTorch's allocator keeps that memory
        until the copy is done.
        """
        device = self.model.device
        return self.model.signature.converted(
            x.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))
        )


def _catalogue(
    model: LoadedModel,
    compute: ComputeThreads,
    scope: PassScope,
    cache: PlanCache | None,
    call: Call,
) -> tuple[Catalogue, str, str]:
    """Return a model's catalogue, kept or measured, and the digests of the model and the file."""
    if cache is None or not cache.catalogues:
        return _measured(model, compute, scope, call), "", ""
    file = compute.run(lambda: CatalogueFile(cache, model, scope), call)
    kept = compute.run(file.read, call)
    if kept is not None:
        if kept.looks.looked:
            import_compiler()  # Its requests watch passes.
        return kept, file.fingerprint, file.facts
    catalogue = _measured(model, compute, scope, call)
    stored = compute.run(lambda: file.store(catalogue), call)
    return catalogue, file.fingerprint, file.facts if stored else ""


def _measured(
    model: LoadedModel, compute: ComputeThreads, scope: PassScope, call: Call
) -> Catalogue:
    """Return a model's catalogue, with all its claims tested.

    This is done in steps, and requests for other models run between them.
    """
    import_compiler()  # Not on a compute thread, where requests would wait for it.
    measured = compute.run(lambda: measure_with_graph(model, scope), call)
    steps = kept_claims(model, *measured)
    catalogue: Catalogue | None = None
    while catalogue is None:
        return_memory()
        catalogue = compute.run(partial(next, steps), call)
    return_memory()
    return catalogue


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


def _log_findings(model: LoadedModel, catalogue: Catalogue) -> None:
    for note in catalogue.scope.rules.notes:
        _log.warning("model %s: %s", model.name, note)
    if catalogue.non_finite:
        _log.warning(
            "model %s: layer %r returns NaN or infinity for random input in [0, 1)",
            model.name, catalogue.non_finite,
        )  # fmt: skip
    for note in catalogue.notes:
        _log.info("model %s: %s", model.name, note)
