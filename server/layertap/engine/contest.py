"""What a race of extractors is about, and its result."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layertap.extraction.plan import PlanKey
from layertap.selection import Extractor

__all__ = ["Contest", "Entrant", "Race"]


class Entrant(NamedTuple):
    """What takes part in a race.

    Attributes:
        extractor: The extractor.
        variant: How its program is finished; empty for the usual way.
    """

    extractor: Extractor
    variant: str = ""

    @classmethod
    def of(cls, key: PlanKey) -> Entrant:
        """Return what runs a plan."""
        return cls(key.extractor, key.variant)

    def key(self, other: PlanKey) -> PlanKey:
        """Return the key of this entrant's plan for what another plan is for."""
        return other._replace(extractor=self.extractor, variant=self.variant)

    def __str__(self) -> str:
        """Return it in words."""
        name = self.extractor.name
        return f"{name} with {self.variant.replace('_', ' ')}" if self.variant else name


class Contest(NamedTuple):
    """What a race is about.

    Attributes:
        key: The compiled plan that AUTO prefers.
        bucket: The largest batch size of the bucket.
        others: The other compilers that have a plan for the same layers, and the other ways to
            finish the program of this one.
    """

    key: PlanKey
    bucket: int
    others: tuple[Entrant, ...] = ()

    @classmethod
    def of(cls, key: PlanKey, size: int, others: Sequence[Entrant] = ()) -> Contest:
        """Return the contest for a plan's requests with so many items."""
        return cls(key, 1 << (size - 1).bit_length(), tuple(others))


@dataclass(frozen=True, slots=True)
class Race:
    """The result of a race.

    Attributes:
        first: What AUTO prefers without a race.
        winner: What serves the requests from now on.
        ratios: For each other entrant, how many times as fast as the first one it was, by turn.
        where: The layers and the number of items, for people.
        refused: Other ways to finish the program that failed their proof.
    """

    first: Entrant
    winner: Entrant
    ratios: Mapping[Entrant, Sequence[float]]
    where: str
    refused: frozenset[Entrant] = frozenset()

    def had(self, entrants: Iterable[Entrant]) -> bool:
        """Return whether all of these took part, or were refused."""
        return {self.first, *self.ratios, *self.refused} >= set(entrants)

    def __str__(self) -> str:
        """Return the result in words."""
        turns = len(next(iter(self.ratios.values())))
        rates = {self.first: [1.0] * turns, **self.ratios}
        own, beside = rates.pop(self.winner), []
        for other, theirs in rates.items():
            factors = [mine / its for mine, its in zip(own, theirs, strict=True)]
            beside.append(
                f"{statistics.median(factors):.2f} times as fast as {other} "
                f"({min(factors):.2f} to {max(factors):.2f} in {turns} turns)"
            )
        return f"AUTO, {self.where}: {self.winner} was {' and '.join(beside)}"
