"""How the named tensors of a batch become the arguments of a model's ``forward``.

Note [Names with dots]
    An argument may be a dict or a tuple of tensors. Each of them is an input of its own, and its
    name is the way to it: ``features.input_ids`` is the member ``input_ids`` of the dict
    ``features``, and ``pair.0`` is the first member of the tuple ``pair``. It is the way in which
    members of a layer's output are named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

__all__ = ["Adapter", "Arguments", "Kind", "Parameter", "parameters_of"]

Adapter = Callable[[dict[str, torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]
"""Makes the positional and keyword arguments of ``forward`` of a batch's tensors by name."""


class Kind(Enum):
    """How a parameter of ``forward`` is given."""

    POSITIONAL = "positional"
    KEYWORD = "keyword"
    REST = "rest"
    """``*args``: any number of positional arguments."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a module's ``forward``.

    Attributes:
        name: Its name.
        kind: How it is given; POSITIONAL where it may also be given by name.
        required: Whether it has no default.
        none: Whether its default is None.
        constant: Whether its annotation says that it is no tensor but a number, a text or a flag.
    """

    name: str
    kind: Kind = Kind.POSITIONAL
    required: bool = True
    none: bool = False
    constant: bool = False

    @property
    def rest(self) -> bool:
        """Whether it is ``*args``."""
        return self.kind is Kind.REST


def parameters_of(module: nn.Module) -> list[Parameter]:
    """Return the parameters of a module's ``forward`` in order, without ``**kwargs``.

    Empty for a ``forward`` whose signature Python can't tell.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return _of_program(module)
    try:
        given = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # Some callables have no signature.
        return []
    kinds: dict[Any, Kind] = {
        inspect.Parameter.KEYWORD_ONLY: Kind.KEYWORD,
        inspect.Parameter.VAR_POSITIONAL: Kind.REST,
    }
    return [
        Parameter(
            each.name,
            kinds.get(each.kind, Kind.POSITIONAL),
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
            Kind.KEYWORD if each.kwarg_only else Kind.POSITIONAL,
            required=not each.has_default_value(),
            none=each.has_default_value() and each.default_value is None,
            constant=str(each.type) in ("int", "float", "bool", "str"),
        )
        for each in module.forward.schema.arguments[1:]
    ]


def _is_constant(annotation: Any) -> bool:
    # Annotations are texts in files that postpone their evaluation.
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name in ("bool", "int", "float", "str")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Calls a module's ``forward`` with the tensors of a batch.

    Attributes:
        parameters: The parameters of ``forward``.
        adapter: Makes the arguments instead, for a ``forward`` that takes no plain tensors.
    """

    parameters: tuple[Parameter, ...] = ()
    adapter: Adapter | None = None

    def of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments for a batch's tensors.

        Arguments are given by position as far as no parameter before them is left out, and by name
        from there on. A model that takes one tensor may call its parameter as it likes.
        """
        if self.adapter is not None:
            positional, named = self.adapter(dict(tensors))
            return list(positional), dict(named)
        values = _nested(tensors)
        if len(values) == 1 and not any(p.name in values for p in self.parameters):
            return list(values.values()), {}
        args: list[Any] = []
        for parameter in self.parameters:
            if parameter.kind is Kind.REST:
                # Only these have no names of their own, so the order is that of the inputs.
                own = {each.name for each in self.parameters}
                args += [values.pop(name) for name in list(values) if name not in own]
                break
            if parameter.kind is Kind.KEYWORD or parameter.name not in values:
                break
            args.append(values.pop(parameter.name))
        return args, values


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return arguments by name, with dicts and tuples put together; see Note [Names with dots]."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *way, last = name.split(".")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = tensor
    return {name: _tuples(value) for name, value in tree.items()}


def _tuples(value: Any) -> Any:
    """Return a tree in which the dicts whose keys are 0, 1 and so on are tuples."""
    if not isinstance(value, dict):
        return value
    members = {key: _tuples(member) for key, member in value.items()}
    if sorted(members) == sorted(map(str, range(len(members)))):
        return tuple(members[str(index)] for index in range(len(members)))
    return members
