from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType

import pytest

from layertap import _core, _pure, keep_memory, malloc
from layertap.errors import InvalidInputError
from layertap.wire import codec

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
glibc = pytest.mark.skipif(codec.malloc_usage() is None, reason="needs glibc's malloc")

MIB = 1 << 20
# Over the 64 MiB of a thread's own heap, so that only the main heap can keep it.
BLOCK = 100 * MIB
PAGES = BLOCK // 4096

# Settings of malloc last as long as the process, so each test of theirs has one of its own. Without
# huge pages (prctl(2), PR_SET_THP_DISABLE), so that a page fault is always one page.
PREFACE = f"""
import ctypes, resource, threading
from layertap import _core, _pure
from layertap import malloc
MIB, BLOCK = {MIB}, {BLOCK}
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * BLOCK
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def printed(script: str) -> list[int]:
    """Run a script in a new process and return the numbers that it printed."""
    result = subprocess.run(
        [sys.executable, "-c", PREFACE + script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return [int(number) for number in result.stdout.split()]


FREED_BLOCKS = """
small = []

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def run():
    # Raises glibc's own threshold, as a pass with large activations does.
    for _ in range(4):
        bytearray(16 * MIB)
    before = resident()
    large = []
    for _ in range(16):
        large.append(bytearray(b"x") * (8 * MIB))
        small.append([bytes(1000) for _ in range(200)])
    large.clear()
    print((resident() - before) // MIB)

{setting}
t = threading.Thread(target=run)
t.start()
t.join()
"""


@glibc
@pytest.mark.parametrize("core", ["_core", "_pure"])
def test_large_blocks_are_returned_at_once(core: str) -> None:
    """Even if small blocks that stay were allocated between them, and in any thread."""
    setting = f"assert {core}.map_large_blocks(MIB)"
    assert printed(FREED_BLOCKS.format(setting=setting))[0] < 16
    assert printed(FREED_BLOCKS.format(setting=""))[0] > 64
    after = f"{setting}; assert {core}.keep_memory(512 * MIB)"
    assert printed(FREED_BLOCKS.format(setting=after))[0] > 64


SPARING = """
from contextlib import ExitStack
stack = ExitStack()
{before}
stack.enter_context(malloc.sparing_memory({weights} * MIB))
{after}
"""


@glibc
@pytest.mark.parametrize(
    ("before", "weights", "after", "spares"),
    [
        ("malloc.begin_loading()", 300, "", True),
        ("malloc.begin_loading()", 200, "", False),
        ("malloc.begin_loading()", 300, "stack.close()", False),
        ("malloc.begin_loading(); malloc.keep_memory(512)", 300, "", False),
        ("", 300, "", False),
    ],
)
def test_large_models_are_measured_with_less(
    before: str, weights: int, after: str, spares: bool
) -> None:
    """Only while a large model is loaded, before the server has requests."""
    setting = SPARING.format(before=before, weights=weights, after=after)
    held = printed(FREED_BLOCKS.format(setting=setting))[0]
    assert held < 16 if spares else held > 64


@cores
def test_a_threshold_that_malloc_does_not_take_is_refused(core: ModuleType) -> None:
    """Nothing is changed in this process, whose settings last."""
    with pytest.raises(ValueError, match="least: got 0, expected from 1"):
        core.map_large_blocks(0)
    assert core.map_large_blocks(1 << 40) is False


SECOND_BLOCK = """
def run():
    faults_of_a_block()
    print(faults_of_a_block())

for go in (run, lambda: (t := threading.Thread(target=run), t.start(), t.join())):
    go()
"""


@glibc
@pytest.mark.parametrize("core", ["_core", "_pure"])
def test_kept_pages_are_used_again(core: str) -> None:
    """With kept memory, a block uses the pages of the one freed before it, in any thread."""
    for faults in printed(f"{core}.keep_memory(1024 * MIB)\n{SECOND_BLOCK}"):
        assert faults < PAGES // 100


@glibc
def test_without_it_every_block_has_new_pages() -> None:
    """Without it nothing is kept: the pages of a block are all new."""
    for faults in printed(SECOND_BLOCK):
        assert faults > PAGES * 0.99


@glibc
def test_heaps_end_is_held_to_the_bound_at_once() -> None:
    """A freed block over the bound is returned, one within it stays and is reported."""
    after_small, after_large = printed("""
malloc.keep_memory(64)
b"x" * (32 * MIB)
print(malloc.retained_bytes())
b"x" * BLOCK
print(malloc.retained_bytes())
""")
    assert 31 * MIB < after_small < 64 * MIB
    assert after_large < 16 * MIB


@glibc
def test_free_memory_between_blocks_in_use_is_held_to_the_bound() -> None:
    """Memory that can't be returned because of a block in use is returned at the next check."""
    before, after, faults = printed("""
malloc.keep_memory(64)
large = b"x" * BLOCK
small = b"x" * MIB
del large
print(malloc.retained_bytes())
malloc._KEEPER.look()
print(malloc.retained_bytes())
print(faults_of_a_block())
""")
    assert before > 99 * MIB
    assert after < 16 * MIB
    assert faults > PAGES * 0.99


@glibc
def test_bound_can_be_changed() -> None:
    """A second call replaces the bound and starts no second thread."""
    kept, given_back, threads = printed("""
malloc.keep_memory(1024)
b"x" * BLOCK
print(malloc.retained_bytes())
malloc.keep_memory(1)
print(malloc.retained_bytes())
print(threading.active_count())
""")
    assert kept > 99 * MIB
    assert given_back < 16 * MIB
    assert threads == 2


@cores
def test_bound_is_checked(core: ModuleType) -> None:
    """A bound below 1 or over 64 bits is refused, and so is a value that is not an integer."""
    for bound in (0, -1, 1 << 63):
        with pytest.raises(ValueError, match="bound|64 bits"):
            core.keep_memory(bound)
    with pytest.raises(TypeError):
        core.keep_memory(1.5)
    with pytest.raises(InvalidInputError, match="mib: got 0"):
        keep_memory(0)


@glibc
def test_both_see_the_same_memory() -> None:
    """The extension and plain Python read the same figures, and count a block as in use."""
    (used, free), (twin_used, twin_free) = _core.malloc_usage(), _pure.malloc_usage()
    assert abs(used - twin_used) < MIB
    assert abs(free - twin_free) < MIB
    block = b"x" * BLOCK
    assert _core.malloc_usage()[0] - used > len(block) - MIB
    assert _core.trim_memory()
    assert _pure.trim_memory()


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    """If malloc is not glibc's, every function says so and no thread is started."""
    monkeypatch.setattr(_pure._memory, "_LIBC", None)
    assert not _pure.keep_memory(MIB)
    assert not _pure.trim_memory()
    assert _pure.malloc_usage() is None
    monkeypatch.setattr(codec, "set_malloc_bound", _pure.keep_memory)
    for name in ("malloc_usage", "trim_memory"):
        monkeypatch.setattr(codec, name, getattr(_pure, name))
    monkeypatch.setattr(malloc, "_KEEPER", malloc._Keeper())
    threads = threading.active_count()
    assert keep_memory() is False
    assert malloc.retained_bytes() is None
    malloc._KEEPER.look()
    assert threading.active_count() == threads
