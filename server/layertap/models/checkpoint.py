"""Finds the state dict in a checkpoint that belongs to a module, and maps its names.

Note [Which weights a file stands for]
    A training script saves more than a state dict: several of them, nested in dicts, with names to
    which wrappers added a prefix. The module's own names decide which one to load:

    * A state dict is used as it is if its names are those of the module. So a model whose own
      names begin with ``module.`` or ``model.`` is not harmed.
    * Otherwise the names are tried without the prefixes of wrappers: ``module.`` (DataParallel,
      DistributedDataParallel), ``module.`` alongside ``n_averaged`` (AveragedModel), ``_orig_mod``
      (torch.compile), and the module's attribute in a checkpoint of PyTorch Lightning. If the
      module itself is wrapped by DataParallel or compiled, it accepts the names inside the wrapper.
    * If a file has both raw and EMA weights, the EMA weights are loaded, as timm's loader does. The
      description that clients read says so.
    * Anything else is refused. The error says what the file holds and which ``weights_key`` fits.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layertap.errors import WeightsUnavailableError
from layertap.listing import listed
from layertap.models.checkpoint_files import NOT_A_STATE_DICT, Checkpoint
from layertap.models.stand_ins import StandIn

__all__ = [
    "Part",
    "StateDict",
    "choose_part",
    "held_in",
    "likely_part",
    "may_be_weights",
    "suggestions",
]

_DEPTH = 4
_NAMED = 12
_EMA = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
# The attributes in which these wrappers keep the module; no model's own names contain them.
_TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_AVERAGED = "n_averaged"
_DATA_PARALLEL = "module."
_OWN_WRAPPERS = (_DATA_PARALLEL, "_orig_mod.")
# Every checkpoint of PyTorch Lightning has these.
_LIGHTNING = ("pytorch-lightning_version", "state_dict", "epoch", "global_step")

StateDict = Mapping[str, Any]
"""A state dict, whose values may include other things than tensors."""

Fits = Callable[[StateDict], bool]
"""Returns whether a state dict has the module's names."""


@dataclass(frozen=True, slots=True)
class Part:
    """One state dict of a checkpoint.

    Attributes:
        path: The keys that lead to it; empty if the file itself is the state dict.
        state: Its entries by name: tensors, and whatever else was saved with them.
    """

    path: tuple[str, ...]
    state: StateDict

    @property
    def key(self) -> str:
        """The ``weights_key`` that selects it."""
        return ".".join(self.path)


def choose_part(checkpoint: Checkpoint, fits: Fits, key: str) -> Part:
    """Return the state dict that belongs to a module, with the module's names if it fits.

    See Note [Which weights a file stands for]. If nothing fits and there is only one state dict, it
    is returned, so that the caller can say what differs.

    Args:
        checkpoint: The content of the checkpoint.
        fits: Returns whether a state dict has the module's names.
        key: The ``weights_key``; empty to choose by the names.

    Raises:
        WeightsUnavailableError: There is no state dict, none of several fits, several fit, or
            the key leads nowhere.
    """
    lightning = _is_lightning(checkpoint.contents)
    if key:
        part = _at(checkpoint, key)
        return _fitting(part, fits, lightning=False) or Part(part.path, _unwrapped(part.state))
    parts = _parts_of(checkpoint)
    fitting = [fit for part in parts if (fit := _fitting(part, fits, lightning=lightning))]
    if not fitting:
        if len(parts) == 1:
            return Part(parts[0].path, _unwrapped(parts[0].state))
        raise _refusal(checkpoint, fits, "none of its state dicts has the model's names")
    if len(fitting) == 1 or all(_same(fitting[0], other) for other in fitting[1:]):
        return fitting[0]
    averaged = [part for part in fitting if part.path and _EMA.search(part.path[-1])]
    others = [part for part in fitting if part not in averaged]
    if len(averaged) == 1 and all(_is_plain(part) for part in others):
        return averaged[0]
    choices = ", ".join(repr(part.key) for part in fitting)
    raise WeightsUnavailableError(
        f"weights {checkpoint.path}: {len(fitting)} state dicts in it fit the model; choose one "
        f"with weights_key (--weights-key): {choices}. The file holds "
        f"{held_in(checkpoint.contents)}"
    )


