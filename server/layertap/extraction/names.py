"""The names of layers: module paths, repeated calls, members of containers, the model's result.

Note [Names]
    - A module's first call is named by the module's path: ``layer1.0.conv1``. Its further calls are
      ``path_1``, ``path_2`` and so on; ``path@1`` if a module has the name ``path_1``.
    - A module that can be reached by several paths has a name for each. The first path, in the
      order of ``named_modules``, gives its own name; the other names are aliases.
    - A member of a tuple, a dict or a dataclass is ``path.0`` or ``path.key``. If a module has that
      name, as in a ``Sequential`` that returns a tuple, it is ``path[0]`` or ``path[key]``. So is a
      member below it: if a ``Sequential`` ends in an LSTM, ``rnn.1.0`` is the output of the LSTM
      ``rnn.1``, and ``rnn[1][0]`` is the hidden state in what the ``Sequential`` returns. And so is
      a member of a key with a dot, which would look like two keys: ``path[a.b]``.
    - The model's own result is ``output``; ``model_output`` if a module of the model has that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import nn

__all__ = ["RESULT", "LayerNames", "aliases"]

RESULT = "output"
"""The name of the model's own result, unless a module has that name."""

_NUMBER = re.compile(r"[_@]\d+$")
"""Behind a module's path in the names of its further calls."""

MAX_ALIASES = 10_000
"""Limit on aliases per model. Models whose modules share parts can have very many paths."""


def aliases(module: nn.Module) -> dict[str, str]:
    """Return the further paths of a model's modules, each with the path from ``named_modules``.

    A path never visits a module twice, so modules that contain each other cause no endless path.
    The parts of a TorchScript program have one path each.
    """
    first = {id(submodule): path for path, submodule in module.named_modules()}
    found: dict[str, str] = {}
    for path, submodule in _paths(module, "", set()):
        if path != first[id(submodule)]:
            found[path] = first[id(submodule)]
        if len(found) == MAX_ALIASES:
            break
    return found


def _paths(module: nn.Module, path: str, above: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in above:
        return
    yield path, module
    if isinstance(module, torch.jit.ScriptModule):
        return
    inside = above | {id(module)}
    for name, child in module._modules.items():
        if child is not None:
            yield from _paths(child, f"{path}.{name}" if path else name, inside)


class LayerNames:
    """Names for the values of one model; see Note [Names].

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._aliases: dict[str, list[str]] = {}
        for alias, path in aliases(module).items():
            self._aliases.setdefault(path, []).append(alias)
        self._paths = {path for path, _ in module.named_modules()}
        self._paths.update(alias for paths in self._aliases.values() for alias in paths)
        self.result = RESULT
        while self.result in self._paths:
            self.result = f"model_{self.result}"

    def of_call(self, path: str, call: int) -> list[str]:
        """Return the names of a module's call; the one with the module's first path comes first."""
        if not path:
            return [self.result]
        return [self._numbered(each, call) for each in (path, *self._aliases.get(path, ()))]

    def of_member(self, call: str, way: tuple[str, ...]) -> str:
        """Return the name of a member of the container that a call returned or was given.

        Args:
            call: One of the names of the call.
            way: The keys that lead to the member; empty for a plain tensor.
        """
        names = list(accumulate(way, "{}.{}".format, initial=call))
        if any("." in key for key in way) or any(map(self._is_call, names[1:])):
            return call + "".join(f"[{key}]" for key in way)
        return names[-1]

    def _is_call(self, name: str) -> bool:
        """Return whether a module's call has this name, or may have it if the module runs often."""
        return name in self._paths or _NUMBER.sub("", name) in self._paths

    def _numbered(self, path: str, call: int) -> str:
        name = f"{path}_{call}" if call else path
        return f"{path}@{call}" if call and name in self._paths else name

    def aliases_of(self, path: str) -> list[str]:
        """Return the further paths of the module with this path."""
        return self._aliases.get(path, [])
