"""Finds the dtype and the free dimensions of a model's input by running the model.

Note [Found by trying]
    A factory's module or a TorchScript file says nothing about its input, and the class of its
    first layer says little: a text tower may begin with its own parameter, a tabular model with an
    embedding of one column. So the model runs on random input, first with one dtype after the other
    until one works, then with each dimension at half and at twice its size. What works is used. A
    declared input is not tested.

Note [Tried on the CPU]
    Some of these runs fail: a longer text than the table of positions has rows, an id that a second
    table lacks. On a CPU the model raises an error. On a GPU an index that is out of range stops a
    kernel by an assertion, after which the process can't use the device any more (see
    ``engine.lost_device``). So a copy of the model on the CPU is tried. A model that runs on its
    GPU only, because its code names the device, is tried there.

Note [Differentiation inside forward]
    A force field differentiates its own energy in ``forward``. Passes run in inference mode, which
    forbids that for every tensor made in it; ``torch.no_grad`` allows it. So models are loaded
    under ``no_grad``, and the passes of a model that turns gradients on run under it, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from layertap.errors import ModelLoadError
from layertap.extraction.cpu_twin import on_cpu
from layertap.extraction.free_dimensions import free_dimensions
from layertap.extraction.id_range import with_id_ranges
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import PassScope
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.script_taps import instrument, programs
from layertap.models import BatchKey, InputGuess, InputSpec, LoadedModel
from layertap.models.companions import needs_declaring

__all__ = ["tried"]

_log = logging.getLogger(__name__)

MAX_TRIED = 200
"""Maximum number of combinations of dtypes and shapes to try for several inputs."""

_LOOK_UP = {
    nn.functional.embedding,
    nn.functional.embedding_bag,
    nn.functional.one_hot,
}


def tried(model: LoadedModel, scope: PassScope | None = None) -> LoadedModel:
    """Return a model with the facts about its input that its source did not know.

    See Note [Found by trying], Note [Tried on the CPU] and Note [Differentiation inside forward].
    No other forward pass may run meanwhile.

    Args:
        model: The model.
        scope: The model's scope, in which each pass runs and which restores the model; a new scope
            if not given.

    Raises:
        ConfigError: Preprocessed images don't fit the input that was found.
        ModelLoadError: The model runs on no element types and shapes that were tried.
    """
    inputs = model.signature.inputs
    open_ = any(each.guess or each.optional for each in inputs)
    if not open_ and all(each.dtype.is_floating_point for each in inputs):
        return model
    for program in programs(model.module).values():
        # The first run decides permanently how a program's calls are compiled.
        instrument(program)
    if model.device.type != "cpu":
        try:
            found = _tried(on_cpu(model))
        except Exception as error:  # noqa: BLE001 - a copy may fail in any way; see the note
            _log.info("model %s can't be tried on the CPU: %s", model.name, own_words(error))
        else:
            return replace(found, module=model.module, device=model.device)
    return _tried(model, scope)


def _tried(model: LoadedModel, scope: PassScope | None = None) -> LoadedModel:
    inputs = model.signature.inputs
    scope = scope or PassScope(model.module)
    if any(each.guess for each in inputs):
        model = _that_runs(model, scope)
    if any(each.optional for each in inputs):
        model = _with_optional(model, scope)
    free = free_dimensions(model, partial(_runs, model, scope))
    with torch.inference_mode():
        model = with_id_ranges(replace(model, signature=free), scope)
    scope.snapshot.deep_restore()
    found = tuple(replace(each, guess=None) for each in model.signature.inputs)
    return model.with_signature(replace(model.signature, inputs=found))


@dataclass
class _Run:
    """The result of a pass on random input.

    Attributes:
        error: The model's exception; None if it ran to its end.
        ids: Whether the whole input was looked up in a table of embeddings.
        differentiates: Whether the model turned gradients on.
    """

    error: Exception | None = None
    ids: bool = False
    differentiates: bool = False


def _that_runs(model: LoadedModel, scope: PassScope) -> LoadedModel:
    """Return the model with dtypes and shapes of its required inputs, and a mode, that work.

    For the first input, floating-point dtypes are tried first. If one works, but the model rounds
    the whole input to look it up in a table, the input is token ids after all.
    """
    signature = model.signature
    main = signature.main
    first = [replace(main, dtype=dtype) for dtype in _types(main)]
    others = [_forms(each) for each in signature.required[1:]]
    failed: dict[torch.dtype, Exception] = {}
    for form, *rest in islice(product(first, *others), MAX_TRIED):
        candidate, run = _in_its_mode(_taking(model, form, *rest), scope)
        if run.error is not None:
            failed.setdefault(form.dtype, run.error)
            continue
        if run.ids and _is_float(form.dtype) and torch.int64 in _types(main):
            ids = _taking(model, replace(form, dtype=torch.int64, also=()), *rest)
            ids, second = _in_its_mode(ids, scope)
            return candidate if second.error else ids
        return candidate
    causes = "; ".join(f"{_name(dtype)}: {own_words(error)}" for dtype, error in failed.items())
    if len(signature.required) > 1:
        names = [each.name for each in signature.required]
        raise needs_declaring(model.name, names, causes) from failed[main.dtype]
    raise ModelLoadError(
        f"model {model.name!r} fails on random input of item shape {list(main.shape)}: {causes}"
    ) from failed[main.dtype]


def _with_optional(model: LoadedModel, scope: PassScope) -> LoadedModel:
    """Return the model without the guessed inputs with which it fails, alone or together."""
    found = [each for each in model.signature.inputs if not each.optional]
    for each in model.signature.inputs:
        if not each.optional:
            continue
        forms = _forms(each) if each.guess else [each]
        candidates = (_with_inputs(model, (*found, form)) for form in forms)
        runs = (one for one in candidates if _runs_whole(one, scope))
        if (taken := next(runs, None)) is not None:
            found = list(taken.signature.inputs)
        elif each.guess is None or not each.guess.uncertain:
            raise ModelLoadError(
                f"model {model.name!r} fails on random tensors with its optional input "
                f"{each.name!r} {each.pattern} {each.dtype_name}; see the log for its own message"
            )
    return _with_inputs(model, found)


def _with_inputs(model: LoadedModel, inputs: Iterable[InputSpec]) -> LoadedModel:
    return replace(model, signature=replace(model.signature, inputs=tuple(inputs)))


def _runs_whole(model: LoadedModel, scope: PassScope) -> bool:
    """Return whether a model runs with all of its inputs, alone and in a batch of three."""
    for size in (1, 3):
        run = _run(model, model.signature.whole_key, scope, size)
        if run.error is not None:
            last = model.signature.inputs[-1]
            _log.info(
                "model %s fails with input %s: %s", model.name, last.name, own_words(run.error)
            )
            return False
    return True


def _types(main: InputSpec) -> list[torch.dtype]:
    """Return the dtypes to try for the first input.

    A half-precision type is only taken from the weights of one layer, and the model may convert its
    input to that type itself. Then it accepts float32 too, so float32 is tried first.
    """
    own, guess = main.dtype, main.guess or InputGuess()
    halves = _is_float(own) and own.itemsize < torch.float32.itemsize and not main.also
    return sorted(
        dict.fromkeys((own, *guess.dtypes)),
        key=lambda dtype: (not _is_float(dtype), halves and dtype is not torch.float32),
    )


def _forms(spec: InputSpec) -> list[InputSpec]:
    """Return the dtypes and shapes to try for an input other than the first."""
    guess = spec.guess or InputGuess()
    return [
        replace(spec, shape=shape, dtype=dtype, free=(), symbols=())
        if guess.shapes or guess.dtypes
        else spec
        for shape in (spec.shape, *guess.shapes)
        for dtype in (spec.dtype, *guess.dtypes)
    ]


def _taking(model: LoadedModel, *specs: InputSpec) -> LoadedModel:
    """Return a model in which inputs are replaced by those with the same names."""
    signature = model.signature
    for spec in specs:
        own = signature.spec(spec.name).dtype
        signature = signature.with_input(spec if spec.dtype is own else replace(spec, also=()))
    return replace(model, signature=signature)


def _in_its_mode(model: LoadedModel, scope: PassScope) -> tuple[LoadedModel, _Run]:
    """Run a model; under ``no_grad`` if it turns gradients on or fails in inference mode."""
    run = _run(model, model.signature.key, scope)
    if run.error is None and not run.differentiates:
        return model, run
    plain = replace(model, differentiates=True)
    second = _run(plain, model.signature.key, scope)
    return (model, run) if second.error else (plain, second)


def _runs(model: LoadedModel, scope: PassScope, key: BatchKey) -> bool:
    return _run(model, key, scope).error is None


def _run(model: LoadedModel, key: BatchKey, scope: PassScope, size: int = 1) -> _Run:
    x = ordinary_batch(model, size, key)
    watcher = _Watcher(x[model.signature.main.name].numel())
    try:
        with torch.inference_mode(), scope, watcher:
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


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
