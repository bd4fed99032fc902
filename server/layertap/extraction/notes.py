"""Writes what people should know of a model that was measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from layertap.extraction.catalogue import LayerEntry
from layertap.extraction.kinds.base import CompiledKind
from layertap.extraction.kinds.registry import KINDS, REFERENCE
from layertap.extraction.measurement import Measurement
from layertap.extraction.points import CapturePoint
from layertap.listing import listed
from layertap.models import LoadedModel
from layertap.selection import Capture

__all__ = ["notes_of"]

_MAX_NAMED = 5
"""Layers that a note lists by name."""


def notes_of(findings: Measurement, entries: Mapping[str, LayerEntry]) -> Iterator[str]:
    """Yield the notes of a model, each a sentence without its full stop."""
    ungiven = _ungiven_arguments(findings.model)
    if ungiven:
        yield (
            f"these arguments of its forward are never given and keep their defaults: "
            f"{', '.join(ungiven)}"
        )
    if findings.model.signature.towers:
        alone = (
            " and ".join(map(repr, findings.model.signature.of_tower(tower).key.names))
            for tower in findings.model.signature.towers
        )
        yield (
            f"a request with only {', or only '.join(alone)} runs only the layers that depend on "
            f"it; a request for others needs the other inputs too"
        )
    looked = _first(entries, findings.looks.looked)
    if looked:
        yield (
            f"its forward branches on values of its input before layer {looked!r}, so other input "
            f"may take another branch there; {_branches(findings)}"
        )
    varying = sorted(findings.varying)
    if varying:
        yield (
            f"some layers run only for some inputs, and a request for one that does not run fails: "
            f"{listed(map(repr, varying), _MAX_NAMED)}"
        )
    random = _first(entries, findings.random)
    if random:
        yield (
            f"its forward draws random numbers, so from layer {random!r} on, two requests with the "
            f"same input give different values"
        )


def _branches(findings: Measurement) -> str:
    """Say how layers after a branch are served."""
    compiled = " and ".join(
        kind.name
        for kind in KINDS.values()
        if isinstance(kind, CompiledKind) and kind.automatic and kind.follows_branches
    )
    if findings.looks.looked.keys() <= findings.looks.unguarded.keys():
        return f"{compiled} serves no layer from there on"
    return (
        f"{compiled} serves layers from there on by one compiled plan for each way that the code "
        f"can go, and {REFERENCE.name} serves the ways that have no plan"
    )


def _first(entries: Mapping[str, LayerEntry], points: Collection[CapturePoint]) -> str:
    """Return the first layer whose output is one of the points; empty for none."""
    names = (n for n, entry in entries.items() if entry.points.get(Capture.OUTPUT) in points)
    return next(names, "")


def _ungiven_arguments(model: LoadedModel) -> list[str]:
    """Return the names of the arguments of ``forward`` to which no input belongs."""
    if model.arguments.adapter is not None:
        return []
    given = {spec.name.split(".")[0] for spec in model.signature.inputs}
    ungiven = [p.name for p in model.arguments.parameters if p.name not in given and not p.rest]
    # A single input may have another name than its parameter.
    unnamed = len(given) == 1 and len(ungiven) == len(model.arguments.parameters)
    return ungiven[1:] if unnamed else ungiven
