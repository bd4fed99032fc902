"""Shared memory that clients register by name: read and written by its descriptor, never mapped.

Note [Never mapped]
    If a client shortens a file that the server has mapped, SIGBUS ends the server. So nothing is
    mapped: a region is a descriptor, read with ``pread`` and written with ``pwrite``. If a file has
    become too short, the read is short, and only that request fails. This needs no additional copy.

Note [Whose memory]
    The server opens files with its own rights, for any caller. So it opens only regular files
    directly in ``/dev/shm`` with one link and no symbolic links. They must belong to the server's
    own user or to a user that the configuration lists, and must be neither layertap's own files nor
    semaphores. Every refusal has the same message, so a caller can't probe which objects exist.
    Each owner has a separate set of names: no owner can see, use or remove another's regions.

Note [In flight]
    A request that uses a region refers to its file, and the descriptor is closed with the last
    reference. So a region may be unregistered at any time: requests that use it finish as before.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from layertap.errors import InvalidInputError, NotFoundError, OverloadedError

__all__ = ["MAX_REGIONS", "ClientRegion", "ClientRegions", "RegionSlice"]

MAX_REGIONS = 256
"""Maximum number of regions of all owners by default; each takes an open file of the process."""

MAX_NAME_BYTES = 255

_FOLDER = Path("/dev/shm")  # noqa: S108 - this is where POSIX shared memory is
_RESERVED = ("layertap", "sem.")


class _File:
    """A file descriptor that is closed when this object is freed."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)


@dataclass(frozen=True, slots=True)
class ClientRegion:
    """A registered region.

    Attributes:
        name: The name that its owner gave it.
        offset: Where it begins in its file, in bytes.
        byte_size: Its size in bytes.
    """

    name: str
    offset: int
    byte_size: int
    _file: _File = field(repr=False)

    def slice(self, offset: int, byte_size: int) -> RegionSlice:
        """Return a part of the region; raise InvalidInputError if it has no such part."""
        if not 0 <= offset < self.byte_size:
            raise InvalidInputError(
                f"Invalid offset for shared memory region: {self.name!r}: got {offset}, expected 0 "
                f"to {self.byte_size} less 1"
            )
        if not 0 <= byte_size <= self.byte_size - offset:
            raise InvalidInputError(
                f"Invalid offset + byte size for shared memory region: {self.name!r}: got {offset} "
                f"+ {byte_size}, expected at most {self.byte_size}"
            )
        return RegionSlice(self.name, self._file, self.offset + offset, byte_size)


@dataclass(frozen=True, slots=True)
class RegionSlice:
    """A part of a region, which keeps its file open.

    Attributes:
        region: The region's name.
        byte_size: Its size in bytes.
    """

    region: str
    _file: _File = field(repr=False)
    _begin: int
    byte_size: int

    def read(self) -> bytes:
        """Return the bytes; raise InvalidInputError if the file has become too short."""
        try:
            data = os.pread(self._file.fd, self.byte_size, self._begin)
        except OSError as error:
            raise self._failed(error) from None
        if len(data) != self.byte_size:
            raise self._truncated()
        return data

    def write(self, data: memoryview) -> None:
        """Write bytes at the beginning of the part.

        Raises:
            InvalidInputError: If there are too many bytes, or the file has become too short.
        """
        if data.nbytes > self.byte_size:
            raise InvalidInputError(
                f"shared memory region {self.region!r}: got {data.nbytes} bytes, expected at most "
                f"{self.byte_size}"
            )
        try:
            # pwrite would extend the file again, with memory that its owner has given up.
            if os.fstat(self._file.fd).st_size < self._begin + data.nbytes:
                raise self._truncated()
            done = 0
            while done < data.nbytes:
                done += os.pwrite(self._file.fd, data[done:], self._begin + done)
        except OSError as error:
            raise self._failed(error) from None

    def _truncated(self) -> InvalidInputError:
        return InvalidInputError(
            f"shared memory region {self.region!r}: its memory object is shorter than it was when "
            f"it was registered"
        )

    def _failed(self, error: OSError) -> InvalidInputError:
        return InvalidInputError(f"shared memory region {self.region!r}: {error.strerror}")


