from __future__ import annotations

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layertap import _core, _pure
from layertap.v1.feature_service_pb2 import ExtractResponse
from layertap.v1.tensor_pb2 import Tensor
from layertap.wire import codec
from layertap.wire.dtypes import DTYPES
from strategies import tensors

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ITEMSIZE = {row.number: row.itemsize for row in DTYPES}


@cores
@bounded
@given(st.lists(tensors(), max_size=3), st.integers(0, 9))
def test_encoded_messages_mean_what_upb_would_have_written(
    core: ModuleType, parts: list[Tensor], extractor: int
) -> None:
    """An encoded message parses to the message that protobuf builds, apart from the padding."""
    head = ExtractResponse(extractor=extractor).SerializeToString()
    arrays = [
        (t.name, t.dtype, np.frombuffer(t.data, f"V{ITEMSIZE[t.dtype]}").reshape(t.shape))
        if t.data
        else (t.name, t.dtype, np.zeros(tuple(t.shape), f"V{ITEMSIZE[t.dtype]}"))
        for t in parts
    ]
    message = core.encode(arrays, field=1, head=head)
    parsed = ExtractResponse.FromString(message)
    for tensor in (*parsed.tensors, *parts):
        assert set(tensor.padding) <= {0}
        tensor.ClearField("padding")
    assert parsed == ExtractResponse(tensors=parts, extractor=extractor)
    assert message == _pure.encode(arrays, field=1, head=head)


def test_extension_is_in_use() -> None:
    """If the extension is built, the codec uses it."""
    assert codec.ACCELERATED
    assert codec.decode is _core.decode
    assert codec.ReplyBuilder is _core.ReplyBuilder


def test_missing_extension_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension its plain-Python equivalent is used, with a single warning."""
    monkeypatch.delattr("layertap._core")
    monkeypatch.setitem(sys.modules, "layertap._core", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "layertap.wire.codec")
    with pytest.warns(RuntimeWarning, match="plain Python") as caught:
        fallback = importlib.import_module("layertap.wire.codec")
    try:
        assert len(caught) == 1
        assert not fallback.ACCELERATED
        assert fallback.decode is _pure.decode
    finally:
        monkeypatch.undo()
        sys.modules["layertap.wire"].codec = codec  # type: ignore[attr-defined]
