"""Ray data sets on Ray's local cluster: the rows have the layers that this process gives.

Parquet files with each row once: see check_ray_parquet.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import ray
import ray.data
from PIL import Image

import layertap
from layertap.errors import InvalidInputError
from layertap.ray import extract
from raydata import LAYERS, NET, encoded, items, rows
from rays import local_cluster
from tinynets import ITEM

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    # Each call starts actors, which import PyTorch.
    pytest.mark.long,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that ends with the tests."""
    with local_cluster(4):
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield


def test_rows_have_their_layers() -> None:
    """Each row keeps its other columns; two actors give the values of one call."""
    arrays, dataset = items(12)
    found = rows(extract(dataset, layers=LAYERS, column="x", batch_size=4, actors=2, **NET))
    with layertap.load("tinynets:residual", item_shape=ITEM, device="cpu", threads=1) as model:
        expected = model.extract(arrays, LAYERS, extractor="hook").numpy()
    assert sorted(found) == list(range(12))
    for index, row in found.items():
        assert set(row) == {"id", "label", "layer1", "pooled"}
        assert row["label"] == f"n{index}"
        np.testing.assert_allclose(row["layer1"], expected["layer1"][index], atol=1e-6)
        np.testing.assert_array_equal(row["pooled"], expected["pooled"][index].astype(np.float32))


def test_images_and_rows_that_fail() -> None:
    """Bytes and pixels are the same images; a row that fails is left out, or ends the run."""
    images = [encoded(value) for value in range(5)]
    pixels = [np.asarray(Image.open(io.BytesIO(raw))) for raw in images]
    given = {"layers": "layer1", "column": "x", **NET}
    of_bytes, of_pixels = (
        ray.data.from_items([{"id": i, "x": each} for i, each in enumerate(column)])
        for column in (images, pixels)
    )
    one, other = rows(extract(of_bytes, **given)), rows(extract(of_pixels, **given))
    for index in range(5):
        np.testing.assert_array_equal(one[index]["layer1"], other[index]["layer1"])
    broken = ray.data.from_items(
        [{"id": i, "x": each} for i, each in enumerate([*images, b"no image"])]
    )
    left = rows(extract(broken, id_column="id", on_error="skip", **given))
    assert sorted(left) == list(range(5))
    np.testing.assert_allclose(left[4]["layer1"], one[4]["layer1"], atol=1e-6)
    with pytest.raises(Exception, match="image 5"):
        extract(broken, id_column="id", **given).take_all()


def test_what_is_refused() -> None:
    """Ragged layers at once, and names that a column has when the rows are used."""
    _, dataset = items(2)
    with pytest.raises(InvalidInputError, match="different lengths"):
        extract(dataset, layers="layer1:reduce=tokens", column="x", **NET)
    with pytest.raises(Exception, match="'label' is the name of a column"):
        extract(dataset, layers="fc=label", column="x", **NET).take_all()
    with pytest.raises(Exception, match="column: got 'y', expected one of id, x, label"):
        extract(dataset, layers="fc", column="y", **NET).take_all()
