"""Valid tensors, drawn by hypothesis."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from layertap.v1.tensor_pb2 import DATA_TYPE_BOOL, Tensor
from layertap.wire.dtypes import DTYPES


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every dtype, mostly small; a few with a size of 0, a few without sizes."""
    row = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = row.itemsize * math.prod(shape)
    data = draw(st.binary(min_size=size, max_size=size))
    if row.number == DATA_TYPE_BOOL:
        data = bytes(byte & 1 for byte in data)
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
    return Tensor(name=name, dtype=row.number, shape=shape, padding=bytes(size % 3), data=data)
