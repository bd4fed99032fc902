"""The dtype and shape in which an output is sent, as far as they are known without a plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from layertap.engine.host import ModelHost
from layertap.engine.making import Needed, made_of
from layertap.engine.resolve import Output, Resolved
from layertap.errors import InvalidInputError
from layertap.extraction.points import ValueSpec

__all__ = ["sent_spec"]


def sent_spec(host: ModelHost, resolved: Resolved, output: Output) -> ValueSpec:
    """Return the dtype and shape of an output for items of the default size.

    Where what is made of the values can't be made for these, it is that of the value itself.
    """
    specs = [host.catalogue.specs[point] for point in resolved.points]
    try:
        spec = made_of(output, specs, Needed(host.model.signature.key)).spec
    except InvalidInputError:
        spec = specs[output.members[0].point]
    if output.dtype is not None and spec.dtype.is_floating_point:
        spec = replace(spec, dtype=getattr(torch, output.dtype.name))
    return spec
