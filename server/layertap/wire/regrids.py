"""Converts what is done to grids and channels to and from its messages."""

from __future__ import annotations

from layertap.errors import InvalidInputError
from layertap.projection import Projection, SentProjection
from layertap.regrid import NO_REGRID, Regrid, Resize
from layertap.v1 import feature_service_pb2
from layertap.wire.enums import from_proto, to_proto
from layertap.wire.small_tensors import array_from_proto, array_to_proto

__all__ = [
    "projection_from_proto",
    "projection_to_proto",
    "regrid_from_proto",
    "regrid_to_proto",
]


def regrid_to_proto(regrid: Regrid) -> feature_service_pb2.Regrid | None:
    """Return the message; None if nothing is done."""
    if regrid == NO_REGRID:
        return None
    height, width = regrid.size or (0, 0)
    return feature_service_pb2.Regrid(
        around=regrid.around,
        height=height,
        width=width,
        resize=to_proto(regrid.resize, "RESIZE"),
    )


def regrid_from_proto(message: feature_service_pb2.Regrid) -> Regrid:
    """Return what a message says.

    Raises:
        InvalidInputError: For a number out of its range or an unknown enum value.
    """
    size = (message.height, message.width)
    return Regrid(
        around=message.around or 1,
        size=size if any(size) else None,
        resize=from_proto(message.resize, feature_service_pb2.Resize, "RESIZE", Resize.BILINEAR),
    )


def projection_to_proto(
    projection: Projection | SentProjection | None,
) -> feature_service_pb2.Projection | None:
    """Return the message; None for no projection."""
    if not isinstance(projection, Projection):
        return None
    mean = projection.mean
    return feature_service_pb2.Projection(
        matrix=array_to_proto(projection.matrix),
        mean=None if mean is None else array_to_proto(mean),
    )


def projection_from_proto(message: feature_service_pb2.Projection) -> Projection:
    """Return what a message says.

    Raises:
        InvalidInputError: If the matrix is missing, or an array has another shape or dtype, is in
            shared memory, or holds NaN or infinity.
        DecodeError: If bytes don't fit their shape.
    """
    if not message.HasField("matrix"):
        raise InvalidInputError("projection: got no matrix, expected [K, C]")
    mean = message.mean if message.HasField("mean") else None
    return Projection(
        array_from_proto(message.matrix, "projection: matrix"),
        None if mean is None else array_from_proto(mean, "projection: mean"),
    )
