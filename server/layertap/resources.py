"""The CPUs, memory and files that this process may use; in a container fewer than the machine has.

They are read from the process's control groups, version 2 and version 1, and from the affinity
mask. A container with a quota of one CPU on a machine with 64 still sees 64 cores, but as many
threads would be throttled most of the time.

Sources: cgroups(7), the kernel's documents cgroup-v2.rst (``cpu.max``, ``memory.max``,
``memory.high``) and cgroup-v1 (``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), and proc(5) for
``/proc/self/cgroup`` and ``/proc/self/mountinfo``.
"""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "FileBudget",
    "available_cpus",
    "file_budget",
    "memory_limit",
    "raise_file_limit",
    "spare_files",
]

_MOST_FILES = 1 << 16
_MOST_SPARE = 128
_raising = threading.Lock()
_OCTAL = re.compile(r"\\([0-7]{3})")


def available_cpus(proc: Path = Path("/proc")) -> int:
    """Return how many threads can compute at once without being throttled; at least 1.

    This is the number of cores in the affinity mask, or the smallest CPU quota if that is lower. A
    fraction is rounded down, which leaves the rest to the threads that communicate with callers.

    Args:
        proc: The mount point of procfs.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for group in _groups("cpu", proc) if (quota := _cpu_quota(group)) is not None]
    return max(1, int(min([cores, *quotas])))


def memory_limit(proc: Path = Path("/proc")) -> int:
    """Return the bytes of memory that this process may use.

    This is the smallest limit of its control groups, or the machine's memory if that is less.

    Args:
        proc: The mount point of procfs.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [
        int(text)
        for group in _groups("memory", proc)
        for name in names
        if (text := _read(group / name)).isdecimal()
    ]
    # Ignore a limit of 0: nothing could run with it, and the group is about to be removed.
    return min([machine, *(limit for limit in limits if limit > 0)])


@dataclass(frozen=True, slots=True)
class FileBudget:
    """How many files a server gives to each of their uses, so that no use takes those of another.

    Together they are 7/8 of the files that the process may have open. The rest is for everything
    else, such as weights, compiled plans and the server's own pipes.

    Attributes:
        rpc_connections: Connections to the gRPC port: a half.
        http_connections: Connections to the HTTP port: an eighth, at most 128.
        regions: Regions of shared memory that the server makes: an eighth at two files for each, at
            most 192.
        region_clients: Clients that use such regions: a sixteenth, at most 128.
        named_regions: Regions of shared memory that clients register: a sixteenth, at most 256.
    """

    rpc_connections: int
    http_connections: int
    regions: int
    region_clients: int
    named_regions: int

    @classmethod
    def of(cls, files: int) -> FileBudget:
        """Divide so many files; each use gets at least one."""
        return cls(
            rpc_connections=max(1, files // 2),
            http_connections=max(1, min(128, files // 8)),
            regions=max(1, min(192, files // 16)),
            region_clients=max(1, min(128, files // 16)),
            named_regions=max(1, min(256, files // 16)),
        )


def file_budget() -> FileBudget:
    """Return how the files that this process may have open are divided."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FileBudget.of(_MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES))


def raise_file_limit() -> None:
    """Raise the limit of open files to 65,536, or nearly to the hard limit if that is lower.

    The usual limit of 1024 is for programs that still use select(2). Other programs are meant to
    raise it to the hard limit. An eighth of a low hard limit, at most 128 files, is kept back for
    ``spare_files``.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES
    if hard != resource.RLIM_INFINITY:
        allowed = min(allowed, hard - min(_MOST_SPARE, hard // 8))
    # Some systems refuse even values below their own hard limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@contextmanager
def spare_files() -> Iterator[None]:
    """Let this process open the files that ``raise_file_limit`` kept back.

    Use it as briefly as possible, and only to open what must work even if all other files are in
    use: other threads could take the spare files meanwhile.
    """
    with _raising:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _cpu_quota(group: Path) -> float | None:
    """Return the CPUs that a group may use; None if it has no quota."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota = _read(group / "cpu.cfs_quota_us")
        period = _read(group / "cpu.cfs_period_us")
    # "max" in version 2 and "-1" in version 1 mean no quota.
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that a controller may limit, and their parents.

    The limits of all of them apply, so a reader takes the smallest. On machines with both versions
    of control groups, the controller belongs to one of them; the other's folders lack its files.
    """
    paths = dict(_memberships(controller, proc))
    for version, root, mounted in _mounts(controller, proc):
        if version not in paths:
            continue
        path = PurePosixPath(paths[version])
        # Without a cgroup namespace the process sees its path on the node, while a container's
        # mount shows only the end of that path.
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        if ".." in inside.parts:  # The group is outside of what the namespace shows.
            inside = PurePosixPath()
        folder = mounted / inside
        yield folder
        while folder != mounted:
            folder = folder.parent
            yield folder


def _memberships(controller: str, proc: Path) -> Iterator[tuple[int, str]]:
    """Yield (version, path) of the groups that the process is in."""
    for line in _read(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(controller: str, proc: Path) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """Yield (version, mounted group, mount point) of the mounted hierarchies."""
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        root, where = _unescaped(fields[3]), _unescaped(fields[4])
        if kinds[0] == "cgroup2":
            yield 2, PurePosixPath(root), Path(where)
        elif kinds[0] == "cgroup" and controller in kinds[2].split(","):
            yield 1, PurePosixPath(root), Path(where)


def _unescaped(text: str) -> str:
    """Return a path from mountinfo, which writes a space as a backslash and 040."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _read(file: Path) -> str:
    """Return the content of a file; empty if it doesn't exist or can't be read."""
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
