"""Resolves selections to outputs: which values to capture, and their names in the reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from layertap.engine.resolve_interventions import (
    check_behind,
    check_changeable,
    reported_changes,
    resolve_sites,
)
from layertap.engine.resolve_objective import (
    check_differentiable,
    check_order,
    gradient_obstacle,
    input_entries,
    is_model_input,
    resolve_objective,
)
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayerNotFoundError
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.kinds.registry import KINDS, REFERENCE
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, PointKind
from layertap.intervention import SiteKey
from layertap.models import LoadedModel
from layertap.objective import TermKey
from layertap.projection import SentProjection
from layertap.regrid import NO_REGRID, Regrid
from layertap.selection import (
    SENT_DTYPES,
    Capture,
    Extractor,
    LayerSelection,
    MapForm,
    Method,
    Reduction,
    is_glob,
)
from layertap.wire.dtypes import DType, by_name

__all__ = ["Member", "Output", "Resolved", "resolve"]


class Member(NamedTuple):
    """One of the layers of an output.

    Attributes:
        layer: The layer's name in the catalogue.
        point: The index of the capture point whose value is taken.
    """

    layer: str
    point: int


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the reply.

    Attributes:
        name: Its name in the reply.
        members: The layer from which it is made, or the layers whose channels follow one another.
        reduction: The reduction that is applied to the value.
        dtype: The floating-point dtype to send it in; None for the model's own dtype.
        method: What is made of the value before the reduction, if it is made of no gradient.
        map_form: The form in which a map is sent.
        regrid: What is done to the grid of each value before the reduction.
        projection: What the channels are multiplied by in the end; None for nothing.
    """

    name: str
    members: tuple[Member, ...]
    reduction: Reduction
    dtype: DType | None
    method: Method = Method.GRADIENT
    map_form: MapForm = MapForm.GRID
    regrid: Regrid = NO_REGRID
    projection: SentProjection | None = None

    @property
    def layer(self) -> str:
        """The names of its layers, for error messages."""
        return "+".join(member.layer for member in self.members)

    @property
    def needs_shape(self) -> bool:
        """Whether the value must have the predicted shape for what is made of it."""
        return bool(self.asked)

    @property
    def asked(self) -> str:
        """What is made of the value, for error messages; empty if it is sent as it is."""
        if self.reduction is not Reduction.NONE:
            return f"reduction: {self.reduction.name}"
        if not self.method.takes_gradient:
            return f"method: {self.method.name}"
        if self.map_form is not MapForm.GRID:
            return f"map: {self.map_form.name}"
        return self.regridded or ("projection" if self.projection is not None else "")

    @property
    def regridded(self) -> str:
        """What needs a grid of the layer, for error messages; empty if nothing does."""
        if self.regrid.size is not None:
            return f"{self.regrid.resize.name} to {list(self.regrid.size)}"
        if self.regrid.around > 1:
            return f"around: {self.regrid.around}"
        return "concat" if len(self.members) > 1 else ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request in terms of the catalogue.

    Attributes:
        outputs: The tensors of the reply, in order.
        pass_spec: What the forward pass must do: capture each distinct value.
        candidates: The extractors that can serve it, in the order in which AUTO prefers them.
        variant: How the program of the only candidate is finished; empty for the usual way.
    """

    outputs: tuple[Output, ...]
    pass_spec: PassSpec
    candidates: tuple[Extractor, ...]
    variant: str = ""

    @property
    def points(self) -> tuple[CapturePoint, ...]:
        """The distinct values to capture, in execution order."""
        return self.pass_spec.points


def resolve(
    model: LoadedModel,
    catalogue: Catalogue,
    selections: Sequence[LayerSelection],
    extractor: Extractor,
    *,
    max_layers: int,
    variant: str = "",
    objective: Sequence[TermKey] = (),
    interventions: Sequence[SiteKey] = (),
) -> Resolved:
    """Match selections against a catalogue.

    Args:
        model: The model.
        catalogue: Its catalogue.
        selections: The layers to return.
        extractor: The extractor to use.
        max_layers: Maximum number of layers that the selections match.
        variant: How the extractor's program is finished; empty for the usual way.
        objective: The terms of the objective; none if no gradients are requested.
        interventions: The layers of interventions; none without any.

    Raises:
        InvalidInputError: If there are no selections, too many of them, two outputs with one name,
            an alias for a glob, a dtype in which values can't be sent, gradients without an
            objective, an intervention behind all that is requested, or a variant that the extractor
            does not have.
        LayerNotFoundError: If a name or glob matches nothing.
        ExtractorUnsupportedError: If the extractor, or in case of AUTO every extractor, can't
            serve a layer or its gradient, or an intervention.
    """
    if not selections:
        raise InvalidInputError("layers: got none, expected at least one layer")
    if variant:
        _check_variant(model, extractor, variant)
    _check_objective(selections, objective)
    if objective:
        check_differentiable(model, catalogue, extractor)
    if interventions:
        check_changeable(model, catalogue, extractor)
    matches: list[tuple[LayerSelection, LayerEntry]] = []
    groups: list[tuple[LayerSelection, tuple[LayerEntry, ...]]] = []
    for selection in selections:
        if len(selection.concat) >= max_layers:
            raise InvalidInputError(f"layers: got more than {max_layers}, the most allowed")
        found = [list(_found(model, catalogue, each, extractor)) for each in _each_layer(selection)]
        members = [entry for entries in found for entry in entries]
        matches.extend((selection, entry) for entry in members)
        groups.extend([(selection, tuple(members))] if selection.concat
                      else [(selection, (entry,)) for entry in members])  # fmt: skip
        if len(matches) > max_layers:
            raise InvalidInputError(f"layers: got more than {max_layers}, the most allowed")
    _check_names(groups, [*_reported(objective), *reported_changes(interventions)])
    order = {entry.name: index for index, entry in enumerate(catalogue)}
    wanted = {
        (order.get(entry.name, -1), selection.capture, number): _point(entry, selection)
        for number, (selection, entry) in enumerate(matches)
    }
    points = tuple(dict.fromkeys(wanted[key] for key in sorted(wanted)))
    spec = PassSpec(points)
    if objective:
        aim, entries = resolve_objective(catalogue, objective)
        check_order(catalogue, matches, list(zip(objective, entries, strict=True)))
        companions = (replace(point, companion=True) for point in points if _companion(point))
        points = (*points, *companions, *_reported(objective))
        spec = PassSpec(points, aim)
    if interventions:
        spec = _with_sites(model, catalogue, spec, interventions)
        points = spec.points
    outputs = tuple(
        Output(
            name=selection.name_for(entries[0].name),
            members=tuple(
                Member(entry.name, points.index(_point(entry, selection))) for entry in entries
            ),
            reduction=selection.reduction,
            dtype=_float_dtype(selection.dtype),
            method=Method.GRADIENT if selection.method.takes_gradient else selection.method,
            map_form=selection.map_form,
            regrid=selection.regrid,
            projection=_sent(selection),
        )
        for selection, entries in groups
    )
    outputs += tuple(
        Output(
            f"{output.name}.{_companion(points[member.point])}",
            (Member(member.layer, points.index(replace(points[member.point], companion=True))),),
            Reduction.NONE,
            None,
        )
        for output in outputs
        for member in output.members
        if _companion(points[member.point])
    )
    outputs += tuple(
        Output(point.report_name, (Member(point.report_name, index),), Reduction.NONE, None)
        for index, point in enumerate(points)
        if point.is_report
    )
    return Resolved(outputs, spec, _candidates(matches, extractor, spec), variant)


def _each_layer(selection: LayerSelection) -> list[LayerSelection]:
    """Return a selection for each layer of a concatenation."""
    if not selection.concat:
        return [selection]
    return [replace(selection, layer=layer, concat=()) for layer in selection.layers]


def _found(
    model: LoadedModel, catalogue: Catalogue, selection: LayerSelection, extractor: Extractor
) -> Iterator[LayerEntry]:
    if is_model_input(catalogue, selection):
        return iter(input_entries(model, catalogue, selection))
    return _matches(catalogue, selection, extractor)


def _sent(selection: LayerSelection) -> SentProjection | None:
    """Return which of the request's projections a selection has."""
    given = selection.projection
    if given is None or isinstance(given, SentProjection):
        return given
    raise AssertionError("the numbers of projections are kept apart from selections")


