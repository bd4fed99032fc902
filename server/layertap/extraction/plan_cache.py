"""A folder of compiled plans and catalogues, so that a restart need not make them again.

Note [What is stored]
    A program is stored before its last optimisation, which is repeated after loading: an optimised
    TorchScript program, for one, would lose its weights when saved. The name of its file is a
    digest of everything that it was made from, including the extractor kind, and a loaded program
    is proven again. So a file that doesn't fit costs time, but never gives a wrong answer.

Note [Proofs that are kept]
    A second file says for what a program was proven: the digest of its file, the facts of the
    model and the machine (see ``kept_catalogue``), and the batch sizes. If all of that is equal,
    the same instructions get the same numbers as in that proof, and one batch is enough to see that
    the program still fits. If anything differs, the whole proof is repeated.

Loading a program may run code in its file. So only this user may be able to write to the folder.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
import torchvision
from blake3 import blake3

from layertap.errors import ConfigError
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.base import CompiledKind
from layertap.extraction.pass_spec import PassSpec
from layertap.models import BatchKey, LoadedModel
from layertap.models.tensor_content import digest_of_elements, plain_tensors
from layertap.resources import available_cpus
from layertap.threads import is_thread_refused

__all__ = ["PlanCache", "PlanFile", "fingerprint", "plan_digest", "remove"]

_log = logging.getLogger(__name__)

FORMAT = "6"
SUFFIX = ".plan.pt"
CATALOGUE_SUFFIX = ".catalogue"
PROOF_SUFFIX = ".proof"
RACES_SUFFIX = ".races"
PART = ".part"
"""The suffix of a file that is being written."""

# Errors that are the disk's fault, not the configuration's.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_STALE_SECONDS = 3600.0

_PIECE = 1 << 20
"""Bytes that are read from a file at once."""

MAX_DIGESTING = 4
"""Threads that read a model's weights at once; each may hold a copy of a tensor of a GPU."""


class PlanCache:
    """A folder, bounded in bytes, whose least recently used files are removed first.

    It has the compiled programs of declared layers, the catalogues of models (see
    ``kept_catalogue``) and the results of their races.

    A full, read-only or broken disk is not an error: the log says so, nothing is stored, and the
    server works without stored plans. Each program is tried again, so space that becomes free later
    is used.

    Args:
        folder: The folder, created with mode 0700 if it doesn't exist.
        max_bytes: Maximum total size of its files.
        catalogues: Whether catalogues are kept.

    Attributes:
        catalogues: The same.

    Raises:
        ConfigError: If the folder belongs to another user, if another user can write to it, or if
            it can't be created for a reason other than the disk.
    """

    def __init__(self, folder: Path, max_bytes: int, *, catalogues: bool = True) -> None:
        self.catalogues = catalogues
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            self._prepare()
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise ConfigError(f"plan cache {folder}: {error.strerror}") from error
            _log.warning("plan cache %s: plans are not stored: %s", folder, error.strerror)
        self._sweep()

    def file(self, digest: str) -> PlanFile:
        """Return the file of one program, which may not exist yet."""
        return PlanFile(self, self._folder / f"{digest}{SUFFIX}")

    def catalogue(self, digest: str) -> Path:
        """Return the path of one model's catalogue, which may not exist yet."""
        return self._folder / f"{digest}{CATALOGUE_SUFFIX}"

    def races(self, digest: str) -> Path:
        """Return the path of the results of one model's races, which may not exist yet."""
        return self._folder / f"{digest}{RACES_SUFFIX}"

    @staticmethod
    def used(path: Path) -> None:
        """Record that a file was just used, so that it is removed last."""
        with suppress(OSError):  # On a read-only disk, nothing is trimmed either.
            os.utime(path)

    def write(self, data: memoryview) -> Path:
        """Write a new file, under a temporary name that no reader looks for.

        Args:
            data: The bytes to write. They are all on the disk when this returns.

        Raises:
            OSError: If they can't be written; then no file is left.
            ConfigError: If other users can write to the folder.
        """
        self._prepare()  # The folder may have been removed meanwhile.
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=PART)
        written = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                # A disk may report only now that it is full.
                os.fsync(handle)
        except BaseException:
            remove(written)
            raise
        return written

    def replace(self, path: Path, data: memoryview) -> None:
        """Write a file in place of the one at a path, if there is one; readers see either whole.

        Raises:
            OSError: If it can't be written; then the old file stays, and nothing else is left.
            ConfigError: If other users can write to the folder.
        """
        written = self.write(data)
        try:
            written.replace(path)
        except OSError:
            remove(written)
            raise

    def trim(self) -> None:
        """Remove the least recently used files until the others fit."""
        found = []
        for path in itertools.chain.from_iterable(
            map(self._files, (SUFFIX, CATALOGUE_SUFFIX, PROOF_SUFFIX, RACES_SUFFIX))
        ):
            with suppress(OSError):  # Another process may be trimming too.
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            remove(path)
            total -= size

    def _prepare(self) -> None:
        """Create the folder if needed; raise ConfigError if other users can write to it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = self._folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"plan cache {self._folder}: other users can write there, but the server runs "
                f"programs from it; expected a folder of this user with mode 0700"
            )

    def _files(self, suffix: str) -> list[Path]:
        try:
            return list(self._folder.glob(f"*{suffix}"))
        except OSError as error:
            _log.warning("plan cache %s can't be listed: %s", self._folder, error.strerror)
            return []

    def _sweep(self) -> None:
        """Remove partly written files that killed processes left behind."""
        for path in self._files(PART):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def remove(path: Path) -> None:
    """Remove a file if it exists; log why if it can't be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("stored plan %s can't be removed: %s", path.name, error.strerror)


