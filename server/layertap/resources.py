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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["available_cpus", "file_limit", "memory_limit", "raise_file_limit"]

_MOST_FILES = 1 << 16
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


def file_limit() -> int:
    """Return how many files and connections this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES)


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit, but not above 65,536.

    The usual limit of 1024 is for programs that still use select(2). Other programs are meant to
    raise it to the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        # Some systems refuse even values below their own hard limit.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


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
