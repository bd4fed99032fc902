"""Reads what a factory says about its model, in attributes of the factory function.

===========  ======================================================================================
attribute    content
===========  ======================================================================================
inputs       a dict of texts by name, as ``inputs`` of ``[[models]]``: ``{"ids": "int64 [L=16]"}``
example      a function of a number of items that makes such a batch: a dict of tensors by name
arguments    a function from a dict of tensors by name to the arguments of ``forward``: a tuple of
             positional arguments and a dict of keyword arguments
towers       a dict from the names of methods of the module to the inputs that each of them takes:
             ``{"encode_image": ["image"], "encode_text": ["text"]}``; see ``Signature.towers``
preprocess   a function from a PIL image to a tensor, or a dict of settings
===========  ======================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layertap.errors import ConfigError, ModelLoadError
from layertap.models.arguments import Adapter
from layertap.models.guessed_input import declared_input
from layertap.models.loaded import Example
from layertap.models.signature import InputGuess, InputSpec, Tower
from layertap.settings import DeclaredInput

__all__ = ["attribute", "own_adapter", "own_example", "own_inputs", "own_towers"]

_ITEMS = 2
"""Number of items in the example batch that is made to find the inputs."""


def attribute(factory: Any, name: str) -> Any:
    """Return an attribute of a factory; None if it has none.

    If the factory is a class, a method with that name doesn't count, as it needs an instance.
    """
    found = getattr(factory, name, None)
    if inspect.isclass(factory) and inspect.isfunction(inspect.getattr_static(factory, name, None)):
        return None
    return found


def own_adapter(factory: Any, target: str) -> Adapter | None:
    """Return the function that makes the arguments of ``forward``; None if there is none.

    Raises:
        ModelLoadError: It is not a function.
    """
    found: Adapter | None = _function(factory, "arguments", target)
    return found


def own_example(factory: Any, target: str) -> Example | None:
    """Return the function that makes example batches; None if there is none.

    Raises:
        ModelLoadError: It is not a function.
    """
    found: Example | None = _function(factory, "example", target)
    return found


def own_inputs(factory: Any, target: str) -> tuple[InputSpec, ...]:
    """Return the inputs that a factory declares or shows by an example; empty if neither.

    Raises:
        ModelLoadError: The declaration is malformed, or the example is not a batch.
    """
    declared = attribute(factory, "inputs")
    if declared is not None:
        return _declared(declared, target)
    example = own_example(factory, target)
    return () if example is None else _of_example(example, target)


def own_towers(
    factory: Any, target: str, module: Any, inputs: Sequence[InputSpec]
) -> tuple[Tower, ...]:
    """Return the parts of a model that a factory says run by themselves; empty if none.

    Raises:
        ModelLoadError: The attribute is malformed, or doesn't fit the module and its inputs.
    """
    given = attribute(factory, "towers")
    if given is None:
        return ()
    if not isinstance(given, Mapping) or len(given) < 2 or not all(map(_are_names, given.values())):
        raise ModelLoadError(
            f"factory {target}: its towers attribute is {given!r}, expected a dict from at least "
            f"two methods to lists of inputs, such as {{'encode_image': ['image'], "
            f"'encode_text': ['text']}}"
        )
    towers = tuple(Tower(tuple(own), str(method)) for method, own in given.items())
    names = [name for tower in towers for name in tower.inputs]
    required = {spec.name for spec in inputs if not spec.optional}
    if len(set(names)) < len(names) or not required <= set(names) <= {s.name for s in inputs}:
        raise ModelLoadError(
            f"factory {target}: its towers take {', '.join(names)}, expected each of "
            f"{', '.join(spec.name for spec in inputs)} in one tower; declare them in the "
            f"attribute inputs"
        )
    for tower in towers:
        if not callable(getattr(module, tower.method, None)):
            raise ModelLoadError(
                f"factory {target}: its towers name the method {tower.method!r}, which a "
                f"{type(module).__name__} doesn't have"
            )
        if not required & set(tower.inputs):
            raise ModelLoadError(
                f"factory {target}: all inputs of its tower {tower.method!r} are optional, "
                f"expected a required one"
            )
    return towers


def _are_names(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(each, str) for each in given)


def _declared(given: Any, target: str) -> tuple[InputSpec, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ModelLoadError(
            f"factory {target}: its inputs attribute is a {type(given).__name__}, expected a "
            f"dict of texts by name, such as {{'input_ids': 'int64 [sequence=16]'}}"
        )
    try:
        return tuple(
            declared_input(DeclaredInput.parse(str(name), str(text)))
            for name, text in given.items()
        )
    except ConfigError as error:
        raise ModelLoadError(f"factory {target}: its {error}") from error


def _of_example(example: Example, target: str) -> tuple[InputSpec, ...]:
    try:
        batch = example(_ITEMS)
    except Exception as error:  # The user's own code, which may raise anything.
        raise ModelLoadError(
            f"factory {target}: its example raised {type(error).__name__}: {error}"
        ) from error
    tensors = dict(batch) if isinstance(batch, Mapping) else {}
    if not tensors or not all(
        isinstance(each, torch.Tensor) and each.ndim and len(each) == _ITEMS
        for each in tensors.values()
    ):
        raise ModelLoadError(
            f"factory {target}: its example({_ITEMS}) gave {_words(batch)}, expected a dict of "
            f"tensors with a first dimension of {_ITEMS}"
        )
    return tuple(
        InputSpec(
            tuple(tensor.shape[1:]),
            dtype=tensor.dtype,
            name=str(name),
            guess=InputGuess(free=True),
        )
        for name, tensor in tensors.items()
    )


def _words(given: Any) -> str:
    if not isinstance(given, Mapping):
        return f"a {type(given).__name__}"
    return ", ".join(
        f"{name} {list(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__}"
        for name, each in given.items()
    )


def _function(factory: Any, name: str, target: str) -> Callable[..., Any] | None:
    found = attribute(factory, name)
    if found is not None and not callable(found):
        raise ModelLoadError(
            f"factory {target}: its {name} is a {type(found).__name__}, expected a function"
        )
    return found  # type: ignore[no-any-return]
