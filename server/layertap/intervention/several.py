"""The interventions of a request: their limits, and how callers give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layertap.errors import InvalidInputError
from layertap.intervention.intervention import Intervention

__all__ = [
    "MAX_INDEXES",
    "MAX_INTERVENTIONS",
    "InterventionsLike",
    "check_count",
    "check_interventions",
    "parse_interventions",
]

MAX_INTERVENTIONS = 1024
"""Maximum number of interventions of a request."""

MAX_INDEXES = 1 << 16
"""Maximum number of indices and ranges of all interventions of a request."""

InterventionLike = Intervention | str


InterventionsLike = (
    InterventionLike | Sequence[InterventionLike] | Sequence[Sequence[InterventionLike]]
)
"""An intervention or its text; a list of these; or a list of such lists, one for each set."""


def parse_interventions(given: InterventionsLike | None) -> tuple[Intervention, ...]:
    """Convert a caller's interventions, and number their sets if there are several.

    Raises:
        InvalidInputError: If there are too many; or a text can't be read, see ``parse``.
    """
    if given is None:
        return ()
    if isinstance(given, Intervention | str):
        given = [given]
    members: list[Any] = list(given)
    flat: list[Intervention] = []
    sets = [each for each in members if isinstance(each, Sequence) and not isinstance(each, str)]
    if sets and len(sets) < len(members):
        raise InvalidInputError(
            "interventions: got interventions beside lists of them, expected one or the other"
        )
    for number, member in enumerate(members, 1):
        several = list(member) if isinstance(member, Sequence) and sets else [member]
        if sets and not several:
            raise InvalidInputError(
                f"interventions: set {number}: got none, expected at least one; scaling by 1 "
                f"changes nothing"
            )
        for each in several:
            if not isinstance(each, Intervention | str):
                raise InvalidInputError(
                    f"interventions: got {type(each).__name__}, expected an Intervention or a text"
                )
            read = Intervention.parse(each) if isinstance(each, str) else each
            flat.append(replace(read, set=number) if sets else read)
            check_count(len(flat))
    return check_interventions(flat)


def check_count(count: int) -> None:
    """Raise InvalidInputError for too many interventions."""
    if count > MAX_INTERVENTIONS:
        raise InvalidInputError(
            f"interventions: got more than {MAX_INTERVENTIONS}, the most allowed"
        )


def check_interventions(given: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Return the interventions of a request.

    Raises:
        InvalidInputError: If they have too many indices together, or a set is missing.
    """
    check_count(len(given))
    if sum(len(part.indexes) for each in given for part in each.parts) > MAX_INDEXES:
        raise InvalidInputError(
            f"interventions: got more than {MAX_INDEXES} indices and ranges together; a range is "
            f"shorter than its indices"
        )
    sets = {each.set for each in given} - {0}
    missing = set(range(1, max(sets, default=0) + 1)) - sets
    if missing:
        raise InvalidInputError(
            f"interventions: got no intervention of set {min(missing)}, expected sets from 1 to "
            f"{max(sets)}"
        )
    return tuple(given)
