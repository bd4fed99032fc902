"""Resolves the objective of a request, and checks what can be known of it before any compute."""

from __future__ import annotations

from collections.abc import Sequence

from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayerNotFoundError
from layertap.extraction.attention import UNUSED
from layertap.extraction.catalogue import Catalogue, LayerEntry, Support
from layertap.extraction.kinds.base import Verdict
from layertap.extraction.kinds.registry import KINDS, REFERENCE
from layertap.extraction.pass_spec import ObjectiveSpec, TermSpec
from layertap.extraction.passes import KeptState
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.script_taps import programs
from layertap.models import InputSpec, LoadedModel
from layertap.objective import TermKey
from layertap.selection import SIDES, Capture, Extractor, Glob, LayerSelection, is_glob

__all__ = [
    "check_differentiable",
    "check_order",
    "gradient_obstacle",
    "input_entries",
    "is_model_input",
    "resolve_objective",
]


def resolve_objective(
    catalogue: Catalogue, keys: Sequence[TermKey]
) -> tuple[ObjectiveSpec, list[LayerEntry]]:
    """Match the terms of an objective against a catalogue.

    Returns:
        The objective, and the layer of each term.

    Raises:
        LayerNotFoundError: If there is no such layer.
        ExtractorUnsupportedError: If its value can't be captured, or is not a floating-point one.
    """
    entries, terms = [], []
    for key in keys:
        entry = catalogue.entry(key.layer) if key.layer else _result(catalogue)
        reason = entry.refusal(REFERENCE.id, key.capture) or _obstacle(entry, key.capture)
        if reason:
            raise ExtractorUnsupportedError(
                f"objective: the {key.capture} of layer {entry.name!r} can't be used: {reason}"
            )
        entries.append(entry)
        terms.append(TermSpec(entry.points[key.capture], key.measure))
    return ObjectiveSpec(tuple(terms)), entries


def _result(catalogue: Catalogue) -> LayerEntry:
    found = [entry for entry in catalogue if entry.is_result]
    if not found:
        raise LayerNotFoundError("objective: the model returns no tensor; name a layer")
    return found[0]


def gradient_obstacle(entry: LayerEntry, side: Capture) -> str:
    """Return why one side of a layer has no gradient; empty if nothing indicates that."""
    return _obstacle(entry, side) or ("" if entry.is_used else UNUSED)


def _obstacle(entry: LayerEntry, side: Capture) -> str:
    """Return why one side of a layer can't be differentiated; empty if nothing indicates that."""
    if entry.kind is PointKind.NODE:
        return "it is a node of the symbolic graph, not a module"
    spec = entry.specs.get(side)
    if spec is None:
        return f"the layer's {side} is not a single tensor"
    if spec.quantized:
        return f"it is quantised ({spec.quantized}), which has no gradient"
    if not spec.dtype.is_floating_point:
        return f"it is {str(spec.dtype).removeprefix('torch.')}, which has no gradient"
    return ""


def check_differentiable(model: LoadedModel, catalogue: Catalogue, extractor: Extractor) -> None:
    """Check that gradients of a model can be computed at all.

    Raises:
        ExtractorUnsupportedError: If they can't, or the extractor can't compute any.
    """
    able = [kind.name for kind in KINDS.values() if kind.gradients]
    if extractor is not Extractor.AUTO and not KINDS[extractor].gradients:
        raise ExtractorUnsupportedError(
            f"{extractor.name} can't compute gradients; extractors that can: {', '.join(able)}"
        )
    reason = ""
    if catalogue.scope.rules.state is KeptState.KEPT:
        reason = "the model keeps state that can't be restored after each pass"
    elif model.differentiates:
        reason = "the model differentiates inside its own forward"
    elif programs(model.module):
        reason = "the model is, or contains, a TorchScript program"
    if reason:
        raise ExtractorUnsupportedError(f"gradients of model {model.name!r}: {reason}")


def check_order(
    catalogue: Catalogue,
    matches: Sequence[tuple[LayerSelection, LayerEntry]],
    terms: Sequence[tuple[TermKey, LayerEntry]],
) -> None:
    """Check that no layer whose gradient is requested returns after the objective's layers.

    Raises:
        InvalidInputError: If one does.
    """
    if any(key.capture is not Capture.OUTPUT for key, _ in terms):
        return
    begun = catalogue.begun
    last = max((begun[entry.points[Capture.OUTPUT]], entry.name) for _, entry in terms)
    around = [f"{entry.points[Capture.OUTPUT].path}." for _, entry in terms]
    for selection, entry in matches:
        if selection.capture is not Capture.GRADIENT:
            continue
        point = entry.points[Capture.OUTPUT]
        # What is inside a layer of the objective begins after it, but returns before it.
        if point.path in catalogue.varying or any(map(point.path.startswith, around)):
            continue
        if begun.get(point, -1) > last[0]:
            raise InvalidInputError(
                f"layers: got the gradient of {entry.name!r}, which returns after {last[1]!r}, the "
                f"last layer of the objective, so the objective does not depend on it"
            )


def is_model_input(catalogue: Catalogue, selection: LayerSelection) -> bool:
    """Return whether a selection names tensors that the model is given."""
    return selection.capture is Capture.GRADIENT and (
        selection.layer not in catalogue.entries
        and selection.layer.startswith(f"{catalogue.inputs_name}.")
    )


def input_entries(
    model: LoadedModel, catalogue: Catalogue, selection: LayerSelection
) -> list[LayerEntry]:
    """Return an entry for each tensor that the model is given and that a selection matches.

    Raises:
        LayerNotFoundError: If there is none.
        InvalidInputError: If the selection names one whose dtype has no gradient.
    """
    prefix = f"{catalogue.inputs_name}."
    glob, named = Glob(selection.layer), not is_glob(selection.layer)
    found = [spec for spec in model.signature.inputs if glob.matches(f"{prefix}{spec.name}")]
    able = [spec for spec in found if spec.dtype.is_floating_point]
    if named and found and not able:
        raise InvalidInputError(
            f"layers: the model's input {found[0].name!r} is {found[0].dtype_name}, which has no "
            f"gradient{_advice(catalogue)}"
        )
    if not able:
        names = ", ".join(repr(f"{prefix}{spec.name}") for spec in model.signature.inputs)
        raise LayerNotFoundError(
            f"no input {selection.layer!r} with floating-point values; the model's inputs are "
            f"{names}{_advice(catalogue)}"
        )
    return [_input_entry(spec, prefix) for spec in able]


def _input_entry(spec: InputSpec, prefix: str) -> LayerEntry:
    dims = (Dim(1, batch=True), *map(Dim, spec.shape))
    return LayerEntry(
        f"{prefix}{spec.name}",
        PointKind.INPUT,
        "input",
        1,
        points={Capture.OUTPUT: CapturePoint(PointKind.INPUT, spec.name)},
        specs={Capture.OUTPUT: ValueSpec(spec.dtype, dims)},
        support={
            kind.id: Support(dict.fromkeys(SIDES, Verdict("" if kind.gradients else "_")))
            for kind in KINDS.values()
        },
    )


def _advice(catalogue: Catalogue) -> str:
    found = [e.name for e in catalogue if "Embedding" in e.type and Capture.OUTPUT in e.specs]
    return f"; request that of an embedding, such as {found[0]!r}" if found else ""
