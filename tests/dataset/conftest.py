"""The model of the tests of data sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layertap.local import LocalModel, load


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    """A tiny net with items ``[3, 16, 16]``, in this process."""
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1) as model:
        yield model
