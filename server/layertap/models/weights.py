"""Loads a checkpoint's weights into a module; errors name every difference."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from layertap.errors import WeightsUnavailableError
from layertap.models.checkpoint import (
    Part,
    choose_part,
    held_in,
    likely_part,
    may_be_weights,
    suggestions,
)
from layertap.models.checkpoint_files import Checkpoint, read_checkpoint

__all__ = [
    "DEFAULT",
    "RANDOM",
    "likely_state",
    "load_checkpoint",
    "load_into",
    "random_text",
    "read_checkpoint",
]

DEFAULT = "DEFAULT"
RANDOM = "random"

State = Mapping[str, Any]

_NAMED = 5


def random_text(seed: int) -> str:
    """Return what clients read for seeded weights."""
    return f"random (seed {seed})"


def load_checkpoint(module: nn.Module, checkpoint: Checkpoint, key: str = "") -> str:
    """Load the weights of a checkpoint that belong to a module.

    See Note [Which weights a file stands for] in ``layertap.models.checkpoint``.

    Args:
        module: On the CPU.
        checkpoint: What ``read_checkpoint`` returned.
        key: Which state dict is meant; empty to choose by the module's names.

    Returns:
        What clients read: the file's name, and the state dict's where there are several.

    Raises:
        WeightsUnavailableError: No state dict fits, or several do.
    """
    own = module.state_dict()
    tied = _tied(own)

    def fits(state: State) -> bool:
        whole = _aliased(state, own, checkpoint.aliases)
        missed = (name for name in own if name not in whole and _is_missed(name, whole, tied))
        return whole.keys() <= own.keys() and next(missed, None) is None

    part = choose_part(checkpoint, fits, key)
    several = bool(key) or _is_one_of_several(checkpoint, part)
    text = f"{checkpoint.name}: {part.key}" if several and part.key else checkpoint.name
    try:
        load_into(module, _aliased(part.state, own, checkpoint.aliases), text)
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(f"{error}{_ways_out(checkpoint, fits)}") from error
    return text


def likely_state(checkpoint: Checkpoint, key: str = "") -> State:
    """Return the state dict that is most likely meant, for what its names tell of the module.

    Raises:
        WeightsUnavailableError: There is none.
    """
    return likely_part(checkpoint, key).state


def load_into(module: nn.Module, state: State, origin: str) -> None:
    """Load a state dict whose every key and shape, and kind of numbers, must match the module's.

    A tensor that the module has under several names (tied weights) needs one of them only.

    Raises:
        WeightsUnavailableError: they don't; the message names the first few of each kind.
    """
    own = module.state_dict()
    tied = _tied(own)
    _check_values(own, state, tied, origin)
    if not hasattr(state, "_metadata"):
        # Without the versions that torch.save keeps, some modules (MNASNet) refuse to load.
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        # Not strict: modules may rename the keys of old files while loading; what is left is
        # judged.
        outcome = module.load_state_dict(state, strict=False)
    # Modules may convert what they load, and refuse it, by code of their own.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WeightsUnavailableError(f"weights {origin} don't fit the model: {reason}") from error
    unexpected = set(outcome.unexpected_keys)
    loaded = {key: value for key, value in state.items() if key not in unexpected}
    missing = [key for key in outcome.missing_keys if _is_missed(key, loaded, tied)]
    if missing or outcome.unexpected_keys:
        raise _mismatch(
            origin, [("missing", missing), ("not in the model", outcome.unexpected_keys)]
        )


def _check_values(
    own: State, state: State, tied: Mapping[str, frozenset[str]], origin: str
) -> None:
    """Compare what a file and a module have under one name, before anything is loaded."""
    pairs = [
        (key, state[key], value)
        for key, value in own.items()
        # What quantised modules keep besides tensors is theirs to read.
        if key in state and isinstance(value, torch.Tensor)
    ]
    wrong = [
        f"{key} is {type(given).__name__}, the model has a tensor"
        for key, given, _ in pairs
        if not isinstance(given, torch.Tensor)
    ]
    if wrong:
        raise _mismatch(origin, [("values differ", wrong)])
    wrong = [
        f"{key} is {list(given.shape)}, the model has {list(value.shape)}"
        for key, given, value in pairs
        if given.shape != value.shape
    ]
    if wrong:
        raise _mismatch(origin, [("shapes differ", wrong)])
    # Loading would convert them, and quantised weights are not numbers until they are scaled.
    wrong = [
        f"{key} is {given.dtype}, the model has {value.dtype}"
        for key, given, value in pairs
        if value.is_floating_point() and not given.is_floating_point()
    ]
    if wrong:
        raise _mismatch(origin, [("types differ", wrong)])
    wrong = [
        f"{key} and {other} are one tensor of the model, and two in the file"
        for key, given, _ in pairs
        for other in tied.get(key, ())
        if other > key
        and isinstance(state.get(other), torch.Tensor)
        and not torch.equal(given, state[other])
    ]
    if wrong:
        raise _mismatch(origin, [("tied weights differ", wrong)])


def _tied(own: State) -> dict[str, frozenset[str]]:
    """Return each name of a tensor that has several, with all of them."""
    names: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.numel() and value.data_ptr():
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            names[place].append(key)
    return {key: frozenset(keys) for keys in names.values() if len(keys) > 1 for key in keys}


def _is_missed(name: str, state: State, tied: Mapping[str, frozenset[str]]) -> bool:
    """Return whether a name that a file lacks leaves a tensor of the module without its value."""
    # The counter steers training only, and files from before torch 0.4.1 lack it.
    return not name.endswith("num_batches_tracked") and not any(
        other in state for other in tied.get(name, ())
    )


def _aliased(state: State, own: State, aliases: Mapping[str, str]) -> State:
    """Return the state with the names that safetensors left out, where the module has them."""
    left_out = {
        name: state[kept]
        for name, kept in aliases.items()
        if name in own and name not in state and kept in state
    }
    return {**state, **left_out} if left_out else state


def _is_one_of_several(checkpoint: Checkpoint, part: Part) -> bool:
    """Return whether a file holds other weights, or what may be such, alongside the chosen ones."""
    contents = checkpoint.contents
    for key in part.path:
        if any(other != key and may_be_weights(other, contents[other]) for other in contents):
            return True
        contents = contents[key]
    return False


def _ways_out(checkpoint: Checkpoint, fits: Callable[[State], bool]) -> str:
    """Return what the file holds, and which option would take the weights out of it."""
    keys = suggestions(checkpoint, fits)
    hint = f". weights_key (--weights-key) {' or '.join(map(repr, keys))} would fit" if keys else ""
    return f". The file holds {held_in(checkpoint.contents)}{hint}"


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
