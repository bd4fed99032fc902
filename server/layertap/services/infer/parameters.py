"""The typed parameters of requests, inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb

__all__ = ["Parameters", "check_choice", "check_known", "flag", "number", "text"]

Parameters = Mapping[str, pb.InferParameter]

# Parameters of Triton, its clients or HTTP. Clients send them anyway, so they are ignored here.
_RESERVED = ("triton_", "headers", "binary_data", "sequence_", "priority")


def text(parameters: Parameters, key: str, where: str) -> str:
    """Return a string parameter, empty if missing; raise InvalidInputError for another type."""
    if key not in parameters:
        return ""
    kind = parameters[key].WhichOneof("parameter_choice")
    if kind != "string_param":
        raise InvalidInputError(f"{where}: parameter {key!r}: got {kind}, expected a string")
    return parameters[key].string_param


def number(parameters: Parameters, key: str, where: str) -> int:
    """Return an integer parameter, 0 if missing; raise InvalidInputError for another type."""
    if key not in parameters:
        return 0
    kind = parameters[key].WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidInputError(f"{where}: parameter {key!r}: got {kind}, expected an integer")
    return int(getattr(parameters[key], kind))


def flag(parameters: Parameters, key: str, where: str) -> bool:
    """Return a boolean parameter, False if missing; raise InvalidInputError for another type."""
    if key not in parameters:
        return False
    kind = parameters[key].WhichOneof("parameter_choice")
    if kind != "bool_param":
        raise InvalidInputError(f"{where}: parameter {key!r}: got {kind}, expected a boolean")
    return parameters[key].bool_param


def check_choice(parameters: Parameters, key: str, choices: Sequence[str], where: str) -> str:
    """Return a string parameter, the first choice if missing.

    Raises:
        InvalidInputError: If it has another type, or is none of the choices.
    """
    given = text(parameters, key, where) if key in parameters else choices[0]
    if given not in choices:
        raise InvalidInputError(
            f"{where}: parameter {key!r}: got {given!r}, expected one of {', '.join(choices)}"
        )
    return given


def check_known(parameters: Parameters, known: Iterable[str], where: str) -> None:
    """Raise InvalidInputError for a parameter that would be ignored."""
    known = tuple(known)
    for key in parameters:
        if key not in known and not key.startswith(_RESERVED):
            raise InvalidInputError(
                f"{where}: parameter {key!r} is not known, expected {', '.join(known)}"
            )
