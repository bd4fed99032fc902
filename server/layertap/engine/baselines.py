"""Takes the tensors out of selections, which are kept with plans and compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
        if not isinstance(sweep.baseline, np.ndarray):
            kept.append(selection)
        elif not selection.method.sweeps:
            kept.append(replace(selection, sweep=replace(sweep, baseline=0.0)))
        else:
            given = SentBaseline(sweep.steps, sweep.rule, 0.0, sweep.noise, sweep.seed, len(arrays))
            arrays.append(sweep.baseline)
            kept.append(replace(selection, sweep=given))
    return tuple(kept), tuple(arrays)
