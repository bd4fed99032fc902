"""What a snapshot holds of torch itself: its functions and its settings."""

# ruff: noqa: D102 - Node says what the methods do.

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from layertap.extraction.state.node import Node

__all__ = ["FunctionsNode", "SettingsNode"]


class FunctionsNode(Node):
    """The functions of torch, which a model may replace while it runs.

    They are restored only if a pass was seen to replace them. torch itself replaces
    ``manual_seed`` by a wrapper when its compiler is imported, which changes nothing.
    """

    of_torch = True

    def __init__(self) -> None:
        super().__init__("torch's functions", everywhere=True)
        self._held = [
            (place, {name: value for name, value in vars(place).items() if _is_function(value)})
            for place in (nn.functional, torch, torch.Tensor)
        ]

    def suspect(self) -> bool:
        for place, held in self._held:
            now = vars(place)
            if all(map(operator.is_, map(now.get, held), held.values())):
                continue
            for name, value in held.items():
                if _is_wrapped_by_torch(now.get(name), value):
                    held[name] = now[name]
                elif now.get(name) is not value:
                    return True
        return False

    def differing(self) -> list[str]:
        return [""] if self.suspect() else []

    def restore(self) -> None:
        if not self.always:
            return
        for place, held in self._held:
            for name, value in held.items():
                if vars(place).get(name) is not value:
                    setattr(place, name, value)


class SettingsNode(Node):
    """The process-wide settings of torch, which affect other passes too.

    Code that changes a setting is expected to restore it, so settings are restored here only if a
    pass was seen to change them.
    """

    of_torch = True

    def __init__(self) -> None:
        super().__init__("torch's settings", everywhere=True)
        self._held = self._now()

    @staticmethod
    def _now() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        )

    def suspect(self) -> bool:
        return self._now() != self._held

    def differing(self) -> list[str]:
        return [""] if self.suspect() else []

    def restore(self) -> None:
        if self.always:
            dtype, deterministic, mkldnn = self._held
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.mkldnn.enabled = mkldnn


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_wrapped_by_torch(now: Any, held: Any) -> bool:
    """Return whether a function is the wrapper by which torch keeps its compiler away from it."""
    wrapper = getattr(now, "__globals__", {}).get("__name__") == "torch._compile"
    return wrapper and getattr(now, "__wrapped__", None) is held
