"""Describes a model's inputs and outputs in terms of this protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from layertap.engine import ModelHost, sent_spec
from layertap.extraction import ValueSpec
from layertap.inference import grpc_service_pb2 as pb
from layertap.inference import model_config_pb2
from layertap.models import InputSpec
from layertap.selection import Capture, Extractor
from layertap.services.infer.infer_form import MODEL_VERSION
from layertap.services.infer.inputs import BYTES, TEXTS_NAME
from layertap.services.infer.outputs import default_selections
from layertap.wire import dtypes

__all__ = ["BACKEND", "PLATFORM", "config_of", "metadata_of"]

PLATFORM = "layertap_pytorch"
BACKEND = "layertap"


def metadata_of(host: ModelHost) -> pb.ModelMetadataResponse:
    """Describe a model: its inputs, and the outputs of a request that lists no outputs.

    Sizes that may vary are -1. If the model takes texts, they follow its inputs as ``texts``, since
    a request has either texts or the ids.
    """
    kind = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=host.model.name,
        versions=[MODEL_VERSION],
        platform=PLATFORM,
        inputs=[
            kind(
                name=spec.name,
                datatype=dtypes.by_name(spec.dtype_name).datatype,
                shape=[-1, *_sizes(spec)],
            )
            for spec in host.model.signature.inputs
        ]
        + [kind(name=TEXTS_NAME, datatype=BYTES, shape=[-1])] * _lists_texts(host),
        outputs=[
            kind(name=name, datatype=_datatype(spec), shape=_shape(spec))
            for name, spec in _outputs(host)
        ],
    )


def config_of(host: ModelHost, max_batch: int, instances: int) -> model_config_pb2.ModelConfig:
    """Describe how a model is served.

    Args:
        host: The model.
        max_batch: Maximum number of items in a request.
        instances: Forward passes that may run at once.
    """
    device, batching = host.model.device, host.options.batching
    cuda = device.type == "cuda"
    config = model_config_pb2.ModelConfig(
        name=host.model.name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=max_batch,
        input=[
            model_config_pb2.ModelInput(
                name=spec.name,
                data_type=_type(dtypes.by_name(spec.dtype_name).datatype),
                format="FORMAT_NCHW" if len(spec.shape) == 3 else "FORMAT_NONE",
                dims=_sizes(spec),
                optional=host.model.signature.may_leave_out(spec),
            )
            for spec in host.model.signature.inputs
        ]
        + [model_config_pb2.ModelInput(name=TEXTS_NAME, data_type="TYPE_STRING", optional=True)]
        * _lists_texts(host),
        output=[
            model_config_pb2.ModelOutput(
                name=name, data_type=_type(_datatype(spec)), dims=_shape(spec)[1:]
            )
            for name, spec in _outputs(host)
        ],
        instance_group=[
            model_config_pb2.ModelInstanceGroup(
                name=host.model.name,
                count=instances,
                kind="KIND_GPU" if cuda else "KIND_CPU",
                gpus=[device.index or 0] if cuda else [],
            )
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=False),
    )
    if batching.most > 1:
        microseconds = round(batching.max_delay * 1e6)
        config.dynamic_batching.max_queue_delay_microseconds = microseconds
    for name, text in _facts(host).items():
        config.parameters[name].string_value = text
    return config


def _lists_texts(host: ModelHost) -> bool:
    """Return whether requests may have an input ``texts`` besides the model's own inputs."""
    names = [spec.name for spec in host.model.signature.inputs]
    return bool(host.model.text_inputs) and TEXTS_NAME not in names


def _sizes(spec: InputSpec) -> list[int]:
    return [-1 if free else size for size, free in spec.dimensions]


def _facts(host: ModelHost) -> dict[str, str]:
    model = host.model
    return {
        "source": model.source,
        "weights": model.weights,
        "input_shape": model.signature.pattern,
        "images": "true" if model.preprocess else "false",
        "preprocessing": model.preprocess.describe() if model.preprocess else "",
        "texts": ", ".join(model.text_inputs),
        "tokenization": model.tokenizer.describe() if model.tokenizer else "",
        "audio": ", ".join(model.audio_inputs) if model.audio else "",
        "audio_preprocessing": model.audio.describe() if model.audio else "",
        "layers": json.dumps(_catalogue(host), separators=(",", ":")),
    }


def _catalogue(host: ModelHost) -> dict[str, list[object]]:
    """Return every layer name that a request may contain, with its datatype and shape."""
    return {
        entry.name if side is Capture.OUTPUT else f"{entry.name}:{side}": [
            _datatype(entry.specs[side]),
            _shape(entry.specs[side]),
        ]
        for entry in host.catalogue
        for side in entry.specs
        if entry.served_by(side) and _datatype(entry.specs[side])
    }


def _outputs(host: ModelHost) -> Iterator[tuple[str, ValueSpec]]:
    selections = default_selections(host)
    if not selections:
        return
    resolved = host.resolve(selections, Extractor.AUTO)
    for output in resolved.outputs:
        yield output.name, sent_spec(host, resolved, output)


def _shape(spec: ValueSpec) -> list[int]:
    return [
        -1 if dim.batch or spec.dynamic or dim.expression is None or dim.expression.terms
        else dim.size
        for dim in spec.dims
    ]  # fmt: skip


def _datatype(spec: ValueSpec) -> str:
    """Return a dtype's name in the protocol; empty if the protocol has no such dtype."""
    name = str(spec.dtype).removeprefix("torch.")
    return next((row.datatype for row in dtypes.DTYPES if row.name == name), "")


def _type(datatype: str) -> Any:
    """Return the name in the config's enum, which message constructors accept."""
    return f"TYPE_{datatype or 'INVALID'}"
