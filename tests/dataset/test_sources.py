"""Which items inputs name, in which order, and with which ids."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from layertap.dataset.sources import Part, Source, gather
from layertap.errors import InvalidInputError


def ids(source: Source) -> list[str]:
    return [source.id(index) for index in range(len(source))]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, whose content is their name, and other files."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a/z.png", "a/b/c.webp", "a.txt", "._b.jpg", "a/notes.md", "c.jpeg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "photos"


def test_folders_are_searched_in_the_order_of_their_names(photos: Path) -> None:
    """Images are known by their suffix; hidden files are left out."""
    source = gather(["photos"])
    assert ids(source) == [
        f"photos/{name}" for name in ("a/b/c.webp", "a/z.png", "b.JPG", "c.jpeg")
    ]
    assert source.noun == "images"
    assert [source.read(index) for index in range(2)] == [b"a/b/c.webp", b"a/z.png"]


def test_globs_files_and_folders_may_be_mixed(photos: Path) -> None:
    """Each input keeps its place; a file with a star in its name is not a glob."""
    (photos / "*.png").write_text("star")
    assert ids(gather(["photos/c.jpeg", "photos/*.png", "photos/a"])) == [
        "photos/c.jpeg", "photos/*.png", "photos/a/b/c.webp", "photos/a/z.png"
    ]  # fmt: skip
    assert ids(gather([f"{photos}/**/*.[jp][pn]*g"])) == [
        f"{photos}/*.png", f"{photos}/a/z.png", f"{photos}/c.jpeg"
    ]  # fmt: skip


def test_lists_may_hold_any_name(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with newlines are separated by NUL; bytes that are not UTF-8 stay what they are."""
    odd = [os.fsencode("photos/a\nb.png"), b"photos/\xff.png"]
    for name in odd:
        Path(os.fsdecode(name)).write_bytes(name)
    Path("list").write_bytes(b"\0".join([*odd, b"photos/c.jpeg"]))
    source = gather(["@list"])
    assert ids(source) == ["photos/a\nb.png", "photos/\\xff.png", "photos/c.jpeg"]
    assert [source.read(index) for index in range(2)] == odd
    Path("list").write_bytes(b"photos/c.jpeg\n\nphotos/a\n")
    assert ids(gather(["@list"])) == ["photos/c.jpeg", "photos/a/b/c.webp", "photos/a/z.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"photos/b.JPG\n")))
    assert ids(gather(["-"])) == ["photos/b.JPG"]


def test_rows_of_arrays_and_lines_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files follow each other; ids have the number of the row or of the line."""
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(6).reshape(3, 2))
    np.save("b.npy", np.arange(2).reshape(1, 2))
    source = gather(["a.npy", "b.npy"])
    assert ids(source) == ["a.npy:0", "a.npy:1", "a.npy:2", "b.npy:0"]
    batch = source.batch([source.read(index) for index in (1, 3)])
    np.testing.assert_array_equal(batch, [[2, 3], [0, 1]])
    Path("a.txt").write_text("first\n\nthird\n")
    assert ids(gather(["a.txt"])) == ["a.txt:1", "a.txt:3"]


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([], "got no items"),
        (["photos/gone.jpg"], "input photos/gone.jpg: no such file"),
        (["photos/*.gif"], r"glob photos/\*.gif: no file matches"),
        (["empty"], "folder empty: got no images"),
        (["@gone"], "list gone: No such file"),
        (["photos", "photos/c.jpeg"], "got 'photos/c.jpeg' twice"),
        (["photos/c.jpeg", "photos/a.txt"], "got images and texts, expected items of one kind"),
        (["a.npy", "b.npy"], r"got rows of float64 \[3\], expected those .* float64 \[2\]"),
        (["photos/broken.npy"], "got no .npy file of numbers"),
    ],
)
def test_what_is_refused(photos: Path, inputs: list[str], text: str) -> None:
    """The error names the input."""
    Path("empty").mkdir()
    np.save("a.npy", np.zeros((1, 2)))
    np.save("b.npy", np.zeros((1, 3)))
    (photos / "broken.npy").write_text("no array")
    with pytest.raises(InvalidInputError, match=text):
        gather(inputs)


def test_parts_cover_the_whole(photos: Path) -> None:
    """Each item is in exactly one part, in order."""
    whole = gather(["photos"])
    for count in (1, 2, 3, 4):
        parts = [Part(whole, number, count) for number in range(1, count + 1)]
        assert [name for part in parts for name in ids(part)] == ids(whole)
    with pytest.raises(InvalidInputError, match="part: 1/5 of 4 images has none; use fewer"):
        Part(whole, 1, 5)
    with pytest.raises(InvalidInputError, match="part: got 0/2, expected 1/2 to 2/2"):
        Part(whole, 0, 2)
