"""Makes the entries of a catalogue of what was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import replace

from torch import fx, nn

from layertap.extraction.attention import FUSED, TOO_LARGE, WEIGHTS, returns_weights
from layertap.extraction.catalogue import LayerEntry, Support
from layertap.extraction.kinds.base import Verdict
from layertap.extraction.kinds.registry import KINDS, AnyKind
from layertap.extraction.layout import Geometry
from layertap.extraction.measurement import Measurement
from layertap.extraction.passes import PassScope
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.script_taps import programs
from layertap.extraction.survey import survey_fused
from layertap.models import Batch
from layertap.selection import SIDES, Capture, Extractor

__all__ = ["layer_entries"]

_UNORDERED = (
    "the module runs several times in the model's own threads, so the order of its calls is not "
    "defined"
)


def layer_entries(findings: Measurement, x: Batch, scope: PassScope) -> dict[str, LayerEntry]:
    """Return the entries of all layers, by name and in the order in which the layers ran.

    Args:
        findings: What was measured.
        x: A sample batch.
        scope: Runs the pass that finds out which modules have attention weights.
    """
    entries = {entry.name: entry for entry in _module_entries(findings)}
    for more in (
        _weightless_entries(findings, x, scope),
        _node_entries(findings),
        _silent_entries(findings),
    ):
        for entry in more:
            entries.setdefault(entry.name, entry)
    return entries


def _module_entries(findings: Measurement) -> list[LayerEntry]:
    modules = dict(findings.model.module.named_modules())
    calls = Counter(path for path, _ in findings.order)
    by_call: dict[tuple[str, int], list[CapturePoint]] = {}
    for point in findings.specs:
        by_call.setdefault((point.path, point.call), []).append(point)
    # The model's own call began first, but its result comes last. If the model calls itself, its
    # outermost call ends last.
    order = [(path, call) for path, call in findings.order if path]
    entries: list[LayerEntry] = []
    for path, call in (*order, ("", calls[""] - 1)):
        bare = LayerEntry(
            findings.names.of_call(path, call)[0],
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=_refused(_no_tensor(path, call, Capture.OUTPUT, findings)),
            is_result=not path,
        )
        members: dict[tuple[str, ...], dict[Capture, CapturePoint]] = {}
        for point in by_call.get((path, call), ()):
            if path or point.capture is Capture.OUTPUT:
                members.setdefault(point.member, {})[point.capture] = point
        members.setdefault((), {})
        # What a client can request comes first: members of the output, then the container.
        for way, points in sorted(members.items(), key=lambda each: Capture.OUTPUT not in each[1]):
            asked_for = isinstance(modules[path], nn.MultiheadAttention) and WEIGHTS in way[-1:]
            entry = replace(bare, points=points, is_used=not asked_for)
            entries.extend(_named(entry, path, call, way, findings))
    return entries


def _named(
    entry: LayerEntry, path: str, call: int, way: tuple[str, ...], findings: Measurement
) -> Iterator[LayerEntry]:
    """Yield a layer under each of its names; see Note [Names]."""
    calls = findings.names.of_call(path, call)
    own, *others = (findings.names.of_member(each, way) for each in calls)
    described = _describe(replace(entry, name=own), findings)
    yield described
    for other in others:
        yield replace(described, name=other, same_as=own)


def _describe(entry: LayerEntry, findings: Measurement) -> LayerEntry:
    if not entry.points:
        return entry
    specs = {side: findings.specs[point] for side, point in entry.points.items()}
    output = specs.get(Capture.OUTPUT)
    return replace(
        entry,
        specs=specs,
        geometry=output.geometry if output else Geometry(),
        support=_supported(entry, findings),
    )


def _verdict(kind: AnyKind, entry: LayerEntry, side: Capture, findings: Measurement) -> Verdict:
    """Decide whether a kind serves one side of a layer that ran."""
    point = entry.points.get(side)
    if reason := kind.refuses(findings):
        return Verdict(reason)
    if side not in kind.captures:
        taken = " and ".join(f"{each}s" for each in SIDES if each in kind.captures)
        return Verdict(f"it takes {taken} only")
    if point is None:
        any_point = next(iter(entry.points.values()))
        return Verdict(_no_tensor(any_point.path, any_point.call, side, findings))
    if point in findings.unsendable:
        return Verdict(findings.unsendable[point])
    if point.path in findings.threaded and entry.calls > 1:
        return Verdict(_UNORDERED)
    return kind.claims(point, findings)


def _no_tensor(path: str, call: int, side: Capture, findings: Measurement) -> str:
    """Return why a value that is not a tensor can't be captured."""
    if side is not Capture.OUTPUT:
        return f"the layer's {side} is not a single tensor"
    what = "layer" if path else "model"
    inside = _first_member(path, call, findings)
    advice = f"; request a member of it, such as {inside}" if inside else ""
    return f"the {what} does not return a plain tensor{advice}"


