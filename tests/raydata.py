"""Data sets of Ray with tiny items and images, for tests and checks."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image

from tinynets import ITEM

__all__ = ["LAYERS", "NET", "encoded", "items", "rows"]

NET: dict[str, Any] = {"model": "tinynets:residual", "item_shape": ITEM}
LAYERS = ["layer1", "avgpool:reduce=flatten:dtype=bfloat16=pooled"]


def rows(dataset: Any) -> dict[int, dict[str, Any]]:
    """Return the rows of a data set by id."""
    return {row["id"]: row for row in dataset.take_all()}


def items(count: int) -> tuple[np.ndarray, Any]:
    """Return random items, and the same as a data set."""
    arrays = np.random.default_rng(0).random((count, *ITEM), np.float32)
    return arrays, ray.data.from_items(
        [{"id": index, "x": array, "label": f"n{index}"} for index, array in enumerate(arrays)]
    )


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, 2 * value, 3 * value)).save(file, "PNG")
    return file.getvalue()
