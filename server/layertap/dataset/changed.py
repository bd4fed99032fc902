"""What interventions changed in the items of a data set, added up over batches and shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layertap.intervention import REPORT_PREFIX

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Changed", "added_up", "changed_from", "changed_of"]


@dataclass(frozen=True, slots=True)
class Changed:
    """What one intervention changed.

    Attributes:
        elements: The elements that it selected, of all items.
        changed: Those that got another value.
    """

    elements: int
    changed: int


def changed_of(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> tuple[Changed, ...]:
    """Return what each intervention changed, from a reply; none if there were no interventions."""
    if f"{REPORT_PREFIX}elements" not in arrays:
        return ()
    counts = (arrays[f"{REPORT_PREFIX}{name}"].tolist() for name in ("elements", "changed"))
    return tuple(map(Changed, *counts))


def changed_from(stored: Iterable[Mapping[str, int]]) -> tuple[Changed, ...]:
    """Return what is in a manifest or a journal."""
    return tuple(Changed(**each) for each in stored)


def added_up(several: Iterable[Sequence[Changed]]) -> tuple[Changed, ...]:
    """Return the sums for each intervention; parts without any item have none."""
    parts = [each for each in several if each]
    return tuple(
        Changed(sum(each.elements for each in rows), sum(each.changed for each in rows))
        for rows in zip(*parts, strict=True)
    )
