"""Converts interventions to and from their messages."""

from __future__ import annotations

from collections.abc import Sequence

from layertap.errors import InvalidInputError
from layertap.intervention import (
    MAX_INDEXES,
    Axis,
    Intervention,
    Operation,
    Part,
    Span,
    check_count,
    check_interventions,
)
from layertap.selection import Capture
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire.enums import from_proto, to_proto
from layertap.wire.small_tensors import array_from_proto, array_to_proto

__all__ = ["interventions_from_proto", "interventions_to_proto"]


def interventions_to_proto(
    interventions: Sequence[Intervention],
) -> list[feature_service_pb2.Intervention]:
    """Return the messages of interventions."""
    return list(map(_to_proto, interventions))


def interventions_from_proto(
    messages: Sequence[feature_service_pb2.Intervention],
) -> tuple[Intervention, ...]:
    """Convert the interventions of a request.

    Raises:
        InvalidInputError: If there are too many, one contradicts itself, or an enum value is
            unknown.
        DecodeError: If the bytes of a tensor don't fit its shape.
    """
    if not messages:
        return ()
    check_count(len(messages))
    return check_interventions(list(map(_from_proto, messages)))


def _to_proto(one: Intervention) -> feature_service_pb2.Intervention:
    return feature_service_pb2.Intervention(
        layer=one.layer,
        capture=to_proto(one.capture, "CAPTURE"),
        select=[selection for part in one.parts for selection in _selections(part)],
        operation=to_proto(one.operation, "OPERATION"),
        value=one.value,
        factor=one.factor,
        low=one.low,
        high=one.high,
        tensor=None if one.tensor is None else array_to_proto(one.tensor),
        source_item=one.source_item,
        seed=one.seed,
        over=[to_proto(each, "AXIS") for each in one.over if isinstance(each, Axis)],
        over_dimensions=[each for each in one.over if not isinstance(each, Axis)],
        set=one.set,
    )


def _selections(part: Part) -> list[feature_service_pb2.AxisSelection]:
    def selection(**fields: object) -> feature_service_pb2.AxisSelection:
        return feature_service_pb2.AxisSelection(
            axis=to_proto(part.axis, "AXIS"),
            dimension=part.dimension,
            heads=part.heads,
            **fields,  # type: ignore[arg-type]
        )

    single = [each for each in part.indexes if not isinstance(each, Span)]
    spans = [each for each in part.indexes if isinstance(each, Span)]
    found = [selection(index=single)] if single else []
    return [*found, *(selection(begin=s.begin, end=s.end, step=s.step) for s in spans)]


def _from_proto(message: feature_service_pb2.Intervention) -> Intervention:
    over = [_axis(number) for number in message.over[:32]]
    return Intervention(
        layer=message.layer,
        operation=_operation(message.operation),
        parts=_parts(message.select),
        capture=from_proto(message.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT),
        value=message.value,
        factor=message.factor if message.HasField("factor") else 1.0,
        low=message.low if message.HasField("low") else None,
        high=message.high if message.HasField("high") else None,
        tensor=array_from_proto(message.tensor, "intervention: tensor")
        if message.HasField("tensor")
        else None,
        source_item=message.source_item,
        seed=message.seed,
        over=(*over, *message.over_dimensions[:32]),
        set=message.set,
    )


def _parts(selections: Sequence[feature_service_pb2.AxisSelection]) -> tuple[Part, ...]:
    if sum(len(each.index) + 1 for each in selections) > MAX_INDEXES:
        raise InvalidInputError(f"select: got more than {MAX_INDEXES} indices and ranges")
    found: dict[tuple[Axis, int, int], list[int | Span]] = {}
    for each in selections:
        mine = found.setdefault((_axis(each.axis), each.dimension, each.heads), [])
        mine.extend(each.index)
        if each.HasField("begin") or each.HasField("end"):
            end = each.end if each.HasField("end") else None
            mine.append(Span(each.begin, end, each.step or 1))
        elif each.step:
            raise InvalidInputError(f"select: step: got {each.step} without begin or end")
    return tuple(
        Part(axis, tuple(indexes), dimension, heads)
        for (axis, dimension, heads), indexes in found.items()
    )


def _axis(number: int) -> Axis:
    if not number:
        raise InvalidInputError(
            f"axis: got none, expected one of {', '.join(a.name for a in Axis)}"
        )
    return from_proto(number, feature_service_pb2.Axis, "AXIS", Axis.ITEM)


def _operation(number: int) -> Operation:
    if not number:
        names = ", ".join(each.name for each in Operation)
        raise InvalidInputError(f"operation: got none, expected one of {names}")
    return from_proto(number, feature_service_pb2.Operation, "OPERATION", Operation.ZERO)
