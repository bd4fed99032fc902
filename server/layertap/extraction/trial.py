"""Finds the dtype and the free dimensions of a model's input by running the model.

Note [Found by trying]
    A factory's module or a TorchScript file says nothing about its input, and the class of its
    first layer says little: a text tower may begin with its own parameter, a tabular model with an
    embedding of one column. So the model runs on random input, first with one dtype after the other
    until one works, then with each dimension at half and at twice its size. What works is used. A
    declared input is not tested.

Note [Differentiation inside forward]
    A force field differentiates its own energy in ``forward``. Passes run in inference mode, which
    forbids that for every tensor made in it; ``torch.no_grad`` allows it. So models are loaded
    under ``no_grad``, and the passes of a model that turns gradients on run under it, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from layertap.errors import ModelLoadError
from layertap.extraction.id_range import with_id_range
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import PassGuard
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.script_taps import instrument, programs
from layertap.models import BatchKey, InputGuess, LoadedModel

__all__ = ["tried"]

_LOOK_UP = {
    nn.functional.embedding,
    nn.functional.embedding_bag,
    nn.functional.one_hot,
}


def tried(model: LoadedModel, guard: PassGuard | None = None) -> LoadedModel:
    """Return a model with the facts about its input that its source did not know.

    See Note [Found by trying] and Note [Differentiation inside forward]. No other forward pass may
    run meanwhile.

    Args:
        model: The model.
        guard: The model's guard, which is held in each pass and restores the model; a new guard if
            not given.

    Raises:
        ConfigError: Preprocessed images don't fit the input that was found.
        ModelLoadError: The model runs with none of the dtypes that were tried.
    """
    guess = model.signature.main.guess
    if guess is None and model.signature.main.dtype.is_floating_point:
        return model
    for program in programs(model.module).values():
        # The first run decides permanently how a program's calls are compiled.
        instrument(program)
    guard = guard or PassGuard(model.module)
    if guess:
        model = _that_runs(model, guess, guard)
    free = _free_dims(model, guard) if guess and guess.free else model.signature.main.free
    model = _with_id_range(model, guard)
    guard.snapshot.deep_restore()
    return model.with_input(replace(model.signature.main, free=free, guess=None))


@dataclass
class _Run:
    """The result of a pass on random input.

    Attributes:
        error: The model's exception; None if it ran to its end.
        ids: Whether the whole input was looked up in a table of embeddings.
        differentiates: Whether gradients were turned on.
    """

    error: Exception | None = None
    ids: bool = False
    differentiates: bool = False


def _that_runs(model: LoadedModel, guess: InputGuess, guard: PassGuard) -> LoadedModel:
    """Return the model with a dtype, and inference mode or ``no_grad``, with which it runs.

    Floating-point types come first. If one works, but the model rounds the whole input to look it
    up in a table, the input is token ids after all.

    A half-precision type is only taken from the weights of one layer, and the model may convert its
    input to that type itself. Then it accepts float32 too, so float32 is tried first.
    """
    own = model.signature.main.dtype
    halves = (
        _is_float(own) and own.itemsize < torch.float32.itemsize and not model.signature.main.also
    )
    types = sorted(
        dict.fromkeys((own, *guess.dtypes)),
        key=lambda dtype: (not _is_float(dtype), halves and dtype is not torch.float32),
    )
    failed: dict[torch.dtype, Exception] = {}
    for dtype in types:
        candidate, run = _in_its_mode(_of_type(model, dtype), guard)
        if run.error is not None:
            failed[dtype] = run.error
            continue
        if run.ids and _is_float(dtype) and torch.int64 in types:
            ids, second = _in_its_mode(_of_type(model, torch.int64), guard)
            return candidate if second.error else ids
        return candidate
    causes = "; ".join(f"{_name(dtype)}: {own_words(error)}" for dtype, error in failed.items())
    raise ModelLoadError(
        f"model {model.name!r} fails on random input of item shape "
        f"{list(model.signature.main.shape)}: {causes}"
    ) from failed[own]


def _with_id_range(model: LoadedModel, guard: PassGuard) -> LoadedModel:
    with torch.inference_mode():
        return with_id_range(model, guard)


def _of_type(model: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    main = model.signature.main
    if dtype is main.dtype:
        return model
    found = replace(main, dtype=dtype, also=())
    return replace(model, signature=model.signature.with_main(found))


def _in_its_mode(model: LoadedModel, guard: PassGuard) -> tuple[LoadedModel, _Run]:
    """Run a model; under ``no_grad`` if it turns gradients on or fails in inference mode."""
    run = _run(model, model.signature.key, guard)
    if run.error is None and not run.differentiates:
        return model, run
    plain = replace(model, differentiates=True)
    second = _run(plain, model.signature.key, guard)
    return (model, run) if second.error else (plain, second)


def _run(model: LoadedModel, key: BatchKey, guard: PassGuard) -> _Run:
    x = ordinary_batch(model, 1, key)
    watcher = _Watcher(x[model.signature.main.name].numel())
    try:
        with torch.inference_mode(), guard, watcher:
            model.forward(x)
    except Exception as error:  # noqa: BLE001 - a model may raise anything; it is reported
        watcher.run.error = error
    return watcher.run


class _Watcher(TorchFunctionMode):
    """Sees whether a model looks its input up in a table, and whether it differentiates."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.run = _Run()
        self._elements = elements

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _LOOK_UP:
            given = args[0] if args else (kwargs or {}).get("input")
            self.run.ids |= isinstance(given, torch.Tensor) and given.numel() == self._elements
        self.run.differentiates |= torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def _free_dims(model: LoadedModel, guard: PassGuard) -> tuple[int, ...]:
    """Return the item's dimensions that may have another size, as the model runs then too.

    Dimensions of equal size that can't change alone are tried together, such as the height and
    width of a model that takes square images only.
    """
    shape = model.signature.main.shape
    alone = [index for index in range(len(shape)) if _runs_at_other_sizes(model, (index,), guard)]
    alike: dict[int, list[int]] = defaultdict(list)
    for index, size in enumerate(shape):
        if index not in alone:
            alike[size].append(index)
    tied = [group for group in alike.values() if len(group) > 1]
    together = [
        i for group in tied if _runs_at_other_sizes(model, tuple(group), guard) for i in group
    ]
    return tuple(sorted(alone + together))


def _runs_at_other_sizes(model: LoadedModel, dims: tuple[int, ...], guard: PassGuard) -> bool:
    """Return whether a model runs with these dimensions at half or twice their size."""
    key, own = model.signature.key, model.signature.main.shape
    size = own[dims[0]]
    # Not at size 1, which may work only because the tensor is broadcast.
    others = [other for other in (size // 2, 2 * size) if other > 1]
    return any(
        _run(
            model,
            key.with_main([other if axis in dims else size for axis, size in enumerate(own)]),
            guard,
        ).error
        is None
        for other in others
    )


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
