"""Converts a caller's arguments to request messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layertap.client.timeouts import bounded
from layertap.inputs import encode_input
from layertap.selection import (
    Extractor,
    LayerSelection,
    SelectionLike,
    as_extractor,
    parse_selections,
)
from layertap.v1 import feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import to_proto
from layertap.wire.messages import encode_request

if TYPE_CHECKING:
    from layertap.inputs import InputLike
    from layertap.wire.tensors import Arrays

__all__ = ["StreamRequest", "request_fields"]


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """One item of a stream; the arguments of ``Client.extract``, and a key.

    Attributes:
        model: A served model's name.
        given: An array ``[B, ...]`` as the model takes it; an image, or a list of images; or a
            mapping of input names to such arrays or images.
        layers: What to return.
        extractor: How to capture them.
        timeout: Seconds that the server may take for it; None for the stream's own.
        key: What its outcome is yielded with; None for its position, from 0.
    """

    model: str
    given: InputLike
    layers: SelectionLike
    extractor: Extractor | str = Extractor.AUTO
    timeout: float | None = None
    key: Any = None

    def message(self, number: int, timeout: float | None, session: bytes = b"") -> bytes:
        """Return the item's message.

        Args:
            number: Its id.
            timeout: Seconds that it may take if it does not say so itself; None for no limit.
            session: The session of shared memory; empty for none.

        Raises:
            InvalidInputError: For an input, a selection or an extractor that can't be sent.
        """
        seconds = bounded(timeout if self.timeout is None else self.timeout)
        # At least 1: 0 would mean no end.
        timeout_ns = 0 if seconds is None else max(1, int(seconds * 1e9))
        fields, inputs = request_fields(self.model, self.given, self.layers, self.extractor)
        request = feature_service_pb2.ExtractStreamRequest(
            id=number, timeout_ns=timeout_ns, shared_memory_session=session, **fields
        )
        return encode_request(request, inputs)


def request_fields(
    model: str, given: InputLike, layers: SelectionLike, extractor: Extractor | str
) -> tuple[dict[str, Any], Arrays]:
    """Return the fields that a request is made of, and its arrays, which are not for protobuf.

    Arguments and errors are those of ``StreamRequest``.
    """
    fields: dict[str, Any] = {
        "model": model,
        "layers": [_selection(selection) for selection in parse_selections(layers)],
        "extractor": to_proto(as_extractor(extractor), "EXTRACTOR"),
    }
    encoded = encode_input(given)
    fields["images"] = [
        feature_service_pb2.ImageBatch(images=files, input=name) for name, files in encoded.images
    ]
    return fields, encoded.arrays


def _selection(selection: LayerSelection) -> feature_service_pb2.LayerSelection:
    return feature_service_pb2.LayerSelection(
        layer=selection.layer,
        capture=to_proto(selection.capture, "CAPTURE"),
        alias=selection.alias,
        reduction=to_proto(selection.reduction, "REDUCTION"),
        dtype=dtypes.by_name(selection.dtype).proto_name if selection.dtype else None,
    )
