"""Stubs of our services, made from descriptors, equivalent to generated ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from layertap.inference import grpc_service_pb2
from layertap.v1 import feature_service_pb2

__all__ = ["feature_stub", "inference_stub"]


def feature_stub(channel: grpc.Channel) -> Any:
    """Return a stub of ``layertap.v1.FeatureService``."""
    return _stub(channel, feature_service_pb2.DESCRIPTOR.services_by_name["FeatureService"])


def inference_stub(channel: grpc.Channel) -> Any:
    """Return a stub of ``inference.GRPCInferenceService``."""
    return _stub(channel, grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"])


def _stub(channel: grpc.Channel, service: ServiceDescriptor) -> Any:
    """Return an object with a callable for each method, which takes and returns messages."""
    arity = {False: "unary", True: "stream"}
    stub = SimpleNamespace()
    for method in service.methods:
        kind = f"{arity[method.client_streaming]}_{arity[method.server_streaming]}"
        call = getattr(channel, kind)(
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        setattr(stub, method.name, call)
    return stub
