"""Authorization by bearer tokens, checked before a request is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from layertap import errors
from layertap.services.caller import Caller
from layertap.services.grpc_adapter.handlers import refusing
from layertap.services.tokens import Right, Tokens

__all__ = ["Authorization", "needed_right", "refusal"]

_KEY = "authorization"
_SCHEME = "bearer"

# Orchestrators and load balancers probe without credentials, and learn nothing but SERVING or not.
_OPEN = "/grpc.health.v1.Health/"
_ADMIN = (
    "/layertap.v1.AdminService/",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
)


def needed_right(method: str) -> Right:
    """Return the right that a method needs; the method is given as ``/package.Service/Method``."""
    if method.startswith(_OPEN):
        return Right.NONE
    return Right.ADMIN if method.startswith(_ADMIN) else Right.EXTRACT


class Authorization(grpc.ServerInterceptor):  # type: ignore[misc] # gRPC has no types
    """Refuses calls whose metadata ``authorization: Bearer TOKEN`` lacks the right they need.

    The status is UNAUTHENTICATED if the call has no valid token but one could help, else
    PERMISSION_DENIED. Methods that don't exist are refused in the same way, so that a caller can't
    probe which methods exist.

    Args:
        tokens: The tokens and their rights.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Pass a call on, or refuse it."""
        details = handler_call_details
        error = refusal(self._tokens, details.method, details.invocation_metadata)
        return continuation(details) if error is None else _refusing(error)


def refusal(tokens: Tokens, method: str, metadata: Any) -> errors.LayertapError | None:
    """Return why a call is refused; None if it has the right that it needs.

    Neither text depends on the call, so neither reveals anything to an unauthenticated caller.

    Args:
        tokens: The tokens and their rights.
        method: The method, as ``/package.Service/Method``.
        metadata: The metadata of the call: pairs of key and value, or None.
    """
    needed = needed_right(method)
    if needed <= tokens.right_without:
        return None
    token = _bearer(metadata)
    right = tokens.right_of(token) if token else Right.NONE
    if needed <= right:
        return None
    if right is Right.NONE and tokens.configured:
        return errors.UnauthenticatedError(
            "a valid token is needed: metadata 'authorization: Bearer TOKEN'"
        )
    return errors.PermissionDeniedError(
        "administration needs a token of the server's admin_tokens_file"
    )


def _bearer(metadata: Any) -> str:
    """Return the token of the metadata; empty if there is none, or more than one."""
    values = [value for key, value in metadata or () if key == _KEY]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == _SCHEME else ""


def _refusing(error: errors.LayertapError) -> grpc.RpcMethodHandler:
    """Return a handler that refuses a call of any kind."""

    def refuse(caller: Caller) -> NoReturn:
        raise error

    return grpc.stream_stream_rpc_method_handler(refusing(refuse))
