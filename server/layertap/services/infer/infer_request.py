"""Converts a ModelInferRequest to the engine's request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from layertap.engine import Engine, ExtractionRequest, ModelHost
from layertap.errors import InvalidInputError, ModelNotFoundError
from layertap.inference import grpc_service_pb2 as pb
from layertap.intervention import parse_interventions
from layertap.objective import parse_objective
from layertap.services.infer.infer_form import MODEL_VERSION, InferForm, ReplyOptions
from layertap.services.infer.inputs import TakenInputs, infer_inputs
from layertap.services.infer.outputs import extractor_of, selections_of
from layertap.services.infer.parameters import check_known, number, text
from layertap.services.infer.shared_memory_rpcs import CallerMemory
from layertap.services.infer.texts import TEXT_PARAMETERS

__all__ = ["check_version", "extraction_request", "find_host", "timeout_of", "unknown_model"]

_US = 1e-6
_KNOWN = (
    *("capture", "method", "map", "reduction", "dtype", "extractor", "variant", "objective"),
    *("around", "resize", "pool"),
    *("interventions", "timeout"),
    *TEXT_PARAMETERS,
)


def find_host(engine: Engine, name: str, version: str) -> ModelHost:
    """Return a served model.

    Raises:
        ModelNotFoundError: If there is no model with that name and version.
        UnavailableError: If the model is being loaded or could not be loaded.
    """
    try:
        check_version(version)
        return engine.host(name)
    except ModelNotFoundError as error:
        raise unknown_model(name, error) from None


def check_version(version: str) -> None:
    """Raise ModelNotFoundError for a version that no model has in this protocol."""
    if version not in ("", MODEL_VERSION):
        raise ModelNotFoundError(f"version: got {version!r}, expected {MODEL_VERSION!r}")


def unknown_model(name: str, error: ModelNotFoundError) -> ModelNotFoundError:
    """Return the error in Triton's words; Triton's clients look for the first words."""
    return ModelNotFoundError(f"Request for unknown model: {name!r} is not found; {error}")


def timeout_of(request: pb.ModelInferRequest) -> float | None:
    """Return the timeout in seconds that a request gives; None if it gives none.

    Raises:
        InvalidInputError: If ``timeout`` is not a number of microseconds.
    """
    microseconds = number(request.parameters, "timeout", "request")
    if microseconds < 0:
        raise InvalidInputError(f"timeout: got {microseconds}, expected microseconds from 0")
    return microseconds * _US if microseconds else None


def extraction_request(
    request: pb.ModelInferRequest,
    raw: Sequence[memoryview],
    host: ModelHost,
    engine: Engine,
    memory: CallerMemory,
    *,
    admit: Callable[[int], object] = lambda nbytes: None,
    streamed: bool = False,
) -> ExtractionRequest[bytes]:
    """Convert a request for a model.

    Args:
        request: The request's small fields.
        raw: The request's raw inputs.
        host: The model.
        engine: The engine, whose limits apply.
        memory: The caller's shared memory.
        admit: Called before allocating, with the bytes that the input needs besides the message.
        streamed: Whether the request is an item of a stream.

    Raises:
        InvalidInputError: If the request is wrong.
        NotFoundError, PermissionDeniedError: If it names shared memory that the caller doesn't
            have.
    """
    given = request.parameters
    check_known(given, _KNOWN, "request")
    # A sequence_id of 0 means no sequence, but Triton's clients send it together with its flags.
    if "sequence_id" in given and given["sequence_id"] != pb.InferParameter(int64_param=0):
        raise InvalidInputError("sequence_id: sequences are not supported, expected none")
    selections = selections_of(request, host, engine.limits.layers)
    regions = {
        output.name: region
        for output in request.outputs
        if (region := memory.slice(output.parameters, f"output {output.name!r}")) is not None
    }
    options = ReplyOptions(host.model.name, request.id, regions, streamed)
    return ExtractionRequest(
        model=host.model.name,
        inputs=infer_inputs(
            request,
            raw,
            memory,
            engine.limits,
            taken=_taken(host),
            admit=admit,
        ),
        selections=selections,
        extractor=extractor_of(request),
        variant=text(given, "variant", "request"),
        objective=parse_objective(text(given, "objective", "request") or None),
        interventions=parse_interventions(_interventions(text(given, "interventions", "request"))),
        form=partial(InferForm, options=options),
    )


def _interventions(given: str) -> list[str]:
    """Return the texts of interventions, which semicolons separate."""
    return [each for each in given.split(";") if each.strip()]


def _taken(host: ModelHost) -> TakenInputs:
    model = host.model
    return TakenInputs(
        [spec.name for spec in model.signature.inputs],
        model.image_inputs if model.preprocess else (),
        model.text_inputs,
        model.audio_inputs if model.audio else (),
        max((spec.images for spec in model.signature.inputs), default=1),
    )
