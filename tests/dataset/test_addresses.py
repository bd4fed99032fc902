"""Inputs at addresses: fsspec's memory and local file systems, and a real web server."""

from __future__ import annotations

import functools
import http.server
import io
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layertap.dataset.addresses import is_address, read_address, suffix_of
from layertap.dataset.sources import NamedArrayRows, Source, gather, joined
from layertap.errors import ConfigError, InvalidInputError, UnavailableError

PHOTOS = ("a/b/c.webp", "a/z.png", "b.JPG", "c.jpeg")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, with parts of them if the server has ``parts``."""

    server: WebServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name
        """Say nothing."""

    def do_GET(self) -> None:
        """Send a file, a part of one, or the status of ``fail``."""
        if self.server.fail:
            self.send_error(self.server.fail)
            return
        wanted, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        if not (self.server.parts and wanted and path.is_file()):
            super().do_GET()
            return
        begin, end = wanted.removeprefix("bytes=").split("-")
        content = path.read_bytes()
        part = content[int(begin) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {begin}-{end or len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        """Say whether parts can be asked for."""
        if self.server.parts:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


class WebServer(http.server.ThreadingHTTPServer):
    """A web server of a folder.

    Attributes:
        parts: Whether it sends parts of files.
        fail: The status of every answer; 0 for the right one.
    """

    parts = True
    fail = 0
    daemon_threads = True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images, whose content is their name, and other files."""
    for name in (*PHOTOS, "a.txt", "._b.jpg", "a/notes.md"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    """A running web server of the folder."""
    handler = functools.partial(Handler, directory=str(folder))
    with WebServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["memory", "file", "http"])
def root(request: pytest.FixtureRequest, folder: Path, web: WebServer) -> Iterator[str]:
    """The address of the folder, by each file system; a slash follows."""
    if request.param == "file":
        yield f"file://{folder}"
        return
    if request.param == "http":
        yield f"http://127.0.0.1:{web.server_port}"
        return
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/root", recursive=True)
    yield "memory:///root"
    memory.rm("/root", recursive=True)


def put(root: str, folder: Path, name: str, content: bytes) -> str:
    """Write a file that the address serves; return its address."""
    (folder / name).write_bytes(content)
    if root.startswith("memory"):
        fsspec.filesystem("memory").pipe_file(f"/root/{name}", content)
    return f"{root}/{name}"


def ids(source: Source) -> list[str]:
    return [source.id(index) for index in range(len(source))]


