"""Resolves selections to outputs: which values to capture, and their names in the reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayerNotFoundError
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.kinds.registry import KINDS, REFERENCE
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint
from layertap.selection import SENT_DTYPES, Capture, Extractor, LayerSelection, Reduction, is_glob
from layertap.wire.dtypes import DType, by_name

__all__ = ["Output", "Resolved", "resolve"]


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the reply.

    Attributes:
        name: Its name in the reply.
        layer: The layer's name in the catalogue.
        point: The index of the capture point whose value it is made from.
        reduction: The reduction that is applied to the value.
        dtype: The floating-point dtype to send it in; None for the model's own dtype.
    """

    name: str
    layer: str
    point: int
    reduction: Reduction
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request in terms of the catalogue.

    Attributes:
        outputs: The tensors of the reply, in order.
        pass_spec: What the forward pass must do: capture each distinct value.
        candidates: The extractors that can serve it, in the order in which AUTO prefers them.
    """

    outputs: tuple[Output, ...]
    pass_spec: PassSpec
    candidates: tuple[Extractor, ...]

    @property
    def points(self) -> tuple[CapturePoint, ...]:
        """The distinct values to capture, in execution order."""
        return self.pass_spec.points


def resolve(
    catalogue: Catalogue,
    selections: Sequence[LayerSelection],
    extractor: Extractor,
    max_layers: int,
) -> Resolved:
    """Match selections against a catalogue.

    Raises:
        InvalidInputError: If there are no selections, too many of them, two outputs with one name,
            an alias for a glob, or a dtype in which values can't be sent.
        LayerNotFoundError: If a name or glob matches nothing.
        ExtractorUnsupportedError: If the extractor, or in case of AUTO every extractor, can't
            serve a layer.
    """
    if not selections:
        raise InvalidInputError("layers: got none, expected at least one layer")
    matches: list[tuple[LayerSelection, LayerEntry]] = []
    for selection in selections:
        matches.extend((selection, entry) for entry in _matches(catalogue, selection, extractor))
        if len(matches) > max_layers:
            raise InvalidInputError(f"layers: got more than {max_layers}, the most allowed")
    _check_names(matches)
    order = {entry.name: index for index, entry in enumerate(catalogue)}
    wanted = {(order[e.name], s.capture): e.points[s.capture] for s, e in matches}
    points = tuple(dict.fromkeys(wanted[key] for key in sorted(wanted)))
    outputs = tuple(
        Output(
            name=selection.name_for(entry.name),
            layer=entry.name,
            point=points.index(entry.points[selection.capture]),
            reduction=selection.reduction,
            dtype=_float_dtype(selection.dtype),
        )
        for selection, entry in matches
    )
    return Resolved(outputs, PassSpec(points), _candidates(matches, extractor))


def _matches(
    catalogue: Catalogue, selection: LayerSelection, extractor: Extractor
) -> Iterator[LayerEntry]:
    # A module's own name may contain a star or question mark.
    if selection.layer in catalogue.entries or not is_glob(selection.layer):
        entry = catalogue.entry(selection.layer)
        _check_served(entry, selection.capture, extractor)
        yield entry
        return
    if selection.alias:
        raise InvalidInputError(
            f"layers: alias {selection.alias!r} on glob {selection.layer!r}; "
            f"an alias names one output"
        )
    found = [
        entry
        for entry in catalogue.match(selection.layer)
        if _serves(entry, selection.capture, extractor)
    ]
    if not found:
        raise LayerNotFoundError(
            f"glob {selection.layer!r} matches no layer whose {selection.capture} "
            f"{extractor.name} serves; `*` stays within a path's component, `**` crosses them"
        )
    yield from found


def _serves(entry: LayerEntry, capture: Capture, extractor: Extractor) -> bool:
    if extractor is Extractor.AUTO:
        # A glob is about modules, unless an extractor that serves graph nodes is requested.
        return entry.serves(REFERENCE.id, capture)
    return entry.serves(extractor, capture)


def _check_served(entry: LayerEntry, capture: Capture, extractor: Extractor) -> None:
    able = entry.served_by(capture)
    if extractor in able or (extractor is Extractor.AUTO and able):
        return
    others = ", ".join(other.name for other in able) or "none"
    chosen = REFERENCE.id if extractor is Extractor.AUTO else extractor
    raise ExtractorUnsupportedError(
        f"{extractor.name} can't serve the {capture} of layer {entry.name!r}: "
        f"{entry.refusal(chosen, capture)}; "
        f"extractors that can: {others}"
    )


def _check_names(matches: Sequence[tuple[LayerSelection, LayerEntry]]) -> None:
    seen: set[str] = set()
    for selection, entry in matches:
        name = selection.name_for(entry.name)
        if name in seen:
            raise InvalidInputError(
                f"layers: two outputs are called {name!r}; give one of them an alias"
            )
        seen.add(name)


def _candidates(
    matches: Sequence[tuple[LayerSelection, LayerEntry]], extractor: Extractor
) -> tuple[Extractor, ...]:
    if extractor is not Extractor.AUTO:
        return (extractor,)
    able = [set(entry.served_by(selection.capture)) for selection, entry in matches]
    common = set.intersection(*able)
    if not common:
        nodes = _joined(kind.name for kind in KINDS.values() if kind.nodes)
        inputs = _joined(kind.name for kind in KINDS.values() if Capture.INPUT in kind.captures)
        raise ExtractorUnsupportedError(
            f"no extractor serves all of these layers together: graph nodes are {nodes} only, "
            f"inputs are {inputs} only"
        )
    return tuple(candidate for candidate in KINDS if candidate in common)


def _joined(names: Iterable[str]) -> str:
    return " and ".join(names)


def _float_dtype(name: str) -> DType | None:
    if not name:
        return None
    row = by_name(name)
    if name not in SENT_DTYPES:
        raise InvalidInputError(f"dtype: got {name}, expected float32, float16 or bfloat16")
    return row