def _with_sites(
    model: LoadedModel, catalogue: Catalogue, spec: PassSpec, keys: Sequence[SiteKey]
) -> PassSpec:
    """Return a pass spec with interventions."""
    sets = max(1, *(key.set for key in keys))
    if sets > 1 and spec.objective is not None:
        raise InvalidInputError(
            f"interventions: got {sets} sets and an objective, expected one set; send a request "
            f"with gradients for each set"
        )
    sites = resolve_sites(model, catalogue, keys)
    check_behind(catalogue, sites, spec.asked)
    return PassSpec((*spec.points, *reported_changes(keys)), spec.objective, sites, sets)


def _companion(point: CapturePoint) -> str:
    """Return the suffix of what the reply has beside a point's result; empty if nothing."""
    return "" if point.companion else point.method.companion


def _point(entry: LayerEntry, selection: LayerSelection) -> CapturePoint:
    capture = selection.capture
    point = entry.points[capture.side]
    if not capture.is_gradient:
        return point
    sweep = selection.sweep if selection.method.sweeps else None
    return replace(point, gradient=True, method=selection.method, sweep=sweep)


def _check_objective(selections: Sequence[LayerSelection], objective: Sequence[TermKey]) -> None:
    gradient = next((each for each in selections if each.capture.is_gradient), None)
    if gradient is not None and not objective:
        raise InvalidInputError(
            f"objective: got none, expected one, as the {gradient.capture.name} of layer "
            f"{gradient.layer!r} is requested"
        )
    if gradient is None and objective:
        raise InvalidInputError(
            "objective: got one, but no layer's GRADIENT or INPUT_GRADIENT is requested"
        )


