"""Converts a caller's arguments to request messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap.client.timeouts import bounded
from layertap.inputs import encode_input
from layertap.intervention import parse_interventions
from layertap.objective import parse_objective
from layertap.selection import (
    Extractor,
    LayerSelection,
    SelectionLike,
    Sweep,
    as_extractor,
    parse_selections,
)
from layertap.v1 import feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import to_proto
from layertap.wire.interventions import interventions_to_proto
from layertap.wire.messages import encode_request
from layertap.wire.objectives import objective_to_proto
from layertap.wire.regrids import projection_to_proto, regrid_to_proto
from layertap.wire.small_tensors import array_to_proto

if TYPE_CHECKING:
    from layertap.inputs import InputLike
    from layertap.intervention import InterventionsLike
    from layertap.objective import ObjectiveLike
    from layertap.texts import Texts
    from layertap.wire.tensors import Arrays

__all__ = ["StreamRequest", "request_fields"]


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """One item of a stream: the arguments of ``Client.extract``, and a key.

    Attributes:
        model: The name of a served model.
        given: An array ``[B, ...]`` for the model; an image, or a list of images; or a mapping of
            input names to such arrays or images.
        layers: The layers to return.
        extractor: The extractor to use.
        objective: What requested gradients are the gradients of; see ``Client.extract``.
        interventions: Changes of values while the model runs; see ``Client.extract``.
        variant: How the extractor's program is finished, such as ``"channels_last"``; empty for the
            usual way.
        timeout: Seconds that the server may take for this item; None for the stream's default.
        key: Identifies the item's outcome; if None, its position from 0 is used.
    """

    model: str
    given: InputLike
    layers: SelectionLike
    extractor: Extractor | str = Extractor.AUTO
    objective: ObjectiveLike | None = field(default=None, kw_only=True)
    interventions: InterventionsLike | None = field(default=None, kw_only=True)
    variant: str = field(default="", kw_only=True)
    timeout: float | None = None
    key: Any = None

    def message(self, number: int, timeout: float | None, session: bytes = b"") -> bytes:
        """Return the item's message.

        Args:
            number: The item's id.
            timeout: Seconds for an item without its own timeout; None for no limit.
            session: The session of shared memory; empty for none.

        Raises:
            InvalidInputError: If the input, a selection or the extractor can't be sent.
        """
        seconds = bounded(timeout if self.timeout is None else self.timeout)
        # At least 1, because 0 would mean no limit.
        timeout_ns = 0 if seconds is None else max(1, int(seconds * 1e9))
        fields, inputs = request_fields(
            self.model,
            self.given,
            self.layers,
            self.extractor,
            objective=self.objective,
            interventions=self.interventions,
            variant=self.variant,
        )
        request = feature_service_pb2.ExtractStreamRequest(
            id=number, timeout_ns=timeout_ns, shared_memory_session=session, **fields
        )
        return encode_request(request, inputs)


def request_fields(
    model: str,
    given: InputLike,
    layers: SelectionLike,
    extractor: Extractor | str,
    *,
    objective: ObjectiveLike | None = None,
    interventions: InterventionsLike | None = None,
    variant: str = "",
) -> tuple[dict[str, Any], Arrays]:
    """Return the protobuf fields of a request, and its arrays, which protobuf doesn't encode.

    See ``StreamRequest`` for arguments and errors.
    """
    fields: dict[str, Any] = {
        "model": model,
        "layers": [_selection(selection) for selection in parse_selections(layers)],
        "extractor": to_proto(as_extractor(extractor), "EXTRACTOR"),
        "variant": variant,
        "objective": objective_to_proto(parse_objective(objective)),
        "interventions": interventions_to_proto(parse_interventions(interventions)),
    }
    encoded = encode_input(given)
    fields["images"] = [
        feature_service_pb2.ImageBatch(images=files, input=name) for name, files in encoded.images
    ]
    fields["texts"] = [_texts(name, texts) for name, texts in encoded.texts]
    fields["audio"] = [
        feature_service_pb2.AudioBatch(audio=audio.encoded, input=name)
        for name, audio in encoded.audio
    ]
    return fields, encoded.arrays


def _texts(name: str, given: Texts) -> feature_service_pb2.TextBatch:
    options = given.options
    return feature_service_pb2.TextBatch(
        texts=given.texts,
        input=name,
        truncation=to_proto(options.truncation, "TRUNCATION"),
        max_tokens=options.max_tokens,
        omit_special_tokens=not options.special_tokens,
        return_tokens=options.return_tokens,
    )


def _sweep(sweep: Sweep) -> feature_service_pb2.Sweep:
    base = sweep.baseline
    return feature_service_pb2.Sweep(
        steps=sweep.steps,
        rule=to_proto(sweep.rule, "INTEGRATION_RULE"),
        baseline=None if isinstance(base, np.ndarray) else base,
        baseline_tensor=array_to_proto(base) if isinstance(base, np.ndarray) else None,
        noise=sweep.noise,
        seed=sweep.seed,
    )


def _selection(selection: LayerSelection) -> feature_service_pb2.LayerSelection:
    return feature_service_pb2.LayerSelection(
        layer=selection.layer,
        capture=to_proto(selection.capture, "CAPTURE"),
        alias=selection.alias,
        reduction=to_proto(selection.reduction, "REDUCTION"),
        dtype=dtypes.by_name(selection.dtype).proto_name if selection.dtype else None,
        method=to_proto(selection.method, "METHOD"),
        sweep=_sweep(selection.sweep) if selection.method.sweeps else None,
        map_form=to_proto(selection.map_form, "MAP_FORM") if selection.method.is_map else None,
        concat=selection.concat,
        regrid=regrid_to_proto(selection.regrid),
        projection=projection_to_proto(selection.projection),
    )
