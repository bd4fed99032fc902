"""Plans, and the results of their proofs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.base import ExtractorKind
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.models import BatchKey
from layertap.selection import Extractor

__all__ = ["Findings", "Plan", "PlanKey", "quoted"]


class PlanKey(NamedTuple):
    """What a plan is for; plans with equal keys are interchangeable.

    Attributes:
        extractor: Which extractor runs it; never AUTO.
        pass_spec: What its pass does.
        batch_key: What its batches have in common.
        outcome: What the looks of its passes give, for a compiled plan; see ``guards``. None where
            that is not known yet, which holds for no plan.
    """

    extractor: Extractor
    pass_spec: PassSpec
    batch_key: BatchKey
    outcome: Outcome | None = ()


class Findings:
    """What is learnt about one plan after it was built. Safe to share between threads.

    Several compute threads may find out the same thing at once. A finding against the plan stands:
    a later one in its favour does not replace it.

    Args:
        proven: Batch sizes at which the plan was compared with the oracle and was right.
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
        """Record that a forward pass gave a value of another shape than the specs predict."""
        with self._lock:
            self._dynamic = True

    def refusal(self, size: int) -> str | None:
        """Return why the plan can't serve a batch size; empty if it can, None if not known yet."""
        with self._lock:
            return self._sizes.get(size)

    def found_size(self, size: int, reason: str) -> str:
        """Record why the plan can't serve a batch size, empty if it can; return what now stands."""
        with self._lock:
            self._sizes[size] = self._sizes.get(size) or reason
            return self._sizes[size]

    @property
    def alone(self) -> bool | None:
        """Whether each request needs its own forward pass; None until this was tested."""
        with self._lock:
            return self._alone

    def found_alone(self, *, alone: bool) -> None:
        """Record whether each request needs a forward pass of its own."""
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
class Plan:
    """A proven way to do what a pass spec asks, for batches of one key.

    Attributes:
        kind: Which kind of extractor it is.
        pass_spec: What its pass does.
        batch_key: What its batches have in common.
        specs: The type and shape of each point's value, in the order of the points.
        built: The extractor itself; it runs on a compute thread only.
        findings: What was learnt about the plan since it was built.
        outcome: What the looks of each pass that it stands for give; empty if there are none, or
            if it runs the model's own code. It must not be given a batch of another outcome.
    """

    kind: ExtractorKind
    pass_spec: PassSpec
    batch_key: BatchKey
    specs: tuple[ValueSpec, ...]
    built: BuiltExtractor
    findings: Findings
    outcome: Outcome = ()

    @property
    def key(self) -> PlanKey:
        """What the plan is for."""
        return PlanKey(self.kind.id, self.pass_spec, self.batch_key, self.outcome)

    @property
    def extractor(self) -> Extractor:
        """Which extractor it is; never AUTO."""
        return self.kind.id

    @property
    def points(self) -> tuple[CapturePoint, ...]:
        """What it captures."""
        return self.pass_spec.points

    @property
    def dynamic(self) -> bool:
        """Whether some value's shape depends on more than the batch size.

        Then the specs predict nothing.
        """
        return self.findings.dynamic or any(spec.dynamic for spec in self.specs)

    def refusal(self, size: int) -> str | None:
        """Return why it can't serve a batch size; empty if it can, None if not known yet."""
        return "" if self.kind.reference else self.findings.refusal(size)


def quoted(points: Sequence[CapturePoint]) -> str:
    """Return the paths of points as an error quotes them."""
    return ", ".join(repr(point.path) for point in points)
