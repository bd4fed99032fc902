"""Detects changes in a model's settings or files, so that a reload loads it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layertap.models.checkpoint_files import files_of_weights
from layertap.models.hf_folder import files_of_folder
from layertap.models.text import tokenizer_file
from layertap.settings import ServedModel, SourceKind
from layertap.settings.paths import expanded, is_path

__all__ = ["FileStates", "Fingerprint", "file_states", "files_of", "fingerprint_of"]

FileState = tuple[int, int, int] | None
"""Inode, time of the last change in ns, and size in bytes; None if there is no such file.

The inode is needed because a renamed file may keep its time. Links are followed, because a mounted
ConfigMap changes by changing links.
"""

FileStates = dict[Path, FileState]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A model's settings, and the state of the files that they name."""

    model: ServedModel
    files: tuple[FileState, ...]


def files_of(model: ServedModel) -> tuple[Path, ...]:
    """Return the files that a model is loaded from, except Python code."""
    spec = model.spec
    source: tuple[Path, ...] = ()
    if spec.kind is SourceKind.TORCHSCRIPT:
        source = (Path(spec.target),)
    elif spec.kind.is_hugging_face:
        source = files_of_folder(spec.target)
    weights = files_of_weights(spec.weights) if is_path(spec.weights) else ()
    tokenizer = (tokenizer_file(expanded(spec.tokenizer)),) if spec.tokenizer else ()
    return (*source, *weights, *tokenizer)


def fingerprint_of(model: ServedModel) -> Fingerprint:
    """Return a model's fingerprint; call this before loading, so that later changes are seen."""
    return Fingerprint(model, tuple(file_states(files_of(model)).values()))


def file_states(files: Iterable[Path]) -> FileStates:
    """Return the state of files."""
    return {file: _state(file) for file in files}


def _state(file: Path) -> FileState:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
