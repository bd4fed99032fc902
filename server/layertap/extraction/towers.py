"""Finds out which layers a tower of a model serves by itself.

Note [Towers]
    Each tower of a model such as CLIP has a method that runs it alone. The method is another piece
    of code than ``forward``, which may do more or less. So each tower runs alone on the inputs with
    which the whole model was measured: it serves the layers that have the same value in both. A
    request for any other layer must have the inputs of the whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from layertap.errors import InvalidInputError
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.grid import survey_grids
from layertap.extraction.layout import Layout
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.survey import HookSurvey, survey_hooks
from layertap.listing import listed
from layertap.models import Batch, BatchKey, LoadedModel, Signature, Tower

__all__ = ["check_tower", "placed_in_towers", "survey_towers"]

_MAX_NAMED = 3


def survey_towers(
    model: LoadedModel,
    seen: Sequence[tuple[Batch, HookSurvey]],
    turn: AbstractContextManager[object],
) -> dict[Tower, frozenset[CapturePoint]]:
    """Return the points that each tower serves by itself; see Note [Towers].

    Args:
        model: The model.
        seen: Batches on which the whole model ran, with what was seen and kept of each pass.
        turn: The context to hold during each pass.
    """
    found = {}
    for tower in model.signature.towers:
        points: set[CapturePoint] = set()
        for x, whole in seen:
            own = Batch({name: x[name] for name in x if name in tower.inputs})
            with turn:
                points.update(_equal(survey_hooks(model, own, keep_values=True), whole))
        found[tower] = frozenset(points)
    return found


def _equal(alone: HookSurvey, whole: HookSurvey) -> Iterator[CapturePoint]:
    for point, shape in alone.shapes.items():
        if whole.shapes.get(point) != shape:
            continue
        value, reference = alone.values.get(point), whole.values.get(point)
        # The values of inputs and of attention weights are not kept.
        if (value is None) == (reference is None) and (
            value is None or reference is None or value.equals(reference)
        ):
            yield point


def placed_in_towers(
    model: LoadedModel,
    towers: Mapping[Tower, Collection[CapturePoint]],
    specs: Mapping[CapturePoint, ValueSpec],
    turn: AbstractContextManager[object],
) -> dict[CapturePoint, ValueSpec]:
    """Return the specs of points whose grid follows the first input of their own tower.

    The grids of the whole model follow its first input, which belongs to one tower only.
    """
    found = {}
    for tower, points in towers.items():
        alone = replace(model, signature=model.signature.of_tower(tower))
        if alone.signature.main.name == model.signature.main.name:
            continue
        own = {point: specs[point] for point in points if point in specs}
        for point, geometry in survey_grids(alone, own, turn, lambda x: {}).items():
            # The mask of a request is about the positions of the model's first input.
            if geometry.layout is not Layout.UNKNOWN:
                found[point] = replace(specs[point], geometry=geometry)
    return found


def check_tower(
    signature: Signature, catalogue: Catalogue, points: Collection[CapturePoint], key: BatchKey
) -> None:
    """Check that the layers of a request run with the inputs that it has.

    Args:
        signature: The inputs that the model takes.
        catalogue: The model's catalogue.
        points: What the request captures.
        key: What the request gives.

    Raises:
        InvalidInputError: Some layers don't run; the message says which inputs to send.
    """
    given = key.names
    tower = signature.tower_of(given)
    if tower is None:
        return
    missing = [point for point in points if point not in catalogue.towers[tower]]
    if not missing:
        return
    names = [repr(catalogue.names.get(point, point.path)) for point in missing]
    needed = _needed(signature, catalogue, missing)
    wanted = [name for name in needed if name not in given]
    raise InvalidInputError(
        f"layers: {listed(names, _MAX_NAMED)} need {' and '.join(map(repr, needed))}, "
        f"but the request has only {' and '.join(map(repr, given))}; send "
        f"{' and '.join(map(repr, wanted))} too, or leave these layers out"
    )


def _needed(
    signature: Signature, catalogue: Catalogue, points: Sequence[CapturePoint]
) -> list[str]:
    """Return the inputs that a request for these points must have at least."""
    for tower, own in catalogue.towers.items():
        if all(point in own for point in points):
            return [spec.name for spec in signature.of_tower(tower).required]
    return [spec.name for spec in signature.required]