def _check_variant(model: LoadedModel, extractor: Extractor, variant: str) -> None:
    if extractor is Extractor.AUTO:
        raise InvalidInputError(
            f"variant: got {variant!r} with AUTO, which chooses by itself; expected the name of "
            f"the extractor too"
        )
    known = KINDS[extractor].variants(model.device)
    if variant not in known:
        raise InvalidInputError(
            f"variant: got {variant!r}, expected {' or '.join(['none', *map(repr, known)])} for "
            f"{extractor.name} on a {model.device.type} device"
        )


def _reported(objective: Sequence[TermKey]) -> list[CapturePoint]:
    """Return what the reply tells about an objective; nothing if there is none."""
    if not objective:
        return []
    value, first = (CapturePoint(PointKind.OBJECTIVE, name) for name in ("value", "index"))
    finding = sum(key.measure.finds for key in objective)
    return [value, *(replace(first, call=number) for number in range(finding))]


def _matches(
    catalogue: Catalogue, selection: LayerSelection, extractor: Extractor
) -> Iterator[LayerEntry]:
    # A module's own name may contain a star or question mark.
    if selection.layer in catalogue.entries or not is_glob(selection.layer):
        entry = catalogue.entry(selection.layer)
        _check_served(entry, selection.capture.side, extractor)
        reason = selection.capture.is_gradient and gradient_obstacle(entry, selection.capture.side)
        if reason:
            raise ExtractorUnsupportedError(
                f"the {selection.capture} of layer {entry.name!r} can't be computed: {reason}"
            )
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
        if _serves(entry, selection.capture.side, extractor)
        and not (selection.capture.is_gradient and gradient_obstacle(entry, selection.capture.side))
    ]
    if not found:
        chosen = REFERENCE.id if selection.capture.is_gradient else extractor
        raise LayerNotFoundError(
            f"glob {selection.layer!r} matches no layer whose {selection.capture} "
            f"{chosen.name} serves; `*` stays within a path's component, `**` crosses them"
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


def _check_names(
    groups: Sequence[tuple[LayerSelection, Sequence[LayerEntry]]], reports: Sequence[CapturePoint]
) -> None:
    seen = {point.report_name for point in reports}
    for selection, entries in groups:
        own = selection.name_for(entries[0].name)
        suffix = selection.method.companion
        for name in (own, f"{own}.{suffix}") if suffix else (own,):
            if name in seen:
                raise InvalidInputError(
                    f"layers: two outputs are called {name!r}; give one of them an alias"
                )
            seen.add(name)


def _candidates(
    matches: Sequence[tuple[LayerSelection, LayerEntry]], extractor: Extractor, spec: PassSpec
) -> tuple[Extractor, ...]:
    if extractor is not Extractor.AUTO:
        return (extractor,)
    if spec.objective is not None or spec.sites:
        for selection, entry in matches:
            if not selection.capture.is_gradient:
                _check_served(entry, selection.capture, REFERENCE.id)
        return tuple(
            kind.id
            for kind in KINDS.values()
            if (kind.gradients or spec.objective is None) and (kind.edits or not spec.sites)
        )
    able = [set(entry.served_by(selection.capture)) for selection, entry in matches]
    common = {each for each in set.intersection(*able) if KINDS[each].automatic}
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
