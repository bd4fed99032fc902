"""Finds how the program of an extractor is finished so that a data set takes the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from layertap.errors import ExtractorUnsupportedError
from layertap.turns import other_pays

__all__ = ["fastest_variant"]


def fastest_variant(seconds: Callable[[str], float], variants: Iterable[str]) -> str:
    """Return the fastest variant; empty for the usual way.

    Each takes turns with the fastest so far, on the same batch; see ``layertap.turns``.

    Args:
        seconds: Runs a variant on the batch and returns how long that took.
        variants: The variants. One whose run raises ExtractorUnsupportedError is left out.
    """
    best = ""
    seconds(best)  # The first run may compile, and so may the first one of each variant.
    for variant in variants:
        try:
            seconds(variant)
            if _pays(seconds, best, variant):
                best = variant
        except ExtractorUnsupportedError:
            continue
    return best


def _pays(seconds: Callable[[str], float], first: str, other: str) -> bool:
    ratios: list[float] = []
    while (pays := other_pays(ratios)) is None:
        ratios.append(seconds(first) / max(seconds(other), 1e-9))
    return pays
