"""What the service reports about itself and its models."""

from __future__ import annotations

import json

import grpc
import pytest

from infering import batch, output, raw_request
from layertap import Client, __version__
from layertap.inference import grpc_service_pb2 as pb
from layertap.inference import model_config_pb2

Code = grpc.StatusCode


def test_the_server_tells_who_it_is(stub) -> None:
    """It is live and ready, and reports its name, version and the extensions that it supports."""
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("layertap", __version__)
    assert list(metadata.extensions) == [
        "model_configuration",
        "model_repository",
        "parameters",
        "statistics",
        "system_shared_memory",
    ]


def test_a_server_whose_health_is_not_serving_is_not_ready(stub, server) -> None:
    """ServerReady follows the health, while ServerLive stays true."""
    server._health.show("", serving=False)
    try:
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert stub.ServerLive(pb.ServerLiveRequest()).live
    finally:
        server._health.show("", serving=True)


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("residual", "", True),
        ("residual", "1", True),
        ("residual", "2", False),
        ("nope", "", False),
        ("coming", "", False),
    ],
)
def test_models_are_ready_or_not(stub, name: str, version: str, ready: bool) -> None:
    """Unknown models and versions, and models that are loading, are not ready; nothing raises."""
    request = pb.ModelReadyRequest(name=name, version=version)
    assert stub.ModelReady(request).ready is ready


def test_metadata_lists_the_input_and_the_declared_layers(stub) -> None:
    """The model has one input tensor; its outputs are the declared layers, under their aliases."""
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="residual"))
    assert (list(metadata.versions), metadata.platform) == (["1"], "layertap_pytorch")
    tensors = [*metadata.inputs, *metadata.outputs]
    assert [(t.name, t.datatype, list(t.shape)) for t in tensors] == [
        ("x", "FP32", [-1, 3, -1, -1]),
        ("layer1", "FP32", [-1, 8, -1, -1]),
        ("before", "FP32", [-1, 16, -1, -1]),
    ]


def test_the_last_module_stands_in_for_declared_layers(stub) -> None:
    """The output of resnet18 without declared layers is its fc."""
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="resnet18"))
    assert [(t.name, list(t.shape)) for t in metadata.outputs] == [("fc", [-1, 1000])]


def test_config_tells_how_a_model_is_served(stub, engine) -> None:
    """The config has batch sizes, dims without the batch, instances and other facts."""
    config = stub.ModelConfig(pb.ModelConfigRequest(name="residual")).config
    assert (config.name, config.backend, config.max_batch_size) == ("residual", "layertap", 64)
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert config.input[0].format == model_config_pb2.ModelInput.FORMAT_NCHW
    assert list(config.input[0].dims) == [3, -1, -1]
    assert [(o.name, list(o.dims)) for o in config.output] == [
        ("layer1", [8, -1, -1]),
        ("before", [16, -1, -1]),
    ]
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert config.instance_group[0].count == 1
    assert not config.model_transaction_policy.decoupled
    assert not config.HasField("dynamic_batching")
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert facts["source"] == "tinynets:residual"
    assert facts["input_shape"] == engine.host("residual").model.signature.pattern
    assert facts["images"] == "true"
    assert facts["preprocessing"] == engine.host("residual").model.preprocess.describe()


@pytest.mark.long
def test_every_layer_of_the_catalogue_in_the_config_can_be_asked_for(stub) -> None:
    """Each layer in it is returned with the datatype and shape given there."""
    config = stub.ModelConfig(pb.ModelConfigRequest(name="residual")).config
    layers = json.loads(config.parameters["layers"].string_value)
    assert {"layer1.0.conv1", "avgpool", "avgpool:input", "layer1.0.relu_1"} <= set(layers)
    for name, (datatype, shape) in layers.items():
        out = stub.ModelInfer(raw_request(None, output(name), parameters={})).outputs[0]
        real = [-1 if said == -1 else size for said, size in zip(shape, out.shape, strict=True)]
        assert (out.datatype, out.shape[0], real) == (datatype, 1, shape), name


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_unknown_models_are_not_found(stub, method: str) -> None:
    """The text is the one that clients of the protocol know."""
    request = getattr(pb, f"{method}Request")(name="nope")
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request)
    assert caught.value.code() == Code.NOT_FOUND
    assert caught.value.details().startswith("Request for unknown model: 'nope' is not found")


def test_statistics_move(stub) -> None:
    """Items, passes, times and sizes are counted by outcome; those of other models don't change."""

    def told(name: str) -> pb.ModelStatistics:
        request = pb.ModelStatisticsRequest(name=name)
        (stats,) = stub.ModelStatistics(request).model_stats
        return stats

    before, other = told("residual"), told("resnet18")
    stub.ModelInfer(raw_request(batch(3)))
    stub.ModelInfer(raw_request(batch(3)))
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(raw_request(None, output("layer7")))
    after = told("residual")
    assert after.inference_count == before.inference_count + 6
    assert after.execution_count == before.execution_count + 2
    assert after.last_inference > 1_700_000_000_000
    old, new = before.inference_stats, after.inference_stats
    assert new.success.count == old.success.count + 2
    assert new.fail.count == old.fail.count + 1
    assert new.fail.ns > old.fail.ns
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    for part in parts:
        assert getattr(new, part).count == getattr(old, part).count + 2
    assert sum(getattr(new, part).ns for part in parts) == new.success.ns
    assert 3 in {each.batch_size for each in after.batch_stats}
    assert after.memory_usage[0].byte_size > 0
    assert told("resnet18") == other
    everything = stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert {"residual", "resnet18"} <= {each.name for each in everything}


def test_native_requests_count_as_well(stub, server) -> None:
    """Statistics belong to the model, whichever protocol was used."""
    request = pb.ModelStatisticsRequest(name="residual")
    before = stub.ModelStatistics(request).model_stats[0].inference_count
    with Client(server.address) as client:
        client.extract("residual", batch(2), "layer1")
    assert stub.ModelStatistics(request).model_stats[0].inference_count == before + 2


def test_settings_are_told_and_not_changed(stub) -> None:
    """Tracing in this protocol is off; log settings are reported; changes are refused."""
    traces = stub.TraceSetting(pb.TraceSettingRequest())
    assert list(traces.settings["trace_level"].value) == ["OFF"]
    logs = stub.LogSettings(pb.LogSettingsRequest()).settings
    assert logs["log_error"].bool_param
    assert logs["log_verbose_level"].uint32_param == 0
    changed = pb.TraceSettingRequest()
    changed.settings["trace_level"].value.append("TENSORS")
    louder = pb.LogSettingsRequest()
    louder.settings["log_verbose_level"].uint32_param = 9
    for call, request in ((stub.TraceSetting, changed), (stub.LogSettings, louder)):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() == Code.INVALID_ARGUMENT
        assert "changed by the server's configuration only" in caught.value.details()