def likely_part(checkpoint: Checkpoint, key: str) -> Part:
    """Return the state dict that is most likely meant, when the module is not built yet.

    Raises:
        WeightsUnavailableError: There is none.
    """
    if key:
        part = _at(checkpoint, key)
    else:
        parts = _parts_of(checkpoint)
        averaged = [part for part in parts if part.path and _EMA.search(part.path[-1])]
        part = max(averaged or parts, key=lambda part: len(part.state))
    return Part(part.path, _unwrapped(part.state))


def suggestions(checkpoint: Checkpoint, fits: Fits) -> list[str]:
    """Return the values of ``weights_key`` that would give exactly the module's names."""
    found = []
    for part in _all_parts(checkpoint.contents):
        for prefix in _prefixes(part.state):
            inner = _below(part.state, prefix)
            if fits(inner):
                found.append(".".join([*part.path, prefix.removesuffix(".")]))
    return found


def held_in(contents: Any) -> str:
    """Describe what a checkpoint holds, such as ``"state_dict (102 tensors), epoch"``."""
    if not isinstance(contents, Mapping):
        return _kind(contents)
    return listed((f"{key} ({_kind(value)})" for key, value in contents.items()), _NAMED)


def may_be_weights(key: object, value: Any) -> bool:
    """Return whether an entry of a checkpoint holds tensors, or EMA weights in another form."""
    if isinstance(value, Mapping):
        return any(isinstance(each, torch.Tensor) for each in value.values())
    return bool(_EMA.search(str(key))) and isinstance(value, (list, tuple, StandIn))


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        tensors = sum(isinstance(each, torch.Tensor) for each in value.values())
        inner = [str(key) for key, each in value.items() if isinstance(each, Mapping)]
        if not tensors and inner:
            return f"dict with {', '.join(inner[:_NAMED])}"
        return f"{tensors} tensors" if tensors else "dict"
    return _class_of(value)


def _class_of(value: Any) -> str:
    return f"object of {value.origin}" if isinstance(value, StandIn) else type(value).__name__


def _parts_of(checkpoint: Checkpoint) -> list[Part]:
    """Return the state dicts of a checkpoint; raise if there is none."""
    parts = list(_all_parts(checkpoint.contents))
    if not parts:
        empty = isinstance(checkpoint.contents, Mapping) and not checkpoint.contents
        what = "is empty" if empty else f"holds {held_in(checkpoint.contents)}"
        raise WeightsUnavailableError(
            f"weights {checkpoint.path}: the file {what}; {NOT_A_STATE_DICT}"
        )
    return parts


def _all_parts(contents: Any, path: tuple[str, ...] = ()) -> Iterator[Part]:
    """Yield every dict that holds tensors, outermost first."""
    if not isinstance(contents, Mapping) or not all(isinstance(key, str) for key in contents):
        return  # An optimizer's state has numbers as keys.
    if any(isinstance(value, torch.Tensor) for value in contents.values()):
        yield Part(path, contents)
    if len(path) < _DEPTH:
        for key, value in contents.items():
            yield from _all_parts(value, (*path, key))


def _fitting(part: Part, fits: Fits, *, lightning: bool) -> Part | None:
    """Return the part with the first variant of its names that the module has; None if none."""
    for state in _variants(part, lightning=lightning):
        if fits(state):
            return Part(part.path, state)
    return None


def _variants(part: Part, *, lightning: bool) -> Iterator[StateDict]:
    bare = _without_transparent(part.state)
    # If the module itself is compiled, its own names have torch.compile's prefix. Numbers and texts
    # among the tensors, such as an epoch, are not weights.
    for state in _distinct(part.state, bare, _tensors_of(bare)):
        yield state
        inner = state
        if _AVERAGED in inner:
            inner = _renamed(inner, lambda key: None if key == _AVERAGED else key)
        while inner and all(key.startswith(_DATA_PARALLEL) for key in inner):
            inner = _below(inner, _DATA_PARALLEL)
            yield inner
        if lightning:
            for prefix in _prefixes(inner):
                if all(key.startswith(prefix) for key in inner):
                    yield _below(inner, prefix)
    # The module itself may be wrapped, while the file has the names inside the wrapper.
    for prefix in _OWN_WRAPPERS:
        yield _renamed(part.state, prefix.__add__)


