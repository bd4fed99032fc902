"""Loads a checkpoint's weights into a module; errors name every difference."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from layertap.errors import WeightsUnavailableError
from layertap.listing import listed
from layertap.models.checkpoint import (
    Part,
    StateDict,
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

_NAMED = 5


def random_text(seed: int) -> str:
    """Return the description of seeded weights that clients read."""
    return f"random (seed {seed})"


def load_checkpoint(module: nn.Module, checkpoint: Checkpoint, key: str = "") -> str:
    """Load the weights of a checkpoint that belong to a module.

    See Note [Which weights a file stands for] in ``layertap.models.checkpoint``.

    Args:
        module: The module, on the CPU.
        checkpoint: The result of ``read_checkpoint``.
        key: The ``weights_key`` of a state dict; empty to choose by the module's names.

    Returns:
        The text that clients read: the file's name, and the state dict's if there are several.

    Raises:
        WeightsUnavailableError: No state dict fits, or several do.
    """
    own = module.state_dict()
    tied = _tied(own)

    def fits(state: StateDict) -> bool:
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


def likely_state(checkpoint: Checkpoint, key: str = "") -> StateDict:
    """Return the state dict that is most likely meant, to learn from its names about the module.

    Raises:
        WeightsUnavailableError: There is none.
    """
    return likely_part(checkpoint, key).state


def load_into(module: nn.Module, state: StateDict, origin: str) -> None:
    """Load a state dict. Its keys, shapes and kinds of numbers must match the module's.

    If a tensor has several names in the module (tied weights), one of them is enough.

    Raises:
        WeightsUnavailableError: They don't match. The message names the first few differences.
    """
    own = module.state_dict()
    tied = _tied(own)
    _check_values(own, state, tied, origin)
    if not hasattr(state, "_metadata"):
        # Without the module versions that torch.save stores, some modules (MNASNet) fail to load.
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        # Not strict, because modules may rename keys of old files while loading. The remaining
        # differences are checked below.
        outcome = module.load_state_dict(state, strict=False)
    # A module's own loading code may convert or refuse its entries, and raise anything.
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
    own: StateDict, state: StateDict, tied: Mapping[str, frozenset[str]], origin: str
) -> None:
    """Compare the entries that a file and a module share, before anything is loaded."""
    pairs = [
        (key, state[key], value)
        for key, value in own.items()
        # Quantised modules also keep entries that are not tensors, and read these themselves.
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
    # Loading would convert them. But quantised weights are no usable numbers until scaled.
    wrong = [
        f"{key} is {given.dtype}, the model has {value.dtype}"
        for key, given, value in pairs
        if value.is_floating_point() and not given.is_floating_point()
    ]
    if wrong:
        raise _mismatch(origin, [("types differ", wrong)])
    wrong = [
        f"{key} and {other} are one tensor in the model, but two different ones in the file"
        for key, given, _ in pairs
        for other in tied.get(key, ())
        if other > key
        and isinstance(state.get(other), torch.Tensor)
        and not torch.equal(given, state[other])
    ]
    if wrong:
        raise _mismatch(origin, [("tied weights differ", wrong)])


def _tied(own: StateDict) -> dict[str, frozenset[str]]:
    """Return all names of each tensor that has several names, by each of its names."""
    names: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.numel() and value.data_ptr():
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            names[place].append(key)
    return {key: frozenset(keys) for keys in names.values() if len(keys) > 1 for key in keys}


def _is_missed(name: str, state: StateDict, tied: Mapping[str, frozenset[str]]) -> bool:
    """Return whether a tensor of the module gets no value, as a file lacks this name."""
    # num_batches_tracked matters only in training, and files from before torch 0.4.1 lack it.
    return not name.endswith("num_batches_tracked") and not any(
        other in state for other in tied.get(name, ())
    )


def _aliased(state: StateDict, own: StateDict, aliases: Mapping[str, str]) -> StateDict:
    """Return the state with the names that safetensors did not store, if the module has them."""
    left_out = {
        name: state[kept]
        for name, kept in aliases.items()
        if name in own and name not in state and kept in state
    }
    return {**state, **left_out} if left_out else state


def _is_one_of_several(checkpoint: Checkpoint, part: Part) -> bool:
    """Return whether a file holds, or may hold, other weights than the chosen ones."""
    contents = checkpoint.contents
    for key in part.path:
        if any(other != key and may_be_weights(other, contents[other]) for other in contents):
            return True
        contents = contents[key]
    return False


def _ways_out(checkpoint: Checkpoint, fits: Callable[[StateDict], bool]) -> str:
    """Return what the file holds, and which option would select fitting weights."""
    keys = suggestions(checkpoint, fits)
    hint = f". weights_key (--weights-key) {' or '.join(map(repr, keys))} would fit" if keys else ""
    return f". The file holds {held_in(checkpoint.contents)}{hint}"


def _mismatch(origin: str, groups: Iterable[tuple[str, list[str]]]) -> WeightsUnavailableError:
    parts = []
    for title, entries in groups:
        if entries:
            parts.append(f"{title}: {listed(entries, _NAMED)}")
    return WeightsUnavailableError(
        f"weights {origin} don't fit the model: {'; '.join(parts)}. Use weights of exactly this "
        "architecture, or build yours in a factory 'package.module:function'"
    )
