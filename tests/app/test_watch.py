"""The watcher reports a change once, and only when the file is stable."""

from __future__ import annotations

import os
from pathlib import Path

from layertap.app.watch import Watcher


def test_a_change_is_told_once_it_has_settled(tmp_path: Path) -> None:
    """A file that changes between checks is waited for; a stable change is reported once."""
    file = tmp_path / "net.pt"
    file.write_bytes(b"1")
    told: list[bytes] = []
    watcher = Watcher(lambda: [file], lambda: told.append(file.read_bytes()))
    watcher.look()
    watcher.look()
    assert told == []
    for size in range(2, 5):
        file.write_bytes(b"2" * size)
        watcher.look()
    assert told == []
    watcher.look()
    watcher.look()
    assert told == [b"2222"]


def test_what_changed_before_the_first_look_is_told(tmp_path: Path) -> None:
    """A change between construction and the first check is reported like any other."""
    file = tmp_path / "net.pt"
    told: list[bool] = []
    watcher = Watcher(lambda: [file], lambda: told.append(file.exists()))
    file.write_bytes(b"")
    watcher.look()
    watcher.look()
    file.unlink()
    watcher.look()
    watcher.look()
    assert told == [True, False]


def test_a_renamed_file_and_a_moved_link_are_changes(tmp_path: Path) -> None:
    """A replacement with the same time and size is detected, also through a link."""
    first, second, link = tmp_path / "1", tmp_path / "2", tmp_path / "net.pt"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    link.symlink_to(first)

    for file in (first, second):
        os.utime(file, ns=(10**18, 10**18))
    told: list[bytes] = []
    watcher = Watcher(lambda: [link], lambda: told.append(link.read_bytes()))
    link.unlink()
    link.symlink_to(second)
    watcher.look()
    watcher.look()
    assert told == [b"2"]
