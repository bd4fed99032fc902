"""Takes the tensors out of selections, which are kept with plans and compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from layertap.extraction.sweeps import SentBaseline
from layertap.selection import LayerSelection

__all__ = ["apart"]


def apart(
    selections: Sequence[LayerSelection],
) -> tuple[tuple[LayerSelection, ...], tuple[np.ndarray[Any, np.dtype[Any]], ...]]:
    """Return selections whose baselines are numbers of arrays, and these arrays."""
    arrays: list[np.ndarray[Any, np.dtype[Any]]] = []
    kept = []
    for selection in selections:
        sweep = selection.sweep
        if selection.method.sweeps and not isinstance(sweep.baseline, Real):
            given = SentBaseline(sweep.steps, sweep.rule, 0.0, sweep.noise, sweep.seed, len(arrays))
            arrays.append(sweep.baseline)
            selection = replace(selection, sweep=given)  # noqa: PLW2901 - without the array
        elif not isinstance(sweep.baseline, Real):
            selection = replace(selection, sweep=replace(sweep, baseline=0.0))  # noqa: PLW2901
        kept.append(selection)
    return tuple(kept), tuple(arrays)
