"""The client: one channel, one method for each RPC."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2

from layertap.client.failures import error_from_rpc
from layertap.client.features import Features
from layertap.client.inputs import encode_input
from layertap.errors import UnavailableError
from layertap.selection import Extractor, LayerSelection, SelectionLike, parse_selections
from layertap.v1 import admin_service_pb2, catalogue_pb2, feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import to_proto
from layertap.wire.messages import encode_request

if TYPE_CHECKING:
    from layertap.client.inputs import InputLike

__all__ = ["Client"]

HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
SERVICE = "/layertap.v1.FeatureService/"
RELOAD = "/layertap.v1.AdminService/Reload"
TARGET = "127.0.0.1:8001"


class Client:
    """Asks a layertap server for layers.

    Safe to share between threads. Use it as a context manager, or ``close`` it.

    Args:
        target: The server's address, ``host:port``.
        timeout: Seconds that a call may take, unless the call says otherwise; None for no end.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     features = client.extract("resnet18", "photo.jpg", ["layer1", "avgpool:input"])
        >>> features["layer1"].shape
        (1, 64, 56, 56)
    """

    def __init__(self, target: str = TARGET, *, timeout: float | None = 60.0) -> None:
        self._timeout = timeout
        # Features are large: gRPC's default of 4 MB would refuse most replies.
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        self._channel = grpc.insecure_channel(target, options=options)
        self._extract = self._channel.unary_unary(f"{SERVICE}Extract")
        self._list = self._channel.unary_unary(f"{SERVICE}ListModels")
        self._describe = self._channel.unary_unary(f"{SERVICE}DescribeModel")

    def extract(
        self,
        model: str,
        given: InputLike,
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        timeout: float | None = None,
    ) -> Features:
        """Run a model on a batch and return layers of it.

        Args:
            model: A served model's name.
            given: A float array ``[B, ...]`` as the model takes it; or an image, or a list of
                images: a path, the bytes of a JPEG, PNG or WebP file, or a PIL image.
            layers: What to return: a name or glob, ``"avgpool:input"`` for an input,
                ``"layer4=deep"`` to rename, a LayerSelection; a list of those; or a mapping of
                names to aliases.
            extractor: How to take them.
            timeout: Seconds that this call may take; None for the client's own.

        Returns:
            The layers by name: read-only numpy views of the received message.

        Raises:
            LayertapError: Whatever the server refuses, as the exception that it names.
        """
        inputs = encode_input(given)
        request = feature_service_pb2.ExtractRequest(
            model=model,
            layers=[_selection(selection) for selection in parse_selections(layers)],
            extractor=to_proto(Extractor(extractor), "EXTRACTOR"),
        )
        tensor = inputs if isinstance(inputs, np.ndarray) else None
        if not isinstance(inputs, np.ndarray):
            request.images.images.extend(inputs)
        return Features(self._call(self._extract, encode_request(request, tensor), timeout))

    def list_models(self, *, timeout: float | None = None) -> list[catalogue_pb2.Model]:
        """Return the models that the server holds."""
        reply = self._call(self._list, b"", timeout)
        return list(feature_service_pb2.ListModelsResponse.FromString(reply).models)

    def describe_model(
        self, model: str, *, timeout: float | None = None
    ) -> feature_service_pb2.DescribeModelResponse:
        """Return a model's catalogue: every layer, its shapes and the extractors that serve it."""
        request = feature_service_pb2.DescribeModelRequest(model=model)
        reply = self._call(self._describe, request.SerializeToString(), timeout)
        return feature_service_pb2.DescribeModelResponse.FromString(reply)

    def reload(self, *, timeout: float | None = None) -> admin_service_pb2.ReloadResponse:
        """Have the server read its configuration and changed weights again.

        Returns:
            What became of each model, once everything new is warm.

        Raises:
            LayertapError: Where the configuration is wrong, another reload is in progress, or the
                server was started without ``--admin``.
        """
        reply = self._call(self._channel.unary_unary(RELOAD), b"", timeout)
        return admin_service_pb2.ReloadResponse.FromString(reply)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server reports itself as serving.

        Raises:
            UnavailableError: After ``timeout`` seconds.
        """
        watch = self._channel.unary_stream(
            HEALTH_WATCH,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        replies = watch(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
        try:
            for reply in replies:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.RpcError:
            pass  # The time is up, or the server went away while it was starting.
        finally:
            replies.cancel()
        raise UnavailableError(f"the server was not ready within {timeout:g} seconds")

    def close(self) -> None:
        """Close the channel. Features that were received stay valid."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the channel."""
        self.close()

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable, message: bytes, timeout: float | None
    ) -> bytes:
        try:
            return method(message, timeout=self._timeout if timeout is None else timeout)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None


def _selection(selection: LayerSelection) -> feature_service_pb2.LayerSelection:
    return feature_service_pb2.LayerSelection(
        layer=selection.layer,
        capture=to_proto(selection.capture, "CAPTURE"),
        alias=selection.alias,
        reduction=to_proto(selection.reduction, "REDUCTION"),
        dtype=dtypes.by_name(selection.dtype).proto_name if selection.dtype else None,
    )
