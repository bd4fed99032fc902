"""Takes the arrays out of selections, which are kept with plans and compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from layertap.extraction.sweeps import SentBaseline
from layertap.projection import Projection, SentProjection
from layertap.selection import LayerSelection, Sweep

__all__ = ["SentArrays", "apart", "has_arrays"]


@dataclass(frozen=True, slots=True)
class SentArrays:
    """The arrays of a request's selections, which name them by number.

    Attributes:
        baselines: The baselines of integrated gradients.
        projections: The projections.
    """

    baselines: list[np.ndarray[Any, np.dtype[Any]]] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)


def has_arrays(selection: LayerSelection) -> bool:
    """Return whether a selection has arrays."""
    return isinstance(selection.sweep.baseline, np.ndarray) or selection.projection is not None


def apart(selections: Sequence[LayerSelection]) -> tuple[tuple[LayerSelection, ...], SentArrays]:
    """Return selections that have numbers in place of arrays, and these arrays."""
    arrays = SentArrays()
    kept = tuple(
        replace(
            selection,
            sweep=_sweep(selection, arrays.baselines),
            projection=_projection(selection, arrays.projections),
        )
        for selection in selections
    )
    return kept, arrays


def _sweep(selection: LayerSelection, baselines: list[np.ndarray[Any, np.dtype[Any]]]) -> Sweep:
    sweep = selection.sweep
    if not isinstance(sweep.baseline, np.ndarray):
        return sweep
    if not selection.method.sweeps:
        return replace(sweep, baseline=0.0)
    baselines.append(sweep.baseline)
    number = len(baselines) - 1
    return SentBaseline(sweep.steps, sweep.rule, 0.0, sweep.noise, sweep.seed, number)


def _projection(selection: LayerSelection, projections: list[Projection]) -> SentProjection | None:
    given = selection.projection
    if not isinstance(given, Projection):
        return given
    if given not in projections:  # Compared by identity: several layers may share one.
        projections.append(given)
    return SentProjection(projections.index(given))
