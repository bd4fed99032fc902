"""Loads a model into this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layertap.engine import Engine, allow_tf32, choose_device
from layertap.errors import ConfigError
from layertap.extraction.plan_folder import open_plan_cache
from layertap.local.model import LocalModel
from layertap.selection import SelectionLike, parse_selections
from layertap.settings import Limits, ModelSpec, ServedModel, ServerOptions, definitions, replaced

__all__ = ["load"]


def load(
    source: str,
    *,
    weights: str = "DEFAULT",
    seed: int = 0,
    device: str = "auto",
    item_shape: Sequence[int] | None = None,
    input_dtype: str = "",
    free_dims: Sequence[int] | None = None,
    precision: str = "",
    layers: SelectionLike = (),
    limits: Limits | None = None,
    threads: int | None = None,
    tf32: bool = False,
    plan_cache: str | Path = "auto",
    **settings: Any,
) -> LocalModel:
    """Load a model into this process, and measure its layers by running it.

    What was measured is kept in ``plan_cache``. The next load of the same model, in this or another
    process, verifies it with one pass instead (docs/lifecycle.md).

    Args:
        source: A torchvision model (``"resnet18"``), a timm model (``"timm:NAME"``), a Hugging Face
            model (``"hf:FOLDER"``), a TorchScript file (``"net.pt"``) or a factory
            (``"package.module:function"``); ``"NAME=SOURCE"`` gives it a name.
        weights: ``"DEFAULT"``, the name of torchvision weights, a checkpoint or ``"random"``.
        seed: Seeds the values of random weights.
        device: The device to run it on, such as ``"cpu"`` or ``"cuda:1"``; ``"auto"`` takes a GPU
            if there is one.
        item_shape: The shape of one input item, without the batch; None for the model's own.
        input_dtype: The dtype of the input, such as ``"int64"``, for factories and TorchScript
            files; if empty, it is found by running the model.
        free_dims: The dimensions of an item that may have another size, as indices into the item
            shape, for factories and TorchScript files; if None, they are found by running the
            model.
        precision: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to compute in; the weights' own if
            empty.
        layers: Layers that will be requested. They are compiled and warm when this returns; any
            other layer may be requested as well.
        limits: The limits of extractions; the defaults of a server if None.
        threads: Cores for one forward pass on a CPU; None leaves it to PyTorch.
        tf32: Whether CUDA may round the operands of float32 convolutions and matrix products to
            TF32. PyTorch has one such setting for the whole process, and this sets it.
        plan_cache: The folder that keeps catalogues and compiled plans for the next load;
            ``"auto"`` is that of ``layertap serve`` in the user's cache folder, ``"off"`` keeps
            nothing.
        settings: Other settings of ``[[models]]`` in a configuration file, by their keys
            (docs/settings.md): ``channels_last``, ``require_finite``, ``image_mean`` and so on.

    Returns:
        The model. Close it, or use it in a ``with`` block, to free its memory and its threads.

    Raises:
        ConfigError: If an argument is invalid; the message names it.
        ModelLoadError: If the model can't be loaded or can't run.
        LayertapError: Any error that a request for ``layers`` would raise.
    """
    optional = {
        "input_dtype": input_dtype or None,
        "precision": precision or None,
        "item_shape": None if item_shape is None else list(item_shape),
        "free_dims": None if free_dims is None else list(free_dims),
    }
    given = {key: value for key, value in optional.items() if value is not None}
    values = _checked({"weights": weights, "seed": seed, **given, **settings})
    model = replaced(ServedModel(ModelSpec.parse(source)), values)
    model = replace(model, layers=tuple(parse_selections(layers)))
    model.check()
    allow_tf32(tf32)
    cache = open_plan_cache(str(plan_cache), ServerOptions().plan_cache_bytes)
    engine = Engine(limits, device=choose_device(device), threads=threads, plan_cache=cache)
    try:
        engine.load(model.spec, model.layers, options=model.options)
    except BaseException:
        engine.close()
        raise
    return LocalModel(engine, model.name)


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as raw values of their own kinds; raise ConfigError if one is invalid."""
    known = {each.key: each for each in definitions(ServedModel)}
    if unknown := values.keys() - known.keys():
        raise ConfigError(
            f"load: got unknown settings {', '.join(sorted(unknown))}, expected some of "
            f"{', '.join(known)}"
        )
    checked = {}
    for key, value in values.items():
        try:
            checked[key] = known[key].kind.check(value)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
    return checked
