"""Compiled plans on disk, so that a restart need not trace again.

Note [What is stored]
    A program is stored traced and frozen, and optimised after it was loaded: an optimised program
    loses its weights when it is saved. It is stored under a digest of everything that it was made
    from and proven again after loading, so that a file that doesn't fit can cost time, never a
    wrong answer.

Loading a TorchScript file runs what is in it. So the folder belongs to this user alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torchvision

from layertap.errors import ConfigError
from layertap.extraction.points import CapturePoint
from layertap.extraction.torchscript import load_program, save_program
from layertap.models import LoadedModel

__all__ = ["PlanCache", "PlanFile", "fingerprint", "plan_digest"]

_log = logging.getLogger(__name__)

FORMAT = "1"
SUFFIX = ".plan.pt"


class PlanCache:
    """A folder of traced and frozen programs, bounded in bytes; the longest unused go first.

    Args:
        folder: Made with mode 0700 where it is missing.
        max_bytes: Of all files together.

    Raises:
        ConfigError: Where the folder can't be made, belongs to another user or is writable by one.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
        except OSError as error:
            raise ConfigError(f"plan cache {folder}: {error.strerror}") from error
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"plan cache {folder}: other users can write there, and programs in it are run; "
                f"expected a folder of this user with mode 0700"
            )

    def file(self, digest: str) -> PlanFile:
        """Return the place of one program."""
        return PlanFile(self, self._folder / f"{digest}{SUFFIX}")

    def trim(self) -> None:
        """Remove the longest unused files until the rest fits."""
        found = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # Another process may be trimming too.
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class PlanFile:
    """One program's file, which may not exist yet."""

    def __init__(self, cache: PlanCache, path: Path) -> None:
        self._cache = cache
        self._path = path

    def load(self, device: torch.device) -> torch.jit.ScriptModule | None:
        """Return the stored program; None where there is none or the file is damaged."""
        if not self._path.exists():
            return None
        try:
            program = load_program(self._path, device)
            os.utime(self._path)
        except (RuntimeError, OSError) as error:
            _log.warning("stored plan %s can't be read: %s", self._path.name, type(error).__name__)
            self.forget()
            return None
        return program

    def forget(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def storing(self, frozen: torch.jit.ScriptModule) -> Iterator[None]:
        """Write a program, and keep the file only if the block ends well.

        The block may optimise the program, which spoils it for saving. A disk that is full is
        logged and nothing else.
        """
        written = self._write(frozen)
        try:
            yield
        except BaseException:
            if written:
                written.unlink(missing_ok=True)
            raise
        if written:
            written.replace(self._path)
            self._cache.trim()

    def _write(self, frozen: torch.jit.ScriptModule) -> Path | None:
        try:
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
        except OSError as error:
            _log.warning("plan not stored: %s", error.strerror)
            return None
        os.close(handle)
        try:
            save_program(frozen, Path(name))
        except (RuntimeError, OSError) as error:
            _log.warning("plan not stored: %s", type(error).__name__)
            Path(name).unlink(missing_ok=True)
            return None
        return Path(name)


def fingerprint(model: LoadedModel) -> str:
    """Return a digest of what a model computes: its structure, its weights, and by which torch.

    Reads all the weights: some 50 ms for resnet18, a second for vgg16.
    """
    digest = hashlib.blake2b(digest_size=16)
    for fact in (FORMAT, torch.__version__, torchvision.__version__, model.device.type):
        digest.update(f"{fact}\n".encode())
    digest.update(repr(model.module).encode())
    for kind in (model.module.named_parameters, model.module.named_buffers):
        for name, tensor in kind():
            facts = (name, tensor.dtype, tuple(tensor.shape), tensor.stride())
            digest.update(f"{facts}\n".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def plan_digest(
    model_digest: str,
    points: Sequence[CapturePoint],
    item_shape: Sequence[int],
    dtype: torch.dtype,
) -> str:
    """Return the name under which a plan is stored."""
    text = repr((model_digest, tuple(points), tuple(item_shape), str(dtype)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
