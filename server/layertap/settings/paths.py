"""Resolves settings that name files."""

from __future__ import annotations

from pathlib import Path, PurePath

__all__ = ["INDEX_SUFFIX", "WEIGHTS_SUFFIXES", "expanded", "is_path"]

INDEX_SUFFIX = ".index.json"
"""The suffix of a file that lists the shards of a checkpoint."""

WEIGHTS_SUFFIXES = frozenset({".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", ".pyth"})
"""The suffixes of weights files."""


def is_path(weights: str) -> bool:
    """Return whether the text names a file or folder, and not weights by name."""
    separators = "/" in weights or "\\" in weights
    return (
        separators or PurePath(weights).suffix in WEIGHTS_SUFFIXES or weights.endswith(INDEX_SUFFIX)
    )


def expanded(path: str) -> Path:
    """Return a path with ``~`` replaced by the home folder, if that is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # There is no such user, or the user has no home.
        return Path(path)
