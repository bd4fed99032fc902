"""Memory that clients name: only their own, only within its bounds, whatever happens to it."""

from __future__ import annotations

import gc
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from layertap.errors import InvalidInputError, NotFoundError, OverloadedError
from layertap.shm.client_regions import ClientRegions

ME, OTHER = "me", "other"
SIZE = 4096


@pytest.fixture
def key() -> Iterator[str]:
    """A real POSIX shared memory object of this user."""
    name = f"test-{secrets.token_hex(8)}"
    path = Path("/dev/shm") / name  # noqa: S108 - where they are
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    yield f"/{name}"
    path.unlink(missing_ok=True)


@pytest.fixture
def path(key: str) -> Path:
    """The path of the object."""
    return Path("/dev/shm") / key[1:]  # noqa: S108 - where they are


@pytest.fixture
def regions() -> ClientRegions:
    """Regions of a server of this user."""
    return ClientRegions()


def descriptors() -> int:
    """Count the descriptors of shared memory; other descriptors come and go."""
    gc.collect()  # What the test before left behind is not this one's.
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(fd.readlink()).startswith("/dev/shm/test-")  # noqa: S108 - as above
    return found


def test_parts_are_read_and_written(regions: ClientRegions, key: str, path: Path) -> None:
    """Reads return the bytes at region plus part, and writes change them there."""
    regions.register(ME, "in", key, 256, 512)
    part = regions.slice(ME, "in", 16, 32)
    assert part.read() == bytes(range(16, 48))
    part.write(memoryview(b"new"))
    assert path.read_bytes()[256 + 16 :][:4] == b"new\x13"
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [
        (0, 0),
        (0, SIZE + 1),
        (1, SIZE),
        (SIZE, 1),
        (1 << 63, 1 << 63),
        ((1 << 64) - 1, 2),
        ((1 << 64) - SIZE, SIZE + 1),
        (0, (1 << 64) - 1),
    ],
)
def test_parts_that_the_object_lacks_are_not_registered(
    regions: ClientRegions, key: str, offset: int, byte_size: int
) -> None:
    """Zero, huge sizes and sums over 2**64 are refused, and nothing stays open."""
    before = descriptors()
    with pytest.raises(InvalidInputError, match="Invalid offset . byte size for shared memory"):
        regions.register(ME, "in", key, offset, byte_size)
    assert regions.status(ME, "") == []
    assert descriptors() == before


@pytest.mark.parametrize(
    ("offset", "byte_size", "text"),
    [
        (512, 1, "Invalid offset for shared memory region"),
        (1 << 63, 1, "Invalid offset for shared memory region"),
        (-1, 1, "Invalid offset for shared memory region"),
        (0, 513, "Invalid offset . byte size for shared memory region"),
        (511, 2, "Invalid offset . byte size for shared memory region"),
        (1, (1 << 63) - 1, "Invalid offset . byte size for shared memory region"),
        (0, -1, "Invalid offset . byte size for shared memory region"),
    ],
)
def test_parts_that_the_region_lacks_are_refused(
    regions: ClientRegions, key: str, offset: int, byte_size: int, text: str
) -> None:
    """Bytes of the object outside the region can't be reached, whatever the numbers."""
    regions.register(ME, "in", key, 256, 512)
    with pytest.raises(InvalidInputError, match=text):
        regions.slice(ME, "in", offset, byte_size)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "/",
        "//a",
        "../etc/passwd",
        "/../../etc/passwd",
        "a/b",
        "/dev/shm/a",  # noqa: S108 - it is refused
        ".",
        "..",
        "/.hidden",
        "a\0b",
        "a\nb",
        "x" * 256,
        "layertap-pool",
        "/LayerTap-pool",
        "sem.lock",
    ],
)
def test_keys_that_are_no_plain_names_are_refused(regions: ClientRegions, bad: str) -> None:
    """Paths, control characters, layertap's own objects and semaphores get the same refusal."""
    with pytest.raises(InvalidInputError, match="no memory object that this server may use"):
        regions.register(ME, "in", bad, 0, 1)


def test_what_is_not_the_clients_is_not_opened(
    regions: ClientRegions, path: Path, key: str, tmp_path: Path
) -> None:
    """Links, folders, pipes and missing objects get the same refusal."""
    folder = ClientRegions(folder=tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "soft").symlink_to(tmp_path / "secret")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "twice").write_bytes(b"twice")
    (tmp_path / "hard").hardlink_to(tmp_path / "twice")
    texts = set()
    for name in ("soft", "folder", "pipe", "hard", "twice", "absent"):
        with pytest.raises(InvalidInputError) as caught:
            folder.register(ME, "in", name, 0, 1)
        texts.add(str(caught.value).replace(name, "NAME"))
    assert len(texts) == 1
    folder.register(ME, "in", "secret", 0, 6)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_other_users_memory_is_taken_only_where_configured(key: str, path: Path) -> None:
    """A server that may read everything does not do so for callers, unless configured."""
    os.chown(path, 12345, -1)
    with pytest.raises(InvalidInputError, match="may use"):
        ClientRegions().register(ME, "in", key, 0, SIZE)
    ClientRegions(frozenset({12345})).register(ME, "in", key, 0, SIZE)


