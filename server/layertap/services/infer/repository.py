"""The models of the configuration: any caller may list them, the operator may load and unload."""

from __future__ import annotations

from typing import Protocol

from layertap.engine import Engine
from layertap.engine.versions import LOADING
from layertap.errors import InvalidInputError, PermissionDeniedError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.infer_form import MODEL_VERSION

__all__ = ["Repository", "RepositoryControl"]


class RepositoryControl(Protocol):
    """Loads and unloads models, if the operator allows it."""

    def load_model(self, name: str) -> None:
        """Load a model of the configuration, or replace it.

        Raises:
            ModelNotFoundError: If the configuration has no such model.
            LayertapError: If it can't be loaded, or can't be loaded now.
        """

    def unload_model(self, name: str) -> None:
        """Unload a model, until the model or the configuration is loaded again.

        Raises:
            ModelNotFoundError: If there is no such model.
            UnavailableError: If it can't be done now.
        """


class Repository:
    """Answers the RPCs about the configuration's models.

    Args:
        engine: The engine.
        control: Loads and unloads models; None if that is not allowed.
    """

    def __init__(self, engine: Engine, control: RepositoryControl | None) -> None:
        self._engine = engine
        self._control = control

    def index(
        self, request: pb.RepositoryIndexRequest, caller: Caller
    ) -> pb.RepositoryIndexResponse:
        """List the models, in the configuration's order."""
        _check_repository(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=name, version=MODEL_VERSION, state=_state(reason), reason=reason
                )
                for name, reason in self._engine.states()
                if not (request.ready and reason)
            ]
        )

    def load(
        self, request: pb.RepositoryModelLoadRequest, caller: Caller
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model."""
        _check_repository(request.repository_name)
        if request.parameters:
            raise InvalidInputError(
                f"parameters: got {', '.join(sorted(request.parameters))}, expected none: only the "
                f"configuration decides what is loaded"
            )
        self._allowed().load_model(request.model_name)
        return pb.RepositoryModelLoadResponse()

    def unload(
        self, request: pb.RepositoryModelUnloadRequest, caller: Caller
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model."""
        _check_repository(request.repository_name)
        if unknown := set(request.parameters) - {"unload_dependents"}:
            raise InvalidInputError(
                f"parameters: got {', '.join(sorted(unknown))}, expected 'unload_dependents'"
            )
        self._allowed().unload_model(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _allowed(self) -> RepositoryControl:
        if self._control is None:
            raise PermissionDeniedError(
                "models can't be loaded and unloaded: the server was started without --admin"
            )
        return self._control


def _state(reason: str) -> str:
    if not reason:
        return "READY"
    return "LOADING" if reason == LOADING else "UNAVAILABLE"


def _check_repository(name: str) -> None:
    if name:
        raise InvalidInputError(
            f"repository_name: got {name!r}, expected none: there is only one repository"
        )