def contents(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


def test_folders_globs_and_files(root: str) -> None:
    """The same items as on the disk, in the same order, with addresses as ids."""
    expected = [f"{root}/photos/{name}" for name in PHOTOS]
    source = gather([f"{root}/photos/"])
    assert ids(source) == expected
    assert contents(source) == [name.encode() for name in PHOTOS]
    assert source.noun == "images"
    assert ids(gather([f"{root}/photos/*.jpeg", f"{root}/photos/a/z.png"])) == [
        f"{root}/photos/c.jpeg", f"{root}/photos/a/z.png"
    ]  # fmt: skip


def test_lists_of_addresses(root: str, folder: Path) -> None:
    """A list may be at an address, and name addresses."""
    lines = "\n".join(f"{root}/photos/{name}" for name in ("c.jpeg", "a/z.png"))
    listed = put(root, folder, "list", lines.encode())
    assert contents(gather([f"@{listed}"])) == [b"c.jpeg", b"a/z.png"]


def test_texts(root: str, folder: Path) -> None:
    """The lines of a text file are items."""
    address = put(root, folder, "lines.txt", "one\n\nthré\n".encode())
    source = gather([address])
    assert ids(source) == [f"{address}:1", f"{address}:3"]
    assert contents(source) == ["one", "thré"]


def test_arrays(root: str, folder: Path) -> None:
    """Rows are read one by one."""
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    buffer = io.BytesIO()
    np.save(buffer, array)
    address = put(root, folder, "items.npy", buffer.getvalue())
    source = gather([address])
    assert ids(source)[4] == f"{address}:4"
    assert np.array_equal(source.batch(contents(source)), array)
    named = joined([NamedArrayRows({"x": address, "y": address})])
    assert np.array_equal(named.batch(contents(named))["y"], array)
    for name, odd in (("fortran.npy", np.asfortranarray(array)), ("none.npy", np.float32(1))):
        buffer = io.BytesIO()
        np.save(buffer, odd)
        with pytest.raises(InvalidInputError, match=name):
            gather([put(root, folder, name, buffer.getvalue())])
    with pytest.raises(InvalidInputError, match="no .npy file"):
        gather([put(root, folder, "text.npy", b"text")])


def test_tar_shards(root: str, folder: Path) -> None:
    """Each item is read from its place in the file."""
    with tarfile.open(folder / "part.tar", "w") as archive:
        for index in range(3):
            content = f"image {index}".encode()
            info = tarfile.TarInfo(f"{index:03}.jpg")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    address = put(root, folder, "part.tar", (folder / "part.tar").read_bytes())
    source = gather([address])
    assert ids(source) == ["000", "001", "002"]
    assert contents(source) == [b"image 0", b"image 1", b"image 2"]


def test_parquet(root: str, folder: Path) -> None:
    """Bytes, and paths relative to the folder of the file or addresses of their own."""
    table = pa.table({"id": ["x", "y"], "image": pa.array([b"1", b"2"])})
    pq.write_table(table, folder / "bytes.parquet")
    paths = ["photos/c.jpeg", f"{root}/photos/a/z.png"]
    pq.write_table(pa.table({"id": ["x", "y"], "path": paths}), folder / "paths.parquet")
    for name, expected in (
        ("bytes.parquet", [b"1", b"2"]),
        ("paths.parquet", [b"c.jpeg", b"a/z.png"]),
    ):
        source = gather([put(root, folder, name, (folder / name).read_bytes())])
        assert ids(source) == ["x", "y"]
        assert contents(source) == expected


def test_what_is_not_there(root: str) -> None:
    """The message names the address."""
    for given in ("none.jpg", "none/*.jpg"):
        with pytest.raises(InvalidInputError, match=given.replace("*", r"\*")):
            gather([f"{root}/photos/{given}"])


def test_a_changed_file_has_another_stamp(root: str, folder: Path) -> None:
    """So a run is not continued with another file of the same name."""
    source = gather([put(root, folder, "one.png", b"1")])
    before = source.stamp(0)
    put(root, folder, "one.png", b"22")
    fsspec.filesystem("http").invalidate_cache()
    assert source.stamp(0) != before


def test_a_server_that_sends_no_parts_is_refused(web: WebServer, folder: Path) -> None:
    """A whole file in place of a part would be wrong rows without an error."""
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(folder / "items.npy", array)
    address = f"http://127.0.0.1:{web.server_port}/items.npy"
    source = gather([address])
    assert np.array_equal(source.read(2)[""], array[2])
    web.parts = False
    with pytest.raises(InvalidInputError, match="does not send parts"):
        source.read(2)


def test_what_says_nothing_about_an_item(web: WebServer) -> None:
    """A refusal is the item's failure; a server that fails or is gone is not."""
    source = gather([f"http://127.0.0.1:{web.server_port}/photos/c.jpeg"])
    for status, error in ((403, InvalidInputError), (404, InvalidInputError),
                          (500, UnavailableError), (503, UnavailableError)):  # fmt: skip
        web.fail = status
        with pytest.raises(error, match="jpeg"):
            source.read(0)
    web.fail = 0
    assert source.read(0) == b"c.jpeg"
    with pytest.raises(UnavailableError, match="127.0.0.1:1/"):
        read_address("http://127.0.0.1:1/a.jpg")


def test_addresses_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown schemes, chains and passwords; and a library that is missing is named."""
    with pytest.raises(InvalidInputError, match="nosuch"):
        gather(["nosuch://x/a.jpg"])
    with pytest.raises(InvalidInputError, match="IPv6"):
        gather(["http://[x/a.jpg"])
    with pytest.raises(InvalidInputError, match="chain"):
        gather(["simplecache::memory://x/a.jpg"])
    with pytest.raises(InvalidInputError, match="chain"):
        gather(["zip://a.jpg::memory://x/a.zip"])
    with pytest.raises(UnavailableError):
        gather(["http://[::1]:1/a.jpg"])
    with pytest.raises(InvalidInputError, match="password") as raised:
        gather(["http://me:secret@127.0.0.1/a.jpg"])
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="s3fs"):
        gather(["s3://bucket/a.jpg"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"layertap\[fsspec\]"):
        gather(["memory://x/a.jpg"])


@pytest.mark.parametrize(
    ("path", "suffix", "address"),
    [
        ("a.JPG", ".jpg", False),
        ("s3://b/x.y/a", "", True),
        ("https://h/a.png?x=1.txt", ".png", True),
        ("s3://b/a?.tar", ".tar", True),
        (".hidden", "", False),
        ("C:\\a.npy", ".npy", False),
        ("hf://datasets/a/b/c.parquet", ".parquet", True),
    ],
)
def test_suffixes(path: str, suffix: str, address: bool) -> None:
    """The query of a web address is no part of its suffix."""
    assert suffix_of(path) == suffix
    assert is_address(path) is address
