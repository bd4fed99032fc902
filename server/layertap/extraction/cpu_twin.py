"""A copy on the CPU of a model on a GPU, which samples are given before the GPU gets them.

Note [Samples that a GPU must not see]
    Models are tested with samples that they may refuse: numbers that they round to rows of a table,
    texts longer than their table of positions. On a CPU a model raises an error for an index that
    is out of range. On a GPU such an index stops a kernel by an assertion, and from then on the
    process can't use the device any more, for no model (see ``engine.lost_device``). So a model
    that indexes has a copy on the CPU. Each sample runs there first, once, and if the copy fails,
    ``LoadedModel.forward`` raises an error with its words instead of running the sample on the GPU.

    A model that does not index an ordinary sample, such as most convolutional networks, needs no
    copy.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layertap.extraction.own_words import own_words
from layertap.extraction.passes import PassScope
from layertap.extraction.samples import ordinary_batch
from layertap.models import Batch, LoadedModel

__all__ = ["CpuTwin", "on_cpu", "with_twin"]

_log = logging.getLogger(__name__)

_INDEXES = {
    *("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "index_select"),
    *("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_"),
    *("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"),
    *("take", "take_along_dim", "put", "put_", "one_hot", "bincount", "embedding", "embedding_bag"),
    *("_embedding_bag", "_embedding_bag_forward_only", "multinomial", "nll_loss", "nll_loss_nd"),
    *("cross_entropy_loss", "grid_sampler", "unravel_index", "max_unpool2d", "max_unpool3d"),
}
"""Operations that stop a kernel by an assertion if an index, or a probability, is not valid."""


class CpuTwin:
    """Runs samples on a copy of a model; see Note [Samples that a GPU must not see].

    Args:
        module: The copy, on the CPU. No pass of it has run yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._scope = PassScope(module)
        self._lock = threading.Lock()
        self._known: dict[Hashable, str] = {}

    def refusal(self, model: LoadedModel, batch: Batch, identity: Hashable) -> str:
        """Return the error with which the copy fails on a batch; empty if it runs to its end.

        Args:
            model: The model as it is known by now; its module is not used.
            batch: The batch, on the CPU.
            identity: Tells batches of the same values apart from others, so that each runs once.
        """
        with self._lock:
            key = (identity, batch.key, batch.size, model.differentiates)
            if key not in self._known:
                self._known[key] = self._run(model, batch)
            return self._known[key]

    def indexes(self, model: LoadedModel) -> bool:
        """Return whether the copy indexes anything in a pass on an ordinary sample."""
        mine = self._on_copy(model)
        watcher = _Watcher()  # type: ignore[no-untyped-call]
        with torch.inference_mode(), self._scope, watcher:
            mine.forward(ordinary_batch(mine, 1))
        seen: bool = watcher.seen
        return seen

    def _on_copy(self, model: LoadedModel) -> LoadedModel:
        return replace(model, module=self._module, device=torch.device("cpu"), twin=None)

    def _run(self, model: LoadedModel, batch: Batch) -> str:
        try:
            with torch.inference_mode(), self._scope:
                self._on_copy(model).forward(batch.clone())
        except Exception as error:  # noqa: BLE001 - a model may raise anything; it is passed on
            return f"a copy of the model on the CPU fails: {own_words(error)}"
        return ""


def on_cpu(model: LoadedModel) -> LoadedModel:
    """Return a copy of a model on the CPU. What can't be copied raises its own errors."""
    with torch.inference_mode(False), torch.no_grad():
        module = copy.deepcopy(model.module).to("cpu")
    return replace(model, module=module, device=torch.device("cpu"))


def with_twin(model: LoadedModel) -> LoadedModel:
    """Return a model with its twin, if it is not on the CPU and it indexes anything."""
    if model.device.type == "cpu":
        return model
    try:
        twin = CpuTwin(on_cpu(model).module)
        return replace(model, twin=twin) if twin.indexes(model) else model
    except Exception as error:  # noqa: BLE001 - a copy, and a pass of it, may fail in any way
        _log.warning(
            "model %s: no copy of it runs on the CPU (%s), so the samples that it is tested with "
            "run on the GPU only", model.name, own_words(error),
        )  # fmt: skip
        return model


class _Watcher(TorchDispatchMode):
    """Sees whether an operation may stop a kernel by an assertion."""

    seen: bool = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= func.overloadpacket.__name__ in _INDEXES
        return func(*args, **(kwargs or {}))
