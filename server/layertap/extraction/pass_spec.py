"""What one forward pass must do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from layertap.extraction.points import CapturePoint, PointKind
from layertap.objective import Measure

__all__ = ["ObjectiveSpec", "PassSpec", "SiteSpec", "TermSpec"]


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
class SiteSpec:
    """A value that an intervention changes, apart from the numbers that a request gives.

    Attributes:
        intervention: The index of the intervention in the request.
        point: The value.
        skips: Whether it is replaced by what the module was given.
    """

    intervention: int
    point: CapturePoint
    skips: bool = False


@dataclass(frozen=True, slots=True)
class PassSpec:
    """Everything that one forward pass must do, apart from its input.

    Two requests may use one plan, one stored program or one shared pass only if their specs are
    equal. So the identity of a plan, program or shared pass always includes the whole spec.

    Attributes:
        points: The distinct values to capture, in execution order.
        objective: What the gradients among the points are the gradients of; None without any.
        sites: What interventions change, in their order.
        sets: The number of sets of interventions, 1 without sets.
    """

    points: tuple[CapturePoint, ...]
    objective: ObjectiveSpec | None = None
    sites: tuple[SiteSpec, ...] = ()
    sets: int = 1
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Computed once: each request looks up plans several times, and there can be many points.
        compared = tuple(getattr(self, each.name) for each in fields(self) if each.compare)
        object.__setattr__(self, "_hash", hash(compared))

    def __hash__(self) -> int:
        return self._hash

    @property
    def values(self) -> tuple[CapturePoint, ...]:
        """The values of layers that the pass needs: captured, differentiated, or the objective.

        Also those that it changes.
        """
        if self.objective is None and not self.sites:
            return self.points
        return tuple(dict.fromkeys((*self.asked, *(site.point for site in self.sites))))

    @property
    def asked(self) -> tuple[CapturePoint, ...]:
        """The values of layers that are captured, differentiated, or the objective."""
        points = [point.value for point in self.points if point.kind is PointKind.MODULE]
        terms = self.objective.terms if self.objective else ()
        return tuple(dict.fromkeys((*points, *(term.point for term in terms))))

    @property
    def without_sites(self) -> PassSpec:
        """What the pass must do apart from interventions."""
        points = (point for point in self.points if point.kind is not PointKind.INTERVENTIONS)
        return PassSpec(tuple(points), self.objective)

    @property
    def modules_only(self) -> bool:
        """Whether hooks can see every point: none of them is a node of the symbolic graph."""
        return all(point.kind is PointKind.MODULE for point in self.points)