def _distinct(*states: StateDict) -> Iterator[StateDict]:
    seen: list[StateDict] = []
    for state in states:
        if not any(state is other for other in seen):
            seen.append(state)
            yield state


def _tensors_of(state: StateDict) -> StateDict:
    if all(isinstance(value, torch.Tensor) for value in state.values()):
        return state
    others = {key for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return _renamed(state, lambda key: None if key in others else key)


def _unwrapped(state: StateDict) -> StateDict:
    """Return the state without anything that wrappers may have added to its names."""
    bare = _without_transparent(state)
    if _AVERAGED in bare:
        bare = _renamed(bare, lambda key: None if key == _AVERAGED else key)
    while bare and all(key.startswith(_DATA_PARALLEL) for key in bare):
        bare = _below(bare, _DATA_PARALLEL)
    return bare


def _without_transparent(state: StateDict) -> StateDict:
    if not any(_TRANSPARENT & set(key.split(".")) for key in state):
        return state
    return _renamed(
        state, lambda key: ".".join(part for part in key.split(".") if part not in _TRANSPARENT)
    )


def _below(state: StateDict, prefix: str) -> StateDict:
    """Return the entries whose names begin with a prefix, without the prefix."""
    return _renamed(state, lambda key: key[len(prefix) :] if key.startswith(prefix) else None)


def _renamed(state: StateDict, rename: Callable[[str], str | None]) -> StateDict:
    """Return the state with other names, and with the module versions that torch.save stores.

    Modules read these versions to convert what older releases of them saved.
    """
    renamed: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        if (new := rename(key)) is not None:
            renamed[new] = value
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        # Module paths: the outermost module's is empty, and there is no dot at the end.
        kept = {}
        for path, version in versions.items():
            new = rename(f"{path}." if path else "")
            if new is not None:
                kept[new.removesuffix(".")] = version
        renamed._metadata = kept  # type: ignore[attr-defined]
    return renamed


def _prefixes(state: StateDict) -> list[str]:
    """Return every prefix of the names that ends with a dot, shortest first."""
    found: dict[str, None] = {}
    for key in state:
        parts = key.split(".")[:-1]
        for end in range(1, min(len(parts), _DEPTH) + 1):
            found[".".join(parts[:end]) + "."] = None
    return sorted(found, key=len)


def _at(checkpoint: Checkpoint, key: str) -> Part:
    """Return the part that a ``weights_key`` selects: keys of dicts, then a prefix of names."""
    parts = list(_all_parts(checkpoint.contents))
    for part in parts:
        if part.key == key:
            return part
    for part in parts:
        begin = f"{part.key}." if part.path else ""
        # If the file has only one state dict, its own key may be left out.
        for start in {begin, ""} if len(parts) == 1 else {begin}:
            if key.startswith(start):
                inner = _below(part.state, f"{key[len(start) :]}.")
                if inner:
                    return Part((key,), inner)
    raise WeightsUnavailableError(
        f"weights_key of {checkpoint.path}: got {key!r}, which leads to no state dict. The file "
        f"holds {held_in(checkpoint.contents)}"
    )


def _is_lightning(contents: Any) -> bool:
    return isinstance(contents, Mapping) and all(key in contents for key in _LIGHTNING)


def _is_plain(part: Part) -> bool:
    """Return whether a part's key is a common one for raw weights."""
    return not part.path or part.path[-1] in (
        *("state_dict", "model", "model_state_dict", "net", "network", "params", "weights"),
    )


def _same(part: Part, other: Part) -> bool:
    return part.state.keys() == other.state.keys() and all(
        value is other.state[key]
        or (
            isinstance(value, torch.Tensor)
            and isinstance(other.state[key], torch.Tensor)
            and torch.equal(value, other.state[key])
        )
        for key, value in part.state.items()
    )


def _refusal(checkpoint: Checkpoint, fits: Fits, reason: str) -> WeightsUnavailableError:
    keys = suggestions(checkpoint, fits)
    hint = (
        f"give weights_key (--weights-key), one of {', '.join(map(repr, keys[:_NAMED]))}"
        if keys
        else "choose one with weights_key (--weights-key) to see what differs"
    )
    return WeightsUnavailableError(
        f"weights {checkpoint.path}: {reason}; {hint}. The file holds "
        f"{held_in(checkpoint.contents)}"
    )
