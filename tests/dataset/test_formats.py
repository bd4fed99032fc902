"""Every format holds the rows, their ids and dtypes, as its own library reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import lance
import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors import safe_open

from layertap.dataset import extract
from layertap.dataset.writers import FORMATS, format_of
from layertap.errors import ConfigError, InvalidInputError
from layertap.local import LocalModel

Read = dict[str, np.ndarray]


def read_npz(path: Path) -> Read:
    with np.load(path) as stored:
        return dict(stored)


def read_npy(path: Path) -> Read:
    return {
        file.stem.replace("%3A", ":"): np.load(file, mmap_mode="r") for file in path.glob("*.npy")
    }


def read_safetensors(path: Path) -> Read:
    parts = []
    for file in sorted(path.glob("part-*.safetensors")):
        with safe_open(file, "np") as part:
            arrays = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118
            parts.append({"ids": np.array(json.loads(part.metadata()["ids"])), **arrays})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_parquet(path: Path) -> Read:
    table = pq.read_table(path)
    assert table.column_names[0] == "ids"
    read = {"ids": np.array(table["ids"].to_pylist())}
    for field in table.schema:
        if field.name != "ids":
            shape = json.loads(field.metadata[b"shape"])
            column = table[field.name].combine_chunks()
            flat = column.flatten() if shape else column
            read[field.name] = flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)
    return read


def read_lance(path: Path) -> Read:
    table = lance.dataset(path).to_table()
    assert table.column_names[0] == "ids"
    read = {"ids": np.array(table["ids"].to_pylist())}
    for field in table.schema:
        if field.name != "ids":
            shape = json.loads(field.metadata[b"shape"])
            column = table[field.name].combine_chunks()
            flat = column.flatten() if shape else column
            name = field.name.replace("%2E", ".")
            read[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)
    return read


def read_zarr(path: Path) -> Read:
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def read_hdf5(path: Path) -> Read:
    with h5py.File(path) as file:
        return {"ids": file["ids"].asstr()[:], **{n: file[n][:] for n in file if n != "ids"}}


READERS: dict[str, Callable[[Path], Read]] = {
    "npz": read_npz,
    "npy": read_npy,
    "safetensors": read_safetensors,
    "parquet": read_parquet,
    "lance": read_lance,
    "zarr": read_zarr,
    "hdf5": read_hdf5,
}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.npy"
    np.save(path, np.random.default_rng(0).random((10, 3, 16, 16), np.float32))
    return path


def test_there_is_a_reader_for_each_format() -> None:
    """A new format can't be forgotten here."""
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_ids_and_dtypes(model: LocalModel, items: Path, tmp_path: Path, name: str) -> None:
    """Rows over several shards are those of passes over the same batches, in the items' order."""
    layers = [
        "layer1",
        "layer1.0.conv1",
        "avgpool:input:reduce=flatten:dtype=float16",
        "layer1:dtype=bfloat16=half",
    ]
    output = tmp_path / f"out{FORMATS[name].suffixes[0]}"
    extract(
        model, [items], layers, output, extractor="hook", batch_size=2, shard_items=4
    )  # fmt: skip
    stored = READERS[name](output)
    assert stored.pop("ids").tolist() == [f"{items}:{index}" for index in range(10)]
    batches = np.load(items).reshape(5, 2, 3, 16, 16)
    expected = [model.extract(batch, layers, extractor="hook").numpy() for batch in batches]
    assert stored.keys() == expected[0].keys()
    for layer, rows in stored.items():
        right = np.concatenate([each[layer] for each in expected])
        if name != "safetensors" and right.dtype == ml_dtypes.bfloat16:
            right = right.astype(np.float32)
        assert rows.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(rows, np.float32), right.astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_one_number_for_each_item_and_unusual_names(
    model: LocalModel, items: Path, tmp_path: Path, name: str
) -> None:
    """A layer may be called ``file``, and rows of one value have that shape."""
    output = tmp_path / "out"
    given = extract(model, [items], ["layer1=file"], output, format=name, shard_items=4)
    assert given.rows == 10
    assert READERS[name](output)["file"].shape == (10, 8, 8, 8)


def test_an_unknown_suffix_is_refused_with_the_list(tmp_path: Path) -> None:
    """The error lists the suffixes; ``--format`` takes any suffix."""
    with pytest.raises(ConfigError, match=r"suffix '.csv', expected one of \.npz, \.npy, .*\.hdf5"):
        format_of(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="got no suffix"):
        format_of(tmp_path / "a")
    with pytest.raises(ConfigError, match="format: got 'csv', expected one of npz"):
        format_of(tmp_path / "a.csv", "csv")
    assert format_of(tmp_path / "a.csv", "npz").name == "npz"


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.library])
def test_a_missing_library_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setitem(sys.modules, FORMATS[name].library, None)
    with pytest.raises(ConfigError, match=r"pip install 'layertap\[data\]'"):
        format_of(tmp_path / "a", name)


def test_an_output_called_ids_is_refused(model: LocalModel, items: Path, tmp_path: Path) -> None:
    """It would hide the items' names."""
    with pytest.raises(InvalidInputError, match="can't be called 'ids'"):
        extract(model, [items], ["layer1=ids"], tmp_path / "out.npz")
