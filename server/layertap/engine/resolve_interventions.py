"""Resolves the layers of interventions, and checks what can be known of them before any compute."""

from __future__ import annotations

from collections.abc import Sequence

from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayerNotFoundError
from layertap.extraction.attention import UNUSED
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.interventions import REPORTS
from layertap.extraction.kinds.registry import KINDS, REFERENCE
from layertap.extraction.pass_spec import SiteSpec
from layertap.extraction.passes import KeptState
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.script_taps import programs
from layertap.intervention import MAX_INTERVENTIONS, SiteKey
from layertap.models import LoadedModel
from layertap.selection import Capture, Extractor, is_glob

__all__ = ["check_behind", "check_changeable", "reported_changes", "resolve_sites"]


def check_changeable(model: LoadedModel, catalogue: Catalogue, extractor: Extractor) -> None:
    """Check that interventions on a model are possible at all.

    Raises:
        ExtractorUnsupportedError: If they aren't, or the extractor can't apply any.
    """
    able = [kind.name for kind in KINDS.values() if kind.edits]
    if extractor is not Extractor.AUTO and not KINDS[extractor].edits:
        raise ExtractorUnsupportedError(
            f"{extractor.name} can't apply interventions; extractors that can: {', '.join(able)}"
        )
    if catalogue.scope.rules.state is KeptState.KEPT:
        raise ExtractorUnsupportedError(
            f"interventions on model {model.name!r}: the model keeps state that can't be restored "
            f"after each pass, so a change would show in later requests"
        )


def resolve_sites(
    model: LoadedModel, catalogue: Catalogue, keys: Sequence[SiteKey]
) -> tuple[SiteSpec, ...]:
    """Return the values that interventions change, in the order of the interventions.

    Raises:
        LayerNotFoundError: If a name or glob matches nothing.
        ExtractorUnsupportedError: If a value can't be changed.
        InvalidInputError: If there are too many values.
    """
    sites = []
    for index, key in enumerate(keys):
        for entry in _matches(model, catalogue, key):
            sites.append(SiteSpec(index, entry.points[key.capture], key.skips))
            if len(sites) > MAX_INTERVENTIONS:
                raise InvalidInputError(
                    f"interventions: got more than {MAX_INTERVENTIONS} layers together, the most "
                    f"allowed"
                )
    return tuple(sites)


def _matches(model: LoadedModel, catalogue: Catalogue, key: SiteKey) -> list[LayerEntry]:
    if key.layer in catalogue.entries or not is_glob(key.layer):
        entry = catalogue.entry(key.layer) if key.layer else _result(catalogue)
        reason = _obstacle(model, entry, key.capture)
        if reason:
            raise ExtractorUnsupportedError(
                f"interventions: the {key.capture} of layer {entry.name!r} can't be changed: "
                f"{reason}"
            )
        return [entry]
    found = [
        entry for entry in catalogue.match(key.layer) if not _obstacle(model, entry, key.capture)
    ]
    if not found:
        raise LayerNotFoundError(
            f"interventions: glob {key.layer!r} matches no layer whose {key.capture} can be "
            f"changed; `*` stays within a path's component, `**` crosses them"
        )
    return found


def _result(catalogue: Catalogue) -> LayerEntry:
    found = [entry for entry in catalogue if entry.is_result]
    if not found:
        raise LayerNotFoundError("interventions: the model returns no tensor; name a layer")
    return found[0]


def _obstacle(model: LoadedModel, entry: LayerEntry, side: Capture) -> str:
    """Return why one side of a layer can't be changed; empty if nothing indicates that."""
    if entry.kind is PointKind.NODE:
        return "it is a node of the symbolic graph, not a module"
    if not entry.calls and not entry.is_result:
        return "its module never runs"
    if side not in entry.points:
        return f"the layer's {side} is not a single tensor"
    return (
        _obstacle_of_type(entry.specs[side])
        or _obstacle_of_program(model, entry.points[side])
        or ("" if entry.is_used else UNUSED)
        or entry.refusal(REFERENCE.id, side)
    )


def _obstacle_of_type(spec: ValueSpec) -> str:
    if spec.quantized:
        return f"it is quantised ({spec.quantized})"
    if not spec.dtype.is_floating_point:
        dtype = str(spec.dtype).removeprefix("torch.")
        return f"it is {dtype}, and only floating-point values can be changed"
    return ""


def _obstacle_of_program(model: LoadedModel, point: CapturePoint) -> str:
    for path in programs(model.module):
        if not path or point.path == path or point.path.startswith(f"{path}."):
            return "it is, or is part of, a TorchScript program"
    return ""


def check_behind(
    catalogue: Catalogue, sites: Sequence[SiteSpec], asked: Sequence[CapturePoint]
) -> None:
    """Check that no intervention changes a value that returns after all that is requested.

    Raises:
        InvalidInputError: If one does.
    """
    if any(point.capture is not Capture.OUTPUT or point.path == "" for point in asked):
        return
    begun = catalogue.begun
    if any(point not in begun or point.path in catalogue.varying for point in asked):
        return
    last = max(asked, key=lambda point: begun[point])
    for site in sites:
        point = site.point
        # What is inside a module that is requested begins after it, but returns before it.
        inside = any(point.path.startswith(f"{each.path}.") for each in asked)
        if point.capture is not Capture.OUTPUT or point.path in catalogue.varying or inside:
            continue
        if begun.get(point, -1) > begun[last] and point not in asked:
            raise InvalidInputError(
                f"interventions: layer {catalogue.name_of(point)!r} runs after "
                f"{catalogue.name_of(last)!r}, the last of the requested layers, so it would "
                f"change none of them; request a layer behind it"
            )


def reported_changes(keys: Sequence[SiteKey]) -> list[CapturePoint]:
    """Return what the reply tells about interventions; nothing if there are none."""
    return [CapturePoint(PointKind.INTERVENTIONS, each) for each in REPORTS] if keys else []
