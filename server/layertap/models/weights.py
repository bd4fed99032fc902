"""State dicts: read from a file, and loaded into a module with every difference named."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from layertap.errors import WeightsUnavailableError

__all__ = ["DEFAULT", "RANDOM", "is_path", "load_into", "random_text", "read_state_dict"]

DEFAULT = "DEFAULT"
RANDOM = "random"

StateDict = Mapping[str, torch.Tensor]

_SUFFIXES = frozenset({".pth", ".pt", ".safetensors", ".bin", ".ckpt"})
_NESTED_UNDER = ("state_dict", "model")
# Wrappers that rename every key: DataParallel and torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_NAMED = 5
_NOT_A_STATE_DICT = "expected a state dict, as saved by torch.save(model.state_dict(), PATH)"


def is_path(weights: str) -> bool:
    """Tell whether the text names a file rather than a weights member."""
    return "/" in weights or os.sep in weights or PurePath(weights).suffix in _SUFFIXES


def random_text(seed: int) -> str:
    """Return what clients read for seeded weights."""
    return f"random (seed {seed})"


def read_state_dict(path: str) -> StateDict:
    """Read a .safetensors or torch.save file onto the CPU, without running any code in it.

    A dict nested under ``state_dict`` or ``model`` is unwrapped, and a prefix that DataParallel or
    torch.compile put before every key is dropped.

    Raises:
        WeightsUnavailableError: there is no such file, or it holds no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsUnavailableError(f"weights file {path}: no such file")
    loaded = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    for key in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise WeightsUnavailableError(
            f"weights file {path}: got {type(loaded).__name__}, {_NOT_A_STATE_DICT}"
        )
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsUnavailableError(
                f"weights file {path}: got {type(value).__name__} under {key!r}, "
                f"{_NOT_A_STATE_DICT}"
            )
    return _without_wrapper(loaded)


def load_into(module: nn.Module, state: StateDict, origin: str) -> None:
    """Load a state dict whose every key and shape, and kind of numbers, must match the module's.

    Raises:
        WeightsUnavailableError: they don't; the message names the first few of each kind.
    """
    own = module.state_dict()
    wrong = [
        f"{key} is {list(state[key].shape)}, the model has {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise _mismatch(origin, [("shapes differ", wrong)])
    # Loading would convert them, and quantised weights are no numbers until they are scaled.
    unlike = [
        f"{key} is {state[key].dtype}, the model has {value.dtype}"
        for key, value in own.items()
        if key in state and value.is_floating_point() and not state[key].is_floating_point()
    ]
    if unlike:
        raise _mismatch(origin, [("types differ", unlike)])
    if not hasattr(state, "_metadata"):
        # Without the versions that torch.save keeps, some modules (MNASNet) refuse to load.
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
    # Not strict: modules may rename the keys of old files while loading; what is left is judged.
    outcome = module.load_state_dict(state, strict=False)
    # The counter steers training only, and files from before torch 0.4.1 lack it.
    missing = [key for key in outcome.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or outcome.unexpected_keys:
        raise _mismatch(
            origin, [("missing", missing), ("not in the model", outcome.unexpected_keys)]
        )


def _read_safetensors(file: Path) -> Any:
    try:
        return safetensors.torch.load_file(file, device="cpu")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(file, error) from error


def _read_pickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # A file of another kind reaches torch's unpickler, which raises what it happens to trip over.
    except (
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> WeightsUnavailableError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsUnavailableError(f"weights file {file}: {reason}; {_NOT_A_STATE_DICT}")


def _without_wrapper(state: Mapping[str, torch.Tensor]) -> StateDict:
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _without_wrapper(
                {key.removeprefix(prefix): value for key, value in state.items()}
            )
    return state


def _mismatch(origin: str, groups: Iterable[tuple[str, list[str]]]) -> WeightsUnavailableError:
    parts = []
    for title, entries in groups:
        if entries:
            more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
            parts.append(f"{title}: {', '.join(entries[:_NAMED])}{more}")
    return WeightsUnavailableError(
        f"weights {origin} don't fit the model: {'; '.join(parts)}. Use weights of this very "
        "architecture, or build yours in a factory 'package.module:function'"
    )
