"""Converts objectives to and from their messages."""

from __future__ import annotations

from collections.abc import Sequence

from layertap.errors import InvalidInputError
from layertap.objective import MAX_TERMS, Measure, Objective, ObjectiveTerm
from layertap.selection import Capture
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire.enums import from_proto, to_proto
from layertap.wire.small_tensors import MAX_RANK, array_from_proto, array_to_proto

__all__ = ["objective_from_proto", "objective_to_proto"]

MAX_INDEX_NUMBERS = 1 << 16
"""Maximum number of numbers in the index of a term."""


def objective_to_proto(
    objective: Objective | None,
) -> list[feature_service_pb2.ObjectiveTerm]:
    """Return the messages of an objective's terms; none without an objective."""
    return [_term_to_proto(term) for term in objective.terms] if objective else []


def objective_from_proto(
    terms: Sequence[feature_service_pb2.ObjectiveTerm],
) -> Objective | None:
    """Convert the terms of a request; None if there are none.

    Raises:
        InvalidInputError: If there are too many, one contradicts itself, or an enum value is
            unknown.
        DecodeError: If the bytes of a vector don't fit its shape.
    """
    if len(terms) > MAX_TERMS:
        raise InvalidInputError(f"objective: got {len(terms)} terms, expected at most {MAX_TERMS}")
    return Objective(tuple(map(_term_from_proto, terms))) if terms else None


def _term_to_proto(term: ObjectiveTerm) -> feature_service_pb2.ObjectiveTerm:
    return feature_service_pb2.ObjectiveTerm(
        layer=term.layer,
        capture=to_proto(term.capture, "CAPTURE"),
        measure=to_proto(term.measure, "MEASURE"),
        index=[number for place in term.places for number in place],
        place_length=len(term.places[0]) if term.places else 0,
        vector=None if term.vector is None else array_to_proto(term.vector),
        weight=term.weight,
    )


def _term_from_proto(term: feature_service_pb2.ObjectiveTerm) -> ObjectiveTerm:
    numbers, size = len(term.index), term.place_length or 1
    if numbers > MAX_INDEX_NUMBERS or size > MAX_RANK:
        raise InvalidInputError(
            f"objective: index: got {numbers} numbers in places of {size}, expected at most "
            f"{MAX_INDEX_NUMBERS} in places of {MAX_RANK}"
        )
    if numbers % size:
        raise InvalidInputError(
            f"objective: index: got {numbers} numbers, expected a multiple of place_length {size}"
        )
    index = list(term.index)
    return ObjectiveTerm(
        layer=term.layer,
        measure=from_proto(term.measure, feature_service_pb2.Measure, "MEASURE", Measure.ELEMENT),
        places=tuple(tuple(index[at : at + size]) for at in range(0, numbers, size)),
        vector=array_from_proto(term.vector, "objective: vector")
        if term.HasField("vector")
        else None,
        weight=term.weight if term.HasField("weight") else 1.0,
        capture=from_proto(term.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT),
    )