def test_a_name_is_registered_once(regions: ClientRegions, key: str) -> None:
    """The second registration is refused, and the first is unchanged; another owner may use it."""
    regions.register(ME, "in", key, 0, 16)
    before = descriptors()
    with pytest.raises(InvalidInputError, match="'in' is registered already"):
        regions.register(ME, "in", key, 0, 32)
    assert descriptors() == before
    assert regions.status(ME, "in")[0].byte_size == 16
    regions.register(OTHER, "in", key, 0, 32)


@pytest.mark.parametrize("name", ["", "n" * 256, "é" * 128])
def test_names_are_bounded(regions: ClientRegions, key: str, name: str) -> None:
    """A region's name has 1 to 255 bytes."""
    with pytest.raises(InvalidInputError, match="1 to 255 bytes"):
        regions.register(ME, name, key, 0, 1)


def test_another_owners_region_is_unknown(regions: ClientRegions, key: str) -> None:
    """It can't be used, listed or removed, and is refused like a missing one."""
    regions.register(ME, "mine", key, 0, SIZE)
    for name in ("mine", "nobodys"):
        with pytest.raises(NotFoundError, match=f"Unable to find shared memory region: '{name}'"):
            regions.slice(OTHER, name, 0, 1)
        with pytest.raises(NotFoundError):
            regions.status(OTHER, name)
    assert regions.status(OTHER, "") == []
    regions.unregister(OTHER, "mine")
    regions.unregister(OTHER, "")
    assert [region.name for region in regions.status(ME, "")] == ["mine"]


def test_status_tells_no_keys(regions: ClientRegions, key: str) -> None:
    """Nothing in the status says which object a region is in."""
    regions.register(ME, "mine", key, 8, 16)
    (region,) = regions.status(ME, "mine")
    assert (region.name, region.offset, region.byte_size) == ("mine", 8, 16)
    assert key[1:] not in repr(region)


def test_truncation_is_an_error_of_the_request(
    regions: ClientRegions, key: str, path: Path
) -> None:
    """If the object was shortened, reads and writes say so."""
    regions.register(ME, "in", key, 0, SIZE)
    part = regions.slice(ME, "in", 0, SIZE)
    os.truncate(path, 100)
    with pytest.raises(InvalidInputError, match="shorter than it was"):
        part.read()
    with pytest.raises(InvalidInputError, match="shorter than it was"):
        part.write(memoryview(bytes(SIZE)))
    assert path.stat().st_size == 100


def test_more_than_a_part_is_not_written(regions: ClientRegions, key: str, path: Path) -> None:
    """A write that is too long for its part is refused completely."""
    before = path.read_bytes()
    regions.register(ME, "in", key, 0, SIZE)
    with pytest.raises(InvalidInputError, match="got 9 bytes, expected at most 8"):
        regions.slice(ME, "in", 0, 8).write(memoryview(bytes(9)))
    assert path.read_bytes() == before


def test_unregistering_in_flight_is_safe(regions: ClientRegions, key: str, path: Path) -> None:
    """A request that uses a region finishes with it, and then its descriptor is closed."""
    before = descriptors()
    regions.register(ME, "in", key, 0, SIZE)
    part = regions.slice(ME, "in", 0, 4)
    regions.unregister(ME, "in")
    path.unlink()
    assert part.read() == bytes(range(4))
    part.write(memoryview(b"abcd"))
    assert part.read() == b"abcd"
    assert descriptors() == before + 1
    del part
    assert descriptors() == before


def test_readers_and_unregistering_threads_never_meet_a_closed_descriptor(
    regions: ClientRegions, key: str
) -> None:
    """During concurrent register, read and unregister calls, reads see the bytes or no region."""
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                assert regions.slice(ME, "in", 0, 4).read() == bytes(range(4))
            except NotFoundError:
                pass
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        regions.register(ME, "in", key, 0, SIZE)
        regions.unregister(ME, "in")
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


def test_regions_are_bounded(key: str) -> None:
    """The limit is over all owners, and an unregistered region makes room."""
    regions = ClientRegions(most=3)
    for number, owner in enumerate((ME, ME, OTHER)):
        regions.register(owner, f"r{number}", key, 0, 1)
    with pytest.raises(OverloadedError, match="3 shared memory regions"):
        regions.register(OTHER, "more", key, 0, 1)
    regions.unregister(ME, "")
    regions.register(OTHER, "more", key, 0, 1)


def test_ten_thousand_registrations_leak_nothing(regions: ClientRegions, key: str) -> None:
    """After 10,000 cycles there are as many descriptors and owners as before."""
    before = descriptors()
    for number in range(10_000):
        regions.register(number, "in", key, 0, SIZE)
        regions.unregister(number, "in" if number % 2 else "")
    assert descriptors() == before
    assert regions._regions == {}


def test_descriptors_are_not_inherited(regions: ClientRegions, key: str) -> None:
    """A program that the server starts can't access the memory."""
    regions.register(ME, "in", key, 0, SIZE)
    (region,) = regions.status(ME, "in")
    assert not os.get_inheritable(region._file.fd)
    assert stat.S_ISREG(os.fstat(region._file.fd).st_mode)
