"""Converts the outputs of a request, with their parameters, to selections of layers."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TypeVar

from layertap.engine import ModelHost
from layertap.errors import InvalidInputError
from layertap.extraction import PointKind
from layertap.extraction.kinds.registry import REFERENCE
from layertap.inference import grpc_service_pb2 as pb
from layertap.regrid import Regrid
from layertap.selection import Capture, Extractor, LayerSelection, is_glob
from layertap.services.infer.parameters import Parameters, check_known, number, text
from layertap.services.infer.shared_memory_rpcs import PARAMETERS as MEMORY_PARAMETERS
from layertap.wire.dtypes import DTYPES

__all__ = ["default_selections", "extractor_of", "selections_of"]

E = TypeVar("E", bound=StrEnum)
OutputTensor = pb.ModelInferRequest.InferRequestedOutputTensor

_GRIDS = ("around", "resize", "pool")
_KNOWN = ("layer", "capture", "method", "map", "reduction", "dtype", "extractor", *_GRIDS)
_DTYPE_NAMES = {row.datatype: row.name for row in DTYPES}


def default_selections(host: ModelHost) -> tuple[LayerSelection, ...]:
    """Return the outputs of a request that lists no outputs.

    These are the declared layers, or if there are none, the output of the last module that runs.
    """
    if host.declared:
        return tuple(host.declared)
    last = ""
    for entry in host.catalogue:
        runs = entry.kind is PointKind.MODULE and entry.calls > 0
        own = not entry.is_result and not entry.same_as
        if runs and own and entry.serves(REFERENCE.id, Capture.OUTPUT):
            last = entry.name
    return (LayerSelection(last),) if last else ()


def selections_of(
    request: pb.ModelInferRequest, host: ModelHost, most: int
) -> tuple[LayerSelection, ...]:
    """Return the layers that a request's outputs select; the default outputs if it lists none.

    Args:
        request: The request. Its own parameters apply to all outputs that don't override them.
        host: The model.
        most: Maximum number of outputs.

    Raises:
        InvalidInputError: If there are too many outputs, or for a glob or an invalid parameter.
    """
    if len(request.outputs) > most:
        raise InvalidInputError(f"outputs: got {len(request.outputs)}, expected at most {most}")
    given, where = request.parameters, "request"
    if not request.outputs:
        return tuple(_adjusted(each, given, where) for each in default_selections(host))
    aliases = {each.alias: each for each in host.declared if each.alias}
    return tuple(
        _adjusted(_adjusted(_named(output, aliases), given, where), output.parameters, output.name)
        for output in request.outputs
    )


def extractor_of(request: pb.ModelInferRequest) -> Extractor:
    """Return the extractor that a request or its outputs name; AUTO if none is named.

    Raises:
        InvalidInputError: If an unknown extractor or several extractors are named.
    """
    named = {
        _member(text(parameters, "extractor", "extractor"), Extractor.AUTO, "extractor")
        for parameters in (request.parameters, *(output.parameters for output in request.outputs))
        if "extractor" in parameters
    }
    if len(named) > 1:
        raise InvalidInputError(
            f"extractor: got {', '.join(sorted(named))}, expected one for all outputs of a request"
        )
    return next(iter(named), Extractor.AUTO)


def _named(output: OutputTensor, aliases: dict[str, LayerSelection]) -> LayerSelection:
    """Return the layer that an output's name selects."""
    where = f"output {output.name!r}"
    given = output.parameters
    _check(given, where)
    written = LayerSelection.parse(text(given, "layer", where) or output.name)
    if "layer" not in given and output.name in aliases:
        written = aliases[output.name]
    if is_glob(written.layer):
        raise InvalidInputError(f"{where}: got a glob, expected one layer for each output")
    return replace(written, alias=output.name)


def _adjusted(selection: LayerSelection, given: Parameters, where: str) -> LayerSelection:
    """Return a selection with the changes that parameters make."""
    return replace(
        selection,
        capture=_member(text(given, "capture", where), selection.capture, "capture"),
        method=_member(text(given, "method", where), selection.method, "method"),
        map_form=_member(text(given, "map", where), selection.map_form, "map"),
        reduction=_member(text(given, "reduction", where), selection.reduction, "reduction"),
        dtype=_dtype(text(given, "dtype", where)) or selection.dtype,
        regrid=_regrid(given, where) or selection.regrid,
    )


def _check(given: Parameters, where: str) -> None:
    if number(given, "classification", where):
        raise InvalidInputError(f"{where}: classification is not supported; ask for the layer")
    check_known(given, (*_KNOWN, *MEMORY_PARAMETERS, "classification"), where)


def _regrid(given: Parameters, where: str) -> Regrid | None:
    """Return what parameters say about the grid of a layer; None if they say nothing."""
    if not any(key in given for key in _GRIDS):
        return None
    around = number(given, "around", where)
    return Regrid.parse(
        str(around) if around else "", text(given, "resize", where), text(given, "pool", where)
    )


def _member(name: str, default: E, key: str) -> E:
    if not name:
        return default
    try:
        return type(default)[name.upper()]
    except KeyError:
        choices = ", ".join(member.name for member in type(default))
        raise InvalidInputError(f"{key}: got {name!r}, expected one of {choices}") from None


def _dtype(name: str) -> str:
    """Return layertap's name of a dtype, from the name in either protocol."""
    return _DTYPE_NAMES.get(name.upper(), name)
