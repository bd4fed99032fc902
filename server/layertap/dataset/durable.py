"""Writes files so that a crash at any moment leaves the old file or the whole new one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layertap.errors import InvalidInputError

__all__ = [
    "TEMPORARY",
    "lock",
    "output_errors",
    "remove",
    "replacing",
    "sha256_of",
    "sync_folder",
]

TEMPORARY = ".tmp"
"""The suffix of files and folders that are being written. What a crash leaves has it too."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there replaces ``path`` when it ends.

    The block may write a file or a folder. Everything is synced to the disk before the rename, and
    the folder that holds it afterwards. If the block raises, the temporary path is removed.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    remove(temporary)
    try:
        yield temporary
        _sync_tree(temporary)
        if path.is_dir():
            # A folder can only be renamed to a name that is free. The shards from which a folder is
            # made are still there, so a crash between the two steps loses nothing.
            remove(path)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        # After any exception, including Ctrl-C. On a read-only disk nothing can be removed.
        with suppress(OSError):
            remove(temporary)
        raise


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Raise InvalidInputError with the output's name for an error of the file system."""
    try:
        yield
    except OSError as error:
        raise InvalidInputError(f"output {path}: {error.strerror or error}") from error


def lock(descriptor: int, output: Path | str) -> None:
    """Lock an open file until it is closed; raise InvalidInputError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidInputError(f"output {output}: another process is writing it") from error


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: names that were added, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for below in path.iterdir():
            _sync_tree(below)
        sync_folder(path)
        return
    # A disk may report only now that it is full.
    with path.open("rb+") as file:
        os.fsync(file.fileno())
