"""Finds the range of a model's token ids from the embedding table that they index.

Note [Which table]
    One pass is watched for lookups whose ids follow from the input: ``nn.Embedding``,
    ``functional.embedding`` or plain indexing. The number of the table's rows limits the ids. A
    model may have several such tables (words, positions, columns of tabular data), so the largest
    range is taken with which the model runs at every batch size of a proof.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from layertap.extraction.looks import watch_looks
from layertap.extraction.passes import PassScope
from layertap.extraction.samples import ordinary_batch
from layertap.models import IdRange, InputSpec, LoadedModel

__all__ = ["with_id_ranges"]

_BYTES = 256
"""The range of integers that index no table: that of a byte."""


def with_id_ranges(model: LoadedModel, scope: PassScope) -> LoadedModel:
    """Return the model with the range of ids of each integer input whose range is unknown.

    The model runs, each pass inside its scope. If it runs with no range larger than 0 and 1, the
    input is not changed.
    """
    for spec in model.signature.inputs:
        dtype = spec.dtype
        if not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool or spec.values):
            model = _with_id_range(model, spec, scope)
    return model


def _with_id_range(model: LoadedModel, spec: InputSpec, scope: PassScope) -> LoadedModel:
    tables = sorted(_tables(model, spec.name, scope), reverse=True)
    for rows in (*tables, min(_BYTES, torch.iinfo(spec.dtype).max)):
        known = replace(spec, values=IdRange(rows, _padding(model.module, rows)))
        found = replace(model, signature=model.signature.with_input(known))
        if rows > 2 and _runs(found, scope):
            return found
    return model


def _tables(model: LoadedModel, name: str, scope: PassScope) -> set[int]:
    """Return the number of rows of each table in which ids from an input are looked up."""
    x = ordinary_batch(model, 1, model.signature.whole_key)
    with scope, watch_looks(model.module, {name: x[name]}) as looks:
        try:
            model.forward(x)
        except Exception:  # noqa: BLE001 - measuring the model will report the failure
            return set()
    return looks.tables


def _padding(module: nn.Module, rows: int) -> int:
    for part in module.modules():
        own = getattr(part, "padding_idx", None)
        if isinstance(own, int) and getattr(part, "num_embeddings", rows) == rows:
            return own
    return 0


def _runs(model: LoadedModel, scope: PassScope) -> bool:
    try:
        for batch in (1, 2, 3):
            with scope:
                model.forward(ordinary_batch(model, batch, model.signature.whole_key))
    except Exception:  # noqa: BLE001 - a model may raise anything at ids that it can't look up
        return False
    return True
