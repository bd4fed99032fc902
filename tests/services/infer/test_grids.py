"""Grids and concatenations in the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

import asking
from infering import arrays, batch, output, raw_request
from kept import kept
from layertap import Client, LayerSelection
from layertap.app.server import FeatureServer
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.services.infer.describe import metadata_of
from tinynets import ITEM

LAYERS = ["layer1+layer2:around=3", "layer1:pool=2x2=pooled", "layer2:resize=9x5=large"]


@pytest.mark.long
def test_outputs_may_name_grids(stub: Any, server: FeatureServer) -> None:
    """Names and parameters give what the layertap protocol gives."""
    x = batch(2)
    request = raw_request(
        x,
        output("layer1+layer2:around=3"),
        output("patches", layer="layer1+layer2", around=3),
        output("pooled", layer="layer1", pool="2x2"),
        output("large", layer="layer2", resize="9x5"),
    )
    found = arrays(stub.ModelInfer(request))
    with Client(server.address) as client:
        expected = client.extract("residual", x, LAYERS, extractor="hook")
    patches = expected["layer1+layer2"]
    assert np.array_equal(found["layer1+layer2:around=3"], patches)
    assert np.array_equal(found["patches"], patches)
    assert np.array_equal(found["pooled"], expected["pooled"])
    assert np.array_equal(found["large"], expected["large"])


@pytest.mark.parametrize(
    "given",
    [
        {"around": -3},
        {"around": 4},
        {"around": "3"},
        {"pool": "7"},
        {"pool": "2x2", "resize": "2x2"},
        {"layer": "layer1:project=@/etc/passwd"},
    ],
)
def test_what_outputs_may_not_say(stub: Any, given: dict[str, object]) -> None:
    """The status is INVALID_ARGUMENT. No file of the server can be named."""
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(raw_request(batch(), output("layer1", **given)))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_metadata_says_what_is_sent() -> None:
    """The datatype and shape of a declared layer are those of its reply."""
    declared = [
        "layer1:reduce=global_average_pool:dtype=float16=mean",
        "layer1+layer2:pool=2x3=both",
        "layer1=plain",
    ]
    engine = Engine(plan_cache=kept())
    try:
        host = engine.load(
            ModelSpec("tinynets:chain", item_shape=ITEM), list(map(LayerSelection.parse, declared))
        )
        outputs = {
            each.name: (each.datatype, list(each.shape)) for each in metadata_of(host).outputs
        }
        sent = asking.ask(engine, "chain", declared, batch(2))
    finally:
        engine.close()
    assert outputs["plain"] == ("FP32", [-1, 8, -1, -1])
    assert outputs["mean"][0] == "FP16"
    assert outputs["both"][0] == "FP32"
    for name, (_, shape) in outputs.items():
        assert len(shape) == sent[name].ndim
        for size, real in zip(shape, sent[name].shape, strict=True):
            assert size in (-1, real)
