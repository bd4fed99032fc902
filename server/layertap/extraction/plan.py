"""Plans, and the results of their proofs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.edited import BoundChanges, ChangedGradients, EditedExtractor
from layertap.extraction.gradients import BoundGradients, GradientExtractor
from layertap.extraction.guards import Outcome
from layertap.extraction.interventions import Changes, Site
from layertap.extraction.kinds.base import ExtractorKind
from layertap.extraction.operands import Operands
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.listing import listed
from layertap.models import BatchKey
from layertap.selection import Extractor

__all__ = ["EditFacts", "Findings", "GradientFacts", "Plan", "PlanKey", "quoted"]


class PlanKey(NamedTuple):
    """What a plan is for; plans with equal keys are interchangeable.

    Attributes:
        extractor: Which extractor runs it; never AUTO.
        pass_spec: What its pass does.
        batch_key: What its batches have in common.
        outcome: The outcome of its passes, for a compiled plan; see ``guards``. None if it is not
            known yet; a plan's own key always has one.
        variant: How its program is finished (see ``CompiledKind.variants``); empty as usual.
    """

    extractor: Extractor
    pass_spec: PassSpec
    batch_key: BatchKey
    outcome: Outcome | None = ()
    variant: str = ""


class Findings:
    """What is learnt about one plan after it was built. Safe to share between threads.

    Several compute threads may test the same thing at once. A finding against the plan is final:
    a later finding in its favour does not replace it.

    Args:
        proven: Batch sizes at which the plan's values were compared with the reference and right.
        dynamic: Whether some value's shape is known to depend on more than the batch size.
    """

    def __init__(self, proven: Iterable[int] = (), *, dynamic: bool = False) -> None:
        self._lock = threading.Lock()
        self._sizes = dict.fromkeys(proven, "")
        self._dynamic = dynamic
        self._alone: bool | None = None
        self._shared: dict[int, bool] = {}

    @property
    def dynamic(self) -> bool:
        """Whether some value's shape depends on more than the batch size."""
        with self._lock:
            return self._dynamic

    def found_dynamic(self) -> None:
        """Record that a forward pass gave a value whose shape is not the predicted one."""
        with self._lock:
            self._dynamic = True

    def refusal(self, size: int) -> str | None:
        """Return why the plan can't serve a batch size; empty if it can, None if not known yet."""
        with self._lock:
            return self._sizes.get(size)

    def found_size(self, size: int, reason: str) -> str:
        """Record why the plan can't serve a batch size, empty if it can; return the result."""
        with self._lock:
            self._sizes[size] = self._sizes.get(size) or reason
            return self._sizes[size]

    @property
    def alone(self) -> bool | None:
        """Whether each request needs its own forward pass; None if this was not tested yet."""
        with self._lock:
            return self._alone

    def found_alone(self, *, alone: bool) -> None:
        """Record whether each request needs its own forward pass."""
        with self._lock:
            self._alone = bool(self._alone) or alone

    def shares(self, items: int) -> bool | None:
        """Return whether requests may share a pass of that many items; None if not known yet."""
        with self._lock:
            return False if self._alone else self._shared.get(items)

    def found_shares(self, items: int, *, shares: bool) -> None:
        """Record whether requests may share a pass of that many items in all."""
        with self._lock:
            self._shared[items] = self._shared.get(items, True) and shares


@dataclass(frozen=True, eq=False)
class GradientFacts:
    """What a plan with gradients knows besides the types and shapes of its points.

    Attributes:
        extractor: The plan's extractor, which takes operands.
        dynamic: Whether the shape of a value of the objective depends on more than the batch size,
            so that operands can be checked only when it is there.
        nbytes: Bytes that a pass of one item needs for its gradients, and bytes for each further
            item: what autograd keeps, and the gradients.
        values: A plan for the values themselves, whose findings tell whether the items of a batch
            influence each other.
    """

    extractor: GradientExtractor
    dynamic: bool
    nbytes: tuple[int, int]
    values: Plan

    def bytes_for(self, size: int) -> int:
        """Return the bytes that a request of some items needs besides its reply."""
        first, further = self.nbytes
        return first + (self.extractor.rows_for(size) - 1) * further


