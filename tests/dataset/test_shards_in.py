"""Tar shards and Parquet files as inputs."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layertap.dataset.sources import Source, gather
from layertap.errors import ConfigError, InvalidInputError


def ids(source: Source) -> list[str]:
    return [source.id(index) for index in range(len(source))]


def contents(source: Source) -> list[object]:
    return [source.read(index) for index in range(len(source))]


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return str(path)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_images_of_tar_samples(tmp_path: Path) -> None:
    """The id is the key: the name up to its first dot. Other files of a sample are left alone."""
    first = tar(
        tmp_path / "0.tar",
        {
            "a/1.jpg": b"one",
            "a/1.json": b"{}",
            "a/2.cls": b"7",
            "a/2.PNG": b"two",
            "a/.3.jpg": b"-",
        },
    )
    second = tar(tmp_path / "1.tar", {"b.1.jpg": b"x", "3.webp": b"three"})
    source = gather([first, second])
    assert source.noun == "images"
    assert ids(source) == ["a/1", "a/2", "b", "3"]
    assert [source.read(index) for index in (0, 1)] == [b"one", b"two"]
    assert source.read(3) == b"three"
    with pytest.raises(InvalidInputError, match="the sample has no webp"):
        source.read(2)


def test_one_part_of_tar_samples_is_chosen(tmp_path: Path) -> None:
    """``--field`` says which file to take if a sample has several, or no image."""
    path = tar(
        tmp_path / "0.tar",
        {
            "1.jpg": b"one",
            "1.seg.png": b"segments",
            "1.txt": "schön".encode(),
            "1.npy": npy(np.arange(3)),
        },
    )
    assert contents(gather([path], field="seg.png")) == [b"segments"]
    assert contents(gather([path], field="txt")) == ["schön"]
    np.testing.assert_array_equal(gather([path], field="npy").read(0), np.arange(3))
    assert contents(gather([path])) == [b"one"]
    both = tar(tmp_path / "1.tar", {"1.jpg": b"one", "1.png": b"two"})
    with pytest.raises(InvalidInputError, match="1 has jpg and png; choose one by --field"):
        gather([both])


def test_tar_files_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    """Compressed ones too, as their samples can't be found without reading everything."""
    with pytest.raises(InvalidInputError, match="whole and not compressed"):
        gather([tar(tmp_path / "0.tar", {"1.jpg": b"one"}, "w:gz")])
    with pytest.raises(InvalidInputError, match="got samples with json, expected jpeg, jpg"):
        gather([tar(tmp_path / "1.tar", {"1.json": b"{}"})])
    whole = Path(tar(tmp_path / "2.tar", {"1.jpg": b"one" * 1000}))
    source = gather([str(whole)])
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="the file is cut off"):
        source.read(0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A Parquet file with a column of each kind, in groups of two rows."""
    (tmp_path / "a.jpg").write_bytes(b"in a file")
    table = pa.table(
        {
            "key": ["k0", "k1", "k2"],
            "image": [{"bytes": b"zero", "path": None}, {"bytes": None, "path": "a.jpg"}, None],
            "raw": [b"zero", b"one", b"two"],
            "path": ["a.jpg", "gone.jpg", "a.jpg"],
            "caption": ["a cat", "a bird", "ein Hund"],
            "word": ["a", "b", "c"],
            "values": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    return tmp_path / "rows.parquet"


def test_columns_of_parquet_files(rows: Path) -> None:
    """Images, paths, texts and arrays, with the ids of the column that has them."""
    source = gather([str(rows)], field="raw")
    assert (source.noun, ids(source), contents(source)) == (
        "images", ["k0", "k1", "k2"], [b"zero", b"one", b"two"]
    )  # fmt: skip
    source = gather([str(rows)], field="image")
    assert [source.read(0), source.read(1)] == [b"zero", b"in a file"]
    with pytest.raises(InvalidInputError, match="the column 'image' has no value"):
        source.read(2)
    source = gather([str(rows)], field="path")
    assert source.read(0) == b"in a file"
    with pytest.raises(InvalidInputError, match=r"gone.jpg: No such file"):
        source.read(1)
    source = gather([str(rows)], field="caption")
    assert (source.noun, source.read(2)) == ("texts", "ein Hund")
    assert contents(gather([str(rows)], field="word:text")) == ["a", "b", "c"]
    source = gather([str(rows)], field="values")
    assert source.read(1).dtype == np.float32
    np.testing.assert_array_equal(source.batch(contents(source)), [[1, 2], [3, 4], [5, 6]])


def test_an_unclear_column_is_refused(rows: Path, tmp_path: Path) -> None:
    """The columns are listed; a file with a single one needs no choice."""
    with pytest.raises(
        InvalidInputError, match="got the columns image, raw, path, caption, values"
    ):
        gather([str(rows)])
    with pytest.raises(InvalidInputError, match="got no column 'x', expected one of key, image"):
        gather([str(rows)], field="x")
    with pytest.raises(InvalidInputError, match="got no such column"):
        gather([str(rows)], field="word")
    pq.write_table(pa.table({"jpg": [b"one"], "label": [3]}), tmp_path / "one.parquet")
    assert ids(gather([str(tmp_path / "one.parquet")])) == [f"{tmp_path}/one.parquet:0"]
    (tmp_path / "no.parquet").write_text("no parquet")
    with pytest.raises(InvalidInputError, match="got no Parquet file"):
        gather([str(tmp_path / "no.parquet")])


def test_parquet_files_need_the_extra(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'layertap\[data\]'"):
        gather([str(rows)])
