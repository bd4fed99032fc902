"""What a server stands on and a drill takes away: disks, threads, memory, files, the clock."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLOCK_SOURCE = Path(__file__).with_name("clock.c")
MEMORY = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
PIDS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


class NotPossibleError(Exception):
    """This machine doesn't let us do it; the text says what is missing."""


class Disk:
    """A small file system of its own, in memory.

    Raises:
        NotPossibleError: Where we may not mount one.
    """

    def __init__(self, size: str = "1m") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="layertap-chaos-"))
        options = f"size={size},mode=0700"
        if not _quietly("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)):
            self.folder.rmdir()
            raise NotPossibleError("may not mount a file system here")

    def fill(self) -> None:
        """Leave no byte free."""
        try:
            with (self.folder / "filling").open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        except OSError:
            pass

    def empty(self) -> None:
        """Remove what filled it."""
        (self.folder / "filling").unlink(missing_ok=True)

    def writable(self, yes: bool) -> None:
        """Mount it again for reading only, or for writing as well."""
        if not _quietly("mount", "-o", f"remount,{'rw' if yes else 'ro'}", str(self.folder)):
            raise NotPossibleError("may not mount a file system for reading only")

    def close(self) -> None:
        """Unmount it."""
        _quietly("umount", "--lazy", str(self.folder))
        self.folder.rmdir()


class MemoryGroup:
    """A control group with a memory limit, as a container has.

    Args:
        nbytes: The limit.

    Raises:
        NotPossibleError: Where we may not make one.
    """

    def __init__(self, nbytes: int) -> None:
        for parent in MEMORY:
            self._group = parent / f"layertap-chaos-{os.getpid()}"
            try:
                self._group.mkdir()
                names = (self._group / "memory.limit_in_bytes", self._group / "memory.max")
                limit = next(name for name in names if name.exists())
                limit.write_text(str(nbytes), "ascii")
            except (OSError, StopIteration):
                if self._group.exists():
                    self._group.rmdir()
                continue
            return
        raise NotPossibleError("may not make a control group with a memory limit")

    @property
    def join(self) -> str:
        """What a shell runs to put itself into the group."""
        return f"echo $$ > {self._group}/cgroup.procs"

    def close(self) -> None:
        """Remove it, once its processes have ended."""
        _remove(self._group)


class Clock:
    """The wall clock of a process that is started with ``environment``.

    Raises:
        NotPossibleError: Where there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        library, self._file = folder / "clock.so", folder / "clock"
        if compiler is None or not _quietly(
            *(compiler, "-shared", "-fPIC", "-O1", "-o", str(library)),
            *(str(CLOCK_SOURCE), "-ldl"),
        ):
            raise NotPossibleError("there is no C compiler to build what moves the clock")
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        """Set the clock to the machine's plus so many seconds, at once."""
        with self._file.open("r+b" if self._file.exists() else "wb", buffering=0) as file:
            file.write(struct.pack("=q", seconds))


@contextmanager
def few_threads(pid: int, more: int) -> Iterator[None]:
    """Allow a process so many threads more than it has now.

    Raises:
        NotPossibleError: Where we may not make a control group for it.
    """
    for parent in PIDS:
        group = parent / f"layertap-chaos-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        former = _group_of(pid, parent)
        try:
            threads = len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - no Path of them is made
            (group / "pids.max").write_text(str(threads + more), "ascii")
            (group / "cgroup.procs").write_text(str(pid), "ascii")
        except OSError:
            group.rmdir()
            continue
        try:
            yield
        finally:
            (group / "pids.max").write_text("max", "ascii")
            if Path(f"/proc/{pid}").exists():
                (former / "cgroup.procs").write_text(str(pid), "ascii")
            _remove(group)
        return
    raise NotPossibleError("may not make a control group for the number of threads")


def _group_of(pid: int, parent: Path) -> Path:
    """Return the folder of a process's group in a hierarchy."""
    for line in Path(f"/proc/{pid}/cgroup").read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == ("pids" if parent.name == "pids" else ""):
            return parent / path.lstrip("/")
    return parent


def _remove(group: Path) -> None:
    try:
        group.rmdir()
    except OSError:  # A process that ended is not gone from it yet.
        _quietly("sh", "-c", f"sleep 1; rmdir {group}")


def _quietly(*command: str) -> bool:
    """Run a command; return whether it did what it should."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
