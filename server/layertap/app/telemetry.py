"""The observers of a server: metrics always; the access log and traces if they are enabled."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc

from layertap.app.access_log import AccessLog
from layertap.app.config import ServerConfig
from layertap.app.metrics import Metrics
from layertap.engine import Engine
from layertap.errors import ConfigError
from layertap.services.observer import Observer, Observers

if TYPE_CHECKING:
    from layertap.app.tracing import Tracing

__all__ = ["Telemetry", "open_telemetry", "open_tracing"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The observers and interceptors of a server.

    Attributes:
        metrics: The metrics that the page shows.
        observer: Must be notified how each extraction ended.
        interceptors: Must see every call.
    """

    metrics: Metrics
    observer: Observer
    interceptors: Sequence[grpc.ServerInterceptor] = ()


def open_telemetry(engine: Engine, config: ServerConfig, closing: ExitStack) -> Telemetry:
    """Open what the configuration and the environment request; ``closing`` closes it.

    Raises:
        ConfigError: See ``open_tracing``.
    """
    metrics = Metrics(engine)
    observers: list[Observer] = [metrics]
    if AccessLog.wanted():
        observers.append(AccessLog())
    tracing = open_tracing(config.server.otel_endpoint, os.environ)
    if tracing is not None:
        closing.callback(tracing.close)
        observers.append(tracing)
    observer = observers[0] if len(observers) == 1 else Observers(*observers)
    return Telemetry(metrics, observer, (tracing.interceptor,) if tracing else ())


def _is_address(text: str) -> bool:
    try:
        address = urlsplit(text)
        return address.scheme in ("http", "https") and bool(address.hostname)
    except ValueError:  # The brackets of an IPv6 address don't match.
        return False


def open_tracing(endpoint: str, environment: Mapping[str, str]) -> Tracing | None:
    """Return the tracing to an endpoint; None if no endpoint is named.

    Args:
        endpoint: An ``http://`` or ``https://`` address; if empty, OpenTelemetry's own environment
            variables are read.
        environment: The process's environment.

    Raises:
        ConfigError: If the endpoint is malformed, the protocol is not gRPC, or traces are requested
            but the packages are not installed.
    """
    named = endpoint or next(filter(None, map(environment.get, _ENDPOINTS)), "")
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not named or disabled or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if not _is_address(named):
        raise ConfigError(
            f"otel_endpoint: got {named!r}, expected an address such as http://127.0.0.1:4317"
        )
    protocol = next(filter(None, map(environment.get, _PROTOCOLS)), "grpc")
    if not endpoint and protocol != "grpc":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: got {protocol!r}, expected 'grpc'")
    try:
        # Imported only here, because the packages are optional and slow to import.
        tracing = importlib.import_module("layertap.app.tracing")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            f"traces to {named} were requested, but OpenTelemetry is not installed; "
            f"try: pip install 'layertap[otel]'"
        ) from None
    return tracing.Tracing(tracing.otlp_provider(endpoint))  # type: ignore[no-any-return]
