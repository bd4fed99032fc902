"""The true values of every layer, found without layertap: the coverage run's reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer, _set_default_tracer_kwargs

__all__ = ["Key", "module_values", "node_values"]

Key = tuple[str, str, int]
"""(module path, "input" or "output", which call)."""


def module_values(
    module: nn.Module, forward: Callable[[], Any], wanted: Collection[Key]
) -> dict[Key, Any]:
    """Clone the inputs and outputs of the requested modules' calls."""
    seen: dict[Key, Any] = {}
    calls: dict[tuple[str, str], int] = {}

    def note(path: str, side: str, value: Any) -> None:
        call = calls.get((path, side), 0)
        calls[path, side] = call + 1
        if (path, side, call) in wanted:
            seen[path, side, call] = _clone(value)

    handles = []
    for path, submodule in module.named_modules():
        handles.append(
            submodule.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: note(path, "input", _input(args, kwargs)),
                with_kwargs=True,
            )
        )
        handles.append(
            submodule.register_forward_hook(
                lambda m, args, kwargs, output, path=path: note(
                    path, "output", _output(m, args, kwargs, output)
                ),
                with_kwargs=True,
            )
        )
    forward()
    for handle in handles:
        handle.remove()
    return seen


def node_values(
    module: nn.Module, wanted: Collection[str], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Clone the tensors of some nodes of the symbolic graph, interpreted with no node left out.

    The names are those of torchvision's tracer, which makes no extractor here: each node runs as it
    was traced, so nothing is lost to dead-code elimination.
    """
    tracer = NodePathTracer(**_set_default_tracer_kwargs(None))
    graph = tracer.trace(module)
    names = {node: name for node, name in tracer.node_to_qualname.items() if name in wanted}
    seen: dict[str, torch.Tensor] = {}

    class Cloning(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            # A graph's own lists can't be written, those that the model makes can.
            return target(*_thawed(args), **_thawed(kwargs))

        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node in names and isinstance(value, torch.Tensor):
                seen[names[node]] = value.clone()
            return value

    Cloning(fx.GraphModule(tracer.root, graph)).run(x)
    return seen


def _output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return a module's result, with attention weights that its caller did not request."""
    if type(module) is not nn.MultiheadAttention or output[1] is not None:
        return output
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    asked = {**given, "need_weights": True, "average_attn_weights": False}
    return {"0": output[0], "attention_weights": module.forward(**asked)[1]}


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    return {**{str(index): arg for index, arg in enumerate(args)}, **kwargs}


def _thawed(value: Any) -> Any:
    if isinstance(value, list):
        return [_thawed(member) for member in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_thawed(member) for member in value)
    if isinstance(value, dict):
        return {key: _thawed(member) for key, member in value.items()}
    return value


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return tuple(_clone(member) for member in value)
    if isinstance(value, dict):
        return {key: _clone(member) for key, member in value.items()}
    return value