def _refused(reason: str) -> dict[Extractor, Support]:
    return dict.fromkeys(KINDS, Support.refused(reason))


def _supported(entry: LayerEntry, findings: Measurement) -> dict[Extractor, Support]:
    return {
        extractor: Support({side: _verdict(kind, entry, side, findings) for side in SIDES})
        for extractor, kind in KINDS.items()
    }


def _first_member(path: str, call: int, findings: Measurement) -> str:
    """Return the name of the first tensor in the container that a call returned; else empty."""
    base = findings.names.of_call(path, call)[0]
    return next(
        (
            findings.names.of_member(base, point.member)
            for point in findings.specs
            if (point.path, point.call, point.capture) == (path, call, Capture.OUTPUT)
            and point.member
        ),
        "",
    )


def _weightless_entries(findings: Measurement, x: Batch, scope: PassScope) -> Iterator[LayerEntry]:
    """Yield a layer for the attention weights of each module that can't return them."""
    modules = dict(findings.model.module.named_modules())
    # A pass is not worth it if no name suggests attention.
    if not any("att" in f"{path}.{_class_name(each)}".lower() for path, each in modules.items()):
        return
    calls = Counter(path for path, _ in findings.order)
    with scope:
        fused = survey_fused(findings.model, x)
    for path in sorted(fused):
        reason = TOO_LARGE if returns_weights(modules[path]) else FUSED
        name = findings.names.of_member(findings.names.of_call(path, 0)[0], (WEIGHTS,))
        yield LayerEntry(
            name,
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=_refused(reason),
        )


def _node_entries(findings: Measurement) -> Iterator[LayerEntry]:
    for name, spec in findings.graph.specs.items():
        entry = LayerEntry(
            name,
            PointKind.NODE,
            re.sub(r"_\d+$", "", name.rsplit(".", 1)[-1]),
            1,
            points={Capture.OUTPUT: CapturePoint(PointKind.NODE, name)},
            specs={Capture.OUTPUT: spec},
            geometry=spec.geometry,
        )
        yield replace(entry, support=_supported(entry, findings))


_CLOSED = (
    "no call of it was seen inside its TorchScript program; calls are hidden if the program ran "
    "before the model was loaded, as torch.jit.trace runs it; store it by torch.jit.save, and "
    "build the model with what torch.jit.load returns"
)


_GRAPH = (
    "the model is a graph that does not call this module; if torch.export made it, "
    "torch.export.unflatten makes a model of the same program that calls its modules"
)


def _silent_entries(findings: Measurement) -> Iterator[LayerEntry]:
    ran = {path for path, _ in findings.order}
    closed = _closed_programs(findings.model.module, ran)
    reason = "the module never runs in a forward pass"
    if findings.looks.looked:
        reason = (
            "the module never runs in a forward pass on sample input; as the model branches on "
            "tensor values, it may run for other input"
        )
    if isinstance(findings.model.module, fx.GraphModule):
        reason = _GRAPH
    for path, module in findings.model.module.named_modules():
        if not path or path in ran:
            continue
        inside = any(path.startswith(f"{program}.") for program in closed)
        for name in findings.names.of_call(path, 0):
            yield LayerEntry(
                name,
                PointKind.MODULE,
                _class_name(module),
                0,
                support=_refused(_CLOSED if inside else reason),
                same_as="" if name == path else path,
            )


def _closed_programs(module: nn.Module, ran: Container[str]) -> list[str]:
    """Return the paths of TorchScript programs that ran, although none of their modules did."""
    return [
        path
        for path, program in programs(module).items()
        if path in ran
        and not any(f"{path}.{name}" in ran for name, _ in program.named_modules() if name)
    ]


def _class_name(module: nn.Module) -> str:
    # A TorchScript module is a RecursiveScriptModule; this is the class that it was made from.
    return str(getattr(module, "original_name", type(module).__name__))
