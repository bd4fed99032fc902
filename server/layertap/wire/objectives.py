"""Converts objectives to and from their messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layertap.errors import DecodeError, InvalidInputError
from layertap.objective import MAX_TERMS, Measure, Objective, ObjectiveTerm
from layertap.selection import Capture
from layertap.v1 import catalogue_pb2, feature_service_pb2, tensor_pb2
from layertap.wire.dtypes import by_number, of_array
from layertap.wire.enums import from_proto, to_proto

__all__ = ["objective_from_proto", "objective_to_proto"]

MAX_INDEX_NUMBERS = 1 << 16
"""Maximum number of numbers in the index of a term."""

MAX_RANK = 32


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
    vector = None
    if term.vector is not None:
        row = of_array(term.vector)
        vector = tensor_pb2.Tensor(
            dtype=row.proto_name,
            shape=term.vector.shape,
            data=np.ascontiguousarray(term.vector, row.numpy).tobytes(),
        )
    return feature_service_pb2.ObjectiveTerm(
        layer=term.layer,
        capture=to_proto(term.capture, "CAPTURE"),
        measure=to_proto(term.measure, "MEASURE"),
        index=[number for place in term.places for number in place],
        index_size=len(term.places[0]) if term.places else 0,
        vector=vector,
        weight=term.weight,
    )


def _term_from_proto(term: feature_service_pb2.ObjectiveTerm) -> ObjectiveTerm:
    numbers, size = len(term.index), term.index_size or 1
    if numbers > MAX_INDEX_NUMBERS or size > MAX_RANK:
        raise InvalidInputError(
            f"objective: index: got {numbers} numbers in places of {size}, expected at most "
            f"{MAX_INDEX_NUMBERS} in places of {MAX_RANK}"
        )
    if numbers % size:
        raise InvalidInputError(
            f"objective: index: got {numbers} numbers, expected a multiple of index_size {size}"
        )
    index = list(term.index)
    return ObjectiveTerm(
        layer=term.layer,
        measure=from_proto(term.measure, feature_service_pb2.Measure, "MEASURE", Measure.ELEMENT),
        places=tuple(tuple(index[at : at + size]) for at in range(0, numbers, size)),
        vector=_vector(term.vector) if term.HasField("vector") else None,
        weight=term.weight if term.HasField("weight") else 1.0,
        capture=from_proto(term.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT),
    )


def _vector(tensor: tensor_pb2.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    if tensor.HasField("shared"):
        raise InvalidInputError("objective: vector: got shared memory, expected data")
    row, shape = by_number(tensor.dtype), tuple(tensor.shape)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise DecodeError(f"objective: vector: got shape {list(shape)[:MAX_RANK]}")
    elements = 1
    for size in shape:
        elements *= size
    if elements * row.itemsize != len(tensor.data):
        raise DecodeError(
            f"objective: vector: got {len(tensor.data)} bytes, expected "
            f"{elements * row.itemsize} for {row.name} {list(shape)}"
        )
    return np.frombuffer(tensor.data, row.numpy).reshape(shape)
