"""Converts the named tensors of a batch to the arguments of a model's ``forward``.

Note [Names with dots]
    An argument may be a dict or a tuple of tensors. Each of these is a separate input, and its name
    says where it belongs: ``features.input_ids`` is the member ``input_ids`` of the dict
    ``features``, and ``pair.0`` is the first member of the tuple ``pair``. Members of a layer's
    output are named in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

__all__ = ["Adapter", "Arguments", "Parameter", "ParameterKind", "parameters_of"]

Adapter = Callable[[dict[str, torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]
"""Converts a batch's tensors by name to positional and keyword arguments of ``forward``."""


class ParameterKind(Enum):
    """How an argument is passed to ``forward``."""

    POSITIONAL = "positional"
    KEYWORD = "keyword"
    REST = "rest"
    """``*args``: any number of positional arguments."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a module's ``forward``.

    Attributes:
        name: Its name.
        kind: How it is passed; POSITIONAL if it may also be passed by name.
        required: Whether it has no default.
        none: Whether its default is None.
        constant: Whether it is annotated as a number, a text or a flag, and so is not a tensor.
    """

    name: str
    kind: ParameterKind = ParameterKind.POSITIONAL
    required: bool = True
    none: bool = False
    constant: bool = False

    @property
    def rest(self) -> bool:
        """Whether it is ``*args``."""
        return self.kind is ParameterKind.REST


def parameters_of(module: nn.Module) -> list[Parameter]:
    """Return the parameters of a module's ``forward`` in order, without ``**kwargs``.

    Empty if Python can't determine the signature of ``forward``.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return _of_program(module)
    try:
        given = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # Some callables have no signature.
        return []
    kinds: dict[Any, ParameterKind] = {
        inspect.Parameter.KEYWORD_ONLY: ParameterKind.KEYWORD,
        inspect.Parameter.VAR_POSITIONAL: ParameterKind.REST,
    }
    return [
        Parameter(
            each.name,
            kinds.get(each.kind, ParameterKind.POSITIONAL),
            required=each.default is each.empty and each.kind is not each.VAR_POSITIONAL,
            none=each.default is None,
            constant=_is_constant(each.annotation),
        )
        for each in given
        if each.kind is not each.VAR_KEYWORD
    ]


def _of_program(module: Any) -> list[Parameter]:
    return [
        Parameter(
            each.name,
            ParameterKind.KEYWORD if each.kwarg_only else ParameterKind.POSITIONAL,
            required=not each.has_default_value(),
            none=each.has_default_value() and each.default_value is None,
            constant=str(each.type) in ("int", "float", "bool", "str"),
        )
        for each in module.forward.schema.arguments[1:]
    ]


def _is_constant(annotation: Any) -> bool:
    # With ``from __future__ import annotations``, annotations are texts.
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name in ("bool", "int", "float", "str")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Calls a module's ``forward`` with the tensors of a batch.

    Attributes:
        parameters: The parameters of ``forward``.
        adapter: Makes the arguments instead, if ``forward`` takes other things than tensors.
    """

    parameters: tuple[Parameter, ...] = ()
    adapter: Adapter | None = None

    def of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments for a batch's tensors.

        Arguments are passed by position until a parameter is left out, and by name after that. The
        parameter of a model that takes one tensor may have any name.
        """
        if self.adapter is not None:
            positional, named = self.adapter(dict(tensors))
            return list(positional), dict(named)
        values = _nested(tensors)
        if len(values) == 1 and not any(p.name in values for p in self.parameters):
            return list(values.values()), {}
        args: list[Any] = []
        for parameter in self.parameters:
            if parameter.kind is ParameterKind.REST:
                # These arguments have no names, so they are in the order of the inputs.
                own = {each.name for each in self.parameters}
                args += [values.pop(name) for name in list(values) if name not in own]
                break
            if parameter.kind is ParameterKind.KEYWORD or parameter.name not in values:
                break
            args.append(values.pop(parameter.name))
        return args, values


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return arguments by name, with dicts and tuples assembled; see Note [Names with dots]."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *way, last = name.split(".")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = tensor
    return {name: _tuples(value) for name, value in tree.items()}


def _tuples(value: Any) -> Any:
    """Return a tree in which dicts with the keys 0, 1 and so on are replaced by tuples."""
    if not isinstance(value, dict):
        return value
    members = {key: _tuples(member) for key, member in value.items()}
    if sorted(members) == sorted(map(str, range(len(members)))):
        return tuple(members[str(index)] for index in range(len(members)))
    return members
