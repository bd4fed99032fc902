"""Settings of traces and logs: told as they are, and changed only by the server's configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import grpc

from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb

__all__ = ["log_settings", "trace_settings"]

_log = logging.getLogger("layertap")


def trace_settings(
    request: pb.TraceSettingRequest, context: grpc.ServicerContext
) -> pb.TraceSettingResponse:
    """Tell that there are no traces of this protocol's kind; layertap's go to OpenTelemetry."""
    _refuse(request.settings.keys(), "trace")
    response = pb.TraceSettingResponse()
    response.settings["trace_level"].value.append("OFF")
    return response


def log_settings(
    request: pb.LogSettingsRequest, context: grpc.ServicerContext
) -> pb.LogSettingsResponse:
    """Tell what is logged."""
    _refuse(request.settings.keys(), "log")
    response = pb.LogSettingsResponse()
    for name, level in (
        ("log_info", logging.INFO),
        ("log_warning", logging.WARNING),
        ("log_error", logging.ERROR),
    ):
        response.settings[name].bool_param = _log.isEnabledFor(level)
    response.settings["log_verbose_level"].uint32_param = int(_log.isEnabledFor(logging.DEBUG))
    return response


def _refuse(names: Iterable[str], kind: str) -> None:
    if given := ", ".join(sorted(names)):
        raise InvalidInputError(
            f"settings: got {given}, expected none: {kind} settings are changed by the "
            f"server's configuration only"
        )
