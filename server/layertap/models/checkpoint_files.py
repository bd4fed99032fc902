"""Finds and reads the files of a path that is given as ``weights``."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import safetensors
import torch

from layertap.errors import WeightsUnavailableError
from layertap.models.stand_ins import load_pickled
from layertap.settings.paths import INDEX_SUFFIX, WEIGHTS_SUFFIXES, expanded, is_path

__all__ = [
    "Checkpoint",
    "config_folder",
    "files_of_weights",
    "read_checkpoint",
]

CONFIG_FILES = (
    *("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"),
    *("config.json", "open_clip_config.json"),
)
"""The names of the configuration files of Hugging Face's, timm's and open_clip's libraries."""

NOT_A_STATE_DICT = "expected a state dict, as saved by torch.save(model.state_dict(), PATH)"

_NAMED = 12
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.[a-z]+$")
# In folders that Hugging Face, timm or open_clip saved, the weights have these names, and the
# configuration beside them is theirs. Next to other weights, config.json may be anything.
_PUBLISHED = ("model.", "pytorch_model.", "open_clip_", "diffusion_pytorch_model.")
# The files to look for in a folder, in the order of Hugging Face's own loader.
_PREFERRED = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    *("open_clip_model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint's files.

    Attributes:
        path: The given path, for messages to the operator.
        name: The last component of the path, for messages to clients.
        contents: Tensors, numbers, texts and containers of them; ``StandIn`` for other objects.
        aliases: Names that safetensors did not store because another name has the same tensor, each
            with the name that it stored.
    """

    path: str
    name: str
    contents: Any
    aliases: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint onto the CPU, without running code that it contains.

    Args:
        path: A file of safetensors or torch.save, an index file (``*.index.json``) next to its
            shards, or a folder that holds one of these.

    Raises:
        WeightsUnavailableError: There is no such file, it can't be read, or a shard is missing.
    """
    file = _file_of(path)
    name = Path(path).absolute().name
    if file.name.endswith(INDEX_SUFFIX):
        contents, aliases = _read_shards(file)
    else:
        shard = _SHARD.search(file.name)
        if shard is not None and int(shard[2]) > 1:
            raise WeightsUnavailableError(
                f"weights file {file}: it is shard {int(shard[1])} of {int(shard[2])}; give the "
                f"folder or the index file ({_index_beside(file)}) instead"
            )
        contents, aliases = _read(file)
    return Checkpoint(path, name, contents, aliases)


def files_of_weights(path: str) -> tuple[Path, ...]:
    """Return the files from which weights are read, as far as that can be determined.

    These are the weights file, or the index and its shards, and the configuration next to them.
    """
    folder = config_folder(path)
    config = () if folder is None else tuple(folder / name for name in CONFIG_FILES)
    try:
        file = _file_of(path)
        if not file.name.endswith(INDEX_SUFFIX):
            return (file, *config)
        shards = sorted(set(_weight_map(file).values()))
    except WeightsUnavailableError:
        return (expanded(path), *config)
    return (file, *(file.parent / shard for shard in shards), *config)


def config_folder(weights: str) -> Path | None:
    """Return the folder whose configuration files belong to the weights; None if there is none."""
    if not is_path(weights):
        return None
    path = expanded(weights)
    if path.is_dir():
        return path
    published = path.name.endswith(INDEX_SUFFIX) or path.name.startswith(_PUBLISHED)
    return path.parent if published and path.is_file() else None


def _file_of(path: str) -> Path:
    file = expanded(path)
    if file.is_dir():
        return _file_in(file)
    if not file.is_file():
        raise WeightsUnavailableError(f"weights file {path}: no such file")
    return file


def _file_in(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for name in _PREFERRED:
        if name in names:
            return folder / name
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    whole = [
        name
        for name in names
        if PurePath(name).suffix in WEIGHTS_SUFFIXES and _SHARD.search(name) is None
    ]
    found = indices or whole
    if len(found) == 1:
        return folder / found[0]
    if found:
        held = f"it holds {', '.join(found)}; name one of them"
    else:
        held = f"it holds {', '.join(names[:_NAMED]) or 'no file'}"
    raise WeightsUnavailableError(
        f"weights folder {folder}: expected one weights file (such as model.safetensors) or one "
        f"index file (such as model.safetensors{INDEX_SUFFIX}); {held}"
    )


def _index_beside(shard: Path) -> str:
    """Return the name of the index file for a shard; a pattern if it can't be determined."""
    beside = sorted(entry.name for entry in shard.parent.glob(f"*{INDEX_SUFFIX}"))
    return beside[0] if len(beside) == 1 else f"*{INDEX_SUFFIX}"


def _read_shards(index: Path) -> tuple[dict[str, Any], dict[str, str]]:
    weight_map = _weight_map(index)
    state: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            raise WeightsUnavailableError(
                f"weights index {index}: the shard {shard} that it names is not there"
            )
        contents, left_out = _read(file)
        aliases |= left_out
        for key in (key for key, of in weight_map.items() if of == shard):
            if not isinstance(contents, Mapping) or key not in contents:
                raise WeightsUnavailableError(
                    f"weights index {index}: the shard {shard} lacks {key!r}, which the index says "
                    f"is in it"
                )
            state[key] = contents[key]
    return state, aliases


def _weight_map(index: Path) -> dict[str, str]:
    """Return each tensor's shard. Shards must be files next to the index."""
    try:
        content = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(f"weights index {index}: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(
            isinstance(shard, str) and shard and PurePath(shard).name == shard
            for shard in weight_map.values()
        )
    ):
        raise WeightsUnavailableError(
            f"weights index {index}: expected a 'weight_map' from each tensor's name to the file "
            f"beside the index that holds it"
        )
    return weight_map


def _read(file: Path) -> tuple[Any, dict[str, str]]:
    read: Callable[[Path], tuple[Any, dict[str, str]]]
    read = _read_safetensors if file.suffix == ".safetensors" else _read_pickled
    try:
        return read(file)
    # Files of other kinds reach torch's unpickler, which may raise any of these.
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
        safetensors.SafetensorError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsUnavailableError(
            f"weights file {file}: {reason}; {NOT_A_STATE_DICT}"
        ) from error


def _read_safetensors(file: Path) -> tuple[Any, dict[str, str]]:
    with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
        names = opened.keys()
        state: dict[str, torch.Tensor] = {name: opened.get_tensor(name) for name in names}
        # save_model stores a tensor with several names once, and lists the other names here.
        noted: Mapping[str, str] = opened.metadata() or {}
    return state, {name: kept for name, kept in noted.items() if kept in state}


def _read_pickled(file: Path) -> tuple[Any, dict[str, str]]:
    return load_pickled(file), {}
