"""What a request should be answered, found with nothing of layertap.

A fresh module runs to its end under hooks that clone, and what it raises is kept. Calls of a module
are numbered in the order in which they begin, so that a call's input and output have one number.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Point", "Truth", "mistake", "truth_of"]

Point = tuple[str, str, int, tuple[str, ...]]
"""(module path, "output" or "input", which call, the way into a container)."""

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 4e-3, "bfloat16": 4e-2}
"""Largest error of a compiled plan, or of a pass that requests share, by the largest magnitude."""


@dataclass
class Truth:
    """What one forward pass of a fresh module held.

    Attributes:
        calls: A clone of what went into and came out of every call: (path, side, call) to value.
        error: What the model raised; empty where it ran to its end.
    """

    calls: dict[tuple[str, str, int], Any] = field(default_factory=dict)
    error: str = ""

    def values(self, point: Point) -> list[torch.Tensor]:
        """Return the tensors at a point: none, one, or several where two keys have one text."""
        path, side, call, way = point
        found = [self.calls.get((path, side, call))]
        for step in way:
            found = [member for value in found for key, member in _members(value) if key == step]
        return [value for value in found if isinstance(value, torch.Tensor)]


def truth_of(
    net: nn.Module,
    x: torch.Tensor | Mapping[str, torch.Tensor],
    seed: int = 0,
    device: str = "cpu",
) -> Truth:
    """Run a module on a copy of a batch, to its end, with a cloning hook on every submodule.

    Args:
        net: The module, which is moved to the device.
        x: The batch.
        seed: Seeds every generator of random numbers.
        device: Where to run it. The clones are on the CPU.
    """
    net.to(device)
    truth = Truth()
    open_calls: dict[str, list[int]] = {}
    begun: Counter[str] = Counter()
    attention: dict[tuple[str, int], tuple[Any, Any]] = {}

    def before(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_calls.setdefault(path, []).append(begun[path])
        given = args[0] if len(args) == 1 and not kwargs else _named(args, kwargs)
        truth.calls[path, "input", begun[path]] = _clone(given)
        if type(module) is nn.MultiheadAttention:
            attention[path, begun[path]] = args, kwargs
        begun[path] += 1

    def after(module: nn.Module, path: str, output: Any) -> None:
        call = open_calls[path].pop()
        truth.calls[path, "output", call] = _clone(output)
        if (path, call) in attention and output[1] is None:
            args, kwargs = attention[path, call]
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            weights = module.forward(*args, **asked)[1]
            truth.calls[path, "output", call]["attention_weights"] = weights.clone()

    handles = list(_hooks(net, before, after))
    # torch.manual_seed takes its time over devices that are not there.
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(x, Mapping):
                net(**{name: tensor.clone().to(device) for name, tensor in x.items()})
            else:
                net(x.clone().to(device))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is part of the truth
        truth.error = f"{type(error).__name__}: {error}"
    for handle in handles:
        handle.remove()
    return truth


def _hooks(net: nn.Module, before: Any, after: Any) -> Iterator[Any]:
    if isinstance(net, torch.jit.ScriptModule):
        # No hook can be put on a part of a program; its own result is all that is known.
        inner = net
        net = _Wrapped(inner)
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and path:
            continue
        yield module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: before(m, path, args, kwargs), with_kwargs=True
        )
        yield module.register_forward_hook(
            lambda m, args, output, path=path: after(m, path, output)
        )


class _Wrapped(nn.Module):
    def __init__(self, program: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.program = program


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{str(index): arg for index, arg in enumerate(args)}, **kwargs}


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        texts = [str(key) for key in value]
        for key, member in value.items():
            yield (repr(key) if texts.count(str(key)) > 1 else str(key)), member
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        yield from ((str(index), member) for index, member in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((each.name, getattr(value, each.name)) for each in fields(value))


class _Pairs(dict[Any, Any]):
    """A container's members, cloned."""


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _plain(value)
    if isinstance(value, Mapping):
        return {key: _clone(member) for key, member in value.items()}
    members = dict(_members(value)) if not isinstance(value, type) else {}
    return _Pairs((key, _clone(member)) for key, member in members.items()) if members else None


def _plain(value: torch.Tensor) -> torch.Tensor | None:
    """Return a copy as a client gets it: dequantised, without gradients, of plain memory."""
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None  # A tensor of vmap or grad, which means nothing outside of them.
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout is not torch.strided or value.device.type == "meta" or value.is_nested:
        return None
    return value.as_subclass(torch.Tensor).clone().resolve_conj().resolve_neg().cpu()


def mistake(got: np.ndarray, truth: torch.Tensor, *, tolerant: bool) -> str:
    """Say how an answer differs from the truth; empty where it does not.

    Args:
        got: The answer.
        truth: What it should be.
        tolerant: Whether it may be off by TOLERANCE, as arithmetic in another order is.
    """
    if truth.is_complex():
        truth = torch.view_as_real(truth)
    name = str(truth.dtype).removeprefix("torch.")
    if got.dtype.name != name or got.shape != tuple(truth.shape):
        return f"{got.dtype.name}{list(got.shape)} for {name}{list(truth.shape)}"
    if not truth.numel():
        return ""
    mine, true = _exact(got), _exact(truth)
    equal = (mine == true) | (np.isnan(mine) & np.isnan(true))
    if equal.all():
        return ""
    if not tolerant or name not in TOLERANCE:
        return f"{_error(mine, true):.1e} off"
    error = _error(mine, true)
    return "" if error <= TOLERANCE[name] else f"{error:.1e} off"


def _exact(value: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = (value.double() if value.is_floating_point() else value).numpy()
    return value.astype(np.float64)


def _error(mine: np.ndarray, true: np.ndarray) -> float:
    """Return the largest error as a share of the largest finite magnitude."""
    finite = np.isfinite(true)
    unlike = ~finite & ~((mine == true) | (np.isnan(mine) & np.isnan(true)))
    if unlike.any() or not np.isfinite(mine[finite]).all():
        return float("inf")
    scale = np.abs(true[finite]).max(initial=0.0)
    return float(np.abs(mine[finite] - true[finite]).max(initial=0.0) / (scale or 1e-300))