@dataclass(frozen=True, eq=False)
class EditFacts:
    """What a plan with interventions knows besides the types and shapes of its points.

    Attributes:
        extractor: The plan's extractor, which takes interventions.
        sites: The values that interventions change.
        values: A plan for the values themselves, whose findings tell whether the items of a batch
            influence each other.
        row_bytes: Bytes that a row of a pass needs besides its reply.
    """

    extractor: EditedExtractor | GradientExtractor
    sites: tuple[Site, ...]
    values: Plan
    row_bytes: int

    def bytes_for(self, size: int) -> int:
        """Return the bytes that a request of some items needs besides its reply."""
        rows = size
        if isinstance(self.extractor, EditedExtractor):
            rows = max(size, min(self.extractor.most_rows, size * self.extractor.sets))
        return rows * self.row_bytes


@dataclass(frozen=True, eq=False)
class Plan:
    """A proven way to run a pass spec, for all batches of one key.

    Attributes:
        kind: The extractor kind that runs it.
        pass_spec: What its pass does.
        batch_key: What its batches have in common.
        specs: The dtype and shape of each point's value, in the order of the points.
        built: The extractor itself, which may run on compute threads only.
        findings: What was learnt about the plan since it was built.
        outcome: The outcome of every pass for which the plan may run; empty if there are no looks,
            or if it runs the model's own code. It must not run for a batch of another outcome.
        predicted: Whether the specs were computed from the expressions of the catalogue, and no
            pass at these sizes has measured them.
        gradients: What a plan with gradients knows besides; None for any other plan.
        edits: What a plan with interventions knows besides; None for any other plan.
        variant: How its program is finished; empty for the usual way.
    """

    kind: ExtractorKind
    pass_spec: PassSpec
    batch_key: BatchKey
    specs: tuple[ValueSpec, ...]
    built: BuiltExtractor
    findings: Findings
    outcome: Outcome = ()
    predicted: bool = False
    gradients: GradientFacts | None = None
    edits: EditFacts | None = None
    variant: str = ""

    def bound(self, operands: Operands | None, changes: Changes | None = None) -> BuiltExtractor:
        """Return what runs a request: the plan's extractor, with the request's operands if any.

        Args:
            operands: The operands of a request with an objective, which were checked.
            changes: The interventions of a request, which were checked.
        """
        if self.edits is not None and changes is not None:
            alone = self.edits.values.findings.alone is not False
            extractor = self.edits.extractor
            if isinstance(extractor, EditedExtractor):
                return BoundChanges(extractor, changes, alone)
            if operands is None:
                raise AssertionError("a plan with gradients has an objective with operands")
            return ChangedGradients(extractor, operands, changes, alone)
        if self.gradients is None or operands is None:
            return self.built
        alone = self.gradients.values.findings.alone is not False
        return BoundGradients(self.gradients.extractor, operands, alone)

    @property
    def key(self) -> PlanKey:
        """What the plan is for."""
        return PlanKey(self.kind.id, self.pass_spec, self.batch_key, self.outcome, self.variant)

    @property
    def extractor(self) -> Extractor:
        """The extractor that runs it; never AUTO."""
        return self.kind.id

    @property
    def points(self) -> tuple[CapturePoint, ...]:
        """The points that it captures."""
        return self.pass_spec.points

    @property
    def dynamic(self) -> bool:
        """Whether some value's shape depends on more than the batch size.

        If so, the specs predict no shapes.
        """
        return self.findings.dynamic or any(spec.dynamic for spec in self.specs)

    def refusal(self, size: int) -> str | None:
        """Return why the plan can't serve a batch size; empty if it can, None if not known yet."""
        return "" if self.kind.reference else self.findings.refusal(size)


def quoted(points: Sequence[CapturePoint]) -> str:
    """Return the paths of the first points, quoted for an error message."""
    return listed(dict.fromkeys(repr(point.path) for point in points))