class PlanFile:
    """One program's file, which may not exist yet."""

    def __init__(self, cache: PlanCache, path: Path) -> None:
        self._cache = cache
        self._path = path
        self._proof = path.with_name(path.name.removesuffix(SUFFIX) + PROOF_SUFFIX)
        self._digest = ""  # Of the file's content, as it was last read or written.

    def exists(self) -> bool:
        """Return whether the program is stored."""
        return self._path.exists()

    def proven_sizes(self, facts: str) -> list[int]:
        """Return the batch sizes for which the program that was just loaded is known to be proven.

        See Note [Proofs that are kept].

        Args:
            facts: A digest of what the proof depends on besides the program.

        Returns:
            The sizes; none if there is no such proof.
        """
        try:
            kept = json.loads(self._proof.read_bytes())
            fits = kept["facts"] == facts and kept["program"] == self._digest != ""
            sizes = [size for size in kept["sizes"] if type(size) is int] if fits else []
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001 - reading damaged JSON may raise anything
            _log.warning("kept proof %s is damaged: %s", self._proof.name, type(error).__name__)
            return []
        if not sizes:
            _log.info("kept proof %s is for something else", self._proof.name)
        return sizes

    def keep_proof(self, facts: str, sizes: Iterable[int]) -> None:
        """Record that the program that was just loaded or stored was proven for batch sizes."""
        proof = {"facts": facts, "program": self._digest, "sizes": sorted(set(sizes))}
        try:
            self._cache.replace(self._proof, memoryview(json.dumps(proof).encode()))
        except (OSError, ConfigError) as error:
            _log.warning("proof not kept: %s", error)

    def is_part(self, other: PlanFile, indexes: Sequence[int]) -> None:
        """Record that the program is part of another file's, which was just read or written.

        It has no file of its own then, but may have a proof.

        Args:
            other: The other file.
            indexes: Which values of the other program it returns.
        """
        whole = other._digest
        self._digest = f"{whole}:{list(indexes)}" if whole else ""

    def load(self, kind: CompiledKind[Any], model: LoadedModel) -> Any:
        """Return the stored program of a kind; None if there is none or it can't be read."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            # The file may be intact: the disk could not be read now.
            _log.warning("stored plan %s can't be read: %s", self._path.name, error.strerror)
            return None
        with file:
            try:
                program = kind.load(self._path, model)
            except Exception as error:  # noqa: BLE001 - a loader may raise anything for damaged bytes
                name, reason = self._path.name, type(error).__name__
                _log.warning("stored plan %s is damaged: %s", name, reason)
                self.forget()
                return None
            if not _is_still(self._path, file):
                return self.load(kind, model)  # Another process has just replaced it.
            self._digest = _digest_of_file(file)
        self._cache.used(self._path)
        return program

    def forget(self) -> None:
        """Remove the file."""
        remove(self._path)
        remove(self._proof)

    @contextmanager
    def storing(self, kind: CompiledKind[Any], program: Any) -> Iterator[None]:
        """Write a program, and keep the file only if the block raises nothing.

        The block may finish the program, which then can't be saved any more. If the program can't
        be written, the log says why, and the block runs all the same.
        """
        written = self._write(kind, program)
        try:
            yield
        except BaseException:
            if written:
                remove(written)
            raise
        if written:
            try:
                written.replace(self._path)
            except OSError as error:
                _log.warning("plan not stored: %s", error.strerror)
                remove(written)
            self._cache.trim()

    def _write(self, kind: CompiledKind[Any], program: Any) -> Path | None:
        try:
            data = memoryview(kind.save(program))
            self._digest = blake3(data).hexdigest()
            return self._cache.write(data)
        except OSError as error:
            _log.warning("plan not stored: %s", error.strerror)
        except Exception as error:  # noqa: BLE001 - a kind may raise anything; only the file is lost
            _log.warning("plan not stored: %s", error)
        return None


def _digest_of_file(file: BufferedReader) -> str:
    """Return the digest of a file's content; empty if it can't be read."""
    digest = blake3()
    with suppress(OSError):
        while piece := file.read(_PIECE):
            digest.update(piece)
        return digest.hexdigest()
    return ""


def _is_still(path: Path, file: BufferedReader) -> bool:
    """Return whether a path still leads to an open file; programs are replaced, not changed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return True  # It was removed, and so not replaced.