class ClientRegions:
    """The regions of all owners. Safe to share between threads.

    Args:
        uids: Users whose memory is accepted besides the server's own user's.
        folder: The folder of the objects.
        most: Maximum number of regions of all owners together.
    """

    def __init__(
        self,
        uids: frozenset[int] = frozenset(),
        folder: Path = _FOLDER,
        *,
        most: int = MAX_REGIONS,
    ) -> None:
        self._most = most
        self._uids = uids | {os.geteuid()}
        self._folder = folder
        self._lock = threading.Lock()
        self._regions: dict[Hashable, dict[str, ClientRegion]] = {}

    def register(self, owner: Hashable, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region of an owner.

        Args:
            owner: Identifies the owner; only the owner may use the region.
            name: The name of the region.
            key: The memory object, as for ``shm_open``.
            offset: Where the region begins in the object, in bytes.
            byte_size: The region's size in bytes.

        Raises:
            InvalidInputError: If the name is taken, the key can't be opened, or the object has no
                such part.
            OverloadedError: If there are too many regions.
        """
        _check_name(name)
        # Checked before the file is opened, so that a refusal is cheap.
        with self._lock:
            self._check_room(owner, name)
        file = self._open(key)
        _check_part(file, name, offset, byte_size)
        with self._lock:
            self._check_room(owner, name)
            regions = self._regions.setdefault(owner, {})
            regions[name] = ClientRegion(name, offset, byte_size, file)

    def unregister(self, owner: Hashable, name: str) -> None:
        """Unregister a region if it exists; with an empty name, all regions of the owner."""
        with self._lock:
            regions = self._regions.get(owner, {})
            gone = [regions.pop(name, None)] if name else list(regions.values())
            if not name or not regions:
                self._regions.pop(owner, None)
        del gone  # Closes the descriptors, without the lock.

    def status(self, owner: Hashable, name: str) -> list[ClientRegion]:
        """Return a region; with an empty name, all regions of the owner.

        Raises:
            NotFoundError: If the owner has no region with that name.
        """
        with self._lock:
            regions = dict(self._regions.get(owner, {}))
        if not name:
            return list(regions.values())
        if name not in regions:
            raise NotFoundError(f"Unable to find shared memory region: {name!r}")
        return [regions[name]]

    def slice(self, owner: Hashable, name: str, offset: int, byte_size: int) -> RegionSlice:
        """Return a part of an owner's region.

        Raises:
            NotFoundError: If the owner has no region with that name.
            InvalidInputError: If the region has no such part.
        """
        (region,) = self.status(owner, name) if name else [None]
        if region is None:
            raise NotFoundError("Unable to find shared memory region: ''")
        return region.slice(offset, byte_size)

    def _check_room(self, owner: Hashable, name: str) -> None:
        if name in self._regions.get(owner, {}):
            raise InvalidInputError(f"shared memory region {name!r} is registered already")
        if sum(map(len, self._regions.values())) >= self._most:
            raise OverloadedError(f"{self._most} shared memory regions, the most allowed")

    def _open(self, key: str) -> _File:
        refusal = InvalidInputError(
            f"shared memory key {key[:MAX_NAME_BYTES]!r}: no memory object that this server may use"
        )
        base = key.removeprefix("/")
        if not _is_file_name(base) or base.lower().startswith(_RESERVED):
            raise refusal
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            file = _File(os.open(self._folder / base, flags))
        except OSError:
            raise refusal from None
        facts = os.fstat(file.fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in self._uids or facts.st_nlink > 1:
            raise refusal
        return file


def _check_name(name: str) -> None:
    if not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES:
        raise InvalidInputError(
            f"shared memory region: got a name of {len(name)} characters, expected 1 to "
            f"{MAX_NAME_BYTES} bytes"
        )


def _is_file_name(base: str) -> bool:
    size = len(base.encode("utf-8", "replace"))
    return 0 < size <= MAX_NAME_BYTES and base.isprintable() and "/" not in base and base[0] != "."


def _check_part(file: _File, name: str, offset: int, byte_size: int) -> None:
    size = os.fstat(file.fd).st_size
    # Python's integers don't overflow, so the sum is safe.
    if byte_size < 1 or offset < 0 or offset + byte_size > size:
        raise InvalidInputError(
            f"Invalid offset + byte size for shared memory region: {name!r}: got {offset} + "
            f"{byte_size}, expected at least 1 byte within the memory object"
        )
