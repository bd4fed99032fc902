"""Ray data sets on Ray's local cluster: the rows have the layers that this process gives."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
from PIL import Image

import layertap
from layertap.errors import InvalidInputError
from layertap.ray import extract
from tinynets import ITEM

pytestmark = pytest.mark.filterwarnings("ignore")

NET: dict[str, Any] = {"model": "tinynets:residual", "item_shape": ITEM}
LAYERS = ["layer1", "avgpool:reduce=flatten:dtype=bfloat16=pooled"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that ends with the tests; Ray does not look how many cores there really are."""
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    ray.shutdown()


def rows(dataset: Any) -> dict[int, dict[str, Any]]:
    """Return the rows of a data set by id."""
    return {row["id"]: row for row in dataset.take_all()}


def items(count: int) -> tuple[np.ndarray, Any]:
    """Return random items, and the same as a data set."""
    arrays = np.random.default_rng(0).random((count, *ITEM), np.float32)
    return arrays, ray.data.from_items(
        [{"id": index, "x": array, "label": f"n{index}"} for index, array in enumerate(arrays)]
    )


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


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, 2 * value, 3 * value)).save(file, "PNG")
    return file.getvalue()


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
