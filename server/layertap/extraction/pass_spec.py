"""What one forward pass must do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from layertap.extraction.points import CapturePoint, PointKind
from layertap.objective import Measure

__all__ = ["ObjectiveSpec", "PassSpec", "TermSpec"]


@dataclass(frozen=True, slots=True)
class TermSpec:
    """One term of an objective, apart from the numbers that a request gives.

    Attributes:
        point: The value that it is made from.
        measure: How an item's number is made from the item's part of the value.
    """

    point: CapturePoint
    measure: Measure


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """The number of each item whose gradients a pass computes: a weighted sum of terms."""

    terms: tuple[TermSpec, ...]


@dataclass(frozen=True, slots=True)
class PassSpec:
    """Everything that one forward pass must do, apart from its input.

    Two requests may use one plan, one stored program or one shared pass only if their specs are
    equal. So the identity of a plan, program or shared pass always includes the whole spec.

    Attributes:
        points: The distinct values to capture, in execution order.
        objective: What the gradients among the points are the gradients of; None without any.
    """

    points: tuple[CapturePoint, ...]
    objective: ObjectiveSpec | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Computed once: each request looks up plans several times, and there can be many points.
        compared = tuple(getattr(self, each.name) for each in fields(self) if each.compare)
        object.__setattr__(self, "_hash", hash(compared))

    def __hash__(self) -> int:
        return self._hash

    @property
    def values(self) -> tuple[CapturePoint, ...]:
        """The values of layers that the pass needs: captured, differentiated, or the objective."""
        if self.objective is None:
            return self.points
        points = [point.value for point in self.points if point.kind is PointKind.MODULE]
        return tuple(dict.fromkeys((*points, *(term.point for term in self.objective.terms))))

    @property
    def modules_only(self) -> bool:
        """Whether hooks can see every point: none of them is a node of the symbolic graph."""
        return all(point.kind is PointKind.MODULE for point in self.points)
