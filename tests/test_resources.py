"""CPUs and memory are those of the process's control groups, not of the machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest

from layertap.resources import FileBudget, available_cpus, memory_limit

CORES = len(os.sched_getaffinity(0))
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1 << 20


class Groups:
    """Writes what the kernel reports about control groups: real files with our limits."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.mounted = folder / "sys fs"
        (self.proc / "self").mkdir(parents=True)

    def member(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines), "ascii")

    def mount(self, kind: str, options: str, root: str = "/", at: str = "") -> Path:
        where = self.mounted / at
        where.mkdir(parents=True, exist_ok=True)
        shown = str(where).replace(" ", "\\040")
        with (self.proc / "self/mountinfo").open("a", encoding="ascii") as file:
            file.write(f"31 24 0:27 {root} {shown} rw,nosuid shared:9 - {kind} {kind} {options}\n")
        return where

    @staticmethod
    def set(group: Path, **values: str) -> None:
        group.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (group / name.replace("__", ".")).write_text(f"{value}\n", "ascii")

    def cpus(self) -> int:
        return available_cpus(self.proc)

    def memory(self) -> int:
        return memory_limit(self.proc)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_control_groups_they_are_the_machines(groups: Groups) -> None:
    """If the kernel has no control groups, the affinity mask and the memory count."""
    assert (groups.cpus(), groups.memory()) == (CORES, MACHINE)


def test_a_quota_of_version_2_limits_the_cpus(groups: Groups) -> None:
    """``cpu.max`` and ``memory.max`` of the process's own group are its limits."""
    groups.member("0::/kubepods/pod7")
    group = groups.mount("cgroup2", "rw,nsdelegate") / "kubepods/pod7"
    groups.set(group, cpu__max="100000 100000", memory__max=str(256 * MIB))
    assert (groups.cpus(), groups.memory()) == (1, 256 * MIB)


def test_the_smallest_limit_of_all_parents_holds(groups: Groups) -> None:
    """A pod's limit applies to a container without one, and ``memory.high`` counts too."""
    groups.member("0::/pod/container")
    top = groups.mount("cgroup2", "rw")
    groups.set(top / "pod", cpu__max="50000 100000", memory__high=str(512 * MIB))
    groups.set(top / "pod/container", cpu__max="max 100000", memory__max="max")
    assert (groups.cpus(), groups.memory()) == (1, 512 * MIB)


def test_a_quota_of_version_1_limits_the_cpus(groups: Groups) -> None:
    """Each controller of version 1 has its own hierarchy; -1 and 2^63 mean no limit."""
    groups.member("4:memory:/docker/ab", "3:cpu,cpuacct:/docker/ab", "0::/")
    cpu = groups.mount("cgroup", "rw,cpu,cpuacct", at="cpu,cpuacct") / "docker/ab"
    memory = groups.mount("cgroup", "rw,memory", at="memory") / "docker/ab"
    groups.mount("cgroup2", "rw", at="unified")
    groups.set(cpu, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    groups.set(memory, memory__limit_in_bytes="9223372036854771712")
    assert (groups.cpus(), groups.memory()) == (CORES, MACHINE)
    groups.set(cpu, cpu__cfs_quota_us="150000")
    groups.set(memory, memory__limit_in_bytes=str(300 * MIB))
    assert (groups.cpus(), groups.memory()) == (1, 300 * MIB)


@pytest.mark.parametrize("told", ["/docker/ab", "/", "/../../elsewhere"])
def test_a_container_sees_its_own_group_at_the_mount(groups: Groups, told: str) -> None:
    """With or without a cgroup namespace, the mount of a container shows its own group."""
    groups.member(f"3:cpu:{told}")
    root = "/docker/ab" if told == "/docker/ab" else "/"
    groups.set(
        groups.mount("cgroup", "rw,cpu", root),
        cpu__cfs_quota_us="100000",
        cpu__cfs_period_us="100000",
    )
    assert groups.cpus() == 1


def test_a_fraction_of_a_cpu_is_one_thread(groups: Groups) -> None:
    """Half a CPU still means one thread."""
    groups.member("0::/")
    groups.set(groups.mount("cgroup2", "rw"), cpu__max="50000 100000")
    assert groups.cpus() == 1


@pytest.mark.parametrize("text", ["", "rubbish", "100000", "100000 0", "-5 100000"])
def test_what_makes_no_sense_is_no_limit(groups: Groups, text: str) -> None:
    """A malformed file limits nothing, and raises nothing."""
    groups.member("0::/", "nonsense")
    groups.set(groups.mount("cgroup2", "rw"), cpu__max=text, memory__max=text)
    with (groups.proc / "self/mountinfo").open("a", encoding="ascii") as file:
        file.write("rubbish\n - \n")
    assert (groups.cpus(), groups.memory() <= MACHINE) == (CORES, True)


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_the_affinity_mask_counts() -> None:
    """A process that is bound to one core has one CPU."""
    former = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(former)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, former)


@pytest.fixture
def quota_group() -> Iterator[Path]:
    """A real control group with a quota of one CPU, if this machine allows one."""
    for parent in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        group = parent / f"layertap-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text("100000 100000")
            else:
                (group / "cpu.cfs_quota_us").write_text("100000")
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("may not make a control group with a CPU quota here")


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_the_kernels_own_quota_is_read(quota_group: Path) -> None:
    """A process in a real group with a quota of one CPU reports one CPU."""
    program = (
        f"open('{quota_group}/cgroup.procs', 'w').write('0')\n"
        "from layertap.resources import available_cpus\n"
        "print(available_cpus())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"1\n"


@pytest.mark.parametrize(
    ("soft", "hard", "want"), [(64, 128, 112), (1024, 1024, 896), (1024, 100_000, 65_536)]
)
def test_the_limit_of_files_is_raised_but_for_a_few(soft: int, hard: int, want: int) -> None:
    """The limit becomes the hard limit less an eighth of it or 128 files, at most 65,536."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < hard:
        pytest.skip(f"this process may have {most} files open, fewer than {hard}")
    program = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from layertap.resources import raise_file_limit\n"
        "raise_file_limit()\n"
        "raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode() == f"({want}, {hard})\n"


def test_spare_files_can_be_opened_when_all_others_are_in_use() -> None:
    """Inside ``spare_files`` a process at its limit can open a file, and only there."""
    program = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from layertap.resources import raise_file_limit, spare_files\n"
        "raise_file_limit()\n"
        "def count():\n"
        "    opened = 0\n"
        "    try:\n"
        "        while True:\n"
        "            os.open('/dev/null', os.O_RDONLY)\n"
        "            opened += 1\n"
        "    except OSError:\n"
        "        return opened\n"
        "print(count() > 0, count())\n"
        "with spare_files():\n"
        "    print(count())\n"
        "print(count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"True 0\n8\n0\n"


@pytest.mark.parametrize("files", [64, 224, 1024, 65_536])
def test_the_budget_of_files_leaves_an_eighth(files: int) -> None:
    """All uses together take at most 7/8 of the files, and each gets some."""
    budget = FileBudget.of(files)
    assert budget.rpc_connections == files // 2
    used = (
        budget.rpc_connections
        + budget.http_connections
        + 2 * budget.regions
        + budget.region_clients
        + budget.named_regions
    )
    assert used <= files * 7 // 8
    assert min(astuple(budget)) >= 1
