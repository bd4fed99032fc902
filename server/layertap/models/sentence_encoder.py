"""Models of sentence-transformers: a transformers model, then pooling and other modules.

The package sentence-transformers is not needed. ``modules.json`` lists the modules, which become
layers named after their kind: ``transformer``, ``pooling``, ``dense`` and ``normalize``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.text import IDS, MASK, TYPES
from layertap.models.weights import load_checkpoint, read_checkpoint

__all__ = [
    "SENTENCE_INPUTS",
    "Dense",
    "Normalize",
    "Pooling",
    "SentenceEncoder",
    "has_modules",
    "longest_text",
    "parts_of",
    "transformer_folder",
]

_MODULES = "modules.json"

SENTENCE_INPUTS = (IDS, MASK, TYPES)
"""The arguments of a SentenceEncoder's ``forward``."""

_TRANSFORMER = "Transformer"
_TINY = 1e-9


class Pooling(nn.Module):
    """Computes one vector from the states of a text's tokens; padding does not count.

    Args:
        modes: What to compute, such as ``("mean_tokens",)``; several results are concatenated.
    """

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return ``[B, C * len(modes)]`` for states ``[B, L, C]`` and a mask ``[B, L]``."""
        return torch.cat([_MODES[mode](states, mask) for mode in self.modes], 1)

    def extra_repr(self) -> str:
        """Show the modes."""
        return ", ".join(self.modes)


class Normalize(nn.Module):
    """Divides a vector by its Euclidean length."""

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``[B, C]`` of length 1 for ``[B, C]``."""
        return nn.functional.normalize(vector, p=2.0, dim=1)


class Dense(nn.Module):
    """A linear layer and its activation function."""

    def __init__(self, config: Mapping[str, Any], activation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(
            config["in_features"], config["out_features"], bias=config.get("bias", True)
        )
        self.activation_function = activation

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``[B, out]`` for ``[B, in]``."""
        result: torch.Tensor = self.activation_function(self.linear(vector))
        return result


class SentenceEncoder(nn.Module):
    """Computes one vector for a text.

    Args:
        transformer: A model whose result has ``last_hidden_state``.
        parts: The modules after it by name, the pooling first.
    """

    def __init__(self, transformer: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.transformer = transformer
        for name, part in parts.items():
            self.add_module(name, part)
        self._after = tuple(name for name in parts if name != "pooling")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[B, C]`` for token ids ``[B, L]``; without a mask every token counts."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        result = self.transformer(
            input_ids=input_ids, **{name: x for name, x in given.items() if x is not None}
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vector: torch.Tensor = self.get_submodule("pooling")(result.last_hidden_state, mask)
        for name in self._after:
            vector = self.get_submodule(name)(vector)
        return vector


_Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _weights(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask.unsqueeze(-1).expand(states.shape).to(states.dtype)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), mask.argmax(1)]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask != 0, positions, -1).amax(1).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), last]


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = _weights(states, mask)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=_TINY)


def _mean_sqrt(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = _weights(states, mask)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=_TINY).sqrt()


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(1, states.shape[1] + 1, device=states.device)
    weights = _weights(states, mask) * positions[:, None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=_TINY)


# The keys of its configuration, in the order in which vectors are concatenated.
_MODES: dict[str, _Pool] = {
    "cls_token": _first,
    "max_tokens": _max,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
# What newer configurations call them.
_SHORT = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


def has_modules(folder: Path) -> bool:
    """Return whether a folder is one of sentence-transformers."""
    return (folder / _MODULES).is_file()


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the model of transformers.

    Raises:
        ModelLoadError: The first module is not a transformers model.
    """
    kind, place = _listed(folder)[0]
    if kind != _TRANSFORMER:
        raise _unsupported(folder, kind)
    return place


def longest_text(folder: Path) -> int:
    """Return the maximum number of tokens in the folder's settings; 0 if they have none."""
    file = transformer_folder(folder) / "sentence_bert_config.json"
    if not file.is_file():
        return 0
    return int(_read(file).get("max_seq_length") or 0)


def parts_of(folder: Path, *, weights: bool) -> dict[str, nn.Module]:
    """Return the modules after the model of transformers, by name.

    Args:
        folder: The folder of sentence-transformers.
        weights: Whether to load their weights; otherwise they are random.

    Raises:
        ModelLoadError: A module is of an unsupported kind, or the first one is not pooling.
        WeightsUnavailableError: A module's weights can't be read.
    """
    parts: dict[str, nn.Module] = {}
    for kind, place in _listed(folder)[1:]:
        if kind not in _MAKE or (kind == "Pooling") == bool(parts):
            raise _unsupported(folder, kind)
        name = kind.lower()
        part = _MAKE[kind](place)
        if weights and part.state_dict():
            load_checkpoint(part, read_checkpoint(str(place)))
        parts[f"{name}_{len(parts)}" if name in parts else name] = part
    if not parts:
        raise ModelLoadError(
            f"{folder.name}: {_MODULES} has no Pooling, expected one after the first"
        )
    return parts


def _pooling(place: Path) -> nn.Module:
    config = _read(place / "config.json")
    modes: list[str]
    if "pooling_mode" in config:
        given = config["pooling_mode"]
        modes = [_SHORT.get(mode, mode) for mode in ([given] if isinstance(given, str) else given)]
    else:
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in config.items()
            if key.startswith("pooling_mode_") and value
        ]
    unknown = [mode for mode in modes if mode not in _MODES]
    if unknown or not modes:
        raise ModelLoadError(
            f"{place.name}: got pooling by {', '.join(unknown) or 'nothing'}, expected some of "
            f"{', '.join(_MODES)}"
        )
    return Pooling(tuple(mode for mode in _MODES if mode in modes))


def _dense(place: Path) -> nn.Module:
    config = _read(place / "config.json")
    name = str(config.get("activation_function") or "Tanh").rpartition(".")[2]
    # Only the classes of torch.nn: the configuration could name anything to import.
    activation = getattr(nn.modules.activation, name, None) or getattr(nn, name, None)
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ModelLoadError(
            f"{place.name}: got activation function {name!r}, expected one of torch.nn"
        )
    return Dense(config, activation())


_MAKE: dict[str, Callable[[Path], nn.Module]] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "Normalize": lambda _: Normalize(),
}


def _listed(folder: Path) -> list[tuple[str, Path]]:
    """Return the kind and the folder of each module."""
    listed = sorted(json.loads((folder / _MODULES).read_text("utf-8")), key=lambda row: row["idx"])
    found = []
    for row in listed:
        path = PurePath(row["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ModelLoadError(f"{folder.name}: {_MODULES} names {row['path']!r}, outside of it")
        found.append((str(row["type"]).rpartition(".")[2], folder / path))
    if not found:
        raise ModelLoadError(f"{folder.name}: {_MODULES} is empty")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file.parent.name}/{file.name}: {error}") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{file.parent.name}/{file.name}: expected a JSON object")
    return found


def _unsupported(folder: Path, kind: str) -> ModelLoadError:
    return ModelLoadError(
        f"{folder.name}: got a module {kind} of sentence-transformers here, expected Transformer, "
        f"Pooling, then {', '.join(k for k in _MAKE if k != 'Pooling')}; build it in a factory "
        f"'package.module:function'"
    )