def fingerprint(model: LoadedModel) -> str:
    """Return a digest of what a model computes: its structure, its weights and torch's version.

    This reads all weights; up to `MAX_DIGESTING` cores share the work.
    """
    digest = hashlib.blake2b(digest_size=16)
    for fact in (FORMAT, torch.__version__, torchvision.__version__, model.device.type):
        digest.update(f"{fact}\n".encode())
    digest.update(repr(model.module).encode())
    named: list[tuple[str, torch.Tensor]] = []
    for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
        plain = list(plain_tensors(tensor))
        if not plain:  # Nobody can tell what it holds, so it is like no other.
            digest.update(os.urandom(16))
        named += [
            (name if each is tensor else f"{name}, in a {_kind(tensor)}", each) for each in plain
        ]
    contents = _digests([tensor for _, tensor in named])
    for (name, tensor), content in zip(named, contents, strict=True):
        facts = (name, tensor.dtype, tuple(tensor.shape), tensor.stride(), content)
        digest.update(f"{facts}\n".encode())
    return digest.hexdigest()


def _digests(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the digest of each tensor's elements."""
    threads = min(MAX_DIGESTING, available_cpus())
    if threads > 1:
        try:
            with ThreadPoolExecutor(threads, "layertap-digest") as pool:
                return list(pool.map(digest_of_elements, tensors))
        except RuntimeError as error:
            if not is_thread_refused(error):
                raise
    return [digest_of_elements(tensor) for tensor in tensors]


def _kind(tensor: torch.Tensor) -> str:
    """Return what a tensor is that is not plain and dense, with its shape."""
    return f"{type(tensor).__qualname__} {tensor.layout} {tuple(tensor.shape)}"


def plan_digest(
    model_digest: str,
    kind: CompiledKind[Any],
    pass_spec: PassSpec,
    batch_key: BatchKey,
    outcome: Outcome = (),
) -> str:
    """Return the name of the file in which a plan is stored."""
    text = repr((model_digest, kind.name, kind.facts(), pass_spec, batch_key, outcome))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
