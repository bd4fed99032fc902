"""Ray Data's rows in Parquet files: each row once, whatever was there before.

Run it with ``make test-ray``. It takes minutes, because each run starts actors that import PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from layertap.errors import InvalidInputError
from layertap.ray import extract, extract_to_parquet
from raydata import LAYERS, NET, encoded, items, rows
from rays import local_cluster

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that ends with the tests."""
    with local_cluster(4):
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield


def table(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a Parquet output by id; each id must be there once."""
    found = pq.read_table(folder).to_pylist()
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def test_parquet_files_continue(tmp_path: Path) -> None:
    """Rows that are in the output are not run again; then it has the bits of a whole run."""
    _, dataset = items(48)
    blocks = dataset.repartition(6)
    given: dict[str, Any] = {"layers": LAYERS, "column": "x", "id_column": "id", **NET}
    given |= {"batch_size": 3}
    whole = extract_to_parquet(blocks, tmp_path / "whole", **given)
    assert (whole.rows, whole.before, whole.failed) == (48, 0, ())
    expected = table(tmp_path / "whole")
    assert expected[0].keys() == {"id", "label", "layer1", "pooled"}
    direct = rows(extract(dataset, **{**given, "batch_size": 16}))
    for index, row in expected.items():
        np.testing.assert_allclose(row["layer1"], direct[index]["layer1"].ravel(), atol=1e-5)

    part = tmp_path / "part"
    extract_to_parquet(blocks, part, **given)
    files = sorted(part.glob("part-*.parquet"))
    assert len(files) == 6
    kept = files[2].stat().st_mtime_ns
    for each in (files[0], files[4]):
        each.unlink()
    again = extract_to_parquet(blocks, part, **given)
    assert (again.rows, again.before) == (48, 32)
    assert table(part) == expected
    assert files[2].stat().st_mtime_ns == kept
    assert sorted(path.name for path in (part / ".layertap").iterdir()) == ["lock", "manifest.json"]
    # Other blocks: rows of a batch that are there already are left out.
    files[1].unlink()
    other = extract_to_parquet(dataset.repartition(5), part, **given)
    assert (other.rows, other.before) == (48, 40)
    found = table(part)
    assert found.keys() == expected.keys()
    for index, row in found.items():
        np.testing.assert_allclose(row["layer1"], expected[index]["layer1"], atol=1e-5)


def test_parquet_files_with_rows_that_fail(tmp_path: Path) -> None:
    """A row that fails is reported, and tried again by the next run."""
    given: dict[str, Any] = {"layers": "layer1", "column": "x", "id_column": "id", **NET}
    given |= {"on_error": "skip"}

    def images(last: bytes) -> Any:
        column = [*(encoded(value) for value in range(4)), last]
        return ray.data.from_items([{"id": f"n{i}", "x": each} for i, each in enumerate(column)])

    first = extract_to_parquet(images(b"no image"), tmp_path / "out", **given)
    assert (first.rows, first.failed) == (4, ("n4",))
    second = extract_to_parquet(images(encoded(9)), tmp_path / "out", **given)
    assert (second.rows, second.before, second.failed) == (5, 4, ())
    with pytest.raises(Exception, match="image n4"):
        extract_to_parquet(
            images(b"no image"), tmp_path / "strict", **{**given, "on_error": "fail"}
        )


def test_parquet_files_that_are_refused(tmp_path: Path) -> None:
    """Other options, a foreign folder, two rows with one id, and an address."""
    _, dataset = items(4)
    given: dict[str, Any] = {"layers": "fc", "column": "x", "id_column": "id", **NET}
    extract_to_parquet(dataset, tmp_path / "out", **given)
    with pytest.raises(InvalidInputError, match=r'layers: \["fc"\] before, \["layer1"\] now'):
        extract_to_parquet(dataset, tmp_path / "out", **{**given, "layers": "layer1"})
    manifest = tmp_path / "out" / ".layertap" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(InvalidInputError, match="made in another way .weights: 0"):
        extract_to_parquet(dataset, tmp_path / "out", **given)
    manifest.unlink()
    with pytest.raises(InvalidInputError, match="there is one already, which has no manifest"):
        extract_to_parquet(dataset, tmp_path / "out", **given)
    twice = dataset.union(dataset)
    with pytest.raises(InvalidInputError, match="two rows have one 'id'"):
        extract_to_parquet(twice, tmp_path / "twice", **given)
    with pytest.raises(InvalidInputError, match="a path on a disk that all nodes share"):
        extract_to_parquet(dataset, "s3://bucket/x", **given)
    with pytest.raises(Exception, match="id_column: got 'name', expected one of id, x, label"):
        extract_to_parquet(dataset, tmp_path / "none", **{**given, "id_column": "name"})


def test_the_documented_code_runs(tmp_path: Path) -> None:
    """The code of docs/ray.md, with a small model and a folder of photos that is here."""
    page = (Path(__file__).parents[1] / "docs" / "ray.md").read_text("utf-8")
    blocks = re.findall(r"```py\n(.*?)```", page[page.index("## Ray Data") :], re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "photos").mkdir()
    for value in range(3):
        (tmp_path / "photos" / f"{value}.png").write_bytes(encoded(value))
    code = "\n".join(blocks)
    for documented, here in {
        "s3://bucket": str(tmp_path),
        "/shared": str(tmp_path / "once"),
        '"resnet50",': '"usualnets:resnet10",',
        'column="bytes",': 'column="bytes", item_shape=(3, 64, 64),',
        "actors=8": "actors=1",
        "num_cpus=4": "num_cpus=1",
    }.items():
        assert documented in code
        code = code.replace(documented, here)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - the page is ours
    assert (names["done"].rows, names["done"].before, names["done"].failed) == (3, 0, ())
    plain, once = (
        pq.read_table(folder) for folder in (tmp_path / "features", tmp_path / "once" / "features")
    )
    assert set(plain.column_names) == set(once.column_names) == {"path", "vector"}
    assert sorted(plain["path"].to_pylist()) == sorted(once["path"].to_pylist())
