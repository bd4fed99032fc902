"""Models built by a user's function: ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from layertap.errors import ConfigError, LayertapError, ModelLoadError, WeightsUnavailableError
from layertap.models.factory_attributes import (
    attribute,
    own_adapter,
    own_example,
    own_inputs,
    own_towers,
)
from layertap.models.guessed_input import guess_input, taken_by
from layertap.models.image_config import config_of_module
from layertap.models.loaded import Built
from layertap.models.preprocess import Preprocess, choose_preprocess
from layertap.models.seeding import seeded
from layertap.models.weights import (
    DEFAULT,
    RANDOM,
    load_checkpoint,
    random_text,
    read_checkpoint,
)
from layertap.settings import ImageSettings, ModelSpec
from layertap.settings.paths import is_path

__all__ = ["build_factory"]


def build_factory(spec: ModelSpec) -> Built:
    """Import the factory, call it without arguments, and load the spec's weights into its module.

    Raises:
        ModelLoadError: It can't be imported, raises, returns no ``nn.Module``, or returns one with
            lazy parameters or one whose input shape can't be determined.
        WeightsUnavailableError: The weights can't be found or read.
    """
    factory = _find(spec.target)
    if spec.weights == RANDOM:
        with seeded(spec.seed):
            module = _call(factory, spec.target)
        text = random_text(spec.seed)
    elif spec.weights == DEFAULT:
        module, text = _call(factory, spec.target), "factory's own"
    elif is_path(spec.weights):
        checkpoint = read_checkpoint(spec.weights)
        module = _call(factory, spec.target)
        text = load_checkpoint(module, checkpoint, spec.weights_key)
    else:
        raise WeightsUnavailableError(
            f"weights of {spec.target}: got {spec.weights!r}, expected DEFAULT (the factory's "
            "own), the path of a checkpoint (a file, index or folder), or 'random'"
        )
    return _described(spec, factory, module, text)


def _described(
    spec: ModelSpec, factory: Callable[[], Any], module: nn.Module, weights: str
) -> Built:
    """Return the module with its input, and with the preprocessing of the module or its factory."""
    given = _own_preprocess(factory, spec.target)
    own = None if given is None or isinstance(given, Mapping) else Preprocess.of(given)
    config = None if given is not None else config_of_module(module)
    described = own or config
    shape = None if described is None else described.shape
    inputs = taken_by(module, spec) if spec.inputs else own_inputs(factory, spec.target)
    declared = bool(inputs)
    if not inputs:
        shaped = replace(spec, item_shape=_declared_or_described(spec, module, shape))
        inputs = (guess_input(module, shaped),)
    # Images have three dimensions; without any such input the first one is told to be no image.
    images = [each for each in inputs if len(each.shape) == 3] or list(inputs[:1])
    if isinstance(given, Mapping):
        own = choose_preprocess(None, _settings(given, spec.target), images[0], spec.name)
    if own is not None:
        own = replace(own, origin=f"the preprocess of {spec.target}")
    elif config is not None:
        own = config.preprocess(images[0].shape)
    return Built(
        module=module,
        source=spec.target,
        weights=weights,
        inputs=inputs,
        preprocess=own,
        image_inputs=tuple(each.name for each in images) if declared else (),
        example=own_example(factory, spec.target),
        adapter=own_adapter(factory, spec.target),
        towers=own_towers(factory, spec.target, module, inputs),
        preprocess_is_code=given is not None,
        more=not declared,
    )


def _declared_or_described(
    spec: ModelSpec, module: nn.Module, described: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Return the spec's item shape, or else the shape of the described images, or else None.

    The number of channels is that of the module's first layer, if it has one: a configuration for
    colour images is often combined with a module built for another number of channels.
    """
    if spec.item_shape is not None or described is None:
        return spec.item_shape
    try:
        guessed = guess_input(module, spec).shape
    except ModelLoadError:
        return described
    return (guessed[0], *described[1:])


def _own_preprocess(factory: Any, target: str) -> Any:
    """Return the factory's attribute ``preprocess``; None if it has none."""
    found = attribute(factory, "preprocess")
    if found is not None and not callable(found) and not isinstance(found, Mapping):
        raise ModelLoadError(
            f"factory {target}: its preprocess is a {type(found).__name__}, expected a function "
            f"from a PIL image to a tensor, or a dict of settings such as "
            f"{{'mean': [0.5], 'std': [0.5]}}"
        )
    return found


def _settings(given: Mapping[str, Any], target: str) -> ImageSettings:
    known = [field.name for field in fields(ImageSettings)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ModelLoadError(
            f"factory {target}: its preprocess has {unknown[0]!r}, expected {', '.join(known)}"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in given.items()
    }
    try:
        return ImageSettings(**values)
    except (ConfigError, TypeError) as error:
        raise ModelLoadError(f"factory {target}: its preprocess: {error}") from error


def _find(target: str) -> Callable[[], Any]:
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise ModelLoadError(f"factory {target!r}: expected package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelLoadError(
            f"factory {target}: {error}; is its folder on PYTHONPATH, and is everything that it "
            f"imports installed?"
        ) from error
    # Importing runs the user's own code, which may raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"factory {target}: importing it raised {type(error).__name__}: {error}"
        ) from error
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ModelLoadError(f"factory {target}: {module_name} has no function {function_name!r}")
    return found  # type: ignore[no-any-return]


def _call(factory: Callable[[], Any], target: str) -> nn.Module:
    try:
        module = factory()
    except LayertapError:
        raise
    # The factory is the user's own code, which may raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"factory {target}: it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"factory {target}: it returned {type(module).__name__}, expected a torch.nn.Module"
        )
    lazy = [name for name, tensor in _tensors(module) if is_lazy(tensor)]
    if lazy:
        raise ModelLoadError(
            f"factory {target}: {lazy[0]!r} has no shape yet, as it belongs to a lazy module; run "
            "the module once in the factory"
        )
    return module


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
