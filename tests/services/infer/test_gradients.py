"""Gradients in the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from infering import arrays, batch, output, parameters, raw_request
from layertap import Client
from layertap.app.server import FeatureServer

LAYERS = ["layer1:gradient", "layer1:grad_cam", "conv1:input_gradient"]


@pytest.mark.long
def test_outputs_may_be_gradients(stub: Any, server: FeatureServer) -> None:
    """The parameter ``objective`` gives what the layertap protocol gives, and its value too."""
    x = batch(2)
    request = raw_request(
        x,
        *map(output, LAYERS),
        output("cam", layer="layer1", capture="gradient", method="grad_cam"),
        parameters=parameters({"objective": "fc[maximum]"}),
    )
    found = arrays(stub.ModelInfer(request))
    with Client(server.address) as client:
        expected = client.extract("residual", x, LAYERS, objective="fc[maximum]")
    for name in expected:
        assert np.array_equal(found[name], expected[name])
    assert np.array_equal(found["cam"], expected["layer1:grad_cam"])
    assert found["objective.index"].shape == (2, 1)


@pytest.mark.parametrize("objective", ["fc[99999]", "fc", "fc[median]", ""])
def test_objectives_that_make_no_sense_are_refused(stub: Any, objective: str) -> None:
    """The status is INVALID_ARGUMENT, and the message is about the objective."""
    given = parameters({"objective": objective})
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(raw_request(batch(), output("layer1:gradient"), parameters=given))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "objective" in raised.value.details()


def test_the_form_of_a_map_is_a_parameter(stub: Any, server: FeatureServer) -> None:
    """``map`` and the method of a value give what the layertap protocol gives."""
    x = batch(2)
    request = raw_request(
        x,
        output("large", layer="layer1", capture="gradient", method="grad_cam", map="resized"),
        output("layer1:eigen_cam:map=resized"),
        output("eigen", layer="layer1", method="eigen_cam"),
        parameters=parameters({"objective": "fc[maximum]"}),
    )
    found = arrays(stub.ModelInfer(request))
    with Client(server.address) as client:
        expected = client.extract(
            "residual", x,
            ["layer1:grad_cam:map=resized", "layer1:eigen_cam"], objective="fc[maximum]",
        )  # fmt: skip
    assert np.array_equal(found["large"], expected["layer1:grad_cam"])
    assert np.array_equal(found["eigen"], expected["layer1:eigen_cam"])
    assert found["layer1:eigen_cam:map=resized"].shape == (2, *x.shape[2:])
    wrong = output("wrong", layer="layer1", method="eigen_cam", map="png")
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(raw_request(x, wrong))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "map: got 'png'" in raised.value.details()
